"""What all engines do with a request before and after its work: whether it may come, and what is counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ia3.serving.found import Found
from ia3.serving.registry import Held, Registry
from ia3.serving.requests import Answer, Dropped, Overloaded, Request, Served, TooLate

_logger = logging.getLogger(__name__)

_OUTCOMES = ("answered", "failed", "too_late", "cancelled", "overloaded", "dropped")


@dataclass(frozen=True)
class Limits:
    """How requests become batches, and how many may wait.

    Args:
        batch_size: the most texts of a batch, and in slots of one size; at most the registry's capacity.
        gather_s: how long the first request of a batch waits for others, in seconds; up to five times as long for the
            last of those that are submitted together.
        most_waiting: how many requests may wait; a longer list may where nothing else does.
        deadline_s: after how many seconds nobody waits for an answer, where a request doesn't say.
        batch_invariant: whether an answer is the same to the last bit whatever else is asked at the same time. All is
            then computed in fixed shapes, filled up, which takes longer.
    """

    batch_size: int = 32
    gather_s: float = 0.003
    most_waiting: int = 1024
    deadline_s: float = 60.0
    batch_invariant: bool = False


class Intake:
    """The part of a `Server` that is the same whoever computes.

    Args:
        registry: the adapters; closed with the engine.
        limits: how many requests may wait, and for how long.
        sums: what is summed up besides outcomes and tokens.
    """

    def __init__(self, registry: Registry, limits: Limits, *sums: str) -> None:
        self.registry, self.limits = registry, limits
        self._sums = dict.fromkeys((*_OUTCOMES, "prompt_tokens", "completion_tokens", *sums), 0.0)
        # Told of all that changes of an engine; held for moments only, never while the model runs.
        self._changed = threading.Condition()
        self._is_open = True
        self._kept = 0  # places of lists whose requests are still to come
        self._submits = threading.local()  # the list that a thread submits

    # What an engine says of itself

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        raise NotImplementedError

    def _queued(self) -> int:
        """How many wait; the lock is held."""
        raise NotImplementedError

    def _running(self) -> int:
        """How many are being answered; the lock is held."""
        raise NotImplementedError

    def _seconds_each(self) -> float:
        """How long an answer takes at the rate of the last ones; the lock is held."""
        raise NotImplementedError

    @contextmanager
    def together(self, count: int) -> Iterator[None]:
        """See `Server.together`."""
        with self._changed:
            self._expect_room(count)
            self._kept += count
        self._submits.left = count
        try:
            yield
        finally:
            with self._changed:
                self._kept -= self._submits.left
            self._submits.left = 0

    # What is served

    def models(self) -> list[Served]:
        """All that can be asked, the base first."""
        return self.registry.models()

    def find(self, name: str) -> Served | None:
        """See `Registry.find`."""
        return self.registry.find(name)

    def load(self, name: str, path: str) -> Served:
        """See `Registry.load`."""
        return self.registry.load(name, path)

    def unload(self, name: str) -> None:
        """See `Registry.unload`."""
        self.registry.unload(name)

    def alias(self, alias: str, name: str) -> Served:
        """See `Registry.alias`."""
        return self.registry.alias(alias, name)

    def stats(self) -> dict[str, float]:
        """Figures by name; see `Server.stats`."""
        with self._changed:
            sums = {f"requests_{name}" if name in _OUTCOMES else name: value for name, value in self._sums.items()}
            now = {"queued": float(self._queued()), "running": float(self._running())}
        return {**now, **self.registry.stats(), **sums}

    # Who comes

    def _hold(self, request: Request) -> tuple[Held, float, float]:
        """The version that a request is for, which is held from now on; when it came, and its deadline.

        Raises:
            ServingError: too many wait, the deadline went by, or nothing has that name.
        """
        now = time.monotonic()
        if not self._has_place():
            self._expect_room()
        deadline = now + self.limits.deadline_s if request.deadline is None else request.deadline
        if deadline <= now:
            self._add(too_late=1)
            raise too_late()
        return self.registry.hold(request.model), now, deadline

    def _has_place(self) -> bool:
        """Whether this thread's next request is one of a list, for all of which places are kept."""
        return getattr(self._submits, "left", 0) > 0

    def _take_place(self) -> None:
        """For a request that waits from now on; the lock is held."""
        if self._has_place():
            self._submits.left -= 1
            self._kept -= 1
            self._expect_open()
        else:
            self._expect_room()

    def _expect_open(self) -> None:
        if not self.ready:
            raise stopped()

    def _expect_room(self, count: int = 1) -> None:
        """For so many more requests.

        Raises:
            ServingError: there is none.
        """
        with self._changed:
            self._expect_open()
            queued, most = self._queued() + self._kept, self.limits.most_waiting
            # A longer list would never find so many places, and may wait where nobody else does.
            if queued + count <= most or (not queued and count > most):
                return
            self._sums["overloaded"] += count
            # Who waited longer would not be answered.
            seconds = min(queued * self._seconds_each(), self.limits.deadline_s)
        more = "no more" if count == 1 else f"not {count:,} more, at most {most:,} together,"
        raise Overloaded(f"{queued:,} requests wait, and {more} may: try again later.", seconds)

    # Who goes

    def _pass_on(self, request: Request, piece: str) -> bool:
        """Tell a request's listener a piece of the answer; whether it took it."""
        try:
            if piece and request.on_token is not None:
                request.on_token(piece)
        except Exception:  # the client's side; its answer is whole all the same
            _logger.exception("A listener to an answer's tokens failed.")
            return False
        return True

    def _answer_with(
        self, future: Future[Answer], held: Held, found: Found, *, read: int, queued_s: float, ran_s: float
    ) -> None:
        """Answer a request, which can't be cancelled any more, after having read so many tokens."""
        if future.done():  # when the server stopped
            return
        self._add(answered=1, prompt_tokens=read, completion_tokens=found.tokens)
        label = found.text if found.text in held.version.task.labels else None
        said = (found.text, label, found.probabilities, held.name, held.version.digest)
        with suppress(InvalidStateError):  # this very moment
            future.set_result(Answer(*said, read, found.tokens, found.finish_reason, queued_s, ran_s, found.vector))

    def _fail(self, future: Future[Answer], error: Exception, outcome: str) -> None:
        if not (future.running() or runs_from_now(future)):
            return
        self._add(**{outcome: 1})
        with suppress(InvalidStateError):  # it was answered this very moment
            future.set_exception(error)

    def _count_cancelled(self, deadline: float) -> None:
        """A client has gone, or nobody waits any more since the time is over."""
        self._add(**{"too_late" if deadline <= time.monotonic() else "cancelled": 1})

    def _add(self, **more: float) -> None:
        with self._changed:
            for name, value in more.items():
                self._sums[name] += value


def runs_from_now(future: Future[Answer]) -> bool:
    """Whether a request waited to be answered; it can't be cancelled from now on."""
    try:
        return not future.done() and future.set_running_or_notify_cancel()
    except (InvalidStateError, RuntimeError):  # another thread was first
        return False


def too_late() -> TooLate:
    """For who isn't answered in time."""
    return TooLate("The deadline went by before the answer: allow more time, or send less at once.")


def stopped() -> Dropped:
    """For who isn't answered any more."""
    return Dropped("The server stops and takes no more requests: try another, or later.")
