"""Tables for the terminal: names with what they say, and columns of which those that fit are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST_CELL = 28
NONE = "–"
_GAP = 2
# A line names no more columns that did not fit than these.
_MOST_NAMED = 12


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """Names and what they say, a row each."""
    table = Table(show_header=False, box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table


@dataclass(frozen=True)
class Column:
    """A column; where not all fit, those of a higher rank are left out first, those of rank 0 never."""

    title: str
    cells: Sequence[str | Text]
    rank: int = 0
    text: bool = False

    @property
    def width(self) -> int:
        """The characters that it takes."""
        longest = max(map(cell_len, [*self.title.split("\n"), *map(str, self.cells)]))
        return min(longest, WIDEST_CELL) if self.text else longest

    @property
    def empty(self) -> bool:
        """Whether no row has anything in it."""
        return all(str(cell) == NONE for cell in self.cells)


def print_table(console: Console, columns: Sequence[Column], title: str | None = None) -> None:
    """Print the columns that fit, and the names of those that don't."""
    shown = _fitting(columns, console.width)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
        header_style="bold",
        title=title and Text(title),
        title_justify="left",
    )
    for column in shown:
        table.add_column(
            Text(column.title),
            justify="left" if column.text else "right",
            max_width=WIDEST_CELL if column.text else None,
            overflow="fold",
            no_wrap=not column.text,
        )
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    console.print("", table, highlight=False)
    hidden = [column.title.replace("\n", " ") for column in columns if column not in shown]
    if hidden:
        more = [f"{len(hidden) - _MOST_NAMED} more"] if len(hidden) > _MOST_NAMED else []
        names = ", ".join([*hidden[:_MOST_NAMED], *more])
        say(console, f"\nFor want of width not shown: {names}. A wider terminal shows them, or --json.")


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    chosen: list[Column] = []
    for column in sorted(columns, key=lambda column: column.rank):
        together = [*chosen, column]
        if column.rank == 0 or sum(each.width + _GAP for each in together) - _GAP <= width:
            chosen = together
    return [column for column in columns if column in chosen]


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, markup=False)
