"""The engine: requests wait, and one thread that owns the model answers them.

Labels are ranked, and a causal model writes, in whole batches; an encoder-decoder writes side by side in slots, which
others may join at any step. A batch and the steps take turns, each for as long as the other took.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from ia3.mixing import gather_flat
from ia3.serving.batches import Batches
from ia3.serving.found import Found
from ia3.serving.intake import Intake, Limits, runs_from_now, stopped, too_late
from ia3.serving.queue import List, Queue, Work
from ia3.serving.reading import Reader
from ia3.serving.registry import Registry
from ia3.serving.requests import Answer, NotServed, Request
from ia3.serving.writing import Place, Size, Writing

_logger = logging.getLogger(__name__)

# Batches and steps by which it is said how fast requests are answered.
_RECENT = 256
# For the last request of a list is waited so many times as long as for anybody else.
_FOR_LISTS = 5


class Engine(Intake):
    """Answers requests for the adapters of a registry, in batches that mix them; the `Server` that HTTP sees.

    What waits is taken by its deadline, the nearest first, together with others that are answered the same way, those
    of about the same length in a batch, under whichever adapters.

    Args:
        model: the base model. From now on this engine's thread alone runs it.
        tokenizer: its tokenizer.
        registry: the adapters, in the model's table; closed with the engine.
        limits: how requests become batches.

    Raises:
        ValueError: batches that are larger than the registry's capacity, or without anything.
    """

    def __init__(self, model: Any, tokenizer: Any, registry: Registry, limits: Limits) -> None:
        if not 1 <= limits.batch_size <= registry.table.capacity:
            raise ValueError(
                f"batch_size is {limits.batch_size}: expected a number from 1 to the registry's capacity of "
                f"{registry.table.capacity}, since each request of a batch may have another adapter."
            )
        super().__init__(registry, limits, "batches", "ran_s")
        self._device = model.device
        self._read = Reader(model, tokenizer)
        self._answer = Batches(model, tokenizer, limits.batch_size, invariant=limits.batch_invariant)
        self._writing = Writing(model, tokenizer, limits.batch_size, invariant=limits.batch_invariant)
        self._waiting = Queue()
        self._batch: Sequence[Work] = ()
        self._written: dict[Place, Work] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="ia3-engine", daemon=True)
        self._thread.start()

    # What HTTP sees

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_open and self._thread.is_alive()

    def submit(self, request: Request) -> Future[Answer]:
        """Take a request in; see `Server.submit`."""
        held, now, deadline = self._hold(request)
        try:
            prompt = self._read(held.version, request)
            told = None if request.on_token is None else ""
            reads = None if held.version.encodes or not prompt.task.ranks else tuple(prompt.tokens)
            listed: List | None = getattr(self._submits, "list", None)
            work = Work(request, held, prompt, now, deadline, self._writing.place_of(prompt), reads, listed, told)
            with self._changed:
                self._take_place()
                self._wait(work)
        except BaseException:  # a version that is held for nobody would stay for ever
            self.registry.release(held.version)
            raise
        work.future.add_done_callback(lambda _: self._leave(work))
        return work.future

    @contextmanager
    def together(self, count: int) -> Iterator[None]:
        """See `Server.together`."""
        opened = List()
        try:
            with super().together(count):
                self._submits.list = opened
                yield
        finally:
            self._submits.list = None
            with self._changed:
                opened.is_open = False
                self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """See `Server.drain`."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: not self._waiting and not self._running(), timeout_s)
            left = [*self._batch, *self._written.values(), *self._waiting.take_late(math.inf)]
        for work in left:
            self._fail(work.future, stopped(), "dropped")
        return in_time

    def close(self, timeout_s: float | None = None) -> None:
        """See `Server.close`; the model and its adapters are the thread's while that runs."""
        with self._changed:
            self._is_open, self._ends = False, True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.registry.close()

    # What waits

    def _queued(self) -> int:
        return len(self._waiting)

    def _running(self) -> int:
        return len(self._batch) + len(self._written)

    def _seconds_each(self) -> float:
        count, seconds = (sum(each) for each in zip(*self._recent, strict=True)) if self._recent else (1, 1.0)
        return seconds / max(count, 1)

    def _wait(self, work: Work) -> None:
        with self._changed:
            self._waiting.add(work)
            self._changed.notify_all()

    def _leave(self, work: Work) -> None:
        """A request is done, whichever way: it waits no more, and its version may go."""
        with self._changed:
            if work.future.cancelled():
                self._count_cancelled(work.deadline)
            self._waiting.remove(work)
            self._changed.notify_all()
        self.registry.release(work.held.version)

    # The thread

    def _work(self) -> None:
        try:
            while (taken := self._next()) is not None:
                # Beginning to write is no turn of others.
                self._write_on(self._begin(taken) if taken else 0.0)
        except BaseException:  # the end of the thread, of which nobody else would hear
            _logger.critical("The engine has failed, and answers nothing more.", exc_info=True)
        finally:  # told to stop, or by an error in this file: nobody is left to wait for ever
            with self._changed:
                self._is_open = False
                left = [*self._batch, *self._written.values(), *self._waiting.take_late(math.inf)]
                self._batch, self._written = (), {}
                self._changed.notify_all()
            for work in left:
                self._fail(work.future, stopped(), "dropped")

    def _next(self) -> list[Work] | None:
        """Who is taken up next, nobody where what is written goes on meanwhile; None where there will be nobody."""
        with self._changed:
            self._batch = ()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._written or self._ends)
            if self._ends and not self._written:
                return None
            late = self._waiting.take_late(time.monotonic())
            self._batch = late or self._gather()
        for work in late:
            self._fail(work.future, too_late(), "too_late")
        return [] if late else list(self._batch)

    def _gather(self) -> list[Work]:
        """Wait a moment for company of the most urgent request, and take them; nobody where something is written."""
        while not self._ends and (urgent := self._waiting.most_urgent(self._room)) is not None:
            most = self._room(urgent.company)
            more_come = urgent.listed is not None and urgent.listed.is_open
            rest = urgent.arrived + self.limits.gather_s * (_FOR_LISTS if more_come else 1) - time.monotonic()
            # Of those that read one text a batch may have more.
            is_full = self._waiting.beside(urgent) >= most and not (more_come and urgent.reads is not None)
            if rest > 0 and not is_full and self._is_open:
                if self._written:
                    return []
                self._changed.wait(rest)
                continue
            # Labels of one text under adapters that read it alike cost little more than those of one.
            all_in_all = most if isinstance(urgent.company, Size) else self.registry.table.capacity
            return self._waiting.take_nearest(urgent, most, all_in_all)
        return []

    def _room(self, company: Hashable) -> int:
        return self._writing.room(company) if isinstance(company, Size) else self.limits.batch_size

    def _begin(self, taken: Sequence[Work]) -> float:
        """Answer a batch, or begin to write in slots; how many seconds the batch took."""
        started = time.monotonic()
        if isinstance(taken[0].company, Size):
            self._admit(taken[0].company, [work for work in taken if not work.future.done()])
            return 0.0
        if batch := _running_from_now(taken):
            self._run(batch)
        return time.monotonic() - started

    def _expect_device(self, error: Exception) -> None:
        """Try nothing again where nothing is computed any more, as after some errors of CUDA: the thread ends.

        Raises:
            Exception: the error, if so.
        """
        if not _computes(self._device):
            raise error

    # Whole batches

    def _run(self, batch: Sequence[Work]) -> None:
        started = time.monotonic()
        for work in batch:
            work.started = work.started or started
        try:
            found = self._answer([work.prompt for work in batch], [work.held.version.row for work in batch])
        except Exception as error:  # whatever it is, it is that of these requests alone
            _logger.exception("A batch of %d failed.", len(batch))
            failure = error
        else:
            seconds = time.monotonic() - started
            self._note(len(batch), seconds)
            self._add(batches=1, ran_s=seconds)
            for work, each in zip(batch, found, strict=True):
                self._give(work, each)
            return
        self._retry(batch, failure)

    def _retry(self, batch: Sequence[Work], error: Exception) -> None:
        """Each request of a batch that failed is tried alone, so that a bad one doesn't take its neighbours."""
        self._expect_device(error)
        if len(batch) == 1:
            failure = NotServed(str(error)) if isinstance(error, ValueError) else error
            self._fail(batch[0].future, failure, "failed")
            return
        self._run_alone(batch)

    def _run_alone(self, works: Sequence[Work]) -> None:
        for work in works:
            if work.deadline <= time.monotonic():
                self._fail(work.future, too_late(), "too_late")
            elif not work.future.done():
                self._run([work])

    # Slots

    def _admit(self, size: Size, works: Sequence[Work]) -> None:
        started, places = time.monotonic(), list[Place | None]()
        try:
            if not self._writing.make_ready(size):
                for work in works:
                    self._wait(work)
                return
            works = [work for work in works if not work.future.done()]  # since then: slots may take long to make
            if not works:
                return
            try:
                vectors = gather_flat(self._writing.model, [work.held.version.row for work in works])
            except ValueError:  # a client went this very moment, and its version with it
                self._run_alone(_running_from_now(works))
                return
            places = self._writing.admit(size, [work.prompt for work in works], vectors)
        except Exception as error:  # whatever it is, each of these is tried alone
            self._leave_slots(size, works, error)
            return
        self._note(0, time.monotonic() - started)
        with self._changed:
            self._batch = ()
            for work, place in zip(works, places, strict=True):
                work.started = started
                if place is not None:
                    self._written[place] = work
                else:  # slots can't have its vectors
                    work.company = work.prompt.task
                    self._wait(work)

    def _write_on(self, seconds: float) -> None:
        """Go on with what is written for so long, at least by a token."""
        started = time.monotonic()
        while self._written:
            self._stop_writing()
            for size in self._writing.sizes:
                self._step(size)
            if time.monotonic() - started >= seconds:
                return

    def _step(self, size: Size) -> None:
        started = time.monotonic()
        try:
            ended = self._writing.step(size)
            pieces = [
                (work, self._writing.more(place))
                for place, work in self._written.items()
                if place.size == size and work.told is not None
            ]
        except Exception as error:  # whatever it is, each of these is tried alone
            self._leave_slots(size, (), error)
            return
        self._note(len(ended), time.monotonic() - started)
        for work, piece in pieces:
            self._tell(work, piece)
        for place, found in ended:
            work = self._written[place]
            if _running_from_now([work]):
                self._give(work, found)
            self._forget([place])

    def _stop_writing(self) -> None:
        """For those who are gone, or too late."""
        now = time.monotonic()
        over = [place for place, work in self._written.items() if work.future.done() or work.deadline <= now]
        if over:
            try:
                self._writing.stop(over)
            except Exception as error:  # whatever it is, each of these is tried alone
                for size in {place.size for place in over}:
                    self._leave_slots(size, (), error)
                return
            for place in over:
                self._fail(self._written[place].future, too_late(), "too_late")
            self._forget(over)

    def _leave_slots(self, size: Size, coming: Sequence[Work], error: Exception) -> None:
        """Slots of a size failed: who is in them, or would be, is answered alone."""
        self._expect_device(error)
        _logger.error("Slots of %d tokens failed.", size.source, exc_info=error)
        self._writing.forget(size)
        places = [place for place in self._written if place.size == size]
        works = _running_from_now([*(self._written[place] for place in places), *coming])
        with self._changed:
            self._batch = works
            self._forget(places)
        self._run_alone(works)

    def _forget(self, places: Sequence[Place]) -> None:
        with self._changed:
            for place in places:
                del self._written[place]
            self._changed.notify_all()

    # Answers

    def _give(self, work: Work, found: Found) -> None:
        told = work.told or ""
        if not found.text.startswith(told):
            began = "The answer was begun, failed, and began otherwise when it was tried again: ask again."
            self._fail(work.future, RuntimeError(began), "failed")
            return
        self._tell(work, found.text.removeprefix(told))
        times = {"queued_s": work.started - work.arrived, "ran_s": time.monotonic() - work.started}
        self._answer_with(work.future, work.held, found, read=len(work.prompt.tokens), **times)

    def _tell(self, work: Work, piece: str) -> None:
        if work.told is not None:
            work.told = work.told + piece if self._pass_on(work.request, piece) else None

    def _note(self, answered: int, seconds: float) -> None:
        """How long something ran, and how many were answered by it."""
        with self._changed:
            self._recent.append((answered, seconds))


def _running_from_now(works: Sequence[Work]) -> list[Work]:
    """Those that are not cancelled, and can't be from now on."""
    return [work for work in works if runs_from_now(work.future)]


def _computes(device: torch.device) -> bool:
    try:
        return bool(torch.ones(1, device=device).sum() == 1)
    except Exception:  # a device that is gone says so in many ways
        return False
