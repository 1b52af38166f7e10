"""Rows kept as columns: a million of them take their cells' room and no dictionary each."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, overload

Row = tuple[str, dict[str, Any]]
"""Where a row stood ("line 7"), and its cells by column."""

# A column repeats its cells, as labels do, if so many of its first ones are at most half as many different ones.
_SAMPLE = 1000


class ColumnRows(Sequence[Row]):
    """Rows that all have the same columns; a row is made when it is asked for.

    Args:
        places: where each row stood.
        columns: the cells of each column, by its name, one a row.
    """

    def __init__(self, places: Sequence[str], columns: dict[str, list[Any]]) -> None:
        self.places, self.columns = places, columns

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> ColumnRows: ...
    def __getitem__(self, index: int | slice) -> Row | ColumnRows:
        if isinstance(index, slice):
            return ColumnRows(self.places[index], {name: cells[index] for name, cells in self.columns.items()})
        return self.places[index], {name: cells[index] for name, cells in self.columns.items()}

    def __iter__(self) -> Iterator[Row]:
        names = [*self.columns]
        rows = zip(*self.columns.values(), strict=True)
        return ((place, dict(zip(names, cells, strict=True))) for place, cells in zip(self.places, rows, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    def __hash__(self) -> int:
        return hash((len(self), *self.columns))


@contextmanager
def without_collecting() -> Iterator[None]:
    """Let Python not look for cycles among a million lists while they come in: there are none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _equal(row: Any, other: Any) -> bool:
    return bool(row == other)


def gather(rows: Iterable[tuple[str, dict[str, Any] | None]]) -> tuple[Sequence[Row], int]:
    """Rows as columns, as far as all have the same ones in the same order; and how many were blank (None)."""
    places: list[str] = []
    columns: dict[str, list[Any]] | None = None
    names: list[str] = []
    blank = 0
    rows = iter(rows)
    for place, record in rows:
        if record is None:
            blank += 1
            continue
        if columns is None:
            columns, names = {name: [] for name in record}, [*record]
        elif [*record] != names:
            return _as_they_are([*ColumnRows(places, columns), (place, record)], rows, blank)
        places.append(place)
        for cells, cell in zip(columns.values(), record.values(), strict=True):
            cells.append(cell)
    return ColumnRows(places, {name: shared(cells) for name, cells in (columns or {}).items()}), blank


def _as_they_are(
    found: list[Row], more: Iterable[tuple[str, dict[str, Any] | None]], blank: int
) -> tuple[Sequence[Row], int]:
    for place, record in more:
        if record is None:
            blank += 1
        else:
            found.append((place, record))
    return tuple(found), blank


def digest_of(rows: Sequence[Row]) -> str:
    """The SHA-256 of rows, their places aside, in hexadecimal."""
    digest = hashlib.sha256()
    if not isinstance(rows, ColumnRows):
        for _, record in rows:
            digest.update(_as_json(record))
        return digest.hexdigest()
    for name, cells in rows.columns.items():
        digest.update(_as_json(name))
        for start in range(0, len(cells), _SAMPLE):
            digest.update(_as_json(cells[start : start + _SAMPLE]))
    return digest.hexdigest()


def _as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


def shared(cells: list[Any]) -> list[Any]:
    """The cells, equal texts as one object where a column repeats them."""
    first = [cell for cell in islice(cells, _SAMPLE) if isinstance(cell, str)]
    if len(cells) < _SAMPLE or 2 * len({*first}) > len(first):
        return cells
    known: dict[str, str] = {}
    return [known.setdefault(cell, cell) if isinstance(cell, str) else cell for cell in cells]
