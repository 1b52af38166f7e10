"""torch's one generator of random numbers, for which trainings in several threads wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_LOCK = threading.RLock()


@contextmanager
def generator_alone(console: Console) -> Iterator[None]:
    """Draw random numbers, or load a model, while no other training of this process does.

    Dropout and new heads are drawn from torch's default generator, of which a process has one a device: two trainings
    that draw at once would change each other's numbers. Processes of their own have one each.

    Args:
        console: where it is said that it waits.
    """
    if not _LOCK.acquire(blocking=False):
        console.print(
            "Waiting for another training of this process: both draw from torch's one generator. Without dropout, or "
            "in processes of their own, they run at once.",
            style="yellow",
        )
        _LOCK.acquire()
    try:
        yield
    finally:
        _LOCK.release()
