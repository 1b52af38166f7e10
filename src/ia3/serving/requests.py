"""What is asked of a server and what it answers: all that HTTP and the engine know of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Request:
    """One text for one adapter.

    Args:
        text: what the task's template calls `{text}`, as the client sent it.
        model: what the client named: an adapter, `base:adapter`, an alias, or the base.
        max_new_tokens: the longest answer in tokens, at most the task's own number; None for that number. A label
            that is ranked is given whole.
        deadline: the moment on `time.monotonic()` after which nobody waits for the answer; None for never.
        on_token: called from the engine's thread with pieces of the answer as they are written. They join to its text.
        turns: the earlier messages as (role, content), for tasks of conversations.
        embeds: whether the text's vector is asked for, instead of what the task answers.
        labels: whether one of the task's labels is asked for, and no other words.
    """

    text: str
    model: str
    max_new_tokens: int | None = None
    deadline: float | None = None
    on_token: Callable[[str], None] | None = None
    turns: Sequence[tuple[str, str]] = ()
    embeds: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Answer:
    """What was answered, and by whom.

    Args:
        text: the label or what was written.
        label: the likeliest label, None where the answer is free text.
        probabilities: of each label, where they were ranked.
        adapter: the adapter's own name, whatever the client called it; the base's where the base answered.
        digest: the sha256 of the adapter that answered, vectors and task; None for the base.
        prompt_tokens: how many tokens the model read.
        completion_tokens: how many it wrote; 0 where labels were ranked.
        finish_reason: `"length"` where the answer was as long as it may be.
        queued_s: seconds from its coming until it was taken up, in a batch or a place in slots.
        ran_s: seconds from then on.
        vector: the text's, of the length 1, where that was asked for.
    """

    text: str
    label: str | None
    probabilities: dict[str, float] | None
    adapter: str
    digest: str | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    queued_s: float
    ran_s: float
    vector: Sequence[float] | None = None


@dataclass(frozen=True)
class Served:
    """What can be asked.

    Args:
        name: the adapter's, or the base's.
        digest: the sha256 of its content, vectors and task; None for the base.
        parent: the base's name; None for the base.
        aliases: its other names.
        task_kind: the kind of its task, one of `ia3.tasks.task.TaskKind`; None for the base.
        labels: what it chooses from; empty where it writes freely.
    """

    name: str
    digest: str | None
    parent: str | None
    aliases: tuple[str, ...] = ()
    task_kind: str | None = None
    labels: tuple[str, ...] = ()


class ServingError(Exception):
    """A request that gets no answer.

    Args:
        message: what was wrong, what was expected and what to do, in words for the client: no path of this machine.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnknownModel(ServingError):
    """No adapter, alias or base of that name."""


class NotServed(ServingError):
    """A request that this model can't answer."""


class Overloaded(ServingError):
    """Too many requests wait.

    Args:
        message: how many wait.
        retry_after_s: when those will be answered, by the rate of the last batches.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLate(ServingError):
    """The deadline went by before the answer."""


class Dropped(ServingError):
    """Nobody answers any more: the client is gone, or the server stops."""


class Refused(ServingError):
    """An adapter or a name that can't be taken, and why."""


class Server(Protocol):
    """What HTTP sees of an engine. Every method may be called from any thread; `load`, `drain` and `close` wait."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        ...

    def submit(self, request: Request) -> Future[Answer]:
        """Take a request in.

        Returns:
            Its answer, or one of the errors of this module. `cancel()` drops work that waits or is being written.

        Raises:
            ServingError: what is known at once: `UnknownModel`, `NotServed`, `Overloaded`, `TooLate`, `Dropped`.
        """
        ...

    def together(self, count: int) -> AbstractContextManager[None]:
        """So many requests, which this thread submits inside, have places for all of them and share a batch as far as
        they can. Where batches are gathered, the first waits for the last of them, unless that takes long.

        Raises:
            Overloaded: there are not so many places now; all of them there are when nothing waits.
        """
        ...

    def models(self) -> list[Served]:
        """All that can be asked, the base first."""
        ...

    def find(self, name: str) -> Served | None:
        """What a client means by a name; None where nothing has it."""
        ...

    def load(self, name: str, path: str) -> Served:
        """Serve the adapter at a path below the folder under a name, in the place of what had that name.

        Raises:
            Refused: a name, path or adapter that can't be taken.
        """
        ...

    def unload(self, name: str) -> None:
        """Serve an adapter, or an alias, no more; its running requests are answered.

        Raises:
            UnknownModel: there is none.
        """
        ...

    def alias(self, alias: str, name: str) -> Served:
        """Let an alias mean what a name means at this moment, for good or until it is moved.

        Raises:
            UnknownModel: there is no such model.
            Refused: a name that can't be an alias.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Figures by name, no tenant among them.

        Now: `queued` and `running` requests, names of `adapters`, and of those that are `refused` as they are now,
        contents in memory (`versions`) and on the device (`resident`). Since the start: requests by outcome
        (`requests_answered`, `_failed`, `_too_late`, `_cancelled`, `_overloaded`, `_dropped`), `prompt_tokens` and
        `completion_tokens`; where requests share whole batches, `batches` and `ran_s`, the seconds that these took.
        """
        ...

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until all are answered; whether that was within the time. All that is not is
        `Dropped`."""
        ...

    def close(self, timeout_s: float | None = None) -> None:
        """Stop: what waits is `Dropped`, what runs is answered, for which is waited as long as it takes, or so long."""
        ...
