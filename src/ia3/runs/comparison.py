"""Several runs side by side: what their folders say, what differs, and how repeated runs spread."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ia3.documents import wrong_field
from ia3.errors import listed
from ia3.files import expect_path
from ia3.runs.recipe import read_recipe
from ia3.runs.run import ENVIRONMENT_NAME, METRICS_NAME, RECIPE_NAME, RESULT_NAME
from ia3.runs.schemas import Figures, MetricsLine, Result, read_lines, read_written
from ia3.runs.sums import expect_unchanged
from ia3.tasks.task import AnswerBy, TaskKind, method_of
from ia3.tasks.template import Template

QUARTILE_METHOD: Final = "linear"

FINISHED, STOPPED_EARLY, UNFINISHED = "finished", "stopped early", "unfinished"

# What repeated runs may differ in: the drawn examples and their order, and the wording.
REPEATED = ("template", "seed")


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
    """Finished runs that differ in nothing but template and seed, at least two, the best first."""

    records: list[RunRecord]

    @property
    def kind(self) -> TaskKind:
        """What they learn."""
        return self.records[0].kind

    @property
    def varied(self) -> dict[str, int]:
        """What they differ in, and how many values it has."""
        return {key: len({str(value) for value in values}) for key, values in differences(self.records).items()}

    @property
    def accuracy(self) -> Quartiles:
        """The spread of the accuracy after the last step."""
        return quartiles_of([record.last["accuracy"] for record in self.records])

    @property
    def loss(self) -> Quartiles:
        """The spread of the held-out loss after the last step."""
        return quartiles_of([record.last["loss"] for record in self.records])

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
    expect_path(folder, "folder")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}: name the folder of your runs, or train one by ia3 train."
        )
    begun = (ENVIRONMENT_NAME, METRICS_NAME, RESULT_NAME)  # against a folder with a recipe of somebody's own
    found = [path.parent for path in sorted(folder.rglob(RECIPE_NAME))]
    runs = [path for path in found if any((path / name).is_file() for name in begun)]
    if not runs:
        raise FileNotFoundError(
            f"There are no runs in {folder}, nor below it: a run's folder holds {RECIPE_NAME} and {ENVIRONMENT_NAME}. "
            "Name the folder that was --output of ia3 train, or one above it."
        )
    return runs


def _read_run(folder: Path) -> RunRecord:
    path = folder / RESULT_NAME
    expect_unchanged(folder, RECIPE_NAME, ENVIRONMENT_NAME, METRICS_NAME, RESULT_NAME)
    recipe = _read_recipe(folder / RECIPE_NAME)
    if not path.is_file():
        steps, evaluations = _read_metrics(folder / METRICS_NAME)
        return RunRecord(folder, recipe, UNFINISHED, steps, evaluations)
    result, _ = read_written(path, Result)
    interval = result.accuracy_interval_95  # None of texts alone
    return RunRecord(
        folder,
        recipe,
        STOPPED_EARLY if result.stopped_early else FINISHED,
        result.steps,
        [_figures(each) for each in result.evaluations],
        interval=None if interval is None else (interval[0], interval[1]),
        best_accuracy=_figures(result.best)["accuracy"],
        seconds=result.train_seconds,
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    """The recipe without where it went, and with the one text column written as the template that it means."""
    recipe = read_recipe(path)
    missing = [name for name in ("model", "data", "task") if name not in recipe]
    kinds = {"answer_by": AnswerBy, "data": str, "model": str, "task": TaskKind, "template": str, "text_column": str}
    misfit = wrong_field(recipe, kinds)
    if missing or misfit:
        wrong = f"has no {missing[0]}" if missing else f"was changed, for {(misfit or '').rstrip('.')}"
        raise ValueError(f"{path} {wrong}: it is not as ia3 train wrote it. Put it back, or move the folder elsewhere.")
    recipe.pop("output", None)
    column = recipe.pop("text_column", "text")
    return {"template": Template.of_column(column).pattern} | recipe


def _read_metrics(path: Path) -> tuple[int, list[dict[str, float]]]:
    """The number of steps and the evaluations of a run under way, whose last line may not be whole yet."""
    if not path.is_file():  # before the first evaluation
        return 0, []
    lines = read_lines(path, MetricsLine)
    evaluations = [_figures(line.evaluation) for line in lines if line.evaluation is not None]
    return max((line.step for line in lines), default=0), evaluations


def _figures(evaluation: Figures) -> dict[str, float]:
    """An evaluation's figures, those of every run among them; of texts alone there is no accuracy."""
    found = evaluation.model_dump(exclude_none=True)
    return {"accuracy": math.nan} | {name: float(value) for name, value in found.items()}


def _rank(record: RunRecord) -> tuple[Any, ...]:
    """The smaller, the better."""
    last = record.last or {"accuracy": 0.0, "loss": math.inf}
    merit = _merit(record.kind, last["accuracy"], last["loss"])
    return (not record.finished, not record.last, not record.kind.has_labels, merit, str(record.folder))


def _merit(kind: TaskKind, accuracy: float, loss: float) -> tuple[float, float]:
    """The smaller, the better: few free texts equal the expected one, so there the loss tells more."""
    return (-accuracy, loss) if kind.has_labels else (loss, -accuracy)


def differences(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """What differs between the runs' recipes.

    Args:
        records: the runs.

    Returns:
        Key to one value a run, None where its recipe leaves the key out; model, data and task first, then what the
        recipes by name are told apart by, what repeated runs may differ in last.
    """
    first, last = ("model", "data", "task", "learning_rate", "target_modules", "objective", "steps"), REPEATED
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
    groups = [Repeats(group) for group in alike.values() if len(group) > 1]
    return sorted(groups, key=lambda group: _merit(group.kind, group.accuracy.median, group.loss.median))


def quartiles_of(values: Sequence[float]) -> Quartiles:
    """The median, the quartiles and the extremes.

    Quartiles are interpolated linearly between the two nearest values (numpy's method `linear`).

    Args:
        values: at least one finite number.

    Raises:
        ValueError: no values, or one that is NaN or infinite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"The values are [{listed(values)}]: expected at least one, and finite numbers only.")
    import numpy as np

    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75), method=QUARTILE_METHOD).tolist()
    return Quartiles(median, lower, upper, min(values), max(values))
