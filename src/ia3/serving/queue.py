"""What waits to be answered, by those who can be answered together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ia3.serving.reading import Prompt
from ia3.serving.registry import Held
from ia3.serving.requests import Answer, Request


@dataclass(eq=False)
class List:
    """Requests that are submitted together; open until the last of them has come."""

    is_open: bool = True


@dataclass(eq=False)
class Work:
    """A request on its way.

    Args:
        company: with whom it is answered: a size of slots, or a task in whole batches.
        reads: what is the same for works that read one text once, together; None for a text of its own.
        listed: the list that it was submitted with; None where it came by itself.
        told: what its listener was told of the answer; None where nobody listens.
        started: when it was taken up.
    """

    request: Request
    held: Held
    prompt: Prompt
    arrived: float
    deadline: float
    company: Hashable
    reads: Hashable
    listed: List | None
    told: str | None
    started: float = 0.0
    future: Future[Answer] = field(default_factory=Future)


class Queue:
    """Works by their company. Whoever calls holds the engine's lock."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Work]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, work: Work) -> None:
        """Let a work wait."""
        self._waiting.setdefault(work.company, []).append(work)

    def beside(self, work: Work) -> int:
        """How many wait in its company, itself included."""
        return len(self._waiting[work.company])

    def remove(self, work: Work) -> None:
        """Let a work wait no more, if it does."""
        if work in self._waiting.get(work.company, []):
            self._take([work])

    def take_late(self, now: float) -> list[Work]:
        """Take the works whose deadline went by."""
        late = []
        for company in [*self._waiting.values()]:
            some = [work for work in company if work.deadline <= now]
            if some:
                self._take(some)
            late += some
        return late

    def most_urgent(self, room: Callable[[Hashable], int]) -> Work | None:
        """The work with the nearest deadline, of the companies for which there is room."""
        some = (work for company, works in self._waiting.items() if room(company) for work in works)
        return min(some, key=_deadline, default=None)

    def take_nearest(self, urgent: Work, texts: int, most: int) -> list[Work]:
        """Take a work, those that read its text, and of its company those that are about as long.

        Args:
            urgent: the work.
            texts: how many different texts.
            most: how many works.
        """
        length, read, found = len(urgent.prompt.tokens), set[Hashable](), list[Work]()

        def distance(work: Work) -> tuple[bool, bool, int]:
            shares = work.reads is not None and work.reads == urgent.reads
            return work is not urgent, not shares, abs(len(work.prompt.tokens) - length)

        for work in sorted(self._waiting[urgent.company], key=distance)[:most]:
            read.add(work if work.reads is None else work.reads)
            if len(read) > texts:
                break
            found.append(work)
        self._take(found)
        return found

    def _take(self, some: Sequence[Work]) -> None:
        company, taken = some[0].company, set(some)
        rest = [work for work in self._waiting[company] if work not in taken]
        if rest:
            self._waiting[company] = rest
        else:
            del self._waiting[company]


def _deadline(work: Work) -> float:
    return work.deadline
