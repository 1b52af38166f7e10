"""How many answers each adapter gave in the last minutes: for the page, which may name adapters as no metric does."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

SECONDS = 300
"""How far back is counted."""
_STEP = 10


class Recent:
    """Counts by adapter in steps of ten seconds, of which the old ones go. Any thread may call it."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, Counter[str]]] = deque()
        self._lock = threading.Lock()

    def add(self, adapter: str) -> None:
        """An adapter has answered."""
        with self._lock:
            step = self._now()
            if not self._steps or self._steps[-1][0] != step:
                self._steps.append((step, Counter()))
            self._steps[-1][1][adapter] += 1

    def counts(self) -> Counter[str]:
        """The answers of each adapter that gave any."""
        with self._lock:
            self._now()
            return sum((counter for _, counter in self._steps), Counter())

    def _now(self) -> int:
        """The number of this step; those that are too old are forgotten."""
        step = int(time.monotonic() // _STEP)
        while self._steps and self._steps[0][0] <= step - SECONDS // _STEP:
            self._steps.popleft()
        return step
