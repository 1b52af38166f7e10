"""A folder is one process's at a time, and free as soon as that is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ia3.runs import lock
from ia3.runs.lock import LOCK_NAME, locked

HOLD = """
import sys, time
from ia3.runs.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_it_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(
            BlockingIOError, match=rf"{tmp_path} is in use by the process {os.getpid()} on .*wait until"
        ):
            locked(tmp_path).__enter__()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_it_goes_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), locked(tmp_path):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"the process {holder.pid} on"):
            locked(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_NAME).exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def _race(folder: Path, number: int, turns: Any, overlaps: Any) -> None:
    """Take the lock until each has had its turns; what stands in the folder tells whether somebody else is in, too."""
    found = 0
    while min(turns) < 50:
        try:
            with locked(folder):
                turns[number] += 1
                try:
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                    time.sleep(0)  # lets the others try
                    (folder / "inside").unlink()
                except FileExistsError:
                    found += 1
        except BlockingIOError:
            pass
    overlaps.put(found)


def test_of_those_that_race_one_goes_on(tmp_path: Path) -> None:
    """Its name goes at the end of each turn, and comes again with the next."""
    context = multiprocessing.get_context("spawn")
    overlaps, turns = context.Queue(), context.RawArray("i", 3)
    racers = [context.Process(target=_race, args=(tmp_path, each, turns, overlaps), daemon=True) for each in range(3)]
    for racer in racers:
        racer.start()
    assert [overlaps.get(timeout=300) for _ in racers] == [0, 0, 0]
    for racer in racers:
        racer.join()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_went_in_between_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former holder takes it away after it was opened and before it is locked."""
    flock, calls = lock.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(BlockingIOError):
            locked(tmp_path).__enter__()


def test_threads_are_kept_apart_too(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with locked(tmp_path):
                pass
        except BlockingIOError as error:
            caught.append(error)

    with locked(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_where_there_are_no_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "is not locked (No locks available)" in caplog.text
    monkeypatch.setattr(lock, "sys", SimpleNamespace(platform="win32"))
    with locked(tmp_path):
        assert "Windows has no flock" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_who_may_not_write_is_told_the_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/\.lock"):
        locked(tmp_path / "none").__enter__()
