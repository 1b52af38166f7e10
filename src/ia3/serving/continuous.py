"""The engine over one that batches by itself, token by token, as vLLM does: requests go there as they come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ia3.inference.complete import end_tokens
from ia3.serving.found import Found, before_end, found_of
from ia3.serving.intake import Intake, Limits, runs_from_now, stopped, too_late
from ia3.serving.pieces import Pieces
from ia3.serving.reading import Prompt, Reader
from ia3.serving.registry import Contents, Held, Registry
from ia3.serving.requests import Answer, Dropped, NotServed, Request

_logger = logging.getLogger(__name__)

# Answers by which it is said how fast requests are answered.
_RECENT = 128


class Tokens(NamedTuple):
    """The next tokens of an answer.

    Args:
        tokens: those since the last ones; an end token is the answer's last.
        started: the moment on `time.monotonic()` at which the prompt's turn came.
    """

    tokens: Sequence[int]
    started: float


class Writer(Contents, Protocol):
    """What writes answers, of many requests at once, and holds the adapters' contents; on a loop of its own."""

    loop: asyncio.AbstractEventLoop
    longest: int
    """The most tokens of a prompt and its answer."""

    @property
    def alive(self) -> bool:
        """Whether anything is written."""
        ...

    def write(self, prompt: Sequence[int], row: str, ends: Sequence[int], most: int) -> AsyncIterator[Tokens]:
        """Answer a prompt greedily, in the loop; leaving the iterator early gives the work up.

        Args:
            prompt: what the model reads.
            row: the name under which the adapter's content was registered, or `BASE`.
            ends: the tokens that end an answer.
            most: the most tokens of it.
        """
        ...


@dataclass(eq=False)
class _Work:
    """A request on its way."""

    request: Request
    held: Held
    prompt: Prompt
    arrived: float
    deadline: float
    future: Future[Answer] = field(default_factory=Future)
    task: asyncio.Task[None] | None = None
    started: float | None = None


class ContinuousEngine(Intake):
    """Answers requests for the adapters of a registry by a writer; the `Server` that HTTP sees.

    Each request is a task on the writer's loop. It ends with the answer, the deadline, or the client's going, and its
    version is held until the writer has let go of it.

    Args:
        model: the base model, which may be without memory: prompts are read by its configuration.
        tokenizer: its tokenizer.
        registry: the adapters, whose table is the writer; closed with the engine.
        writer: who writes.
        limits: how many requests may wait, and for how long; batches are the writer's own.

    Raises:
        ValueError: nothing would end an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, registry: Registry, writer: Writer, limits: Limits) -> None:
        super().__init__(registry, limits)
        self._writer, self._tokenizer = writer, tokenizer
        self._read, self._ends = Reader(model, tokenizer), end_tokens(model, tokenizer)
        self._works: set[_Work] = set()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    # What HTTP sees

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_open and self._writer.alive

    def submit(self, request: Request) -> Future[Answer]:
        """Take a request in; see `Server.submit`."""
        held, now, deadline = self._hold(request)
        try:
            prompt = self._within(self._read(held.version, request))
            work = _Work(request, held, prompt, now, deadline)
            with self._changed:
                self._take_place()
                self._works.add(work)
                self._writer.loop.call_soon_threadsafe(self._begin, work)
        except BaseException:  # a version that is held for nobody would stay for ever
            self.registry.release(held.version)
            raise
        return work.future

    def drain(self, timeout_s: float) -> bool:
        """See `Server.drain`."""
        with self._changed:
            self._is_open = False
            in_time = self._changed.wait_for(lambda: not self._works, timeout_s)
            left = [*self._works]
        for work in left:
            self._fail(work.future, stopped(), "dropped")
        return in_time

    def close(self, timeout_s: float | None = None) -> None:
        """See `Server.close`."""
        with self._changed:
            self._is_open = False
            self._writer.loop.call_soon_threadsafe(self._drop_waiting)
            self._changed.wait_for(lambda: not self._works, timeout_s)
        self.registry.close()

    # What is asked

    def _queued(self) -> int:
        return sum(work.started is None for work in self._works)

    def _running(self) -> int:
        return len(self._works) - self._queued()

    def _seconds_each(self) -> float:
        recent = self._recent
        return (recent[-1] - recent[0]) / (len(recent) - 1) if len(recent) > 1 else 1.0

    def _within(self, prompt: Prompt) -> Prompt:
        """A prompt whose answer ends where the writer's room does."""
        room = self._writer.longest - len(prompt.tokens)
        if room < 1:
            raise NotServed(
                f"The text has {len(prompt.tokens):,} tokens and this server has room for {self._writer.longest:,} "
                "with the answer: send less."
            )
        return prompt._replace(longest=min(prompt.longest, room))

    # On the writer's loop

    def _begin(self, work: _Work) -> None:
        work.task = self._writer.loop.create_task(self._run(work))
        work.task.add_done_callback(lambda _: self._leave(work))
        # Left pending until it is answered, so that who goes can always cancel it.
        work.future.add_done_callback(lambda _: self._give_up(work))

    def _give_up(self, work: _Work) -> None:
        assert work.task is not None
        self._writer.loop.call_soon_threadsafe(work.task.cancel)

    def _drop_waiting(self) -> None:
        for work in [work for work in self._works if work.started is None]:
            assert work.task is not None
            work.task.cancel()

    async def _run(self, work: _Work) -> None:
        try:
            async with asyncio.timeout(work.deadline - time.monotonic()):
                found = await self._write(work)
            self._give(work, found)
        except TimeoutError:
            self._fail(work.future, too_late(), "too_late")
        except Dropped as error:
            self._fail(work.future, error, "dropped")
        except Exception as error:  # whatever it is, it is this request's alone
            _logger.exception("A request failed.")
            self._fail(work.future, NotServed(str(error)) if isinstance(error, ValueError) else error, "failed")

    def _leave(self, work: _Work) -> None:
        """A request's task is done, whichever way; perhaps cancelled before it began."""
        self._fail(work.future, stopped(), "dropped")
        if work.future.cancelled():
            self._count_cancelled(work.deadline)
        self.registry.release(work.held.version)
        with self._changed:
            self._works.discard(work)
            self._changed.notify_all()

    async def _write(self, work: _Work) -> Found:
        """The answer, of which the listener hears as it is written."""
        written: list[int] = []
        pieces, told = Pieces(self._tokenizer), work.request.on_token is not None
        prompt, row = work.prompt, work.held.version.row
        async for more in self._writer.write(prompt.tokens, row, self._ends, prompt.longest):
            work.started = more.started
            written += more.tokens
            if told:
                self._pass_on(work.request, pieces.more(before_end(self._ends, written)))
        found = found_of(self._tokenizer, self._ends, written)
        self._pass_on(work.request, found.text.removeprefix(pieces.told))
        return found

    def _give(self, work: _Work, found: Found) -> None:
        assert work.started is not None
        now = time.monotonic()
        if not runs_from_now(work.future):
            return
        self._recent.append(now)
        times = {"queued_s": work.started - work.arrived, "ran_s": now - work.started}
        self._answer_with(work.future, work.held, found, read=len(work.prompt.tokens), **times)
