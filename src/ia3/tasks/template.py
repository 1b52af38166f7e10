"""The text around the columns of a record: `"Review: {text} Sentiment?"`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ia3.errors import SettingError, listed, shorten
from ia3.tasks.columns import as_text, require_columns

_PIECES = re.compile(r"\{\{|\}\}|\{(?P<breaks>\n*)(?P<column>[^{}\n][^{}]*)\}|[{}]")


_LONGEST = 100_000
_MOST_BRACES = 1_000


@dataclass(frozen=True)
class Template:
    """The text that the model reads, with the columns' names in braces: `"Review: {text} Sentiment?"`.

    Args:
        pattern: the text; a brace that is meant as such is doubled. Line breaks between a brace and its column, as in
            `"{question}{\\n\\ncontext}"`, stand where the column has something; it may be missing.

    Raises:
        ValueError: no field, a brace that belongs to none, or more text or fields than a model reads.
    """

    pattern: str

    def __post_init__(self) -> None:
        if len(self.pattern) > _LONGEST:
            raise SettingError(
                f"The template {shorten(self.pattern)} has {len(self.pattern):,} characters, expected at most "
                f"{_LONGEST:,}."
            )
        if self.pattern.count("{") > _MOST_BRACES:
            raise SettingError(f"The template {shorten(self.pattern)} has more than {_MOST_BRACES:,} fields.")
        stray = [piece.group() for piece in _PIECES.finditer(self.pattern) if piece.group() in ("{", "}")]
        if stray:
            raise SettingError(
                f"The template {shorten(self.pattern)} has a {stray[0]!r} that belongs to no field: name a column, as "
                "in {text}, and double a brace that is meant as one: {{ or }}."
            )
        if not self.fields:
            raise SettingError(
                f"The template {shorten(self.pattern)} shows no column to the model: name one in braces, such as "
                "{text}."
            )

    @classmethod
    def of_column(cls, column: str) -> Template:
        """The text of one column as it is."""
        return cls(f"{{{column}}}")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The columns that it names, in order."""
        return tuple(dict.fromkeys(piece["column"] for piece in _PIECES.finditer(self.pattern) if piece["column"]))

    @property
    def is_one_column(self) -> bool:
        """Whether it shows the text of one column as it is."""
        return self == Template.of_column(self.fields[0])

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The columns among them that a record must have."""
        pieces = [piece for piece in _PIECES.finditer(self.pattern) if piece["column"] and not piece["breaks"]]
        return tuple(dict.fromkeys(piece["column"] for piece in pieces))

    def with_column(self, column: str) -> Template:
        """The same text around another column.

        Raises:
            ValueError: it names several columns.
        """
        if len(self.fields) > 1:
            raise SettingError(
                f"The template {shorten(self.pattern)} reads the columns {listed(self.fields)}, so one text column "
                "can't replace them: leave `text_column` out, and name the columns of the file as the template does."
            )
        return Template(_PIECES.sub(lambda piece: f"{{{column}}}" if piece["column"] else piece.group(), self.pattern))

    def render(self, record: Mapping[str, Any], place: str = "the record") -> str:
        """The text for one record; empty where all of its fields are.

        Args:
            record: column to cell; a missing cell is empty.
            place: where the record was read, for the error.

        Raises:
            ValueError: a column is not there, or a cell holds neither text nor a number.
        """
        require_columns(place, record, *self.required)
        one = "the text" if len(self.fields) == 1 else ""
        cells = {field: as_text(record.get(field), f"{place}: {one or shorten(field)}") for field in self.fields}
        return self.fill([*cells.values()])

    def fill(self, cells: Sequence[str]) -> str:
        """The text around cells without white space around them, one a field; empty where all of them are."""
        if not any(cells):
            return ""
        pattern, slots = self._slots
        text = pattern % tuple(breaks + cells[place] if cells[place] else "" for place, breaks in slots)
        # Breaks after nothing: of a column that may be missing behind one that is empty.
        return text if self.required == self.fields else text.strip("\n")

    @cached_property
    def _slots(self) -> tuple[str, list[tuple[int, str]]]:
        """The pattern with a `%s` for each column, and which field and what breaks each stands for."""
        slots = []

        def slot(piece: re.Match[str]) -> str:
            if not piece["column"]:
                return piece.group()[0]
            slots.append((self.fields.index(piece["column"]), piece["breaks"]))
            return "%s"

        return _PIECES.sub(slot, self.pattern.replace("%", "%%")), slots
