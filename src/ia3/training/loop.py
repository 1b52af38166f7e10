"""The training loop of every kind of task: steps, evaluations, the best adapter, and a state to go on from."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import Progress as ProgressBars
from rich.text import Text
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ia3.fast.step import Step, compile_step, sum_gradients
from ia3.files import append_line
from ia3.inference.processes import ALONE, Processes, join
from ia3.runs.run import ADAPTER_FOLDER, BEST_FOLDER, METRICS_NAME, STATE_NAME, Evaluation, Run, TrainerState
from ia3.runs.screen import Screen
from ia3.runs.settings import TrainSettings
from ia3.runs.sums import write_sums
from ia3.training import sharding
from ia3.training.optimise import decay_vectors, make_optimizer, trainable_parameters
from ia3.training.plan import RunPlan
from ia3.training.state import copies_of, load_state, put_back, save_state
from ia3.weights import Tensors

# A process's part of a batch, and how many targets each part of its loss is the mean of.
_Batch = tuple[dict[str, Tensor], list[int]]

_AHEAD = 16
# A crash costs no more than this, besides the evaluations, after each of which the state is saved, too.
SAVE_SECONDS = 300.0
# A training's time is told from so many steps, where it is longer than so many seconds.
_STEPS_TIMED = 5
_LONG = 60.0


class Interrupted(KeyboardInterrupt):
    """Training was stopped by hand; the message says where its state is."""


class Stop(BaseException):
    """Within the loops: somebody wants the training to end here."""


class Stoppable(Protocol):
    """What looks between its steps at whether somebody wants it to end."""

    stop_asked: bool
    processes: Processes


class Training:
    """One training: making it checks all that can be checked before the first step, and writes nothing.

    Args:
        plan: what to train on what, and when to evaluate it.
        resume: the `state.pt` to go on from, to the same numbers, bit for bit, on the same machine and versions.

    Raises:
        ValueError: nothing to train, a tracker that is not installed, a state of something else, processes that can't
            be joined or are more than a batch has examples.
    """

    def __init__(self, plan: RunPlan, *, resume: Path | None = None) -> None:
        self.plan, self.learner, self.settings = plan, plan.learner, plan.settings
        self.processes = join()
        if self.settings.batch_size < self.processes.count:
            raise ValueError(
                f"`batch_size` is {self.settings.batch_size}, of which each of {self.processes.count} processes takes "
                "its part: expected one example a process at least. Raise it, or start fewer."
            )
        self.accelerator = make_accelerator(self.settings)
        self.sharded = not self.processes.alone and sharding.is_asked_for()
        self.trainable = trainable_parameters(self.learner.model)
        # Where nothing is drawn torch's generator, which is the process's one, is left to others.
        self.draws = draws(self.settings, self.accelerator)
        if self.draws:
            torch.manual_seed(self.settings.seed + self.processes.rank)  # each drops other places of its own examples
        optimizer = make_optimizer(self.trainable, self.settings)
        if self.sharded:
            sharding.shard(self.learner.model, self.trainable.values(), self.processes.device)
        else:
            # In evaluation mode it isn't wrapped: the loop adds up the gradients itself, which are about a megabyte.
            self.accelerator.prepare_model(self.learner.model, evaluation_mode=not self.processes.alone)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.schedule = LambdaLR(optimizer, plan.schedule)
        self.saved_at = time.monotonic()
        self.stop_asked = False
        self.resumed = resume is not None
        self.best: Tensors = {}
        if resume is not None:
            plan.progress, self.best = load_state(resume, self.trainable, optimizer, self.schedule, self.processes)
        self.fast: Step | None = None  # where it isn't right, the step is the ordinary one
        if self.learner.is_the_models_loss and self.settings.gradient_accumulation == 1:
            self.fast = compile_step(
                self.learner.model,
                optimizer,
                self.schedule,
                max_gradient_norm=self.settings.max_gradient_norm,
                weight_decay=self.settings.weight_decay,
                reduce=None if self.processes.alone else self.processes.sum,
            )
        # Losses are looked at so many steps at a time: to look at each would let a GPU wait for the host.
        self.ahead = _AHEAD if self.fast is not None and self.fast.path == "captured" else 1
        self.waiting: list[dict[str, Any]] = []

    @property
    def progress(self) -> TrainerState:
        """How far it has come."""
        return self.plan.progress

    def describe_path(self) -> str:
        """Which way a step goes, and why, in a line."""
        if self.sharded:
            return "The ordinary step, over a base model that is divided among the processes (FSDP2)."
        if self.fast is None:
            return "The ordinary step: the fast one is for the model's own loss of one batch a step."
        if self.fast.reason is not None:
            return f"The ordinary step, since {self.fast.reason}."
        return f"The fast step: no padding{', captured as a CUDA graph' if self.fast.path == 'captured' else ''}."

    def time_steps(self, count: int) -> float:
        """The seconds of a step, the mean of so many after the first; to train, make another one from here on."""
        self.learner.model.train(self.settings.dropout)
        steps = islice(self.plan.steps_from(0), count + 1)
        batches = [[self._batch(rows) for rows in parts] for parts in steps]
        float(self._step(batches[0])["loss"])
        started = time.perf_counter()
        losses = [self._step(each)["loss"] for each in batches[1:]]
        float(losses[-1])  # where it is computed while the host goes on
        return (time.perf_counter() - started) / count

    def run(self, folder: Path, console: Console | None = None, *, resumed_by: str = "the same, resumed") -> Run:
        """Train from where the progress stands to the end, evaluating before the first step and at each interval.

        Leaves in the folder the adapter after the last step and the best one, each with its task, `result.json` (with
        each held-out answer), `metrics.jsonl` (a line a step and an evaluation, written as they come) and `state.pt`,
        from which an interrupted training goes on.

        Args:
            folder: the run's; files of an earlier run there are replaced.
            console: where the progress goes; standard error by default.
            resumed_by: what goes on with it, for the message of an interruption.

        Raises:
            FloatingPointError: a loss is not finite; the adapter is not saved then.
            OSError: a file can't be written, as on a full disk; the last state is whole.
            Interrupted: SIGINT (Ctrl-C) or SIGTERM; the state and the adapter of that moment are saved.
        """
        self.folder = folder
        with progress_bars(self.processes.console(console)) as bars, stop_on_signals(self):
            bar = bars.add_task("training", total=self.plan.total_steps, completed=self.progress.step, note="")
            self.estimate = TimeEstimate(bars, [self.plan])
            try:
                if self.resumed:
                    self._put_back_best()
                self._evaluate_if_due(bars)
                if not self.resumed:
                    self._save_state()  # from here on there is something to go on from
                if self.processes.is_first:
                    self.plan.write_metrics(folder)
                if self.settings.trackers:
                    self._begin_tracking()
                while not self.plan.finished:
                    self._train_until_due(bars, bar)
                    self._evaluate_if_due(bars)
                    self._save_state()
                bars.update(bar, description="trained")
                self._save_adapter(ADAPTER_FOLDER)
                if self.plan.shown is None:  # resumed when all but these files was done
                    self._evaluate(bars)
                self.processes.wait()  # for the adapters, whose size is told
                return self.plan.result(folder, write=self.processes.is_first)
            except Stop:
                self._save_state()
                adapter = self._save_adapter(ADAPTER_FOLDER)
                if self.processes.is_first:
                    write_sums(folder)
                raise Interrupted(
                    f"Interrupted at step {self.progress.step} of {self.plan.total_steps}. Go on: {resumed_by}\n"
                    f"The adapter as it is now: {adapter}"
                ) from None
            except FloatingPointError:
                # Going on from here would diverge again, so the folder is free for another try.
                if self.processes.is_first:
                    (folder / STATE_NAME).unlink(missing_ok=True)
                raise
            finally:
                for tracker in self.accelerator.trackers:  # `end_training` would end the process group, too
                    tracker.finish()

    def _train_until_due(self, bars: ProgressBars, bar: Any) -> None:
        """Steps up to the next evaluation."""
        self.learner.model.train(self.settings.dropout)
        for parts in self.plan.steps_from(self.progress.step):
            batches = [self._batch(rows) for rows in parts]
            started = time.perf_counter()
            record = self._step(batches)
            self.progress.steps.append(record)
            self.waiting.append(record)
            stop, is_time = self._asked()
            if stop or is_time or self.plan.evaluation_is_due() or len(self.waiting) >= self.ahead:
                self._look_at_losses(bars, bar)
            self.progress.seconds += time.perf_counter() - started
            if not self.waiting:
                self.estimate.look()
            if stop:
                raise Stop
            if self.plan.evaluation_is_due():
                return
            if is_time:
                self._save_state()

    def _asked(self) -> list[bool]:
        """Whether to stop and whether to save, which several processes agree on when they look at the losses."""
        is_time = time.monotonic() - self.saved_at > SAVE_SECONDS
        if not (self.processes.alone or self.plan.evaluation_is_due() or len(self.waiting) >= self.ahead):
            return [False, False]
        return self.processes.any(self.stop_asked, is_time)

    def _look_at_losses(self, bars: ProgressBars, bar: Any) -> None:
        """Check and log those of the last steps, which a GPU may still have been at."""
        for record in self.waiting:
            record["loss"] = float(record["loss"])
            self.plan.check_finite(record["loss"], "training loss", int(record["step"]))
            self._log(record)
        bars.update(bar, advance=len(self.waiting), note=f"loss {self.waiting[-1]['loss']:.3f}")
        self.waiting.clear()

    def _batch(self, rows: Sequence[Any]) -> _Batch:
        """This process's part of a batch; a process that gets none of few rows takes one that doesn't count."""
        own = self.processes.share(rows)
        batch = self.learner.collate(own or rows[:1])
        return batch, [count if own else 0 for count in self.learner.counts(batch)]

    def _step(self, batches: Sequence[_Batch]) -> dict[str, Any]:
        """One update from one or more batches, whose losses count by their targets; its number, loss and rate.

        Of several processes each does it on its parts of the same batches.
        """
        rate = self.plan.rate
        weights = self._weights([counts for _, counts in batches])
        if self.fast is not None and self.fast.reason is None:
            loss = self.fast(batches[0][0], *([] if self.processes.alone else weights[0]))
            return {"learning_rate": rate, "loss": loss, "step": self.progress.step + 1}
        loss = torch.zeros((), device=self.accelerator.device)
        for (batch, _), weight in zip(batches, weights, strict=True):
            on_device = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            losses = self.learner.losses(on_device)
            part = (losses * weight.to(losses.dtype)).sum()
            self.accelerator.backward(part)
            loss = loss + part.detach()
        parameters = list(self.trainable.values())
        if not self.processes.alone:
            loss = sum_gradients(parameters, loss, self.processes.sum)
        self.plan.check_finite(float(loss), "training loss", self.progress.step + 1)
        if self.settings.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_gradient_norm)
        decay_vectors(self.trainable, rate, self.settings.weight_decay)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return {"learning_rate": rate, "loss": float(loss), "step": self.progress.step + 1}

    def _weights(self, counts: Sequence[Sequence[int]]) -> Tensor:
        """What each part of each batch's loss counts among those of the step in all processes, `[batches, parts]`."""
        device = self.accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64  # of which Apple's GPUs have none
        own = torch.tensor(counts, dtype=wide, device="cpu", pin_memory=device.type == "cuda")
        own = own.to(device, non_blocking=True)
        return own / self.processes.sum(own.sum(0)).clamp(min=1)

    def _evaluate_if_due(self, bars: ProgressBars) -> None:
        if not self.plan.evaluation_is_due():
            return
        evaluation = self._evaluate(bars)
        best = self.plan.add(evaluation)
        bars.console.print(f"step {evaluation.step:,}: {evaluation.describe()}", highlight=False)
        if self.progress.step:
            method = self.learner.task.method
            self._log({"evaluation": evaluation.summary(), "method": method, "step": evaluation.step})
        if best:
            self.best = copies_of(self.trainable)
            self._save_adapter(BEST_FOLDER)

    def _put_back_best(self) -> None:
        """Write the best adapter as the state has it: what the folder holds may be later, damaged or lost."""
        if self.best:
            now = copies_of(self.trainable)
            put_back(self.best, self.trainable)
            self._save_adapter(BEST_FOLDER)
            put_back(now, self.trainable)

    def _evaluate(self, bars: ProgressBars) -> Evaluation:
        started = time.perf_counter()
        bar = bars.add_task("evaluating", total=len(self.plan.test_rows), note="")

        def beat(rows: int) -> None:
            bars.update(bar, advance=rows)
            if self.processes.any(self.stop_asked)[0]:
                raise Stop

        try:
            with without_draws(self.draws, self.accelerator.device):
                # Where each needs the others' parts of the base, all answer everything together.
                found = self.learner.measure(self.plan.test_rows, beat, ALONE if self.sharded else self.processes)
        finally:
            bars.remove_task(bar)
        return self.plan.compute_metrics(found, time.perf_counter() - started)

    def _begin_tracking(self) -> None:
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        plain = (bool, int, float, str)  # what trackers take
        given = asdict(self.settings).items()
        config = {name: value if isinstance(value, plain) else str(value) for name, value in given}
        self.accelerator.init_trackers("tracker", config=config)
        for each in self.progress.evaluations[-1:]:  # the one made just before
            self._track({"evaluation": each.summary(), "step": each.step})

    def _log(self, line: dict[str, Any]) -> None:
        if not self.processes.is_first:
            return
        append_line(self.folder / METRICS_NAME, json.dumps(line, sort_keys=True))
        if self.settings.trackers:
            self._track(line)

    def _track(self, line: dict[str, Any]) -> None:
        kind, figures = ("held_out", line["evaluation"]) if "evaluation" in line else ("train", line)
        scalars = {f"{kind}/{name}": value for name, value in figures.items() if name != "step"}
        self.accelerator.log(scalars, step=int(line["step"]))

    def _save_adapter(self, name: str) -> Path:
        if self.processes.is_first:
            self.plan.save_adapter(self.folder / name)
        return self.folder / name

    def _save_state(self) -> None:
        save_state(
            self.folder / STATE_NAME,
            self.progress,
            self.trainable,
            self.optimizer,
            self.schedule,
            best=self.best,
            draws=self.draws,
            processes=self.processes,
        )
        self.saved_at = time.monotonic()


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """accelerate's device and trackers; it would leave out a tracker that is not installed without a word."""
    installed = {str(name) for name in get_available_trackers()}
    missing = sorted(set(settings.trackers) - installed)
    if missing:
        raise ValueError(
            f"The trackers {missing} are not installed, or not known to accelerate: of its trackers there are "
            f"{sorted(installed) or 'none'}. Install the package of that name, or leave it out."
        )
    return Accelerator(log_with=list(settings.trackers) or None, project_dir=".")  # until the run has its folder


def draws(settings: TrainSettings, accelerator: Accelerator) -> bool:
    """Whether a training draws from torch's generator: for dropout, and for the seeds that a GPU's kernels get."""
    return bool(settings.dropout) or accelerator.device.type == "cuda"


def without_draws(draws: bool, device: torch.device) -> AbstractContextManager[None]:
    """Leave no draws behind: an evaluation that is interrupted is done again."""
    return torch.random.fork_rng([device] if device.type == "cuda" else []) if draws else nullcontext()


@contextmanager
def stop_on_signals(training: Stoppable) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends training after the step under way; the second SIGINT at once.

    Of several processes none ends at once, since a launcher passes on a Ctrl-C that each of them has got already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        training.stop_asked = True
        if training.processes.alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class TimeEstimate:
    """Says once, some steps after it began, how long a training takes, unless that is short.

    Args:
        bars: the training's, above which it is said.
        plans: the runs whose steps are computed together, each of them one step at a time.
    """

    def __init__(self, bars: ProgressBars, plans: Sequence[RunPlan]) -> None:
        self.console, self.plans, self.said = bars.console, plans, False
        self.began = self._step()
        self.first: tuple[int, float] | None = None

    def _step(self) -> int:
        return max(plan.progress.step for plan in self.plans)

    def look(self) -> None:
        """To be called after a step or several, once they are computed."""
        if self.said:
            return
        now = (self._step(), sum(plan.progress.seconds for plan in self.plans))
        if self.first is None:  # the first steps allocate, and record
            self.first = now
        elif now[0] - self.first[0] >= _STEPS_TIMED:
            self.said = True
            a_step = (now[1] - self.first[1]) / (now[0] - self.first[0])
            steps = max(plan.total_steps for plan in self.plans) - self.began
            evaluations = sum(plan.evaluations_left for plan in self.plans)
            an_evaluation = max(plan.progress.evaluations[-1].seconds for plan in self.plans)
            seconds = steps * a_step + evaluations * an_evaluation
            if seconds >= _LONG:
                self.console.print(
                    f"About {_in_words(seconds)} on this machine: {a_step:.2g} s a step, {steps:,} steps, "
                    f"{evaluations:,} evaluation{'s' * (evaluations > 1)} of {an_evaluation:.2g} s.",
                    highlight=False,
                )


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} minute{'s' * (minutes != 1)}" if minutes < 100 else f"{seconds / 3600:.1f} hours"


class _StepsPerSecond(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2f}/s", style="progress.data.speed")


def progress_bars(console: Console | None) -> ProgressBars:
    """The bars of a training."""
    return ProgressBars(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        _StepsPerSecond(),
        rich_progress.TextColumn("{task.fields[note]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        console=console or Screen(stderr=True),
    )
