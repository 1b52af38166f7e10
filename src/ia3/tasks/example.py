"""Examples as columns: a million of them take their texts' room, and one is made when it is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Example:
    """One text and its label, or the last message of a conversation and the answer to it.

    Args:
        text: what is read, or the user's last message.
        label: the label; the answer; or for the words of a text, one tag each with a blank between.
        turns: the messages before the text as (role, content), the system's among them.
    """

    text: str
    label: str
    turns: Turns = ()


class ExampleRows(Sequence[Example]):
    """Examples in order.

    Args:
        texts: their texts.
        labels: their labels, as many.
        turns: their turns, as many; None where none has any.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str], turns: Sequence[Turns] | None = None) -> None:
        self.texts, self.labels, self.turns = texts, labels, turns

    @classmethod
    def of(cls, rows: Iterable[Example]) -> ExampleRows:
        """Those of any sequence; the same ones of rows."""
        if isinstance(rows, ExampleRows):
            return rows
        rows = tuple(rows)
        turns = [row.turns for row in rows] if any(row.turns for row in rows) else None
        return cls([row.text for row in rows], [row.label for row in rows], turns)

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleRows: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleRows:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return Example(self.texts[index], self.labels[index], self.turns[index] if self.turns is not None else ())

    def __iter__(self) -> Iterator[Example]:
        if self.turns is None:
            return map(Example, self.texts, self.labels)
        return map(Example, self.texts, self.labels, self.turns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == its for mine, its in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(len(self))

    def take(self, places: Sequence[int]) -> ExampleRows:
        """Some of the rows, by their places."""
        turns = None if self.turns is None else [self.turns[place] for place in places]
        taken = ExampleRows([self.texts[place] for place in places], [self.labels[place] for place in places], turns)
        if "keys" in self.__dict__:
            taken.__dict__["keys"] = array("q", [self.keys[place] for place in places])
        return taken

    def labelled(self, labels: Sequence[str]) -> ExampleRows:
        """The same texts with other labels."""
        taken = ExampleRows(self.texts, labels, self.turns)
        if "keys" in self.__dict__:
            taken.__dict__["keys"] = self.keys
        return taken

    @cached_property
    def keys(self) -> Sequence[int]:
        """A number for each row: the same for rows that are the same to the model, case and white space aside."""
        known: dict[str | tuple[str, ...], int] = {}
        number = known.setdefault
        return array("q", [number(read, len(known)) for read in self._what_is_read()])

    def _what_is_read(self) -> Iterator[str | tuple[str, ...]]:
        """The text, and the messages before it where any row has some."""
        if self.turns is None:
            return map(_normalised, self.texts)
        return (
            (*(_normalised(content) for _, content in turns), _normalised(text))
            for turns, text in zip(self.turns, self.texts, strict=True)
        )


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()
