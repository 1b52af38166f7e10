"""What all pictures are drawn with: one style, ticks, heat maps and names of axes; and the pictures of several runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from ia3.files import write_atomically
from ia3.runs.comparison import RunRecord, name_runs
from ia3.runs.run import Run
from ia3.tasks.task import TaskKind

# Okabe and Ito's palette: told apart with any kind of colour blindness, and in grey.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#9AA0A6", "#202124"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5F6368",
    "axes.labelcolor": "#3C4043",
    "xtick.color": "#3C4043",
    "ytick.color": "#3C4043",
    "grid.color": "#E8EAED",
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}
LOSSES = {
    TaskKind.LABEL_WORDS: "cross-entropy (nats a label token)",
    TaskKind.GENERATION: "cross-entropy (nats an answer's token)",
    TaskKind.LANGUAGE_MODELLING: "cross-entropy (nats a token)",
    TaskKind.INSTRUCTIONS: "cross-entropy (nats a completion's token)",
    TaskKind.SEQUENCE_CLASSIFICATION: "cross-entropy (nats a text)",
    TaskKind.TOKEN_CLASSIFICATION: "cross-entropy (nats a word)",
}
# A run's line in a picture of a few.
_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK)
# Of more runs than these, two have a colour.
_MOST_LINES = 10
_LONGEST_NAME = 40
# The legend names no more values than these.
_MOST_NAMED = 12


@contextmanager
def picture(path: Path, size: tuple[float, float], title: str = "") -> Iterator[Any]:
    """A figure in the pictures' style, saved as a PNG when all is drawn.

    Args:
        path: where the picture goes.
        size: width and height in inches.
        title: its headline.

    Raises:
        PermissionError: the picture can't be written.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        yield figure
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        try:
            write_atomically(path, drawn.getvalue())
        except PermissionError as error:
            raise PermissionError(
                f"The picture {path} cannot be written: make its folder writable, or copy the runs to one that is."
            ) from error


def scale_log(axes: Any, low: float, high: float) -> None:
    """A logarithmic axis of losses, with ticks at 1, 2 and 5 times the powers of ten between two of them."""
    ticks = [digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])


def running_mean(losses: Sequence[float]) -> tuple[int, list[float]]:
    """A window of a 25th of the steps, and the mean of the last losses in it at each step, of fewer at the start."""
    window = max(1, len(losses) // 25)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return window, means


def heat_map(
    axes: Any,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str,
    low: float,
    high: float,
    write: Callable[[int, int], str] | None = None,
    **labels: str,
) -> Any:
    """Draw a matrix of cells.

    Args:
        axes: where to.
        values: `[rows, columns]`, NaN for a cell that is left blank.
        rows: their names.
        columns: theirs.
        colours: matplotlib's name of the colour map.
        low: the value of its first colour.
        high: that of its last one.
        write: what stands in a cell, by row and column.
        labels: the title and the axes' names.

    Returns:
        What a colour bar is made of.
    """
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(np.asarray(values, dtype=float)):
        if write is not None and np.isfinite(value):
            ink = "white" if abs(value) > 0.6 * high else INK
            axes.text(column, row, write(row, column), ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.tick_params(which="both", length=0)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.spines[:].set_visible(False)
    axes.set(**labels)
    return image


def colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    """What a heat map's colours stand for, beside it."""
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _draw_lines(
    axes: Any,
    steps: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    styles: Sequence[dict[str, Any]],
    **labels: str,
) -> None:
    """A line a run over the steps."""
    for own_steps, own_values, style in zip(steps, values, styles, strict=True):
        axes.plot(own_steps, own_values, **style)
    axes.set(xlabel="step", **labels)
    axes.grid(axis="y")


def draw_curves(runs: Sequence[Run], settings: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """Draw a sweep into one PNG: each run's losses and accuracies, and what the settings reach.

    Args:
        runs: finished runs, the best first.
        settings: what each was given; the colours are those of the first key's values.
        path: where the picture goes.
        title: what was swept.

    Returns:
        The path.
    """
    key = next((key for key in settings[0] if len({str(each[key]) for each in settings}) > 1), next(iter(settings[0])))
    values = [each[key] for each in settings]
    colours = _colours(values)
    kind, labels = runs[0].task.kind, runs[0].labels
    score = f"right by {runs[0].task.method} (%)" if labels else LOSSES[kind]
    styles = [
        {"color": colours[str(value)], "linewidth": 1.3, "alpha": 0.8, "zorder": 3 - 0.001 * place}
        for place, value in enumerate(values)
    ]
    styles[0] |= {"linewidth": 2.6, "alpha": 1.0}
    with picture(path, (15, 5), title) as figure:
        left, middle, right = figure.subplots(1, 3)
        steps = [list(range(1, len(run.losses) + 1)) for run in runs]
        means = [running_mean(run.losses)[1] for run in runs]
        _draw_lines(left, steps, means, styles, title="Training loss, a running mean", ylabel=LOSSES[kind])
        scale_log(left, *left.get_ylim())
        evaluations = [run.evaluations if labels else run.evaluations[1:] for run in runs]
        steps = [[each.step for each in of_run] for of_run in evaluations]
        scores = [[_score(run, each) for each in of_run] for run, of_run in zip(runs, evaluations, strict=True)]
        dotted = [style | {"marker": "o", "markersize": 4} for style in styles]
        _draw_lines(middle, steps, scores, dotted, title=f"On {runs[0].final.total:,} held out", ylabel=score)
        _draw_reached(right, runs, values, colours)
        right.set(title="The best evaluation of each run", xlabel=key, ylabel=score)
        right.grid(axis="y")
        if len(colours) <= _MOST_NAMED:
            for value, colour in colours.items():
                left.plot([], [], color=colour, linewidth=2, label=value)
            left.legend(title=key, edgecolor="none", framealpha=0.9)
    return path


def _colours(values: Sequence[Any]) -> dict[str, Any]:
    """A colour a value, from dark to light in the values' order."""
    numbers = all(isinstance(value, int | float) for value in values)
    distinct = list(dict.fromkeys(map(str, sorted(values) if numbers else values)))
    places = np.linspace(0.0, 0.88, len(distinct))
    return dict(zip(distinct, matplotlib.colormaps["viridis"](places), strict=True))


def _score(run: Run, evaluation: Any) -> float:
    return 100 * evaluation.accuracy if run.labels else float(evaluation.loss)


def _draw_reached(axes: Any, runs: Sequence[Run], values: Sequence[Any], colours: Mapping[str, Any]) -> None:
    """Each run's best evaluation over the first key's values, and a line through each value's best."""
    scores = [_score(run, run.best) for run in runs]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    order = list(colours)
    places = [float(value) if numeric else order.index(str(value)) for value in values]
    axes.scatter(places, scores, c=[colours[str(value)] for value in values], s=45, zorder=3)
    best = max if runs[0].labels else min
    tops = {place: best(s for p, s in zip(places, scores, strict=True) if p == place) for place in sorted(set(places))}
    axes.plot(list(tops), list(tops.values()), color=GREY, linewidth=1.2, zorder=2)
    if numeric and min(places) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted(set(places)), order if len(order) <= _MOST_NAMED else None)
    axes.tick_params(axis="x", labelrotation=30 if len(order) > 4 else 0)


def draw_runs(records: Sequence[RunRecord], path: str | Path) -> Path:
    """Draw held-out loss and accuracy over the steps into one PNG, a line a run.

    Of more than ten runs, the best and the median one are highlighted and the others are grey.

    Args:
        records: the runs, as `read_runs` gives them; those without an evaluation are left out.
        path: where the picture goes.

    Returns:
        The path.

    Raises:
        ValueError: no run has an evaluation.
        PermissionError: the picture can't be written.
    """
    drawn = [record for record in records if record.evaluations]
    if not drawn:
        raise ValueError("None of the runs has an evaluation yet: there is nothing to draw.")
    folder, names = name_runs(records)
    labels = [_label(record, name) for record, name in zip(records, names, strict=True) if record.evaluations]
    styles = [style | {"clip_on": False} for style in _styles(drawn, labels)]
    steps = [[each["step"] for each in record.evaluations] for record in drawn]
    losses = [[each["loss"] for each in record.evaluations] for record in drawn]
    shares = [[100 * each["accuracy"] for each in record.evaluations] for record in drawn]
    methods, kinds = {record.method for record in drawn}, {record.kind for record in drawn}
    runs = f"{len(drawn)} runs" if len(drawn) > 1 else "1 run"
    with picture(Path(path), (13, 5), f"{runs} in {folder.name}") as figure:
        left, right = figure.subplots(1, 2)
        what = LOSSES[kinds.pop()] if len(kinds) == 1 else "cross-entropy of each task"
        _draw_lines(left, steps, losses, styles, title="Held-out loss", ylabel=what)
        how = f"right by {methods.pop()} (%)" if len(methods) == 1 else "right (%)"
        _draw_lines(right, steps, shares, styles, title="Held-out accuracy", ylabel=how)
        low, high = min(map(min, losses)), max(map(max, losses))
        if low > 0 and high / low >= 5:
            scale_log(left, low, high)
        low, high = right.get_ylim()
        right.set_ylim(max(low, -1), min(max(high, low + 10), 101))
        for axes in (left, right):
            axes.set_xlim(left=0)
        figures = {"last accuracy" if record.kind.has_labels else "last loss" for record in drawn}
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside right upper",
            frameon=False,
            title=f"Run and its {' or '.join(sorted(figures))}",
            alignment="left",
        )
    return Path(path)


def _label(record: RunRecord, name: str) -> str:
    """A run in the legend: a long name without its middle, since runs are told apart by how they begin and end."""
    half = _LONGEST_NAME // 2
    short = name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
    figure = f"{record.last['accuracy']:.1%}" if record.kind.has_labels else f"loss {record.last['loss']:.3f}"
    state = "" if record.finished else f", unfinished ({record.steps:,} steps)"
    return f"{short}: {figure}{state}"


def _styles(records: Sequence[RunRecord], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Of a few runs a colour each, dashed once these are used up; of many the best and the median finished one."""
    finished = sum(record.finished for record in records)
    median = ((finished if finished > 2 else len(records)) - 1) // 2
    grey = {"color": GREY, "label": "_", "linewidth": 0.8, "alpha": 0.7, "zorder": 2.0}
    styles: list[dict[str, Any]] = [dict(grey) for _ in records]
    if len(records) <= _MOST_LINES:
        coloured = list(enumerate(labels))
    else:
        coloured = [(0, f"best: {labels[0]}"), (median, f"median: {labels[median]}")]
        styles[-1]["label"] = f"{len(records) - 2} other runs"
    for number, (place, label) in enumerate(coloured):
        colour = _COLOURS[number % len(_COLOURS)]
        styles[place] = {
            "color": colour,
            "label": label,
            "linestyle": "-" if number < len(_COLOURS) else "--",
            "linewidth": 1.8,
            "marker": "o",
            "markersize": 4.5,
            "markerfacecolor": colour if records[place].finished else "white",
            "zorder": 3 - 0.01 * number,
        }
    return styles
