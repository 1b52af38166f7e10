"""What a reading of records leaves unread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ia3.data.records import Records
from ia3.tasks.columns import belongs_to_text, template_of
from ia3.tasks.examples import Reading
from ia3.tasks.template import Template


def with_unread(reading: Reading, records: Records, texts: Sequence[str]) -> Reading:
    """The reading with what it leaves unread.

    Args:
        reading: the columns that were read.
        records: the records.
        texts: all that the model reads of each record, in their order.
    """
    left = [column for column in records.columns if column not in reading.columns]
    counts = {
        column: count
        for column in left
        if belongs_to_text(column, reading.columns) and (count := _saying_more(records, column, reading, texts))
    }
    shown = [column for column in records.columns if column in counts or column in reading.template.fields]
    are_texts = all(_is_text(cell) for column in counts for cell in records.column(column))
    return replace(
        reading,
        unread=tuple(counts.items()),
        others=tuple(column for column in left if column not in counts),
        suggested=Template(template_of(shown)) if counts and are_texts and not reading.of_conversations else None,
    )


def _saying_more(records: Records, column: str, reading: Reading, texts: Sequence[str]) -> int:
    """How many rows have something in a column; 0 where it is all in what is read, or repeats that and the answer."""
    cells = [_plain(cell) for cell in records.column(column)]
    beside = zip(*(records.column(read) for read in reading.columns), strict=True)
    said = all(
        cell in text or all(_plain(other) in cell for other in others)
        for cell, text, others in zip(cells, texts, beside, strict=True)
    )
    return 0 if said else sum(bool(cell) for cell in cells)


def _plain(cell: Any) -> str:
    """A cell as text, empty where nothing is in it: NaN and an empty list among them."""
    return str(cell).strip() if cell and cell == cell else ""


def _is_text(cell: Any) -> bool:
    return cell is None or isinstance(cell, str | int | float)
