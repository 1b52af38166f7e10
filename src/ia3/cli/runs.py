"""`ia3 runs`: several runs as one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ia3.cli.flags import AsJson, print_json
from ia3.runs.screen import Screen
from ia3.runs.tables import NONE, WIDEST_CELL, Column, print_table, say
from ia3.tasks.metrics import further_scores, write_score

if TYPE_CHECKING:
    from ia3.runs.comparison import Repeats, RunRecord

_FIRST = ("model", "data", "task")
# Further keys of the recipes get a column each up to this many; a line below names the rest.
_MOST_KEYS = 4
_PATHS = ("model", "data", "test_data")
# How soon the columns of differing keys are left out, see Column.
_KEY_RANKS = (2, 4, 4, 8, 8, 8, 8)


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs, or above them.", show_default="runs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: a table, the best first, and a picture of their loss and accuracy, runs.png."""
    given = folders or [Path("runs")]
    with Screen(stderr=True).status("Reading runs"):
        from ia3.runs.comparison import group_repeats, read_runs
        from ia3.runs.run import RUNS_PICTURE_NAME

        records = read_runs(given)
        groups = group_repeats(records)
    drawable = any(record.evaluations for record in records)
    picture = given[0] / RUNS_PICTURE_NAME if drawable else None
    if picture is not None:
        from ia3.runs.picture import draw_runs

        draw_runs(records, picture)
    if as_json:
        repeats, listed = ([each.summary() for each in many] for many in (groups, records))
        print_json({"picture": picture, "repeats": repeats, "runs": listed})
        return
    console = Screen()
    print_runs(console, records, groups)
    say(console, f"\npicture: {picture}" if picture is not None else "\nNo run has an evaluation yet: no picture.")


def print_runs(console: Console, records: Sequence[RunRecord], groups: Sequence[Repeats]) -> None:
    """Print the runs as a table that fits the console, in their order, and the repeated ones as a second table."""
    from ia3.runs.comparison import QUARTILE_METHOD, differences, name_runs

    folder, names = name_runs(records)
    differing = differences(records)
    further = [key for key in differing if key not in _FIRST][_MOST_KEYS:]
    shared = [f"{key} {Path(_write(records[0].recipe[key])).name}" for key in _FIRST if key not in differing]
    methods = {record.method for record in records if record.kind.has_answers}
    shared += [f"accuracy by {methods.pop()}"] if len(methods) == 1 else []
    count = "1 run" if len(records) == 1 else f"{len(records)} runs"
    here = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    say(console, ", ".join([f"{count} in {here}", *shared]))
    print_table(console, _run_columns(records, names, {key: differing[key] for key in differing if key not in further}))
    if further:
        say(console, f"\nThey also differ in {', '.join(further)}.")
    for figure, pattern in (("accuracy", "{:.1%}"), ("loss", "{:.3f}")):
        of_figure = [group for group in groups if group.kind.has_labels == (figure == "accuracy")]
        if of_figure:
            say(console, f"\nRepeated runs: {figure} (finished runs; quartiles: numpy's {QUARTILE_METHOD})")
            print_table(console, _repeat_columns(of_figure, figure, pattern))


def _run_columns(records: Sequence[RunRecord], names: Sequence[str], differing: dict[str, list[Any]]) -> list[Column]:
    """The columns in their order from left to right, without empty ones."""
    from ia3.runs.comparison import FINISHED

    rows = [record.last | record.summary() for record in records]
    scores = {
        name: [write_score(name, row[name]) if name in row else NONE for row in rows]
        for record in records
        for name in further_scores(record.last)
    }
    intervals = [record.interval for record in records]
    ranges = [NONE if each is None else f"{100 * each[0]:.1f} to {100 * each[1]:.1f}" for each in intervals]
    columns = [
        Column("run", names, text=True),
        *(
            Column(key, _cells(values, key), _KEY_RANKS[place], text=True)
            for place, (key, values) in enumerate(differing.items())
        ),
        _figures("accuracy", rows, "accuracy", "{:.1%}"),
        Column("95 %\ninterval", ranges, 3),
        _figures("macro-F1", rows, "macro_f1", "{:.3f}", 5),
        *(Column(name.replace("_", "\n", 1).replace("_", " "), cells, 6) for name, cells in scores.items()),
        _figures("loss", rows, "loss", "{:.3f}"),
        _figures("best\naccuracy", rows, "best_accuracy", "{:.1%}", 7),
        _figures("steps", rows, "steps", "{:,}", 9),
        _figures("seconds", rows, "train_seconds", "{:,.0f}", 10),
    ]
    if any(record.state != FINISHED for record in records):
        columns.append(Column("state", [record.state for record in records], 1, text=True))
    if not all(record.finished for record in records):
        columns.append(_figures("evaluated\nat step", rows, "step", "{:,.0f}", 7))
    return [column for column in columns if not column.empty]


def _repeat_columns(groups: Sequence[Repeats], figure: str, pattern: str) -> list[Column]:
    """The median, the quartiles and the extremes of one figure, a row a group."""
    from ia3.runs.comparison import REPEATED, differences

    differing = differences([group.records[0] for group in groups])
    keys = [key for key in differing if key not in REPEATED]
    varied = [", ".join(f"{count} {key}s" for key, count in group.varied.items()) for group in groups]
    spreads = [group.summary()[figure] for group in groups]
    return [
        *(Column(key, _cells(differing[key], key), 2 if place else 0, text=True) for place, key in enumerate(keys)),
        Column("runs", [f"{len(group.records)}" for group in groups]),
        Column("over", [names or "the same recipe" for names in varied], 1, text=True),
        *(
            _figures(title, spreads, title.split("\n")[0], pattern)
            for title in ("median", "lower\nquartile", "upper\nquartile", "lowest", "highest")
        ),
    ]


def _figures(title: str, rows: Sequence[dict[str, Any]], name: str, pattern: str, rank: int = 0) -> Column:
    values = [row.get(name) for row in rows]
    return Column(title, [NONE if each is None or each != each else pattern.format(each) for each in values], rank)


def _cells(values: Sequence[Any], key: str) -> list[str]:
    """A recipe's values as cells: as short as keeps different ones apart."""
    written = [_write(value) for value in values]
    if key in _PATHS:
        names = [Path(text).name for text in written]
        written = names if len(set(names)) == len(set(written)) else written
    cut = [text if len(text) <= WIDEST_CELL else f"{text[: WIDEST_CELL - 1]}…" for text in written]
    return cut if len(set(cut)) == len(set(written)) else written


def _write(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else " ".join(str(value).split())
