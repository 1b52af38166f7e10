"""A folder that one process at a time works in: a lock that the system lets go of however its holder ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ia3.sites import logger

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"
# What a file system says that has no locks.
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_LONGEST_HOLDER = 500


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Work in a folder alone: no other process, and no other thread of this one, is let in before the end.

    The lock is on a file in the folder that goes with it. The system lets go of it when its holder is killed, so that
    none is left behind; the file of a killed holder is taken over. Where there are no locks, on Windows and on some
    network file systems, a warning says so and nothing is kept apart.

    Args:
        folder: an existing folder.

    Raises:
        BlockingIOError: somebody else works in it.
        OSError: its lock can't be written.
    """
    path = Path(folder) / LOCK_NAME
    handle = _take(path)
    try:
        yield
    finally:
        if handle is not None:
            # Its name goes while it is still held: whoever waits at this file sees that it has none any more.
            path.unlink(missing_ok=True)
            fcntl.flock(handle, fcntl.LOCK_UN)  # also of a child that was forked in between
            os.close(handle)


def _take(path: Path) -> int | None:
    """The locked file's descriptor; None where there are no locks."""
    if sys.platform == "win32":
        logger.warning("%s is not locked, since Windows has no flock: let one process at a time work in it.", path)
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, handle):
                _sign(handle)
                return handle
            os.close(handle)  # the former holder took its name away between the two calls
        except BlockingIOError:
            holder = _describe(os.pread(handle, _LONGEST_HOLDER, 0))
            os.close(handle)
            raise BlockingIOError(
                f"{path.parent} is in use by {holder}: wait until it has ended, or stop it, or name another folder."
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _WITHOUT_LOCKS:
                raise
            path.unlink(missing_ok=True)
            logger.warning("%s is not locked (%s): let one process at a time work in it.", path.parent, error.strerror)
            return None


def _sign(handle: int) -> None:
    """Write down who holds the lock, for the others' errors; on a full disk it is held unsigned."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())


def _names(path: Path, handle: int) -> bool:
    """Whether the path still is the open file's."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _describe(written: bytes) -> str:
    """The holder, as its lock says; it may not have written yet."""
    try:
        content = json.loads(written)
        return f"the process {int(content['pid'])} on {str(content['host'])[:100]}"
    except (KeyError, TypeError, ValueError):
        return "another process"
