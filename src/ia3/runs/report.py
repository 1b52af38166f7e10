"""The run as a picture and as a table: losses, accuracy, confusion, and how far each vector moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ia3.adapter import site_vectors
from ia3.card import add_results
from ia3.files import write_atomically
from ia3.runs.adapters import VectorMap, vector_maps
from ia3.runs.picture import BLUE, GREY, LOSSES, ORANGE, colour_bar, heat_map, picture, running_mean, scale_log
from ia3.runs.run import (
    ENVIRONMENT_NAME,
    METRICS_NAME,
    PICTURE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    RESULT_NAME,
    Evaluation,
    Run,
)
from ia3.runs.tables import facts
from ia3.state import get_adapter
from ia3.tasks.metrics import confusion_matrix, describe, without_empty_other
from ia3.tasks.task import TaskKind

# More labels than this make a confusion matrix that nobody can read.
_MOST_LABELS = 12
_MISTAKES_SHOWN = 10


def draw_report(run: Run, model: Any, path: str | Path, *, title: str = "(IA)³ fine-tuning") -> Path:
    """Draw the run into one PNG: loss, accuracy, confusion matrix and the learned vectors.

    Args:
        run: a finished run.
        model: its model, with the trained vectors.
        path: where the picture goes.
        title: what was trained on what.

    Returns:
        The path.
    """
    maps = vector_maps(dict(site_vectors(model, get_adapter(model, "default"))))
    heat_height = 1.2 + 0.34 * max(len(each.blocks) for each in maps)
    panels = [(_draw_losses, 1.15)]
    panels += [(_draw_accuracy, 1.0)] if run.final.total else []
    panels += [(_draw_confusion, 1.1)] if 0 < len(run.labels) <= _MOST_LABELS else []
    with picture(Path(path), (13, 5.0 + heat_height), _headline(run, title)) as figure:
        top, bottom = figure.subfigures(2, 1, height_ratios=[4.2, heat_height], hspace=0.04)
        axes = top.subplots(1, len(panels), width_ratios=[width for _, width in panels], squeeze=False)[0]
        for (draw, _), own in zip(panels, axes, strict=True):
            draw(own, run)
        _draw_vectors(bottom, maps)
    return Path(path)


def _headline(run: Run, title: str) -> str:
    if not run.final.total:
        return f"{title}: perplexity {run.final.perplexity:.4g}, before training {run.evaluations[0].perplexity:.4g}"
    low, high = run.final.interval
    majority = "" if run.majority is None else f", majority {run.majority:.1%}"
    return f"{title}: {run.final.accuracy:.1%} right ({low:.1%} to {high:.1%}){majority}"


def _draw_losses(axes: Any, run: Run) -> None:
    steps = range(1, len(run.losses) + 1)
    window, means = running_mean(run.losses)
    axes.plot(steps, run.losses, color=GREY, linewidth=0.7, alpha=0.6, label="each step")
    axes.plot(steps, means, color=BLUE, linewidth=2, label=f"mean of the last {window} steps")
    held_out = [(each.step, each.loss) for each in run.evaluations]
    axes.plot(*zip(*held_out, strict=True), "o", color=ORANGE, markersize=7, clip_on=False, label="held out")
    scale_log(axes, min(run.losses), max(run.losses[0], run.evaluations[0].loss))
    axes.set(
        title="Loss",
        xlabel="step",
        ylabel=LOSSES[run.task.kind] if run.settings.objective == "lm" else "L_LM + L_UL + L_LN (held out: L_LM)",
    )
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    axes.legend(edgecolor="none", framealpha=1)


def _draw_accuracy(axes: Any, run: Run) -> None:
    steps = [each.step for each in run.evaluations]
    shares = np.array([100 * each.accuracy for each in run.evaluations])
    low, high = 100 * np.array([each.interval for each in run.evaluations]).T
    errors = (shares - low, high - shares)
    axes.errorbar(steps, shares, yerr=errors, fmt="o-", color=BLUE, linewidth=2, capsize=4, clip_on=False)
    offset: dict[str, Any] = {"textcoords": "offset points"}
    for step, share, end in zip(steps, shares, high, strict=True):
        side, shift = ("left", 8) if step == 0 else ("center", 0)
        axes.annotate(f"{share:.1f}", (step, end), (shift, 5), ha=side, color=BLUE, **offset)
    if run.majority is not None:
        place = (1, 100 * run.majority)
        axes.axhline(place[1], color=ORANGE, linestyle="--", linewidth=1.5)
        offset |= {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "color": ORANGE}
        axes.annotate(f"majority class {run.majority:.1%}", place, (0, -5), **offset)
    axes.set(
        title="Accuracy with 95 % intervals",
        xlabel="step",
        ylabel=f"right of {run.final.total:,} held out (%)\nby {run.task.method}",
    )
    axes.set_ylim(0, 108)  # room for a figure above 100 %
    axes.set_yticks(range(0, 101, 20))
    axes.margins(x=0.1)
    axes.grid(axis="y")


def _draw_confusion(axes: Any, run: Run) -> None:
    counts, columns = without_empty_other(
        confusion_matrix(run.references, run.final.predictions, run.labels), run.labels
    )
    shares = np.array(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)

    def write(row: int, column: int) -> str:
        count = counts[row][column]
        return f"{count}\n{shares[row, column]:.0%}" if count else "0"

    labels = {"title": "Predictions: count, % of the true label", "xlabel": "predicted", "ylabel": "true"}
    heat_map(axes, shares, run.labels, columns, colours="Blues", low=0, high=1, write=write, **labels)


def _draw_vectors(figure: Any, maps: list[VectorMap]) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(maps), width_ratios=[len(each.columns) for each in maps]))
    highest = max(float(np.nanmax(each.distances)) for each in maps) or 1.0
    for panel, each in zip(axes, maps, strict=True):
        image = heat_map(
            panel,
            each.distances,
            each.blocks,
            each.columns,
            colours="YlGnBu",
            low=0,
            high=highest,
            write=lambda row, column, shown=each.distances: f"{shown[row][column]:.2f}",  # type: ignore[misc]
            title=f"{each.title}: how far each vector moved",
            ylabel="block",
        )
    colour_bar(figure, image, list(axes), "mean |l − 1|\n(0: the base model)")


def result_table(run: Run, picture: Path | None = None) -> Table:
    """The run's result as a table for the terminal: accuracy, cost, size and paths."""
    rows = _results(run)
    rows["adapter"] = f"{run.adapter_dir} ({run.adapter_bytes:,} bytes)"
    if run.best.step != run.final.step:
        rows["best adapter"] = str(run.best_dir)
    if picture is not None:
        rows["picture"] = str(picture)
    return facts("Result", rows)


def _describe(run: Run, evaluation: Evaluation, unit: str = "") -> dict[str, str]:
    """An evaluation's figures by their names."""
    found = {
        "accuracy_interval_95": evaluation.interval,
        "examples": evaluation.total,
        "majority_baseline": run.majority,
        "method": run.task.method,
    }
    return describe(evaluation.summary() | found, unit)


def _results(run: Run) -> dict[str, str]:
    """The run's figures by their names."""
    share = run.trainable_parameters / run.all_parameters
    rows = _describe(run, run.final, " words" if run.task.kind is TaskKind.TOKEN_CLASSIFICATION else " held out")
    before = run.evaluations[0]
    rows["before training"] = f"{before.accuracy:.1%}" if before.total else f"perplexity {before.perplexity:.4g}"
    rows["held-out loss"] = f"{run.final.loss:.3f} (perplexity {run.final.perplexity:.4g})"
    if run.best.step != run.final.step:
        share_right = f"{run.best.accuracy:.1%}, " if run.best.total else ""
        rows["best"] = f"{share_right}loss {run.best.loss:.3f}, after step {run.best.step}"
    early = " (stopped early)" if run.progress.stopped_early else ""
    rows["training"] = f"{run.train_seconds:.0f} s, {len(run.losses):,} steps{early}, {run.train_examples:,} examples"
    rows["trained numbers"] = f"{run.trainable_parameters:,} of {run.all_parameters:,} ({share:.3%})"
    if run.advice is not None:
        rows["advice"] = run.advice
    return rows


def write_report(run: Run, title: str) -> Path:
    """Write `report.md` into the run's folder: figures, picture, mistakes, and what the other files hold.

    Args:
        run: a finished run, whose picture is drawn.
        title: what was trained on what.

    Returns:
        The path.
    """
    figures = "\n".join(f"| {name} | {value} |" for name, value in _results(run).items())
    parts = [
        f"# {title}",
        f"| | |\n|---|---|\n{figures}",
        f"![Loss, accuracy and learned vectors]({PICTURE_NAME})",
        *_mistakes(run),
        _FILES,
    ]
    path = run.output_dir / REPORT_NAME
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())
    return path


def complete_cards(run: Run, data: str, *, named: bool) -> None:
    """Put data, figures and settings into the cards of the run's adapters.

    Args:
        run: a finished run.
        data: the training data's name.
        named: whether others can find them by it; data in memory have a name for the eye alone.
    """
    settings = run.settings
    step_size = settings.batch_size * settings.gradient_accumulation
    rate = f"{settings.optimizer}, {settings.learning_rate:g}, falling linearly after {settings.warmup_steps} steps"
    for folder, evaluation in ((run.adapter_dir, run.final), (run.best_dir, run.best)):
        rows = {
            "task": run.task.kind.value,
            **_describe(run, evaluation),
            "held-out loss": f"{evaluation.loss:.3f}",
            "trained on": f"{run.train_examples:,} examples, {evaluation.step:,} steps of {step_size}",
            "learning rate": rate,
            "template": _cell(f"`{run.task.template.pattern}`"),
        }
        if run.labels:
            rows["labels"] = _cell(", ".join(f"`{label}`" for label in run.labels[:_MOST_LABELS]))
        add_results(
            folder,
            rows,
            accuracy=evaluation.accuracy if evaluation.total else None,
            task=_HUB_TASKS[run.task.kind],
            data=data,
            named=named,
        )


_HUB_TASKS = {
    TaskKind.LABEL_WORDS: "text-classification",
    TaskKind.GENERATION: "text-generation",
    TaskKind.LANGUAGE_MODELLING: "text-generation",
    TaskKind.INSTRUCTIONS: "text-generation",
    TaskKind.SEQUENCE_CLASSIFICATION: "text-classification",
    TaskKind.TOKEN_CLASSIFICATION: "token-classification",
}

_FILES = f"""## Files

| file | what it holds |
|---|---|
| `adapter/`, `best/` | the adapter after the last step, and at the best evaluation |
| `{RECIPE_NAME}` | all that was asked for; `ia3 train --recipe {RECIPE_NAME}` does it again |
| `{ENVIRONMENT_NAME}` | versions, hardware, digests of the data |
| `{METRICS_NAME}` | a line a step and an evaluation |
| `{RESULT_NAME}` | every figure, and each held-out answer |"""


def _mistakes(run: Run) -> list[str]:
    """The first wrong answers, as a table."""
    answers = zip(run.shown, run.references, run.final.predictions, strict=True)
    wrong = [answer for answer in answers if answer[1] != answer[2]]
    if not wrong:
        return []
    lines = "\n".join("| " + " | ".join(_cell(part) for part in answer) + " |" for answer in wrong[:_MISTAKES_SHOWN])
    shown = min(len(wrong), _MISTAKES_SHOWN)
    return [f"## Wrong answers: {shown:,} of {len(wrong):,}", f"| text | right | answered |\n|---|---|---|\n{lines}"]


def _cell(text: str) -> str:
    """Text as a cell of a table in Markdown, shortened."""
    line = " ".join(text.split())
    return (line if len(line) <= 160 else f"{line[:159]}…").replace("\\", "\\\\").replace("|", "\\|") or " "
