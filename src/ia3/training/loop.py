"""The training loop of every kind of task: steps, evaluations, the best adapter, and a state to go on from."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as ProgressBars,
)
from rich.progress import (
    Task as Bar,
)
from rich.text import Text
from torch import Tensor
from torch.optim import Optimizer

from ia3.fast.step import Step, compile_step
from ia3.files import write_atomically
from ia3.runs.run import (
    ADAPTER_FOLDER,
    BEST_FOLDER,
    METRICS_NAME,
    RESULT_NAME,
    STATE_NAME,
    Evaluation,
    Run,
    TrainerState,
    check_output,
    compute_metrics,
    write_json,
)
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Examples
from ia3.tasks.task import TaskKind, save_task
from ia3.training.collate import shuffled_batches
from ia3.training.learner import EvalOutput, Learner
from ia3.training.optimise import decay_vectors, make_optimizer, make_schedule, trainable_parameters
from ia3.training.state import load_state, save_state

_AHEAD = 16
# A crash costs no more than this, besides the evaluations, after each of which the state is saved, too.
_SAVE_SECONDS = 300.0


class Interrupted(KeyboardInterrupt):
    """Training was stopped by hand; the message says where its state is."""


def fit(
    learner: Learner[Any],
    train_examples: Examples,
    test_examples: Examples,
    *,
    output_dir: str | Path,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Train a model's trainable parameters, evaluating before the first step and at each interval.

    Leaves in `output_dir` the adapter after the last step and the best one, each with its task, `result.json`
    (with each held-out answer), `metrics.jsonl` (a line a step and an evaluation, written as they come) and
    `state.pt`, from which an interrupted training goes on to the same numbers, bit for bit, on the same machine
    and versions.

    Args:
        learner: the model with its adapter, its task and how to train it.
        train_examples: what to learn from.
        test_examples: what to evaluate on.
        output_dir: the run's folder; files of an earlier run there are replaced.
        resume: go on from the folder's `state.pt`.
        console: where the progress goes; standard error by default.

    Raises:
        NotADirectoryError, PermissionError: `output_dir` cannot be written.
        ValueError: nothing to train or to evaluate, a held-out label that training never shows, a label that
            the tokenizer cannot give back, a tracker that is not installed, a state of something else.
        FloatingPointError: a loss is not finite; the adapter is not saved then.
        Interrupted: SIGINT (Ctrl-C) or SIGTERM; the state and the adapter of that moment are saved.
    """
    return Training(learner, train_examples, test_examples, Path(output_dir), resume=resume).run(console)


class RunPlan:
    """One run: its batches step by step, when it is evaluated, which evaluation is the best, and how far it has come.

    Args:
        learner: the model with its adapter, its task and how to train it.
        training: what to learn from.
        test: what to evaluate on.
        rows: the training examples, as `learner.tokenise` gives them.
        test_rows: the others, likewise.
    """

    def __init__(
        self,
        learner: Learner[Any],
        training: Examples,
        test: Examples,
        rows: Sequence[Any],
        test_rows: Sequence[Any],
    ) -> None:
        self.learner, self.settings, self.test = learner, learner.settings, test
        self.rows, self.test_rows, self.train_count = rows, test_rows, len(training)
        self.lengths = [learner.length(row) for row in rows]
        self.balanced = [example.label for example in training] if self.settings.balance else None
        batches = len(self._batches(epoch=0))
        self.steps_an_epoch = self.settings.steps_an_epoch(batches)
        self.total_steps = self.settings.total_steps(batches)
        self.interval = self.settings.evaluation_interval(batches)
        self.progress = TrainerState()
        self.shown: list[str] | None = None
        self.references: list[str] = []

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.progress.stopped_early or self.progress.step >= self.total_steps

    def steps_from(self, step: int) -> Iterator[list[list[Any]]]:
        """The rows of each batch of each step from `step` on, epoch after epoch.

        The order depends on seed and epoch alone.
        """
        while True:
            epoch, done = divmod(step, self.steps_an_epoch)
            size = self.settings.gradient_accumulation
            batches = self._batches(epoch)
            for start in range(done * size, len(batches), size):
                yield [[self.rows[i] for i in indices] for indices in batches[start : start + size]]
                step += 1

    def _batches(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(
            self.lengths,
            self.settings.batch_size,
            seed=self.settings.seed,
            epoch=epoch,
            group_by_length=self.settings.group_by_length,
            balanced=self.balanced,
        )

    def evaluation_is_due(self) -> bool:
        """At each interval and after the last step, once each."""
        step, done = self.progress.step, self.progress.evaluations
        if done and done[-1].step == step:
            return False
        return step % self.interval == 0 or step >= self.total_steps

    def compute_metrics(self, found: EvalOutput, seconds: float) -> Evaluation:
        """The evaluation of the step that the run is at."""
        self.shown, self.references = found.shown, found.references
        return compute_metrics(
            self.progress.step,
            found.loss,
            found.references,
            found.predictions,
            self.learner.task.labels,
            seconds=seconds,
            scores=found.scores,
        )

    def add(self, evaluation: Evaluation) -> bool:
        """Add an evaluation, and end the run where its patience is over.

        Returns:
            Whether it is the best one, which the one before the first step never is.

        Raises:
            FloatingPointError: its loss is not finite.
        """
        self.check_finite(evaluation.loss, "held-out loss", evaluation.step)
        progress = self.progress
        progress.evaluations.append(evaluation)
        if not progress.step:
            return False
        best = progress.best is None or self.rank(evaluation) > self.rank(progress.evaluations[progress.best])
        if best:
            progress.best = len(progress.evaluations) - 1
        assert progress.best is not None
        since = len(progress.evaluations) - 1 - progress.best
        patient = self.settings.patience is None or since < self.settings.patience
        progress.stopped_early = not patient and progress.step < self.total_steps
        return best

    def rank(self, evaluation: Evaluation) -> tuple[float, ...]:
        """The larger, the better."""
        by = self.settings.best_by or ("accuracy" if self.learner.task.kind.has_labels else "loss")
        if by == "loss":
            return (-evaluation.loss,)
        score = evaluation.accuracy if by == "accuracy" else evaluation.macro_f1
        assert score is not None
        return (score, -evaluation.loss)

    def check_finite(self, loss: float, name: str, step: int) -> None:
        """Refuse a loss that is not finite.

        Raises:
            FloatingPointError: it isn't.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The {name} is {loss} at step {step}, so training stopped and the adapter was not saved. Lower the "
                f"learning rate (it is {self.settings.learning_rate:g}); T5 models overflow in float16: load them in "
                "float32 or bfloat16."
            )

    def result(self, folder: Path) -> Run:
        """The run, once it is finished and its adapters are in the folder; writes `result.json`."""
        model = self.learner.model
        run = Run(
            output_dir=folder,
            settings=self.settings,
            task=self.learner.task,
            shown=self.shown or [],
            references=self.references,
            progress=self.progress,
            train_examples=self.train_count,
            trainable_parameters=sum(parameter.numel() for parameter in trainable_parameters(model).values()),
            all_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
        answers = zip(run.shown, run.references, run.final.predictions, strict=True)
        predictions = [{"label": right, "prediction": found, "text": text} for text, right, found in answers]
        write_json(folder / RESULT_NAME, run.summary() | {"predictions": predictions})
        return run


class _Stop(BaseException):
    """Somebody wants the training to end here."""


class Training:
    """One training: making it checks all that can be checked before the first step, and writes nothing."""

    def __init__(
        self, learner: Learner[Any], training: Examples, test: Examples, folder: Path, *, resume: bool = False
    ) -> None:
        """Takes what `fit` takes, and raises what it raises before training."""
        settings = learner.settings
        check_output(folder)
        check_examples(learner.task.kind, training, test)
        self.learner, self.settings, self.folder = learner, settings, folder
        self.accelerator = make_accelerator(settings, folder)
        self.trainable = trainable_parameters(learner.model)
        self.plan = RunPlan(learner, training, test, learner.tokenise(training), learner.tokenise(test))
        torch.manual_seed(settings.seed)
        optimizer = make_optimizer(self.trainable, settings)
        self.model, self.optimizer = self.accelerator.prepare(learner.model, optimizer)
        self.schedule = make_schedule(optimizer, settings, self.plan.total_steps)
        self.saved_at = time.monotonic()
        self.stop_asked = False
        self.advice = "fit(…, resume=True)"
        if resume:
            self.plan.progress = load_state(folder / STATE_NAME, self.trainable, optimizer, self.schedule)
        self.fast = self._fast_step(optimizer)
        # Losses are looked at so many steps at a time: to look at each would let a GPU wait for the host.
        self.ahead = _AHEAD if self.fast is not None and self.fast.path == "captured" else 1
        self.waiting: list[dict[str, Any]] = []

    @property
    def progress(self) -> TrainerState:
        """How far it has come."""
        return self.plan.progress

    def _fast_step(self, optimizer: Optimizer) -> Step | None:
        """The step that leaves padding out and on a GPU is captured; where it isn't right, it is the ordinary one."""
        if not self.learner.is_the_models_loss or self.settings.gradient_accumulation > 1:
            return None
        return compile_step(
            self.learner.model,
            optimizer,
            self.schedule,
            max_gradient_norm=self.settings.max_gradient_norm,
            weight_decay=self.settings.weight_decay,
        )

    def describe_path(self) -> str:
        """Which way a step goes, and why, in a line."""
        if self.fast is None:
            return "The ordinary step: the fast one is for the model's own loss of one batch a step."
        if self.fast.reason is not None:
            return f"The ordinary step, since {self.fast.reason}."
        if self.fast.path == "captured":
            return "The fast step: no padding, captured as a CUDA graph."
        return "The fast step: no padding."

    def run(self, console: Console | None = None) -> Run:
        """From where the progress stands to the end, then the run's files; see `fit`."""
        with progress_bars(console) as bars, _stop_on_signals(self):
            return self._run(bars)

    def _run(self, bars: ProgressBars) -> Run:
        bar = bars.add_task("training", total=self.plan.total_steps, completed=self.progress.step, note="")
        try:
            self._evaluate_if_due(bars)
            self._begin_logs()
            while not self.plan.finished:
                self._train_until_due(bars, bar)
                self._evaluate_if_due(bars)
                self._save_state()
            bars.update(bar, description="trained")
            return self._finish(bars)
        except _Stop:
            raise self._interrupted() from None
        except FloatingPointError:
            # Going on from here would diverge again, so the folder is free for another try.
            (self.folder / STATE_NAME).unlink(missing_ok=True)
            raise
        finally:
            self.accelerator.end_training()

    def _train_until_due(self, bars: ProgressBars, bar: Any) -> None:
        """Steps up to the next evaluation."""
        self.learner.model.train(self.settings.dropout)
        for parts in self.plan.steps_from(self.progress.step):
            batches = [self.learner.collate(rows) for rows in parts]
            started = time.perf_counter()
            record = self._step(batches)
            self.progress.steps.append(record)
            self.waiting.append(record)
            is_time = time.monotonic() - self.saved_at > _SAVE_SECONDS
            if self.stop_asked or is_time or self.plan.evaluation_is_due() or len(self.waiting) >= self.ahead:
                self._look_at_losses(bars, bar)
            self.progress.seconds += time.perf_counter() - started
            if self.stop_asked:
                raise _Stop
            if self.plan.evaluation_is_due():
                return
            if is_time:
                self._save_state()

    def _look_at_losses(self, bars: ProgressBars, bar: Any) -> None:
        """Check and log those of the last steps, which a GPU may still have been at."""
        for record in self.waiting:
            record["loss"] = float(record["loss"])
            self.plan.check_finite(record["loss"], "training loss", int(record["step"]))
            self._log(record)
        bars.update(bar, advance=len(self.waiting), note=f"loss {self.waiting[-1]['loss']:.3f}")
        self.waiting.clear()

    def _step(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """One update from one or more batches, whose losses count by their targets; its number, loss and rate."""
        rate = self._rate()
        if self.fast is not None and self.fast.reason is None:
            return {"learning_rate": rate, "loss": self.fast(batches[0]), "step": self.progress.step + 1}
        targets = [self.learner.targets(batch) for batch in batches]
        loss = 0.0
        for batch, count in zip(batches, targets, strict=True):
            on_device = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            part = self.learner.loss(on_device)
            if len(batches) > 1:
                part = part * (count / sum(targets))
            self.accelerator.backward(part)
            loss += part.item()
        self.plan.check_finite(loss, "training loss", self.progress.step + 1)
        if self.settings.max_gradient_norm is not None:
            self.accelerator.clip_grad_norm_(list(self.trainable.values()), self.settings.max_gradient_norm)
        decay_vectors(self.trainable, rate, self.settings.weight_decay)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return {"learning_rate": rate, "loss": loss, "step": self.progress.step + 1}

    def _rate(self) -> float:
        """The next step's, computed here, since a GPU's optimizer has it on the device."""
        schedule: Any = self.schedule
        return float(schedule.base_lrs[0]) * float(schedule.lr_lambdas[0](schedule.last_epoch))

    def _evaluate_if_due(self, bars: ProgressBars) -> None:
        if not self.plan.evaluation_is_due():
            return
        evaluation = self._evaluate(bars)
        best = self.plan.add(evaluation)
        if self.progress.step:
            method = self.learner.task.method
            self._log({"evaluation": evaluation.summary(), "method": method, "step": evaluation.step})
        if best:
            save_adapter(self.learner, self.folder / BEST_FOLDER)

    def _evaluate(self, bars: ProgressBars) -> Evaluation:
        started = time.perf_counter()
        bar = bars.add_task("evaluating", total=len(self.plan.test_rows), note="")

        def beat(rows: int) -> None:
            bars.update(bar, advance=rows)
            if self.stop_asked:
                raise _Stop

        # An evaluation that is interrupted is done again, so it must leave no draws behind: a GPU's kernels are given
        # seeds although nothing is dropped.
        device = self.accelerator.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = self.learner.measure(self.plan.test_rows, beat)
        finally:
            bars.remove_task(bar)
        return self.plan.compute_metrics(found, time.perf_counter() - started)

    def _begin_logs(self) -> None:
        """`metrics.jsonl` as far as the progress goes, and the trackers."""
        lines = "".join(
            f"{json.dumps(line, sort_keys=True)}\n" for line in self.progress.lines(self.learner.task.method)
        )
        write_atomically(self.folder / METRICS_NAME, lines.encode())
        if self.settings.trackers:
            self.accelerator.init_trackers("tracker", config=_flat(self.settings))
            for each in self.progress.evaluations[-1:]:  # the one made just before
                self._track({"evaluation": each.summary(), "step": each.step})

    def _log(self, line: dict[str, Any]) -> None:
        with (self.folder / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line, sort_keys=True)}\n")
        if self.settings.trackers:
            self._track(line)

    def _track(self, line: dict[str, Any]) -> None:
        self.accelerator.log(_as_scalars(line), step=int(line["step"]))

    def _save_state(self) -> None:
        save_state(self.folder / STATE_NAME, self.progress, self.trainable, self.optimizer, self.schedule)
        self.saved_at = time.monotonic()

    def _interrupted(self) -> Interrupted:
        self._save_state()
        adapter = save_adapter(self.learner, self.folder / ADAPTER_FOLDER)
        return Interrupted(
            f"Interrupted at step {self.progress.step} of {self.plan.total_steps}. Go on: {self.advice}\n"
            f"The adapter as it is now: {adapter}"
        )

    def _finish(self, bars: ProgressBars) -> Run:
        save_adapter(self.learner, self.folder / ADAPTER_FOLDER)
        if self.plan.shown is None:  # resumed when all but these files was done
            self._evaluate(bars)
        return self.plan.result(self.folder)


def save_adapter(learner: Learner[Any], folder: Path) -> Path:
    """Save the model's adapter with its task; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    learner.model.save_pretrained(folder)
    save_task(folder, learner.task)
    return folder


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """accelerate's device and trackers; it would leave out a tracker that is not installed without a word."""
    installed = {str(name) for name in get_available_trackers()}
    missing = sorted(set(settings.trackers) - installed)
    if missing:
        raise ValueError(
            f"The trackers {missing} are not installed, or not known to accelerate: of its trackers there are "
            f"{sorted(installed) or 'none'}. Install the package of that name, or leave it out."
        )
    accelerator = Accelerator(log_with=list(settings.trackers) or None, project_dir=folder)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"There are {accelerator.num_processes} processes, and ia3 train uses one: start it without a launcher, "
            "or train with transformers' Trainer, which takes several."
        )
    return accelerator


def check_examples(kind: TaskKind, train_examples: Examples, test_examples: Examples) -> None:
    """Refuse what can't be trained on.

    Raises:
        ValueError: nothing to train or to evaluate, or a held-out label that training never shows.
    """
    for examples, purpose in ((train_examples, "train on"), (test_examples, "evaluate on")):
        if len(examples) == 0:
            raise ValueError(f"{examples.source} holds no examples to {purpose}: expected at least one.")
    if kind not in (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION):
        return
    known = {example.label for example in train_examples}
    unseen = sorted({example.label for example in test_examples} - known)
    if unseen:
        raise ValueError(
            f"The held-out labels {unseen} never occur in training, which knows {sorted(known)}: correct the "
            "labels, add training examples with them, raise `limit`, or split otherwise (`split_seed`, `test_data`)."
        )


@contextmanager
def _stop_on_signals(training: Training) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends training after the step under way; the second SIGINT at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        training.stop_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _flat(settings: TrainSettings) -> dict[str, Any]:
    """What trackers take as a configuration: no lists, no None."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in asdict(settings).items()
    }


def _as_scalars(line: dict[str, Any]) -> dict[str, float]:
    evaluation = line.get("evaluation")
    if evaluation is not None:
        return {f"held_out/{name}": value for name, value in evaluation.items() if name != "step"}
    return {f"train/{name}": line[name] for name in ("learning_rate", "loss")}


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Bar) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2f}/s", style="progress.data.speed")


def progress_bars(console: Console | None) -> ProgressBars:
    """The bars of a training."""
    return ProgressBars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _StepsPerSecond(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
