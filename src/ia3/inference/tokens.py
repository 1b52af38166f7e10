"""The tokens of many texts in one array of 32-bit numbers, where lists of Python's would take ten times the room."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, overload

RowT = TypeVar("RowT")


class TokenRows(Sequence[list[int]]):
    """Rows of token ids; a row is a list when it is asked for.

    Args:
        rows: the rows, which are looked at once.
    """

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self.ids, self.ends = array("i"), array("q", [0])
        self.extend(rows)

    def extend(self, rows: Iterable[Sequence[int]]) -> None:
        """Put more rows behind these."""
        for row in rows:
            self.ids.extend(row)
            self.ends.append(len(self.ids))

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...
    def __getitem__(self, index: int | slice) -> list[int] | TokenRows:
        if isinstance(index, slice):
            return TokenRows(self[place] for place in range(len(self))[index])
        place = range(len(self))[index]
        return self.ids[self.ends[place] : self.ends[place + 1]].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(list.__eq__, self, other))

    def __hash__(self) -> int:
        return hash(len(self))


class RowsOnDemand(Sequence[RowT]):
    """Rows that are made when they are asked for.

    Args:
        count: how many.
        make: makes the row of a place.
    """

    def __init__(self, count: int, make: Callable[[int], RowT]) -> None:
        self.places, self.make = range(count), make

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> RowT: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowT]: ...
    def __getitem__(self, index: int | slice) -> RowT | list[RowT]:
        if isinstance(index, slice):
            return [self.make(place) for place in self.places[index]]
        return self.make(self.places[index])
