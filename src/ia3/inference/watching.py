"""Foreign templates run within limits of time and memory: jinja's sandbox lets a loop in a loop go on for ever."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A conversation takes a template some tenths of a millisecond, and some kilobytes.
_MOST_SECONDS = 3.0
_MOST_BYTES = 1 << 28
_EVERY = 0.1
_STATM = Path("/proc/self/statm")


class _Overdue(BaseException):
    """Raised in the middle of a thread that is over its limits; no template can catch it."""


class _Watch:
    """One thread that looks at all others' work; what it looks at pays nothing for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.work: dict[int, tuple[float, int]] = {}  # of each thread, when its time is over, and the memory before
        self.stopped: set[int] = set()
        self.is_looking = False

    def begin(self, thread: int) -> None:
        with self.lock:
            self.work[thread] = (time.monotonic() + _MOST_SECONDS, _memory())
            if not self.is_looking:
                self.is_looking = True
                threading.Thread(target=self._look, name="ia3-watch", daemon=True).start()

    def end(self, thread: int) -> bool:
        """Whether the thread was told to stop."""
        with self.lock:
            self.work.pop(thread, None)
            told = thread in self.stopped
            self.stopped.discard(thread)
            return told

    def _look(self) -> None:
        while True:
            time.sleep(_EVERY)
            with self.lock:
                if not self.work:
                    self.is_looking = False
                    return
                now, memory = time.monotonic(), _memory()
                for thread, (until, before) in list(self.work.items()):
                    if now > until or memory - before > _MOST_BYTES:
                        del self.work[thread]
                        self.stopped.add(thread)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Overdue))


_watch = _Watch()


@contextmanager
def within_limits(what: str) -> Iterator[None]:
    """Stop Python code that takes longer than three seconds, or a quarter of a gigabyte.

    Args:
        what: what it is, for the error.

    Raises:
        ValueError: it was stopped.
    """
    thread = threading.get_ident()
    _watch.begin(thread)
    try:
        yield
    except _Overdue as error:
        _watch.end(thread)
        raise _overdue(what) from error
    except BaseException:  # the watch ends before whatever came goes on
        _wait_for_end(thread)
        raise
    if _wait_for_end(thread):
        raise _overdue(what)


def _wait_for_end(thread: int) -> bool:
    """Whether the work that has come to its end was told to stop; then its exception, still on its way, is caught."""
    told = _watch.end(thread)
    with suppress(_Overdue):
        while told:
            time.sleep(1e-3)
    return told


def _overdue(what: str) -> ValueError:
    return ValueError(
        f"{what} takes longer than {_MOST_SECONDS:g} s, or {_MOST_BYTES >> 20} MiB: it does no honest work. Take the "
        "base from elsewhere, or set another tokenizer.chat_template."
    )


def _memory() -> int:
    """The process's resident bytes; 0 where the system doesn't tell."""
    try:
        return int(_STATM.read_text().split()[1]) * 4096
    except (OSError, IndexError, ValueError):
        return 0
