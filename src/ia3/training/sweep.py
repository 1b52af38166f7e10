"""Many trainings in one batch: a grid of settings over one frozen base, ranked by what they reach."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as ProgressBars
from rich.table import Table
from torch import Tensor

from ia3.adapter import vectors
from ia3.fast.ragged import IGNORE_INDEX
from ia3.fast.sweep import MixedLosses, SweepStep, group_losses
from ia3.inference.loading import Base
from ia3.inference.predict import answer_in_batches
from ia3.rows import acting
from ia3.runs.grid import Over, make_recipes
from ia3.runs.look import Looked, look_before
from ia3.runs.picture import draw_curves
from ia3.runs.recipe import Recipe
from ia3.runs.report import complete_cards
from ia3.runs.run import ADAPTER_FOLDER, BEST_FOLDER, RECIPE_NAME, Run, advise, write_json
from ia3.state import attached, get_adapter
from ia3.tasks.examples import Examples
from ia3.tasks.task import Task
from ia3.training.learner import Answered, EvalOutput, Writer, measurement
from ia3.training.loop import TimeEstimate, make_accelerator, progress_bars
from ia3.training.plan import RunPlan, prepare
from ia3.training.state import describe_environment
from ia3.training.train import begin_folder, claim

SWEEP_NAME = "sweep.json"
PICTURE_NAME = "sweep.png"

_LONGEST_NAME = 100
_IN_A_NAME = re.compile(r"[\w.+-]{1,24}")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Args:
        output_dir: its folder; each run's is in it.
        runs: the finished runs, the best first.
        settings: what each of them was given, in the same order.
        failed: what the runs were given whose losses became infinite, each with the reason.
        seconds: how long all steps took together.
    """

    output_dir: Path
    runs: list[Run]
    settings: list[dict[str, Any]]
    failed: list[tuple[dict[str, Any], str]]
    seconds: float = field(compare=False)

    @property
    def best(self) -> Run:
        """The run with the best evaluation."""
        return self.runs[0]

    @property
    def best_dir(self) -> Path:
        """Where the adapter of that evaluation is, with its task."""
        return self.output_dir / BEST_FOLDER

    @property
    def all_settings(self) -> list[dict[str, Any]]:
        """What the finished runs and then the failed ones were given."""
        return [*self.settings, *(given for given, _ in self.failed)]

    @property
    def advice(self) -> str | None:
        """What to do about the result, in a line; None where nothing stands out."""
        rates = sorted({given["learning_rate"] for given in self.all_settings if "learning_rate" in given})
        best = self.settings[0].get("learning_rate")
        edge = None
        if len(rates) > 1 and best in (rates[0], rates[-1]):
            name, factor = ("lowest", 0.5) if best == rates[0] else ("highest", 2)
            further = f"{best * factor:.3g} and {best * factor**2:.3g}"
            edge = f"The best learning rate, {best:g}, is the {name} that was tried: try {further}, too."
        return advise(self.best, edge)

    def summary(self) -> dict[str, Any]:
        """The sweep as JSON writes it."""
        return {
            "advice": self.advice,
            "best": {"adapter": str(self.best_dir), "settings": self.settings[0]},
            "failed": [{"reason": reason, "settings": given} for given, reason in self.failed],
            "method": self.best.task.method,
            "runs": [
                {
                    "accuracy": run.final.accuracy if run.final.total else None,
                    "best": run.best.summary(),
                    "folder": str(run.output_dir),
                    "loss": run.final.loss,
                    "settings": given,
                    "steps": len(run.losses),
                    "stopped_early": run.progress.stopped_early,
                }
                for run, given in zip(self.runs, self.settings, strict=True)
            ],
            "train_seconds": self.seconds,
        }


def sweep(
    model: str | Path,
    data: str | Path | Examples | None = None,
    *,
    over: Over | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
    **recipe: Any,
) -> Sweep:
    """Train many adapters at once, each with settings of its own, and rank them.

    Every step is one batch: run r's examples are its rows' group r, and its vectors row r of one table. Each run has
    its own order, schedule, clipping, decay, AdamW and end, and without dropout the numbers that `ia3.train` gives it
    alone, up to rounding. What is not in `over` is common to all.

    Args:
        model: the base model, as `ia3.train` takes it.
        data: the examples, likewise; left out where they differ.
        over: a grid, as in `{"learning_rate": [3e-3, 8e-3], "seed": [0, 1]}`, or a list of settings, one a run. By
            default a few learning rates.
        console: where the progress goes; standard error by default.
        trust_remote_code: run code that comes with the model.
        recipe: the fields of `Recipe`, as for `ia3.train`; `output` is the sweep's folder.

    Returns:
        The runs, the best first. The best adapter is in `best_dir`, each run in a folder of its own.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: what the runs can't differ in, a setting or a kind of task that can't be swept, and what
            `ia3.train` raises.
        FloatingPointError: every run's losses became infinite.

    Example:
        >>> found = ia3.sweep("google/flan-t5-small", "reviews.csv", over={"learning_rate": [3e-3, 8e-3, 2e-2]})
        >>> found.settings[0], found.best.best.accuracy
    """
    given = {**recipe, "model": model, **({} if data is None else {"data": data})}
    recipes, keys = make_recipes(given, over)
    console, looked = console or Console(stderr=True), look_before(*recipes)
    return run_sweep(recipes, keys, console, looked, trust_remote_code=trust_remote_code)


def run_sweep(
    recipes: Sequence[Recipe],
    keys: Sequence[str],
    console: Console,
    looked: Looked,
    *,
    trust_remote_code: bool = False,
) -> Sweep:
    """Train in one batch what `make_recipes` made, which differ in `keys`; errors are those of `sweep`."""
    common = recipes[0]
    for name, what in ((SWEEP_NAME, "sweep"), (RECIPE_NAME, "run")):
        if common.output is not None and (common.output / name).is_file():
            raise ValueError(f"{common.output} holds a {what} already: name another output, or remove it.")
    base = Base(common.model, trust_remote_code=trust_remote_code)
    kind = common.task or base.kind
    if not kind.writes:
        raise ValueError(
            f"A sweep trains a row of vectors a run, and a task of {kind} trains a head in full, too: train these runs "
            "one after the other, by ia3.train."
        )
    prepared = prepare(base, kind, recipes, console, looked)
    together = Together([plan for _, plan in prepared])
    given = [{key: getattr(each, key) for key in keys} for each, _ in prepared]
    settings = [
        {key: value.source if isinstance(value, Examples) else value for key, value in each.items()} for each in given
    ]
    output = claim(common.output, common.source)
    folders = [output / name for name in names_of(settings)]
    for (each, plan), folder in zip(prepared, folders, strict=True):
        begin_folder(folder, each, describe_environment(each, plan))
    console.print(together.describe_path(), highlight=False)
    together.run(folders, console)
    return _finish(together, recipes, settings, output)


def names_of(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder's name a run: what it differs in from the others, such as `learning_rate-0.008-seed-1`."""
    parts: list[list[str]] = [[] for _ in settings]
    for key in settings[0]:
        values = [each[key] for each in settings]
        distinct = [value for place, value in enumerate(values) if value not in values[:place]]
        if len(distinct) == 1 and len(settings) > 1:
            continue
        short = all(_IN_A_NAME.fullmatch(str(value)) for value in distinct)
        for part, value in zip(parts, values, strict=True):
            part.append(f"{key}-{value if short else distinct.index(value) + 1}")
    names = ["-".join(part) for part in parts]
    # Data in memory may have one name for different examples.
    if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_NAME:
        return names
    return [f"run-{number}" for number in range(1, len(names) + 1)]


class Together:
    """Runs whose steps and evaluations are computed in one batch; making it checks what can be checked before.

    A run that is finished, or whose loss is not finite, leaves the batch.

    Args:
        plans: the runs, whose learners share a model with one adapter, its vectors where all begin.

    Raises:
        ValueError: several processes.
    """

    def __init__(self, plans: Sequence[RunPlan]) -> None:
        learner = plans[0].learner
        assert isinstance(learner, Writer)
        self.plans, self.learner = plans, learner
        self.device = make_accelerator(learner.settings).device
        self.model = learner.model.to(self.device)
        self.adapter = get_adapter(self.model, attached(self.model).active[0])
        self.mixed = MixedLosses(self.model, self.adapter.layout, learner.token_losses)
        losses, self.reason = group_losses(self.model, self.adapter, learner.token_losses)
        start = self.adapter.layout.flatten([vector.detach() for vector in vectors(self.model, self.adapter)])
        self.step = SweepStep(
            self.model,
            losses,
            start.expand(len(plans), -1),
            max_gradient_norms=[plan.settings.max_gradient_norm or math.inf for plan in plans],
            weight_decays=[plan.settings.weight_decay for plan in plans],
        )
        self.batches = [plan.steps_from(0) for plan in plans]
        # The runs in the batch; run `running[r]` has row r.
        self.running = list(range(len(plans)))
        self.best: dict[int, Tensor] = {}
        self.runs: dict[int, Run] = {}
        self.failures: dict[int, str] = {}
        self.seconds = 0.0

    def describe_path(self) -> str:
        """Which way a step goes, and why, in a line."""
        count = f"{len(self.plans)} runs in one batch"
        if self.reason is not None:
            return f"{count}, through the model's own forward (fused: {self.reason})."
        return f"{count}, without padding{', captured as CUDA graphs' if self.step.records else ''}."

    def run(self, folders: Sequence[Path], console: Console | None = None) -> None:
        """Train until every run is finished or has failed: `runs` and `failures`, by the runs' numbers.

        Each leaves its adapters, `metrics.jsonl` and `result.json` in its folder.
        """
        self.folders = folders
        torch.manual_seed(self.learner.settings.seed)
        with progress_bars(console) as bars:
            total = max(plan.total_steps for plan in self.plans)
            bar = bars.add_task("training", total=total, note="")
            estimate = TimeEstimate(bars, self.plans)
            self._evaluate_due(bars)
            while self.running:
                self._train_until_due(bars, bar, estimate)
                self._evaluate_due(bars)
            bars.update(bar, description="trained")

    def _train_until_due(self, bars: ProgressBars, bar: Any, estimate: TimeEstimate) -> None:
        """Steps up to the next evaluation of any run."""
        self.model.train(self.learner.settings.dropout)
        while self.running and not any(self.plans[run].evaluation_is_due() for run in self.running):
            started = time.perf_counter()
            groups = [[row for part in next(self.batches[run]) for row in part] for run in self.running]
            losses, groups = self._step(groups)
            seconds = time.perf_counter() - started
            self.seconds += seconds
            for run, loss in zip(self.running, losses, strict=True):
                progress = self.plans[run].progress
                progress.steps.append({"learning_rate": self.plans[run].rate, "loss": loss, "step": progress.step + 1})
                progress.seconds += seconds / len(self.running)
            estimate.look()
            bars.update(bar, advance=1, note=f"{len(losses)} runs, loss {min(losses, default=math.nan):.3f} and up")

    def _step(self, groups: list[list[Any]]) -> tuple[list[float], list[list[Any]]]:
        """A step of the running runs, each on its examples: the losses and the examples of those that stay.

        Those whose loss or gradient is not finite leave.
        """
        while self.running:
            batch = self._batch(groups)
            losses: list[float] = self.step(batch, [self.plans[run].rate for run in self.running]).tolist()
            if all(map(math.isfinite, losses)):
                return losses, groups
            lost = self.step.diverged(batch) or [row for row, loss in enumerate(losses) if not math.isfinite(loss)]
            for row in lost:
                plan = self.plans[self.running[row]]
                try:
                    plan.check_finite(math.nan, "training loss, or its gradient,", plan.progress.step + 1)
                except FloatingPointError as error:
                    self.failures[self.running[row]] = str(error)
            groups = [group for row, group in enumerate(groups) if row not in lost]
            self._leave(lost)
        return [], []

    def _batch(self, groups: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """The groups' examples; a short group is filled up with repeated ones without labels, which change nothing."""
        size = max(map(len, groups))
        if self.step.records:  # few shapes of batches, few graphs
            settings = [self.plans[run].settings for run in self.running]
            size = max(size, *(each.batch_size * each.gradient_accumulation for each in settings))
        batch = self.learner.collate([row for rows in groups for row in (*rows, *[rows[0]] * (size - len(rows)))])
        filler = torch.tensor([place >= len(rows) for rows in groups for place in range(size)])
        batch["labels"][filler] = IGNORE_INDEX
        return batch

    def _leave(self, rows: Sequence[int]) -> None:
        """Take rows out of the table and their runs out of the batch."""
        kept = [row for row in range(len(self.running)) if row not in rows]
        self.running = [self.running[row] for row in kept]
        if rows and kept:
            self.step.keep(kept)

    def _evaluate_due(self, bars: ProgressBars) -> None:
        """Evaluate the runs that are due, write their figures, and let the finished ones go."""
        due = [row for row, run in enumerate(self.running) if self.plans[run].evaluation_is_due()]
        started = time.perf_counter()
        found = self._measure(due, bars)
        seconds = (time.perf_counter() - started) / max(1, len(due))
        leaving = []
        for row in due:
            run = self.running[row]
            plan = self.plans[run]
            try:
                if plan.add(plan.compute_metrics(found[row], seconds)):
                    self.best[run] = self.step.table[row].clone()
            except FloatingPointError as error:
                self.failures[run] = str(error)
                leaving.append(row)
                continue
            plan.write_metrics(self.folders[run])
            if plan.finished:
                self._finish(row)
                leaving.append(row)
        self._leave(leaving)

    def _measure(self, due: Sequence[int], bars: ProgressBars) -> dict[int, EvalOutput]:
        """What each row's vectors answer, all in batches that mix them; the model is left in evaluation mode."""
        self.model.eval()
        alike: dict[Any, list[int]] = {}
        for row in due:
            plan = self.plans[self.running[row]]
            # Before the first step all are the base, so that those with the same held-out rows answer alike.
            key = row if plan.progress.step else (plan.learner.task, id(plan.test_rows))
            alike.setdefault(key, []).append(row)
        by_task: dict[Task, list[int]] = {}
        for row, *_ in alike.values():
            by_task.setdefault(self.plans[self.running[row]].learner.task, []).append(row)
        measured: dict[int, EvalOutput] = {}
        for rows in by_task.values():
            measured |= self._answers(rows, bars)
        return {row: measured[rows[0]] for rows in alike.values() for row in rows}

    def _answers(self, rows: Sequence[int], bars: ProgressBars) -> dict[int, EvalOutput]:
        """What the vectors of rows with the same task answer."""
        plans = {row: self.plans[self.running[row]] for row in rows}
        learner: Any = plans[rows[0]].learner
        asked = [(row, place) for row in rows for place in range(len(plans[row].test_rows))]
        lengths = [learner.asked(plans[row].test_rows[place]) for row, place in asked]
        bar = bars.add_task("evaluating", total=len(asked), note="")

        def answer(indices: list[int]) -> list[Answered]:
            chosen = [asked[index] for index in indices]
            flat = self.step.table[torch.tensor([row for row, _ in chosen], device=self.device)]
            with acting(self.mixed.rows(flat)):
                found: list[Answered] = learner.answer([plans[row].test_rows[place] for row, place in chosen])
            return found

        found = answer_in_batches(learner.batches(lengths), answer, lambda count: bars.update(bar, advance=count))
        bars.remove_task(bar)
        return {
            row: measurement([each for each, (own, _) in zip(found, asked, strict=True) if own == row]) for row in rows
        }

    def _finish(self, row: int) -> None:
        """Save a finished run's adapters, after its last step and at its best evaluation, and its result."""
        run = self.running[row]
        plan, folder = self.plans[run], self.folders[run]
        for name, flat in ((BEST_FOLDER, self.best[run]), (ADAPTER_FOLDER, self.step.table[row])):
            parts = self.adapter.layout.split(flat)
            with torch.no_grad():
                for vector, part in zip(vectors(self.model, self.adapter), parts, strict=True):
                    vector.copy_(part.view_as(vector))
            plan.save_adapter(folder / name)
        self.runs[run] = plan.result(folder)


def _finish(together: Together, recipes: Sequence[Recipe], settings: Sequence[dict[str, Any]], output: Path) -> Sweep:
    """The runs in the order of their best evaluations; writes cards, the best adapter, the picture, `sweep.json`."""
    runs, plans = together.runs, together.plans
    failed = [(settings[number], reason) for number, reason in sorted(together.failures.items())]
    if not runs:
        raise FloatingPointError(f"None of the {len(recipes)} runs came to an end. The first: {failed[0][1]}")
    order = sorted(runs, key=lambda number: plans[number].rank(runs[number].best), reverse=True)
    for number in order:
        complete_cards(runs[number], recipes[number].source, named=isinstance(recipes[number].data, str))
    found = Sweep(
        output, [runs[number] for number in order], [settings[number] for number in order], failed, together.seconds
    )
    shutil.rmtree(found.best_dir, ignore_errors=True)  # of a sweep that came to no end
    shutil.copytree(found.best.best_dir, found.best_dir)
    title = f"{len(found.runs)} runs of {Path(recipes[0].model).name} on {Path(recipes[0].source).name}"
    draw_curves(found.runs, found.settings, output / PICTURE_NAME, title=title)
    write_json(output / SWEEP_NAME, found.summary())
    return found


def ranking_table(sweep: Sweep) -> Table:
    """The runs for the terminal, the best first: what each was given, and its best evaluation."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    keys = [key for key in sweep.settings[0] if len({str(each[key]) for each in sweep.all_settings}) > 1]
    for key in keys:
        table.add_column(key, overflow="fold")
    figures: dict[str, Callable[[Run], str]] = {
        "accuracy": lambda run: f"{run.best.accuracy:.1%}",
        "95 % interval": lambda run: " to ".join(f"{100 * end:.1f}" for end in run.best.interval),
        "by rank": lambda run: f"{run.best.scores['accuracy_by_rank']:.1%}",
        "loss": lambda run: f"{run.best.loss:.3f}",
        "at step": lambda run: f"{run.best.step:,}{' (stopped)' if run.progress.stopped_early else ''}",
        "last accuracy": lambda run: f"{run.final.accuracy:.1%}",
    }
    if not any("accuracy_by_rank" in run.best.scores for run in sweep.runs):
        del figures["by rank"]
    shown = [title for title in figures if sweep.best.best.total or title in ("loss", "at step")]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for run, given in zip(sweep.runs, sweep.settings, strict=True):
        table.add_row(*(_write(given[key]) for key in keys), *(figures[title](run) for title in shown))
    for given, _ in sweep.failed:
        table.add_row(*(_write(given[key]) for key in keys), "diverged", style="red")
    return table


def _write(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)
