"""How the pictures look: colours, style, ticks and the names of axes; and the picture of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from ia3.runs.run import Run
from ia3.tasks.task import TaskKind

# Okabe and Ito's palette: told apart with any kind of colour blindness, and in grey.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#9AA0A6"
STYLE = {
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


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two losses."""
    powers = range(-6, 6)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]


# The legend names no more values than these.
_MOST_NAMED = 12


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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 5), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        losses, scores, reached = figure.subplots(1, 3)
        for place, (run, value) in reversed(list(enumerate(zip(runs, values, strict=True)))):
            width = 2.6 if place == 0 else 1.3
            style = {"color": colours[str(value)], "linewidth": width, "alpha": 1 if place == 0 else 0.8}
            _draw_training(losses, run, style)
            _draw_scores(scores, run, style)
        _draw_reached(reached, runs, values, key, colours)
        _finish_losses(losses, runs)
        _finish_scores(scores, runs)
        if len(colours) <= _MOST_NAMED:
            for value, colour in colours.items():
                losses.plot([], [], color=colour, linewidth=2, label=value)
            losses.legend(title=key, edgecolor="none", framealpha=0.9)
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
        figure.savefig(path)
    return path


def _colours(values: Sequence[Any]) -> dict[str, Any]:
    """A colour a value, from dark to light in the values' order."""
    numbers = all(isinstance(value, int | float) for value in values)
    distinct = list(dict.fromkeys(map(str, sorted(values) if numbers else values)))
    places = np.linspace(0.0, 0.88, len(distinct))
    return dict(zip(distinct, matplotlib.colormaps["viridis"](places), strict=True))


def _draw_training(axes: Any, run: Run, style: Mapping[str, Any]) -> None:
    window = max(1, len(run.losses) // 25)
    means = np.convolve(run.losses, np.full(window, 1 / window), "valid")
    axes.plot(np.arange(window, len(run.losses) + 1), means, **style)


def _finish_losses(axes: Any, runs: Sequence[Run]) -> None:
    axes.set(title="Training loss, a running mean", xlabel="step", ylabel=LOSSES[runs[0].task.kind])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(log_ticks(*axes.get_ylim()))
    axes.grid(axis="y")


def _draw_scores(axes: Any, run: Run, style: Mapping[str, Any]) -> None:
    evaluations = run.evaluations if run.labels else run.evaluations[1:]
    scores = [_score(run, each.accuracy, each.loss) for each in evaluations]
    axes.plot([each.step for each in evaluations], scores, marker="o", markersize=4, **style)


def _finish_scores(axes: Any, runs: Sequence[Run]) -> None:
    held_out = f"{runs[0].final.total:,} held out"
    axes.set(title=f"On {held_out}", xlabel="step", ylabel=_score_name(runs[0]))
    axes.grid(axis="y")


def _draw_reached(axes: Any, runs: Sequence[Run], values: Sequence[Any], key: str, colours: Mapping[str, Any]) -> None:
    """Each run's best evaluation over the first key's values, and a line through each value's best."""
    scores = [_score(run, run.best.accuracy, run.best.loss) for run in runs]
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
    axes.set(title="The best evaluation of each run", xlabel=key, ylabel=_score_name(runs[0]))
    axes.grid(axis="y")


def _score(run: Run, accuracy: float, loss: float) -> float:
    return 100 * accuracy if run.labels else loss


def _score_name(run: Run) -> str:
    return f"right by {run.task.method} (%)" if run.labels else LOSSES[run.task.kind]
