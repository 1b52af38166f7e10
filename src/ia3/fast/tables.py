"""Tables that are computed once: those that were read last, within a bound, and those that a recorded graph reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from torch import Tensor

# What tables take that no graph reads; a bias of 16 heads and 512 tokens in fp32 takes a quarter of it.
_MOST_BYTES = 1 << 26


class _Recording(threading.local):
    """The tables that this thread has read for a graph, by their ids; None where it records none."""

    read: dict[int, Tensor] | None = None


_recording = _Recording()


@contextmanager
def read_by_graph() -> Iterator[dict[int, Tensor]]:
    """The tables that this thread reads in here, which a graph must keep: it reads them where they are in memory."""
    before, _recording.read = _recording.read, {}
    try:
        yield _recording.read
    finally:
        _recording.read = before


class Tables:
    """Tables by what they are of.

    Attributes:
        alive: all that somebody keeps, a graph for example.
        recent: those kept here, those that were read last at the end.
        size: how many bytes these have.
    """

    def __init__(self) -> None:
        self.alive: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        self.recent: dict[Hashable, Tensor] = {}
        self.size = 0

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The table of a key, made where there is none."""
        found = self.alive.get(key)
        if found is None:
            found = self.alive[key] = make()
        # One that is made while a graph is recorded has no numbers before the first replay, if that ever comes.
        if _recording.read is not None:
            _recording.read[id(found)] = found
        else:
            self._keep(key, found)
        return found

    def _keep(self, key: Hashable, table: Tensor) -> None:
        former = self.recent.pop(key, None)
        self.size += table.nbytes - (0 if former is None else former.nbytes)
        self.recent[key] = table
        while self.size > _MOST_BYTES and len(self.recent) > 1:
            self.size -= self.recent.pop(next(iter(self.recent))).nbytes
