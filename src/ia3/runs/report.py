"""The run as a picture and as a table: losses, accuracy, confusion, and how far each vector moved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from rich.table import Table

from ia3.card import add_results
from ia3.files import write_atomically
from ia3.runs.picture import BLUE, GREY, LOSSES, ORANGE, STYLE, log_ticks
from ia3.runs.run import ENVIRONMENT_NAME, METRICS_NAME, RECIPE_NAME, RESULT_NAME, Evaluation, Run
from ia3.tasks.metrics import confusion_matrix, write_score
from ia3.tasks.task import TaskKind

PICTURE_NAME = "report.png"
REPORT_NAME = "report.md"

# More labels than this make a confusion matrix that nobody can read.
_MOST_LABELS = 12
_MISTAKES_SHOWN = 10

# How the keys and values of an attention are called in the model families of transformers.
_KEYS = {"k", "k_proj", "key", "wk"}
_VALUES = {"v", "v_proj", "value", "wv"}
_CROSS = re.compile(r"EncDecAttention|encoder_attn|crossattention|cross_attn", re.IGNORECASE)


@dataclass(frozen=True)
class VectorMap:
    """One stack of blocks: the mean |l − 1| of each vector, NaN where a block has none."""

    title: str
    blocks: list[str]
    columns: list[str]
    distances: list[list[float]]


def vector_maps(model: Any, adapter: str = "default") -> list[VectorMap]:
    """How far each learned vector is from one, by stack, block and kind.

    Args:
        model: a model with the adapter attached.
        adapter: the adapter's name.

    Returns:
        One map a stack, the encoder before the decoder; `k`, `v`, `cross k`, `cross v` and `ff` (a vector
        on the input side) are the columns, other vectors go by their module's name.

    Raises:
        ValueError: the model has no vectors of that adapter.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, parameter in model.named_parameters():
        path, _, rest = name.partition(".ia3_l.")
        if rest != adapter:
            continue
        stack, block, column = _place(path, input_side=parameter.ndim > 1 and parameter.shape[0] == 1)
        distance = (parameter.detach().float() - 1).abs().mean().item()
        found.setdefault(stack, {}).setdefault(block, {})[column] = distance
    if not found:
        raise ValueError(f"The model has no vectors of an adapter named {adapter!r}: nothing to draw.")
    return [_vector_map(stack, blocks) for stack, blocks in found.items()]


def _place(path: str, *, input_side: bool) -> tuple[str, str, str]:
    """Split a module path into its stack, its block and the column of its vector."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    stack = next((part for part in reversed(parts[:number]) if part in ("encoder", "decoder")), "model")
    return stack, parts[number], _column(path, parts[-1], input_side=input_side)


def _column(path: str, kind: str, *, input_side: bool) -> str:
    if kind in _KEYS or kind in _VALUES:
        letter = "k" if kind in _KEYS else "v"
        kind = letter
    elif input_side:
        return "ff"
    return f"cross {kind}" if _CROSS.search(path) else kind


def _vector_map(stack: str, blocks: dict[str, dict[str, float]]) -> VectorMap:
    columns = list(dict.fromkeys(column for vectors in blocks.values() for column in vectors))
    rows = [[vectors.get(column, float("nan")) for column in columns] for vectors in blocks.values()]
    return VectorMap(stack.capitalize(), list(blocks), columns, rows)


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
    maps = vector_maps(model)
    rows = max(len(each.blocks) for each in maps)
    heat_height = 1.2 + 0.34 * rows
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 5.0 + heat_height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        halves: Any = figure.subfigures(2, 1, height_ratios=[4.2, heat_height], hspace=0.04)
        top, bottom = halves
        confusion = 0 < len(run.labels) <= _MOST_LABELS
        panels = [(_draw_losses, 1.15)]
        panels += [(_draw_accuracy, 1)] if run.final.total else []
        panels += [(_draw_confusion, 1.1)] if confusion else []
        axes = top.subplots(1, len(panels), width_ratios=[width for _, width in panels], squeeze=False)[0]
        for (draw, _), own in zip(panels, axes, strict=True):
            draw(own, run)
        _draw_vectors(bottom, maps)
        figure.suptitle(_headline(run, title), x=0.012, ha="left", fontsize=14, fontweight="bold")
        figure.savefig(path)
    return Path(path)


def _headline(run: Run, title: str) -> str:
    if not run.final.total:
        return f"{title}: perplexity {run.final.perplexity:.4g}, before training {run.evaluations[0].perplexity:.4g}"
    low, high = run.final.interval
    majority = "" if run.majority is None else f", majority {run.majority:.1%}"
    return f"{title}: {run.final.accuracy:.1%} right ({low:.1%} to {high:.1%}){majority}"


def _draw_losses(axes: Any, run: Run) -> None:
    steps = np.arange(1, len(run.losses) + 1)
    window = max(1, len(run.losses) // 25)
    smoothed = _smoothed(run.losses, window)
    axes.plot(steps, run.losses, color=GREY, linewidth=0.7, alpha=0.6, label="each step")
    axes.plot(steps, smoothed, color=BLUE, linewidth=2, label=f"mean of the last {window} steps")
    held_out = [(each.step, each.loss) for each in run.evaluations]
    axes.plot(*zip(*held_out, strict=True), "o", color=ORANGE, markersize=7, clip_on=False, label="held out")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(log_ticks(min(run.losses), max(run.losses[0], run.evaluations[0].loss)))
    axes.set(
        title="Loss",
        xlabel="step",
        ylabel=LOSSES[run.task.kind] if run.settings.objective == "lm" else "L_LM + L_UL + L_LN (held out: L_LM)",
    )
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    axes.legend(edgecolor="none", framealpha=1)


def _smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` losses at each step, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def _draw_accuracy(axes: Any, run: Run) -> None:
    steps = [each.step for each in run.evaluations]
    shares = [100 * each.accuracy for each in run.evaluations]
    ends = [each.interval for each in run.evaluations]
    below = [share - 100 * low for share, (low, _) in zip(shares, ends, strict=True)]
    above = [100 * high - share for share, (_, high) in zip(shares, ends, strict=True)]
    axes.errorbar(steps, shares, yerr=[below, above], fmt="o-", color=BLUE, linewidth=2, capsize=4, clip_on=False)
    for step, share, offset in zip(steps, shares, above, strict=True):
        place = (step, share + offset)
        side, shift = ("left", 8) if step == 0 else ("center", 0)
        axes.annotate(f"{share:.1f}", place, (shift, 5), textcoords="offset points", ha=side, color=BLUE)
    if run.majority is not None:
        _draw_majority(axes, run.majority)
    axes.set(
        title="Accuracy with 95 % intervals",
        xlabel="step",
        ylabel=f"right of {run.final.total:,} held out (%)\nby {run.task.method}",
    )
    axes.set_ylim(0, 100)
    axes.margins(x=0.1)
    axes.grid(axis="y")


def _draw_majority(axes: Any, majority: float) -> None:
    axes.axhline(100 * majority, color=ORANGE, linestyle="--", linewidth=1.5)
    axes.annotate(
        f"majority class {majority:.1%}",
        (1, 100 * majority),
        (0, -5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        color=ORANGE,
    )


def _draw_confusion(axes: Any, run: Run) -> None:
    counts = np.array(confusion_matrix(run.references, run.final.predictions, run.labels))
    columns = [*run.labels, "other"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        count = counts[row, column]
        _write_cell(axes, row, column, f"{count}\n{share:.0%}" if count else "0", dark=share > 0.55)
    _label_cells(axes, columns, list(run.labels))
    axes.set(title="Predictions: count, % of the true label", xlabel="predicted", ylabel="true")


def _draw_vectors(figure: Any, maps: list[VectorMap]) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(maps), width_ratios=[len(each.columns) for each in maps]))
    highest = max(float(np.nanmax(each.distances)) for each in maps) or 1.0
    for panel, each in zip(axes, maps, strict=True):
        image = panel.imshow(each.distances, cmap="YlGnBu", vmin=0, vmax=highest, aspect="auto")
        for (row, column), distance in np.ndenumerate(np.array(each.distances)):
            if np.isfinite(distance):
                _write_cell(panel, row, column, f"{distance:.2f}", dark=distance > 0.6 * highest)
        _label_cells(panel, each.columns, each.blocks)
        panel.set(title=f"{each.title}: how far each vector moved", ylabel="block")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015)
    bar.set_label("mean |l − 1| (0: the base model)")
    bar.outline.set_visible(False)


def _write_cell(axes: Any, row: int, column: int, text: str, *, dark: bool) -> None:
    axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "#202124")


def _label_cells(axes: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)


def result_table(run: Run, picture: Path | None = None) -> Table:
    """The run's result as a table for the terminal: accuracy, cost, size and paths."""
    table = Table(show_header=False, box=None, pad_edge=False, title="Result", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = _results(run)
    rows["adapter"] = f"{run.adapter_dir} ({run.adapter_bytes:,} bytes)"
    if run.best.step != run.final.step:
        rows["best adapter"] = str(run.best_dir)
    if picture is not None:
        rows["picture"] = str(picture)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _results(run: Run) -> dict[str, str]:
    """The run's figures by their names."""
    share = run.trainable_parameters / run.all_parameters
    what = " words" if run.task.kind is TaskKind.TOKEN_CLASSIFICATION else " held out"
    rows = {"accuracy": _accuracy(run.final, what)} if run.final.total else {}
    rows["asked for"] = run.task.method
    rows |= {name.replace("_", " "): write_score(name, value) for name, value in run.final.scores.items()}
    if run.final.macro_f1 is not None:
        rows["macro-F1"] = f"{run.final.macro_f1:.3f}"
    if run.majority is not None:
        rows["majority class"] = f"{run.majority:.1%}"
    before = run.evaluations[0]
    rows["before training"] = f"{before.accuracy:.1%}" if before.total else f"perplexity {before.perplexity:.4g}"
    rows["held-out loss"] = f"{run.final.loss:.3f} (perplexity {run.final.perplexity:.4g})"
    if run.best.step != run.final.step:
        share_right = f"{run.best.accuracy:.1%}, " if run.best.total else ""
        rows["best"] = f"{share_right}loss {run.best.loss:.3f}, after step {run.best.step}"
    early = " (stopped early)" if run.progress.stopped_early else ""
    rows["training"] = f"{run.train_seconds:.0f} s, {len(run.losses):,} steps{early}, {run.train_examples:,} examples"
    rows["trained numbers"] = f"{run.trainable_parameters:,} of {run.all_parameters:,} ({share:.3%})"
    return rows


def _accuracy(evaluation: Evaluation, what: str = "") -> str:
    low, high = evaluation.interval
    return f"{evaluation.accuracy:.1%} of {evaluation.total:,}{what} (95 % interval {low:.1%} to {high:.1%})"


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
    settings, majority = run.settings, run.majority
    step_size = settings.batch_size * settings.gradient_accumulation
    rate = f"{settings.optimizer}, {settings.learning_rate:g}, falling linearly after {settings.warmup_steps} steps"
    for folder, evaluation in ((run.adapter_dir, run.final), (run.best_dir, run.best)):
        facts = {
            "task": run.task.kind.value,
            "accuracy": _accuracy(evaluation) if evaluation.total else "",
            "asked for": run.task.method,
            **{name.replace("_", " "): write_score(name, value) for name, value in evaluation.scores.items()},
            "majority class": "" if majority is None else f"{majority:.1%}",
            "macro-F1": "" if evaluation.macro_f1 is None else f"{evaluation.macro_f1:.3f}",
            "held-out loss": f"{evaluation.loss:.3f}",
            "trained on": f"{run.train_examples:,} examples, {evaluation.step:,} steps of {step_size}",
            "learning rate": rate,
            "template": _cell(f"`{run.task.template.pattern}`"),
            "labels": _cell(", ".join(f"`{label}`" for label in run.labels[:_MOST_LABELS])),
        }
        add_results(
            folder,
            {name: value for name, value in facts.items() if value},
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
