"""Several runs side by side: what their folders say, what differs, how repeated runs spread, and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from ia3.runs.picture import BLUE, GREY, LOSSES, ORANGE, STYLE, log_ticks
from ia3.runs.recipe import read_recipe
from ia3.runs.run import ENVIRONMENT_NAME, METRICS_NAME, RECIPE_NAME, RESULT_NAME
from ia3.tasks.task import TaskKind, method_of
from ia3.tasks.template import Template

PICTURE_NAME = "runs.png"
QUARTILE_METHOD: Final = "linear"

FINISHED, STOPPED_EARLY, UNFINISHED = "finished", "stopped early", "unfinished"

# What repeated runs may differ in: the drawn examples and their order, and the wording.
REPEATED = ("template", "seed")
_MOST_LINES = 10
_LONGEST_NAME = 40
_COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#202124")


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says about it.

    Args:
        folder: the run's folder.
        recipe: the recipe's keys without `output`; `template` is there even where only a text column was given.
        state: `finished`, `stopped early` or `unfinished`; a run under way is unfinished.
        steps: how many steps are done.
        evaluations: the figures of each evaluation, in the order of their steps.
        interval: the last accuracy's 95 % interval; None while unfinished.
        best_accuracy: the accuracy of the best evaluation, whose adapter is in `best/`; None while unfinished.
        seconds: how long the steps took; None while unfinished.
    """

    folder: Path
    recipe: dict[str, Any] = field(repr=False)
    state: str
    steps: int
    evaluations: list[dict[str, float]] = field(repr=False)
    interval: tuple[float, float] | None = None
    best_accuracy: float | None = None
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether its training came to an end."""
        return self.state != UNFINISHED

    @property
    def kind(self) -> TaskKind:
        """What it learns."""
        return TaskKind(self.recipe["task"])

    @property
    def method(self) -> str:
        """How its answers are found: what its accuracy means."""
        return method_of(self.kind, self.recipe.get("answer_by") or "rank")

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last evaluation; empty where there is none yet."""
        return self.evaluations[-1] if self.evaluations else {}

    def summary(self) -> dict[str, Any]:
        """The record as JSON writes it."""
        return {
            "accuracy": self.last.get("accuracy"),
            "accuracy_interval_95": None if self.interval is None else list(self.interval),
            "best_accuracy": self.best_accuracy,
            "evaluations": self.evaluations,
            "folder": str(self.folder),
            "loss": self.last.get("loss"),
            "macro_f1": self.last.get("macro_f1"),
            "method": self.method,
            "recipe": self.recipe,
            "state": self.state,
            "steps": self.steps,
            "train_seconds": self.seconds,
        }


@dataclass(frozen=True)
class Quartiles:
    """How values lie: their median, quartiles and extremes."""

    median: float
    lower: float
    upper: float
    lowest: float
    highest: float

    def summary(self) -> dict[str, Any]:
        """The figures as JSON writes them, with the quartiles' method."""
        return asdict(self) | {"quartiles": f"numpy, {QUARTILE_METHOD}"}


@dataclass(frozen=True)
class Repeats:
    """Finished runs that differ in nothing but template and seed.

    Args:
        records: at least two, the best first.
        varied: what they differ in, and how many values it has.
        accuracy: the spread of the accuracy after the last step.
        loss: the spread of the held-out loss after the last step.
    """

    records: list[RunRecord] = field(repr=False)
    varied: dict[str, int]
    accuracy: Quartiles
    loss: Quartiles

    @property
    def kind(self) -> TaskKind:
        """What they learn."""
        return self.records[0].kind

    def summary(self) -> dict[str, Any]:
        """The group as JSON writes it."""
        return {
            "accuracy": self.accuracy.summary(),
            "count": len(self.records),
            "folders": [str(record.folder) for record in self.records],
            "loss": self.loss.summary(),
            "varied": self.varied,
        }


def read_runs(folders: Iterable[str | Path]) -> list[RunRecord]:
    """Find the runs at and below folders, unfinished ones too.

    Args:
        folders: a run's folder, or any folder above it.

    Returns:
        One record a run: finished runs before unfinished ones, then the most accurate first; where answers are
        free text the lowest held-out loss first.

    Raises:
        FileNotFoundError: there is no such folder, or no run in one of them.
        ValueError: a damaged file.
    """
    found = {path.resolve(): path for folder in folders for path in _find_runs(Path(folder))}
    return sorted((_read_run(path) for path in found.values()), key=_rank)


def _find_runs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}: name the folder of your runs, or train one by ia3 train."
        )
    runs = [path.parent for path in sorted(folder.rglob(RECIPE_NAME)) if _has_begun(path.parent)]
    if not runs:
        raise FileNotFoundError(
            f"There are no runs in {folder}, nor below it: a run's folder holds {RECIPE_NAME} and {ENVIRONMENT_NAME}. "
            "Name the folder that was --output of ia3 train, or one above it."
        )
    return runs


def _has_begun(folder: Path) -> bool:
    """Whether it is a run's folder and not one with a recipe of somebody's own."""
    return any((folder / name).is_file() for name in (ENVIRONMENT_NAME, METRICS_NAME, RESULT_NAME))


def _read_run(folder: Path) -> RunRecord:
    recipe = _read_recipe(folder / RECIPE_NAME)
    path = folder / RESULT_NAME
    if not path.is_file():
        steps, evaluations = _read_metrics(folder / METRICS_NAME)
        return RunRecord(folder, recipe, UNFINISHED, steps, evaluations)
    result = _parse(path, path.read_bytes())
    try:
        interval = result["accuracy_interval_95"]  # None of texts alone
        evaluations = [_figures(each) for each in result["evaluations"]]
        if not evaluations:
            raise ValueError("it has no evaluation")
        return RunRecord(
            folder,
            recipe,
            STOPPED_EARLY if result["stopped_early"] else FINISHED,
            result["steps"],
            evaluations,
            interval=None if interval is None else (interval[0], interval[1]),
            best_accuracy=_figures(result["best"])["accuracy"],
            seconds=result["train_seconds"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the result of a run as this version of ia3 writes it ({_reason(error)}): train again, or "
            "move the folder elsewhere."
        ) from error


def _read_recipe(path: Path) -> dict[str, Any]:
    """The recipe without where it went, and with the one text column written as the template that it means."""
    recipe = read_recipe(path)
    missing = [name for name in ("model", "data", "task") if name not in recipe]
    if missing or recipe["task"] not in [kind.value for kind in TaskKind]:
        wrong = f"has no {missing[0]}" if missing else f"names an unknown task, {recipe['task']!r}"
        raise ValueError(f"{path} {wrong}: it is not as ia3 train wrote it. Put it back, or move the folder elsewhere.")
    recipe.pop("output", None)
    column = recipe.pop("text_column", "text")
    return {"template": Template.of_column(column).pattern} | recipe


def _read_metrics(path: Path) -> tuple[int, list[dict[str, float]]]:
    """The number of steps and the evaluations of a run under way, whose last line may not be whole yet."""
    if not path.is_file():  # before the first evaluation
        return 0, []
    *lines, _ = path.read_bytes().split(b"\n")
    steps, evaluations = 0, []
    for number, line in enumerate(lines, start=1):
        content = _parse(path, line, f" in line {number}")
        try:
            steps = max(steps, int(content["step"]))
            if "evaluation" in content:
                evaluations.append(_figures(content["evaluation"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f" in line {number}", _reason(error)) from error
    return steps, evaluations


def _parse(path: Path, text: bytes, place: str = "") -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _damaged(path, place, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, place, "it is no JSON object")
    return content


def _damaged(path: Path, place: str, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged{place} ({reason}): copy it again, or move its run's folder elsewhere.")


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _figures(evaluation: dict[str, Any]) -> dict[str, float]:
    """An evaluation's figures, those of every run among them; of texts alone there is no accuracy."""
    return {"accuracy": math.nan} | {name: float(evaluation[name]) for name in ("step", "loss", *evaluation)}


def _rank(record: RunRecord) -> tuple[Any, ...]:
    """The smaller, the better."""
    if not record.evaluations:
        return (True, True, True, (math.inf, math.inf), str(record.folder))
    merit = _merit(record.kind, record.last["accuracy"], record.last["loss"])
    return (not record.finished, False, not record.kind.has_labels, merit, str(record.folder))


def _merit(kind: TaskKind, accuracy: float, loss: float) -> tuple[float, float]:
    """The smaller, the better: few free texts equal the expected one, so there the loss tells more."""
    return (-accuracy, loss) if kind.has_labels else (loss, -accuracy)


def differences(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """What differs between the runs' recipes.

    Args:
        records: the runs.

    Returns:
        Key to one value a run, None where its recipe leaves the key out; model, data and task first, what repeated
        runs may differ in last.
    """
    first, last = ("model", "data", "task"), REPEATED
    between = sorted({key for record in records for key in record.recipe} - {*first, *last})
    columns = {key: [record.recipe.get(key) for record in records] for key in (*first, *between, *last)}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def name_runs(records: Sequence[RunRecord]) -> tuple[Path, list[str]]:
    """Short names of runs.

    Args:
        records: at least one run.

    Returns:
        The folder that all of them are in, and each run's path from there.
    """
    folders = [record.folder.resolve() for record in records]
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    return common, [folder.relative_to(common).as_posix() for folder in folders]


def group_repeats(records: Sequence[RunRecord]) -> list[Repeats]:
    """Group the finished runs that differ in nothing but template and seed.

    T-Few is reported like that: the median over templates and seeds with quartiles (Liu et al. 2022).

    Args:
        records: the runs, the best first.

    Returns:
        The groups of at least two runs, the best median first.
    """
    alike: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.finished:
            rest = {key: value for key, value in record.recipe.items() if key not in REPEATED}
            alike.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(record)
    groups = [_repeats(group) for group in alike.values() if len(group) > 1]
    return sorted(groups, key=lambda group: _merit(group.kind, group.accuracy.median, group.loss.median))


def _repeats(records: list[RunRecord]) -> Repeats:
    varied = {key: len({str(value) for value in values}) for key, values in differences(records).items()}
    return Repeats(
        records,
        varied,
        accuracy=quartiles_of([record.last["accuracy"] for record in records]),
        loss=quartiles_of([record.last["loss"] for record in records]),
    )


def quartiles_of(values: Sequence[float]) -> Quartiles:
    """The median, the quartiles and the extremes.

    Quartiles are interpolated linearly between the two nearest values (numpy's method `linear`).

    Args:
        values: at least one finite number.

    Raises:
        ValueError: no values, or one that is NaN or infinite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"The values are {list(values)}: expected at least one, and finite numbers only.")
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75), method=QUARTILE_METHOD).tolist()
    return Quartiles(median, lower, upper, min(values), max(values))


@dataclass(frozen=True)
class _Line:
    """One run's line in the picture; without a label the legend doesn't name it."""

    record: RunRecord
    label: str
    style: dict[str, Any]


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
    names = [_shorten(name) for record, name in zip(records, names, strict=True) if record.evaluations]
    few = len(drawn) <= _MOST_LINES
    lines = _each_apart(drawn, names) if few else _best_and_median(drawn, names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 5), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        answered = [line for line in lines if line.record.kind.has_answers]
        left, *right = figure.subplots(1, 2 if answered else 1, squeeze=False)[0]
        _draw_losses(left, lines)
        if answered:
            _draw_accuracies(right[0], answered)
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside right upper",
            frameon=False,
            title=_legend_title(drawn),
            alignment="left",
        )
        runs = f"{len(drawn)} runs" if len(drawn) > 1 else "1 run"
        figure.suptitle(f"{runs} in {folder.name}", x=0.012, ha="left", fontsize=14, fontweight="bold")
        _save(figure, Path(path))
    return Path(path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except PermissionError as error:
        raise PermissionError(
            f"The picture {path} cannot be written: make its folder writable, or copy the runs to one that is."
        ) from error


def _shorten(name: str) -> str:
    """A long name without its middle: runs are told apart by how their names begin and end."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _each_apart(records: Sequence[RunRecord], names: Sequence[str]) -> list[_Line]:
    """A colour a run, and dashes once the colours are used up; the best run is on top."""
    styles = []
    for number, colour in zip(range(len(records)), cycle(_COLOURS), strict=False):
        dash = "-" if number < len(_COLOURS) else "--"
        styles.append({"color": colour, "linestyle": dash, "linewidth": 1.8, "marker": "o", "markersize": 4.5})
    return [
        _Line(record, _label(record, name), style | _face(record) | {"zorder": 3 - 0.01 * number})
        for number, (record, name, style) in enumerate(zip(records, names, styles, strict=True))
    ]


def _best_and_median(records: Sequence[RunRecord], names: Sequence[str]) -> list[_Line]:
    """The best and the median one of the finished runs in colour, the others in grey below them."""
    finished = sum(record.finished for record in records)
    median = ((finished if finished > 2 else len(records)) - 1) // 2
    strong = {"linewidth": 2.2, "marker": "o", "markersize": 5}
    lines = []
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        label, style = "", {"color": GREY, "linewidth": 0.8, "alpha": 0.7, "zorder": 2.0}
        if number == 0:
            label, style = f"best: {_label(record, name)}", {"color": BLUE, "zorder": 3, **strong, **_face(record)}
        elif number == median:
            label, style = f"median: {_label(record, name)}", {"color": ORANGE, "zorder": 2.9, **strong}
        lines.append(_Line(record, label, style))
    last = lines[-1]
    lines[-1] = _Line(last.record, f"{len(records) - 2} other runs", last.style)
    return lines


def _face(record: RunRecord) -> dict[str, Any]:
    return {} if record.finished else {"markerfacecolor": "white"}


def _label(record: RunRecord, name: str) -> str:
    figure = f"{record.last['accuracy']:.1%}" if record.kind.has_labels else f"loss {record.last['loss']:.3f}"
    state = "" if record.finished else f", unfinished ({record.steps:,} steps)"
    return f"{name}: {figure}{state}"


def _legend_title(records: Sequence[RunRecord]) -> str:
    figures = {"last accuracy" if record.kind.has_labels else "last loss" for record in records}
    return f"Run and its {' or '.join(sorted(figures))}"


def _draw_losses(axes: Any, lines: Sequence[_Line]) -> None:
    _draw_figure(axes, lines, "loss")
    losses = [each["loss"] for line in lines for each in line.record.evaluations]
    low, high = min(losses), max(losses)
    if low > 0 and high / low >= 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(log_ticks(low, high))
    kinds = {line.record.kind for line in lines}
    axes.set(title="Held-out loss", ylabel=LOSSES[kinds.pop()] if len(kinds) == 1 else "cross-entropy of each task")


def _draw_accuracies(axes: Any, lines: Sequence[_Line]) -> None:
    _draw_figure(axes, lines, "accuracy", scale=100)
    methods = {line.record.method for line in lines}
    axes.set(title="Held-out accuracy", ylabel=f"right by {methods.pop()} (%)" if len(methods) == 1 else "right (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1), min(max(high, low + 10), 101))


def _draw_figure(axes: Any, lines: Sequence[_Line], name: str, *, scale: float = 1) -> None:
    for line in lines:
        steps = [each["step"] for each in line.record.evaluations]
        values = [scale * each[name] for each in line.record.evaluations]
        axes.plot(steps, values, label=line.label or "_", clip_on=False, **line.style)
    axes.set(xlabel="step", xlim=(0, None))
    axes.grid(axis="y")
