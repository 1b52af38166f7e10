"""The engine: requests wait, one thread that owns the model gathers them into batches, each gets its own answer."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ia3.serving.batches import Batches, Found
from ia3.serving.reading import Prompt, Reader
from ia3.serving.registry import Held, Registry
from ia3.serving.requests import Answer, Dropped, NotServed, Overloaded, Request, Served, TooLate
from ia3.tasks.task import Task

_logger = logging.getLogger(__name__)

# Batches by which it is said how fast requests are answered.
_RECENT = 32


@dataclass(frozen=True)
class Limits:
    """How requests become batches, and how many may wait.

    Args:
        batch_size: the most requests of a batch, at most the registry's capacity.
        gather_s: how long the first request of a batch waits for others, in seconds.
        most_waiting: how many requests may wait.
        deadline_s: after how many seconds nobody waits for an answer, where a request doesn't say.
    """

    batch_size: int = 32
    gather_s: float = 0.003
    most_waiting: int = 1024
    deadline_s: float = 60.0


@dataclass(eq=False)
class _Work:
    """A request on its way."""

    request: Request
    held: Held
    prompt: Prompt
    arrived: float
    deadline: float
    future: Future[Answer] = field(default_factory=Future)


class Engine:
    """Answers requests for the adapters of a registry, in batches that mix them; the `Server` that HTTP sees.

    What waits is taken by its deadline, the nearest first, together with requests of the same task and about the same
    length, under whichever adapters.

    Args:
        model: the base model. From now on this engine's thread alone runs it.
        tokenizer: its tokenizer.
        registry: the adapters, in the model's table; closed with the engine.
        limits: how requests become batches.

    Raises:
        ValueError: batches that are larger than the registry's capacity, or without anything.
    """

    def __init__(self, model: Any, tokenizer: Any, registry: Registry, limits: Limits = Limits()) -> None:
        if not 1 <= limits.batch_size <= registry.table.capacity:
            raise ValueError(
                f"batch_size is {limits.batch_size}: expected a number from 1 to the registry's capacity of "
                f"{registry.table.capacity}, since each request of a batch may have another adapter."
            )
        self.registry, self.limits = registry, limits
        self._read = Reader(model, tokenizer)
        self._answer = Batches(model, tokenizer, limits.batch_size)
        self._waiting: dict[Task, list[_Work]] = {}
        self._running: Sequence[_Work] = ()
        self._sums = dict.fromkeys((*_OUTCOMES, *_SUMS), 0.0)
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        # Told of all that changes of these; held for moments only, never while the model runs.
        self._changed = threading.Condition()
        self._is_open, self._ends = True, False
        self._thread = threading.Thread(target=self._work, name="ia3-engine", daemon=True)
        self._thread.start()

    # What HTTP sees

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_open and self._thread.is_alive()

    def submit(self, request: Request) -> Future[Answer]:
        """Take a request in; see `Server.submit`."""
        now = time.monotonic()
        self._expect_room()
        deadline = now + self.limits.deadline_s if request.deadline is None else request.deadline
        if deadline <= now:
            self._add(too_late=1)
            raise _too_late()
        held = self.registry.hold(request.model)
        try:
            work = _Work(request, held, self._read(held.version, request), now, deadline)
            with self._changed:
                self._expect_room()
                self._waiting.setdefault(work.prompt.task, []).append(work)
                self._changed.notify_all()
        except BaseException:
            self.registry.release(held.version)
            raise
        work.future.add_done_callback(lambda _: self._leave(work))
        return work.future

    def models(self) -> list[Served]:
        """All that can be asked, the base first."""
        return self.registry.models()

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
        """Figures by name, since the start: requests by outcome, tokens, seconds; and what waits and runs now."""
        with self._changed:
            outcomes = {f"requests_{name}": self._sums[name] for name in _OUTCOMES}
            sums = {name: self._sums[name] for name in _SUMS}
            now = {"queued": float(self._queued()), "running": float(len(self._running))}
        table = self.registry.table
        adapters = {"adapters": len(self.registry), "versions": len(table), "resident": table.resident}
        return {**now, **adapters, **outcomes, **sums}

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until all are answered; whether that was within the time."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting and not self._running, timeout_s)

    def close(self) -> None:
        """Stop: what waits is `Dropped`, what runs is answered."""
        with self._changed:
            self._is_open, self._ends = False, True
            self._changed.notify_all()
        self._thread.join()
        self.registry.close()

    # What waits

    def _expect_room(self) -> None:
        with self._changed:
            if not self.ready:
                raise _stopped()
            queued = self._queued()
            if queued < self.limits.most_waiting:
                return
            self._sums["overloaded"] += 1
            count, seconds = (sum(each) for each in zip(*self._recent, strict=True)) if self._recent else (1, 1.0)
        raise Overloaded(f"{queued:,} requests wait, and no more may: try again later.", queued * seconds / count)

    def _queued(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _leave(self, work: _Work) -> None:
        """A request is done, whichever way: it waits no more, and its version may go."""
        with self._changed:
            if work.future.cancelled():
                self._sums["cancelled"] += 1
            company = self._waiting.get(work.prompt.task, [])
            if work in company:
                self._take([work])
        self.registry.release(work.held.version)

    def _take(self, some: Sequence[_Work]) -> None:
        """Let requests of one task wait no more."""
        task = some[0].prompt.task
        taken = set(some)
        rest = [work for work in self._waiting[task] if work not in taken]
        if rest:
            self._waiting[task] = rest
        else:
            del self._waiting[task]
        self._changed.notify_all()

    def _take_late(self, now: float) -> list[_Work]:
        """The requests whose deadline went by."""
        late = []
        for company in [*self._waiting.values()]:
            some = [work for work in company if work.deadline <= now]
            if some:
                self._take(some)
            late += some
        return late

    # The thread

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._run(batch)
        finally:  # told to stop, or by an error in this file: nobody is left to wait for ever
            with self._changed:
                self._is_open = False
                left = [*self._running, *self._take_late(math.inf)]
                self._running = ()
                self._changed.notify_all()
            for work in left:
                self._fail(work, _stopped(), "dropped")

    def _next(self) -> list[_Work] | None:
        """The next batch, which runs from now on; None where there will be none."""
        while True:
            with self._changed:
                self._running = ()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if self._ends:
                    return None
                late = self._take_late(time.monotonic())
                self._running = late or self._gather()
            for work in late:
                self._fail(work, _too_late(), "too_late")
            if not late and (batch := [work for work in self._running if work.future.set_running_or_notify_cancel()]):
                return batch

    def _gather(self) -> list[_Work]:
        """Wait a moment for company of the most urgent request, and take them."""
        while self._waiting and not self._ends:
            urgent = min((work for company in self._waiting.values() for work in company), key=_deadline)
            company = self._waiting[urgent.prompt.task]
            rest = urgent.arrived + self.limits.gather_s - time.monotonic()
            if rest > 0 and len(company) < self.limits.batch_size and self._is_open:
                self._changed.wait(rest)
                continue
            length = len(urgent.prompt.tokens)
            nearest = sorted(company, key=lambda work: (work is not urgent, abs(len(work.prompt.tokens) - length)))
            batch = nearest[: self.limits.batch_size]
            self._take(batch)
            return batch
        return []

    def _run(self, batch: Sequence[_Work]) -> None:
        started = time.monotonic()
        try:
            found = self._answer([work.prompt for work in batch], [work.held.version.row for work in batch])
        except Exception as error:  # whatever it is, it is that of these requests alone
            _logger.exception("A batch of %d failed.", len(batch))
            failure = error
        else:
            self._give_all(batch, found, started)
            return
        self._retry(batch, failure)

    def _give_all(self, batch: Sequence[_Work], found: Sequence[Found], started: float) -> None:
        ran_s = time.monotonic() - started
        with self._changed:
            self._recent.append((len(batch), ran_s))
        self._add(batches=1, ran_s=ran_s)
        for work, each in zip(batch, found, strict=True):
            self._give(work, each, started - work.arrived, ran_s)

    def _retry(self, batch: Sequence[_Work], error: Exception) -> None:
        """Each request of a batch that failed is tried alone, so that a bad one doesn't take its neighbours."""
        if len(batch) == 1:
            failure = NotServed(str(error)) if isinstance(error, ValueError) else error
            self._fail(batch[0], failure, "failed")
            return
        for work in batch:
            if work.deadline <= time.monotonic():
                self._fail(work, _too_late(), "too_late")
            else:
                self._run([work])

    def _give(self, work: _Work, found: Found, queued_s: float, ran_s: float) -> None:
        name, version = work.held
        label = found.text if found.text in version.task.labels else None
        read, written = len(work.prompt.tokens), found.tokens
        if work.request.on_token is not None:
            try:
                work.request.on_token(found.text)
            except Exception:  # the client's side; its answer is whole all the same
                _logger.exception("A listener to an answer's tokens failed.")
        self._add(answered=1, prompt_tokens=read, completion_tokens=written, queued_s=queued_s)
        said = (found.text, label, found.probabilities, name, version.digest)
        work.future.set_result(Answer(*said, read, written, found.finish_reason, queued_s, ran_s))

    def _fail(self, work: _Work, error: Exception, outcome: str) -> None:
        if work.future.done() or not (work.future.running() or work.future.set_running_or_notify_cancel()):
            return
        self._add(**{outcome: 1})
        work.future.set_exception(error)

    def _add(self, **more: float) -> None:
        with self._changed:
            for name, value in more.items():
                self._sums[name] += value


_OUTCOMES = ("answered", "failed", "too_late", "cancelled", "overloaded", "dropped")
_SUMS = ("batches", "queued_s", "ran_s", "prompt_tokens", "completion_tokens")


def _deadline(work: _Work) -> float:
    return work.deadline


def _too_late() -> TooLate:
    return TooLate("The deadline went by before the answer: allow more time, or send less at once.")


def _stopped() -> Dropped:
    return Dropped("The server stops and takes no more requests: try another, or later.")
