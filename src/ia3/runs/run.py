"""A run and its folder: recipe, environment, metrics a line a step, adapters, the state to go on from."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ia3.files import write_atomically
from ia3.runs.settings import TrainSettings
from ia3.tasks.metrics import figures_of, majority_baseline, wilson_interval
from ia3.tasks.task import TASK_NAME, Task

ADAPTER_FOLDER = "adapter"
BEST_FOLDER = "best"
RECIPE_NAME = "recipe.yaml"
ENVIRONMENT_NAME = "environment.json"
METRICS_NAME = "metrics.jsonl"
RESULT_NAME = "result.json"
STATE_NAME = "state.pt"
REPORT_NAME = "report.md"
PICTURE_NAME = "report.png"
SUMS_NAME = "SHA256SUMS"
# Of a sweep, in the folder that holds its runs.
SWEEP_NAME = "sweep.json"
SWEEP_RECIPES_NAME = "sweep.yaml"
SWEEP_PICTURE_NAME = "sweep.png"
# What is left of the work that has ended, and what goes on from it: removed before anything new begins.
RUN_FILES = (RECIPE_NAME, STATE_NAME, SUMS_NAME, RESULT_NAME, ENVIRONMENT_NAME, METRICS_NAME, REPORT_NAME, PICTURE_NAME)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", TASK_NAME)
SWEEP_FILES = (SWEEP_RECIPES_NAME, SWEEP_NAME, SWEEP_PICTURE_NAME)
# What `ia3 runs` writes into the folder above.
RUNS_PICTURE_NAME = "runs.png"

# An interval wider than so many points to either side tells little.
_WIDE = 0.1
# A held-out loss that the last third of a training lowers by so much is not at its end.
_STILL_FALLING = 0.05


@dataclass(frozen=True)
class Evaluation:
    """The held-out examples after `step` steps.

    Args:
        step: how many steps the model had been trained for.
        loss: the mean a target (a label token, a text, a word).
        correct: how many answers equal the references.
        total: out of how many; 0 where texts alone are learned, which have none.
        macro_f1: the mean F1 of the labels; None where answers are free text.
        seconds: how long it took.
        predictions: the answers; kept of the last and the best evaluation.
        scores: further figures by name, such as `entity_f1`.
    """

    step: int
    loss: float
    correct: int
    total: int
    macro_f1: float | None
    seconds: float
    predictions: list[str] = field(repr=False)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The share of answers that equal the references; NaN where there are none."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % interval (Wilson)."""
        return wilson_interval(self.correct, self.total) if self.total else (math.nan, math.nan)

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def describe(self) -> str:
        """The figure that it is for, in words."""
        right = f"{self.accuracy:.1%} of {self.total:,} right, " if self.total else ""
        return f"{right}held-out loss {self.loss:.3f}"

    def summary(self) -> dict[str, Any]:
        """Its figures as JSON writes them."""
        figures = {"accuracy": self.accuracy} if self.total else {}
        figures |= {"loss": self.loss, "seconds": self.seconds, "step": self.step}
        if self.macro_f1 is not None:
            figures["macro_f1"] = self.macro_f1
        return figures | self.scores


def compute_metrics(
    step: int, loss: float, references: list[str], predictions: list[str], labels: tuple[str, ...], **more: Any
) -> Evaluation:
    """An evaluation from its answers; `more` are its further fields."""
    found = figures_of(references, predictions, labels)
    return Evaluation(
        step, loss, found["correct"], found["examples"], found.get("macro_f1"), predictions=predictions, **more
    )


@dataclass
class TrainerState:
    """How far a training has come.

    Args:
        steps: one record a step: its number, loss and learning rate.
        evaluations: one before the first step, then in the order of their steps.
        best: the index of the best evaluation of those after training began; None while there is none.
        seconds: how long the steps took.
        stopped_early: whether the evaluations stopped getting better.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: int | None = None
    seconds: float = 0.0
    stopped_early: bool = False

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.steps)

    def lines(self, method: str) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, evaluations after the step that they follow, with how answers are found."""
        lines: list[dict[str, Any]] = []
        following = {each.step: each for each in self.evaluations}
        for step in range(self.step + 1):
            if step:
                lines.append(self.steps[step - 1])
            if step in following:
                lines.append({"evaluation": following[step].summary(), "method": method, "step": step})
        return lines


@dataclass(frozen=True)
class Run:
    """A finished training: what it cost, what it reached, and where its files are."""

    output_dir: Path
    settings: TrainSettings
    task: Task
    shown: list[str] = field(repr=False)
    references: list[str] = field(repr=False)
    progress: TrainerState = field(repr=False)
    train_examples: int
    trainable_parameters: int
    all_parameters: int

    @property
    def adapter_dir(self) -> Path:
        """Where the adapter is, as it was after the last step."""
        return self.output_dir / ADAPTER_FOLDER

    @property
    def best_dir(self) -> Path:
        """Where the adapter of the best evaluation is."""
        return self.output_dir / BEST_FOLDER

    @property
    def adapter_bytes(self) -> int:
        """The size of the adapter's tensors and configuration on disk."""
        return sum(path.stat().st_size for path in self.adapter_dir.glob("adapter_*"))

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's labels, none where answers are free text."""
        return self.task.labels

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [record["loss"] for record in self.progress.steps]

    @property
    def evaluations(self) -> list[Evaluation]:
        """One before the first step, then in the order of their steps."""
        return self.progress.evaluations

    @property
    def final(self) -> Evaluation:
        """The evaluation after the last step."""
        return self.evaluations[-1]

    @property
    def best(self) -> Evaluation:
        """The best evaluation after the first step, by `settings.best_by`."""
        assert self.progress.best is not None
        return self.evaluations[self.progress.best]

    @property
    def train_seconds(self) -> float:
        """How long the steps took, evaluations not counted."""
        return self.progress.seconds

    @property
    def majority(self) -> float | None:
        """The accuracy of always answering the held-out set's most frequent label; None for free text."""
        return majority_baseline(self.references) if self.labels else None

    @property
    def advice(self) -> str | None:
        """What to do about the result, in a line; None where nothing stands out."""
        return advise(self)

    def summary(self) -> dict[str, Any]:
        """The run's numbers as JSON writes them."""
        return {
            "accuracy": self.final.accuracy if self.final.total else None,
            "accuracy_interval_95": list(self.final.interval) if self.final.total else None,
            "adapter_bytes": self.adapter_bytes,
            "advice": self.advice,
            "all_parameters": self.all_parameters,
            "base_model": self.task.base_model,
            "best": self.best.summary(),
            "evaluations": [each.summary() for each in self.evaluations],
            "labels": list(self.labels),
            "loss": self.final.loss,
            "macro_f1": self.final.macro_f1,
            "majority_baseline": self.majority,
            "method": self.task.method,
            "perplexity": self.final.perplexity,
            "scores": self.final.scores,
            "settings": asdict(self.settings),
            "steps": len(self.losses),
            "stopped_early": self.progress.stopped_early,
            "task": self.task.kind.value,
            "test_examples": self.final.total or None,
            "train_examples": self.train_examples,
            "train_seconds": self.train_seconds,
            "trainable_parameters": self.trainable_parameters,
        }


def advise(run: Run, edge: str | None = None) -> str | None:
    """What to do about a result, in a line, the most important thing alone; None where nothing stands out.

    Args:
        run: a finished run.
        edge: what a sweep says whose best learning rate is the lowest or the highest that was tried.
    """
    final, majority = run.final, run.majority
    low, high = final.interval
    few = majority is not None and high - low > 2 * _WIDE
    if majority is not None and low <= majority and not (few and final.accuracy > majority):
        better = "Not clearly" if final.accuracy > majority else "No"
        return (
            f"{better} better than the most frequent label for all ({majority:.1%}): try a higher learning rate and "
            "more epochs, and look at the labels."
        )
    if final.correct < final.total:
        if edge is not None and not few:  # which rate is best is not told by so few answers
            return edge
        if (before := _loss_before(run)) is not None and final.loss < (1 - _STILL_FALLING) * before:
            return (
                f"The held-out loss still falls ({before:.3g} after two thirds, {final.loss:.3g} at the end): train "
                "for more epochs, or at a higher learning rate."
            )
    if few:
        return (
            f"{final.total:,} held-out answers are too few to tell: 95 % intervals are {low:.0%} to {high:.0%} here. "
            "Hold out more of the data, or give held-out data of their own."
        )
    return None


def _loss_before(run: Run) -> float | None:
    """The lowest held-out loss of the first two thirds of a training that went to its end; None if not measured."""
    losses = [each.loss for each in run.evaluations if 0 < each.step <= 2 / 3 * run.final.step]
    return min(losses) if losses and not run.progress.stopped_early else None


def check_output(folder: Path) -> None:
    """Find out before training, not after, that a run cannot be saved.

    Raises:
        NotADirectoryError, IsADirectoryError, PermissionError: the folder cannot be made or written, or something of
            another kind has the name of a file or a folder of a run.
    """
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"The output {folder} cannot be a folder, since {nearest} is a file: name another.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"The output {folder} cannot be written, since {nearest} is read-only: name another.")
    of_adapters = [f"{each}/{name}" for each in (ADAPTER_FOLDER, BEST_FOLDER) for name in (*ADAPTER_FILES, "README.md")]
    for path in (folder / name for name in (*RUN_FILES, *SWEEP_FILES, *of_adapters)):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, and a run writes a file there: move it elsewhere.")
    for path in (folder / ADAPTER_FOLDER, folder / BEST_FOLDER):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, and a run has a folder there: move it elsewhere.")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is read-only, and a run writes there: make it writable, or name another.")


def new_folder(source: str) -> Path:
    """A folder in `runs/` named after the data and the time."""
    name = re.sub(r"\W+", "-", Path(source).stem).strip("-") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON with sorted keys, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())
