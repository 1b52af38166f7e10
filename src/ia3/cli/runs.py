"""`ia3 runs`: several runs as one table and one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.runs.comparison import Repeats, RunRecord

_FIRST = ("model", "data", "task")
# Further keys of the recipes get a column each up to this many; a line below names the rest.
_MOST_KEYS = 4
_WIDEST_CELL = 28
_PATHS = ("model", "data", "test_data")
_OF_EVERY_RUN = ("accuracy", "loss", "macro_f1", "seconds", "step")
# How soon the columns of differing keys are left out, see _Column.
_KEY_RANKS = (2, 4, 4, 8, 8, 8, 8)
_GAP = 2
_NONE = "–"


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs, or above them.", show_default="runs")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare runs: a table, the best first, and a picture of their loss and accuracy, runs.png."""
    from rich.console import Console

    given = folders or [Path("runs")]
    with Console(stderr=True).status("Reading runs"):
        from ia3.runs.comparison import PICTURE_NAME, draw_runs, group_repeats, read_runs

        records = read_runs(given)
        groups = group_repeats(records)
    drawable = any(record.evaluations for record in records)
    picture = given[0] / PICTURE_NAME if drawable else None
    if as_json:
        if picture is not None:
            draw_runs(records, picture)
        typer.echo(json.dumps(_content(records, groups, picture), ensure_ascii=False, default=str))
        return
    console = Console()
    print_runs(console, records, groups)
    if picture is not None:
        draw_runs(records, picture)
    _say(console, f"picture: {picture}" if picture is not None else "No run has an evaluation yet: no picture.")


def _content(records: Sequence[RunRecord], groups: Sequence[Repeats], picture: Path | None) -> dict[str, Any]:
    return {
        "picture": None if picture is None else str(picture),
        "repeats": [group.summary() for group in groups],
        "runs": [record.summary() for record in records],
    }


def print_runs(console: Console, records: Sequence[RunRecord], groups: Sequence[Repeats]) -> None:
    """Print the runs as a table that fits the console, and repeated runs as a second one.

    Args:
        console: where to.
        records: the runs, in the order of the rows.
        groups: the repeated runs among them.
    """
    from ia3.runs.comparison import differences, name_runs

    folder, names = name_runs(records)
    differing = differences(records)
    further = [key for key in differing if key not in _FIRST]
    columns = _run_columns(
        records, names, {key: differing[key] for key in differing if key not in further[_MOST_KEYS:]}
    )
    shared = [f"{key} {Path(_write(records[0].recipe[key])).name}" for key in _FIRST if key not in differing]
    methods = {record.method for record in records if record.kind.has_answers}
    shared += [f"accuracy by {methods.pop()}"] if len(methods) == 1 else []
    count = "1 run" if len(records) == 1 else f"{len(records)} runs"
    _say(console, ", ".join([f"{count} in {_from_here(folder)}", *shared]))
    _print_table(console, columns)
    if further[_MOST_KEYS:]:
        _say(console, f"They also differ in {', '.join(further[_MOST_KEYS:])}.")
    for figure in ("accuracy", "loss"):
        of_figure = [group for group in groups if group.kind.has_labels == (figure == "accuracy")]
        if of_figure:
            _print_repeats(console, figure, of_figure)


@dataclass(frozen=True)
class _Column:
    """A column; where not all fit, those of a higher rank are left out first, those of rank 0 never."""

    title: str
    cells: list[str]
    rank: int = 0
    text: bool = False

    @property
    def width(self) -> int:
        from rich.cells import cell_len

        parts = [*self.title.split("\n"), *self.cells]
        longest = max(cell_len(part) for part in parts)
        return min(longest, _WIDEST_CELL) if self.text else longest

    @property
    def empty(self) -> bool:
        return all(cell == _NONE for cell in self.cells)


def _run_columns(records: Sequence[RunRecord], names: Sequence[str], differing: dict[str, list[Any]]) -> list[_Column]:
    """The columns in their order from left to right, without empty ones."""
    from ia3.runs.comparison import FINISHED

    last = [record.last for record in records]
    scores = list(dict.fromkeys(name for figures in last for name in figures if name not in _OF_EVERY_RUN))
    columns = [
        _Column("run", list(names), text=True),
        *(
            _Column(key, _cells(values, key), _KEY_RANKS[place], text=True)
            for place, (key, values) in enumerate(differing.items())
        ),
        _Column("accuracy", _numbers(last, "accuracy", "{:.1%}")),
        _Column("95 %\ninterval", [_range(*record.interval) if record.interval else _NONE for record in records], 3),
        _Column("macro-F1", _numbers(last, "macro_f1", "{:.3f}"), 5),
        *(_Column(name.replace("_", "\n", 1).replace("_", " "), _scores(last, name), 6) for name in scores),
        _Column("loss", _numbers(last, "loss", "{:.3f}")),
        _Column("best\naccuracy", [_format(record.best_accuracy, "{:.1%}") for record in records], 7),
        _Column("steps", [f"{record.steps:,}" for record in records], 9),
        _Column("seconds", [_format(record.seconds, "{:,.0f}") for record in records], 10),
    ]
    if any(record.state != FINISHED for record in records):
        columns.append(_Column("state", [record.state for record in records], 1, text=True))
    if not all(record.finished for record in records):
        columns.append(_Column("evaluated\nat step", _numbers(last, "step", "{:,.0f}"), 7))
    return [column for column in columns if not column.empty]


def _numbers(figures: Sequence[dict[str, float]], name: str, pattern: str) -> list[str]:
    return [_format(each.get(name), pattern) for each in figures]


def _scores(figures: Sequence[dict[str, float]], name: str) -> list[str]:
    from ia3.tasks.metrics import write_score

    return [write_score(name, each[name]) if name in each else _NONE for each in figures]


def _format(value: float | None, pattern: str) -> str:
    return _NONE if value is None or value != value else pattern.format(value)


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _cells(values: Sequence[Any], key: str) -> list[str]:
    """A recipe's values as cells: as short as keeps different ones apart."""
    written = [_write(value) for value in values]
    if key in _PATHS:
        names = [Path(text).name for text in written]
        written = names if len(set(names)) == len(set(written)) else written
    cut = [text if len(text) <= _WIDEST_CELL else f"{text[: _WIDEST_CELL - 1]}…" for text in written]
    return cut if len(set(cut)) == len(set(written)) else written


def _write(value: Any) -> str:
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else " ".join(str(value).split())


def _from_here(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _print_table(console: Console, columns: Sequence[_Column]) -> None:
    """The columns that fit, and the names of those that don't."""
    from rich.table import Table
    from rich.text import Text

    shown = _fitting(columns, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in shown:
        side: Any = "left" if column.text else "right"
        width = _WIDEST_CELL if column.text else None
        table.add_column(Text(column.title), justify=side, max_width=width, overflow="fold", no_wrap=not column.text)
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    console.print("", table, "", highlight=False)
    hidden = [column.title.replace("\n", " ") for column in columns if column not in shown]
    if hidden:
        _say(console, f"For want of width not shown: {', '.join(hidden)}. A wider terminal shows them, or --json.")


def _fitting(columns: Sequence[_Column], width: int) -> list[_Column]:
    chosen: list[_Column] = []
    for column in sorted(columns, key=lambda column: column.rank):
        together = [*chosen, column]
        if column.rank == 0 or sum(each.width + _GAP for each in together) - _GAP <= width:
            chosen = together
    return [column for column in columns if column in chosen]


def _print_repeats(console: Console, figure: str, groups: Sequence[Repeats]) -> None:
    """The median, the quartiles and the extremes of one figure, a row a group."""
    from ia3.runs.comparison import QUARTILE_METHOD, REPEATED, differences

    firsts = [group.records[0] for group in groups]
    differing = {key: values for key, values in differences(firsts).items() if key not in REPEATED}
    spreads = [asdict(group.accuracy if figure == "accuracy" else group.loss) for group in groups]
    pattern = "{:.1%}" if figure == "accuracy" else "{:.3f}"
    columns = [
        *(
            _Column(key, _cells(values, key), 0 if place == 0 else 2, text=True)
            for place, (key, values) in enumerate(differing.items())
        ),
        _Column("runs", [f"{len(group.records)}" for group in groups]),
        _Column("over", [_varied(group) for group in groups], 1, text=True),
        _Column("median", _numbers(spreads, "median", pattern)),
        _Column("lower\nquartile", _numbers(spreads, "lower", pattern)),
        _Column("upper\nquartile", _numbers(spreads, "upper", pattern)),
        _Column("lowest", _numbers(spreads, "lowest", pattern)),
        _Column("highest", _numbers(spreads, "highest", pattern)),
    ]
    _say(console, f"Repeated runs: {figure} (finished runs; quartiles: numpy's {QUARTILE_METHOD})")
    _print_table(console, columns)


def _varied(group: Repeats) -> str:
    return ", ".join(f"{count} {key}s" for key, count in group.varied.items()) or "the same recipe"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
