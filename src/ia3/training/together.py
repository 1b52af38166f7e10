"""Runs whose steps and evaluations are computed in one batch, and the state that they go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import InstanceOf
from rich.console import Console
from rich.progress import Progress as ProgressBars
from torch import Tensor

from ia3.adapter import vectors
from ia3.fast.ragged import IGNORE_INDEX
from ia3.fast.sweep import MixedLosses, SweepStep, group_losses
from ia3.inference.predict import answer_in_batches
from ia3.inference.processes import join
from ia3.rows import acting
from ia3.runs.run import ADAPTER_FOLDER, BEST_FOLDER, Run, TrainerState
from ia3.state import attached, get_adapter
from ia3.tasks.task import Task
from ia3.training.learner import Answered, EvalOutput, Writer, measurement
from ia3.training.loop import (
    SAVE_SECONDS,
    Interrupted,
    Stop,
    TimeEstimate,
    draws,
    make_accelerator,
    progress_bars,
    stop_on_signals,
    without_draws,
)
from ia3.training.plan import RunPlan
from ia3.training.state import (
    RandomState,
    plain_progress,
    progress_of,
    random_state,
    read_state,
    restore_random_state,
    write_state,
)


@dataclass(frozen=True)
class SavedSweep:
    """What the state of a sweep holds, of which the runs' folders can be written again, too.

    Args:
        rows: of the runs in the batch, row by row.
        running: their numbers.
        progress: how far each run has come.
        best: the vectors of each run's best evaluation.
        last: those of each finished run.
        failures: why runs failed, by their numbers.
        answers: the texts that were asked and their references, once for the runs that share them.
        answers_of: which of these each run has.
        seconds: how long all steps took.
        random: of a sweep that draws, the generators' states.
    """

    rows: dict[str, Any]
    running: list[int]
    progress: list[TrainerState]
    best: dict[int, InstanceOf[Tensor]]
    last: dict[int, InstanceOf[Tensor]]
    failures: dict[int, str]
    answers: list[tuple[list[str], list[str]]]
    answers_of: list[int]
    seconds: float
    random: RandomState | None


class Together:
    """Runs whose steps and evaluations are computed in one batch; making it checks what can be checked before.

    A run that is finished, or whose loss is not finite, leaves the batch.

    Args:
        plans: the runs, whose learners share a model with one adapter, its vectors where all begin.
        rows: the numbers of those that are trained here; of several processes each takes others.
        resume: the `state.pt` to go on from, to the same numbers, bit for bit, on the same machine and versions.

    Raises:
        ValueError: a state of something else.
    """

    def __init__(
        self, plans: Sequence[RunPlan], *, rows: Sequence[int] | None = None, resume: Path | None = None
    ) -> None:
        learner = plans[0].learner
        assert isinstance(learner, Writer)
        self.plans, self.learner, self.processes = plans, learner, join()
        self.rows = list(range(len(plans)) if rows is None else rows)
        accelerator = make_accelerator(learner.settings)
        self.device, self.draws = accelerator.device, draws(learner.settings, accelerator)
        self.model = learner.model.to(self.device)
        self.adapter = get_adapter(self.model, attached(self.model).active[0])
        self.mixed = MixedLosses(self.model, self.adapter.layout, learner.token_losses)
        losses, self.reason = group_losses(self.model, self.adapter, learner.token_losses)
        start = self.adapter.layout.flatten([vector.detach() for vector in vectors(self.model, self.adapter)])
        self.step = SweepStep(
            self.model,
            losses,
            start.expand(len(self.rows), -1),
            max_gradient_norms=[plans[run].settings.max_gradient_norm or math.inf for run in self.rows],
            weight_decays=[plans[run].settings.weight_decay for run in self.rows],
        )
        # The runs in the batch; run `running[r]` has row r.
        self.running = list(self.rows)
        # The vectors of each run's best evaluation, and those of a finished run, on the CPU.
        self.best: dict[int, Tensor] = {}
        self.last: dict[int, Tensor] = {}
        self.runs: dict[int, Run] = {}
        self.failures: dict[int, str] = {}
        self.seconds = 0.0
        self.random: RandomState | None = None
        self.saved_at = time.monotonic()
        self.stop_asked = False
        if resume is not None:
            self._go_on_from(resume)
        self.batches = [plan.steps_from(plan.progress.step) for plan in plans]

    def describe_path(self) -> str:
        """Which way a step goes, and why, in a line."""
        where = "" if self.processes.alone else f" of each of {self.processes.count} processes"
        count = f"{len(self.rows)} runs in one batch{where}"
        if self.reason is not None:
            return f"{count}, through the model's own forward (fused: {self.reason})."
        return f"{count}, without padding{', captured as CUDA graphs' if self.step.records else ''}."

    def run(
        self,
        folders: Sequence[Path],
        console: Console | None = None,
        *,
        state: Path | None = None,
        resumed_by: str = "the same, resumed",
    ) -> None:
        """Train until every run is finished or has failed: `runs` and `failures`, by the runs' numbers.

        Each leaves its adapters, `metrics.jsonl` and `result.json` in its folder.

        Args:
            folders: the runs'.
            console: where the progress goes; standard error by default.
            state: where all that the next step depends on is kept; nowhere by default.
            resumed_by: what goes on from there, for the message of an interruption.

        Raises:
            Interrupted: SIGINT (Ctrl-C) or SIGTERM; the state of that moment is saved.
        """
        self.folders, self.state = folders, state
        self._begin_drawing()
        with progress_bars(console) as bars, stop_on_signals(self):
            total, done = (max(counts) for counts in zip(*self._steps(), strict=True))
            bar = bars.add_task("training", total=total, completed=done, note="")
            estimate = TimeEstimate(bars, [self.plans[run] for run in self.rows])
            try:
                self._write_again()
                self._evaluate_due(bars)
                while self.running:
                    self._train_until_due(bars, bar, estimate)
                    self._evaluate_due(bars)
            except Stop:
                self._save_state()
                done = max(plan.progress.step for plan in self.plans)
                raise Interrupted(f"Interrupted at step {done} of {total}. Go on: {resumed_by}") from None
            bars.update(bar, description="trained")

    def gather(self) -> None:
        """Take over what the other processes' runs came to."""
        for runs, failures, seconds in self.processes.gather((self.runs, self.failures, self.seconds)):
            self.runs |= runs
            self.failures |= failures
            self.seconds = max(self.seconds, seconds)

    def _steps(self) -> Iterator[tuple[int, int]]:
        """How many steps each run has, and how many are done."""
        return ((self.plans[run].total_steps, self.plans[run].progress.step) for run in self.rows)

    def _begin_drawing(self) -> None:
        """Where nothing is drawn torch's generator, which is the process's one, is left to others."""
        if self.random is not None:
            restore_random_state(self.random)
        elif self.draws:
            torch.manual_seed(self.learner.settings.seed)

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
            if self.stop_asked:
                raise Stop
            if time.monotonic() - self.saved_at > SAVE_SECONDS:
                self._save_state()
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
                    self._fail(self.running[row], error)
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
        fills = [place >= len(rows) for rows in groups for place in range(size)]
        batch["labels"][torch.tensor(fills, device="cpu")] = IGNORE_INDEX
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
                    self.best[run] = self.step.table[row].cpu().clone()
            except FloatingPointError as error:
                self._fail(run, error)
                leaving.append(row)
                continue
            plan.write_metrics(self.folders[run])
            if plan.finished:
                self.last[run] = self.step.table[row].cpu().clone()
                self._write(run)
                leaving.append(row)
        self._leave(leaving)
        if due:
            self._save_state()

    def _fail(self, run: int, error: FloatingPointError) -> None:
        self.failures[run] = str(error)
        self.plans[run].write_metrics(self.folders[run])

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

        def beat(count: int) -> None:
            bars.update(bar, advance=count)
            if self.stop_asked:
                raise Stop

        try:
            with without_draws(self.draws, self.device):
                found = answer_in_batches(learner.batches(lengths), answer, beat)
        finally:
            bars.remove_task(bar)
        return {
            row: measurement([each for each, (own, _) in zip(found, asked, strict=True) if own == row]) for row in rows
        }

    def _write(self, run: int) -> None:
        """Save a finished run's adapters, after its last step and at its best evaluation, and its result."""
        plan, folder = self.plans[run], self.folders[run]
        for name, flat in ((BEST_FOLDER, self.best[run]), (ADAPTER_FOLDER, self.last[run])):
            parts = self.adapter.layout.split(flat.to(self.device))
            with torch.no_grad():
                for vector, part in zip(vectors(self.model, self.adapter), parts, strict=True):
                    vector.copy_(part.view_as(vector))
            plan.save_adapter(folder / name)
        self.runs[run] = plan.result(folder)

    def _write_again(self) -> None:
        """Write what a state has of the runs' files: what their folders hold may be later, damaged or lost."""
        for run, plan in enumerate(self.plans):
            if plan.progress.evaluations:
                plan.write_metrics(self.folders[run])
            if run in self.last:
                self._write(run)

    def _save_state(self) -> None:
        if self.state is None:
            return
        answers: list[tuple[list[str], list[str]]] = []  # most runs have the same held-out rows
        for plan in self.plans:
            if (own := (plan.shown or [], plan.references)) not in answers:
                answers.append(own)
        saved: Any = SavedSweep(
            rows=self.step.state(),
            running=self.running,
            progress=[plain_progress(plan.progress) for plan in self.plans],  # type: ignore[misc]
            best=self.best,
            last=self.last,
            failures=self.failures,
            answers=answers,
            answers_of=[answers.index((plan.shown or [], plan.references)) for plan in self.plans],
            seconds=self.seconds,
            random=random_state() if self.draws else None,
        )
        write_state(self.state, saved)
        self.saved_at = time.monotonic()

    def _go_on_from(self, path: Path) -> None:
        saved = read_state(path, SavedSweep)
        width = self.step.table.shape[1:]
        if len(saved.progress) != len(self.plans) or any(each.shape != width for each in saved.best.values()):
            raise ValueError(
                f"{path} is the state of {len(saved.progress)} runs of other vectors than these {len(self.plans)}: go "
                "on with the base model and the recipes that the sweep began with."
            )
        if {*saved.running, *saved.last, *saved.failures} != set(self.rows):
            raise ValueError(
                f"{path} is of other runs than this process takes: go on with as many processes as the sweep began "
                "with."
            )
        for plan, progress, place in zip(self.plans, saved.progress, saved.answers_of, strict=True):
            plan.progress = progress_of(progress)
            shown, plan.references = saved.answers[place]
            plan.shown = shown or None
        self.running, self.best, self.last = saved.running, saved.best, saved.last
        self.failures, self.seconds, self.random = saved.failures, saved.seconds, saved.random
        if self.running:
            self.step.keep([self.rows.index(run) for run in self.running])
            self.step.go_on_from(saved.rows)
