"""Processes that are killed, or whose disk is full, at the n-th thing that they do to files.

A child is forked, so the caller must have imported what the work needs (a child then takes a second), and must not have
run a backward itself. Its file events are counted: opening for writing, renaming, making, removing, flushing to disk;
those in one folder, at any depth. Everything before the n-th has happened then, and nothing after.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Work = Callable[[], object] | Sequence[str | Path | int | float]
"""A function, or the arguments of `ia3`."""

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_MAKING_ROOM = {"os.remove", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FAILED = 70


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Args:
        killed: whether it was killed at its n-th event; otherwise it had fewer and came to an end of its own.
        code: the exit status; 0 where the function returned.
        output: what it wrote, and the traceback of an exception.
        events: how many file events there were, where it was not killed.
    """

    killed: bool
    code: int
    output: str
    events: int


def killed_at(work: Work, number: int, *, within: Path) -> Ended:
    """Do work in a child that SIGKILL ends before its `number`-th file event within a folder, counted from 1."""
    return _forked(work, number, within, lambda path: os.kill(os.getpid(), signal.SIGKILL))


def refused_at(work: Work, number: int, *, within: Path, error: int = errno.ENOSPC) -> Ended:
    """Do work in a child whose `number`-th file event, and every later one that writes, fails, as of a full disk."""

    def refuse(path: str | None) -> None:
        raise OSError(error, os.strerror(error), path)

    return _forked(work, number, within, refuse)


def interrupted_at(work: Work, number: int, *, within: Path) -> Ended:
    """Do work in a child that gets a SIGTERM at its `number`-th file event, as at a Ctrl-C."""
    return _forked(work, number, within, lambda path: signal.raise_signal(signal.SIGTERM), once=True)


def done(work: Work, *, within: Path) -> Ended:
    """Do work in a child to its end."""
    return _forked(work, 0, within, lambda path: None)


def _forked(
    work: Work, number: int, within: Path, strike: Callable[[str | None], None], *, once: bool = False
) -> Ended:
    sys.stdout.flush()
    sys.stderr.flush()
    log, counted = within.with_name(f"{within.name}.log"), within.with_name(f"{within.name}.events")
    child = os.fork()
    if not child:
        code = _FAILED
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            seen = _count_events(number, within.resolve(), strike, once=once)
            code = _do(work)
            counted.write_text(str(len(seen)), encoding="utf-8")
        except BaseException:  # a child ends by its code alone
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    output = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    events = int(counted.read_text(encoding="utf-8")) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return Ended(killed, os.waitstatus_to_exitcode(status), output, events)


def _do(work: Work) -> int:
    """The exit status."""
    if callable(work):
        work()
        return 0
    from ia3.cli.main import app

    try:
        return int(app([str(each) for each in work], standalone_mode=False) or 0)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException as ended:  # typer's class differs by version
        if hasattr(ended, "exit_code"):  # typer's
            return int(ended.exit_code)
        raise


def _count_events(number: int, within: Path, strike: Callable[[str | None], None], *, once: bool) -> list[str]:
    """Strike at the given event of this process; a full disk stays full, so later ones are struck, too, but for `once`.

    Returns:
        The events, which grow.
    """
    seen: list[str] = []

    def count(event: str, path: str | None) -> None:
        seen.append(event)
        later = len(seen) > number and not once and event not in _MAKING_ROOM
        if number and (len(seen) == number or later):
            strike(path)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & _WRITING:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        directory = arguments[-1] if event in _MAKING_ROOM else -1
        if _lies_in(path, directory, within):
            count(event, None if isinstance(path, int) else os.fsdecode(path))

    sys.addaudithook(watch)
    flush = os.fsync

    def fsync(handle: int) -> None:
        if _lies_in(handle, -1, within):
            count("fsync", None)
        flush(handle)

    os.fsync = fsync  # it has no audit event
    return seen


def _lies_in(path: Any, directory: int, within: Path) -> bool:
    where = Path(f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(path))
    if directory != -1 and not where.is_absolute():
        where = Path(f"/proc/self/fd/{directory}").readlink() / where
    parent = where.resolve() if str(where).startswith("/proc/") else where.absolute().parent.resolve() / where.name
    return parent == within or within in parent.parents
