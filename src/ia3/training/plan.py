"""From recipes to runs that can begin: data, base model, tokenised rows, each once; then what a run does when."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ia3.config import IA3Config
from ia3.errors import shorten
from ia3.files import write_atomically
from ia3.inference.classify import head_modules
from ia3.inference.loading import DTYPES, Base
from ia3.inference.predict import count_truncated
from ia3.peft_model import get_peft_model
from ia3.runs.look import Looked
from ia3.runs.recipe import Recipe, describe_choice, resolve
from ia3.runs.run import METRICS_NAME, RESULT_NAME, Evaluation, Run, TrainerState, compute_metrics, write_json
from ia3.status import count_parameters
from ia3.tasks.examples import Examples
from ia3.tasks.task import Task, TaskKind, save_task
from ia3.training.collate import shuffled_batches, tokenise_label
from ia3.training.data import read_data
from ia3.training.learner import EvalOutput, Learner
from ia3.training.learners.instructions import Instructions, count_cut
from ia3.training.learners.making import make_learner, settings_of
from ia3.training.optimise import linear_schedule, trainable_parameters

# What a chat template puts after an answer, and what the answer's first blank may cost.
_ROOM_FOR_THE_END = 8
# How many tokens a text is gone on with where nothing else is asked for.
_CONTINUATION = 128


def prepare(
    base: Base,
    kind: TaskKind,
    recipes: Sequence[Recipe],
    console: Console,
    looked: Looked | None = None,
) -> list[tuple[Recipe, RunPlan]]:
    """Read the data, load the base with a new adapter, tokenise: all that runs over one base need, each once.

    Args:
        base: the recipes' base model.
        kind: the recipes' task, or where they name none the base model's.
        recipes: a run each, which differ neither in base model nor in adapter.
        console: where the data's oddities go.
        looked: what `look_before` has read of the recipes.

    Returns:
        Each run with its recipe, completed by task, way of answering and what it left to the data.

    Raises:
        FileNotFoundError, ValueError: as `ia3.train`.
    """
    asked = [settings_of(replace(each, task=kind), kind) for each in recipes]
    common = asked[0]
    if common.system is not None and kind is not TaskKind.INSTRUCTIONS:
        raise ValueError(f"A system message is for {TaskKind.INSTRUCTIONS}, and this task is {kind}: leave it out.")
    data = read_data(recipes, kind, console, looked)
    labels = [_labels(kind, *parts) for parts in data]
    complete = [
        resolve(each, kind, len(training), len(own))
        for each, (training, _), own in zip(asked, data, labels, strict=True)
    ]
    if chosen := describe_choice(common, complete[0]):
        console.print(f"Chosen by the task and its {len(data[0][0]):,} rows: {chosen}.", highlight=False)
    with console.status(f"Loading {base.name}"):
        tasks = [
            _make_task(each, training, own, base.tokenizer)
            for each, (training, _), own in zip(complete, data, labels, strict=True)
        ]
        loaded = base.load(
            kind,
            labels=tasks[0].labels,
            dtype=DTYPES[common.precision],
            quantize=common.quantize,
            seed=common.seed,
        )
        config = IA3Config(
            task_type=kind.task_type,
            target_modules=common.target_modules,
            feedforward_modules=common.feedforward_modules,
            towers=common.towers,
            modules_to_save=None if kind.writes else head_modules(loaded),
        )
        model = get_peft_model(loaded, config)
    known: dict[int, Sequence[Any]] = {}
    plans = [
        RunPlan(make_learner(model, base.tokenizer, task, each.settings), *parts, known)
        for each, task, parts in zip(complete, tasks, data, strict=True)
    ]
    learner, first = plans[0].learner, plans[0]
    if isinstance(learner, Instructions):
        cut = count_cut([*first.rows, *first.test_rows])
    else:
        cut = count_truncated([*first.training.texts, *first.test.texts], base.tokenizer, common.max_length)
    if cut:
        console.print(f"{cut:,} texts are longer than {common.max_length} tokens and are cut (`max_length`).")
    return list(zip(complete, plans, strict=True))


def _make_task(recipe: Recipe, training: Examples, labels: tuple[str, ...], tokenizer: Any) -> Task:
    """What the recipe's adapter learns to do."""
    assert recipe.task is not None
    # Read as the examples were, unless the recipe says otherwise of examples in memory.
    says = isinstance(recipe.data, Examples) and (recipe.template is not None or recipe.text_column != "text")
    reading = None if says else training.reading
    return Task(
        kind=recipe.task,
        template=recipe.wording if reading is None else reading.template,
        labels=labels,
        max_length=recipe.max_length,
        max_new_tokens=_longest_answer(recipe, labels or [row.label for row in training], tokenizer),
        base_model=recipe.model,
        label_column=recipe.label_column if reading is None else reading.label_column,
        system=recipe.system,
        precision=recipe.precision,
        quantize=recipe.quantize,
    )


def _labels(kind: TaskKind, training: Examples, test: Examples) -> tuple[str, ...]:
    """The labels that training shows, in their source's order; of tags those that only the held-out texts show too."""
    if not kind.has_labels:
        return ()
    if kind is TaskKind.TOKEN_CLASSIFICATION:
        return tuple(dict.fromkeys([*training.labels, *test.labels]))
    occurring = {row.label for row in training}
    found = tuple(label for label in training.labels if label in occurring)
    if len(found) < 2:
        raise ValueError(
            f"All {len(training):,} training examples of {training.source} have the label {shorten(found[0])}, so "
            "there is nothing to tell apart: give examples of at least two labels."
        )
    return found


def _longest_answer(recipe: Recipe, answers: Iterable[str], tokenizer: Any) -> int | None:
    """The most tokens that an answer takes, its end token included."""
    kind, distinct = recipe.task, list(dict.fromkeys(answers))
    if kind is None or not kind.writes:
        return None
    if not kind.has_answers:
        return _CONTINUATION
    if kind is TaskKind.INSTRUCTIONS:
        return _ROOM_FOR_THE_END + max(len(ids) for ids in tokenizer(distinct, add_special_tokens=False)["input_ids"])
    words, longest = kind is TaskKind.LABEL_WORDS, recipe.max_label_length
    return max(len(tokenise_label(each, tokenizer, longest, words)) for each in distinct)


class RunPlan:
    """One run: its batches step by step, when it is evaluated, which evaluation is the best, and how far it has come.

    Args:
        learner: the model with its adapter, its task and how to train it.
        training: what to learn from.
        test: what to evaluate on.
        known: rows of examples by their `id`, as `learner.tokenise` gives them; runs that share it tokenise once.

    Raises:
        ValueError: a label that the tokenizer cannot give back, or a warm-up that is as long as the training.
    """

    def __init__(
        self, learner: Learner[Any], training: Examples, test: Examples, known: dict[int, Sequence[Any]] | None = None
    ) -> None:
        self.learner, self.settings, self.training, self.test = learner, learner.settings, training, test
        known = {} if known is None else known
        for examples in (training, test):
            if id(examples) not in known:
                known[id(examples)] = learner.tokenise(examples)
        self.rows, self.test_rows = known[id(training)], known[id(test)]
        self.lengths = [learner.length(row) for row in self.rows]
        self.balanced = [example.label for example in training] if self.settings.balance else None
        batches = len(self._batches(epoch=0))
        self.steps_an_epoch = self.settings.steps_an_epoch(batches)
        self.total_steps = self.settings.total_steps(batches)
        self.interval = self.settings.evaluation_interval(batches)
        self.schedule = linear_schedule(self.settings, self.total_steps)
        self.progress = TrainerState()
        self.shown: list[str] | None = None
        self.references: list[str] = []

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.progress.stopped_early or self.progress.step >= self.total_steps

    @property
    def rate(self) -> float:
        """The next step's learning rate, computed here, since a GPU's optimizer has it on the device."""
        return self.settings.learning_rate * self.schedule(self.progress.step)

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

    @property
    def evaluations_left(self) -> int:
        """How many follow the steps to come, unless it stops early."""
        return math.ceil(self.total_steps / self.interval) - self.progress.step // self.interval

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
        """Refuse a loss that is not finite by a FloatingPointError."""
        if math.isfinite(loss):
            return
        if step == 0:
            raise FloatingPointError(
                f"The {name} is {loss} before the first step, so it is the base model, {self.learner.task.base_model}, "
                "that gives it: its weights are damaged, or overflow, as T5's do in float16: load them in float32 or "
                "bfloat16."
            )
        raise FloatingPointError(
            f"The {name} is {loss} at step {step}, so training stopped and the adapter was not saved. Lower the "
            f"learning rate (it is {self.settings.learning_rate:g}); T5 models overflow in float16: load them in "
            "float32 or bfloat16."
        )

    def result(self, folder: Path, *, write: bool = True) -> Run:
        """The run, once it is finished and its adapters are in the folder; with `write` it writes `result.json`."""
        model = self.learner.model
        run = Run(
            output_dir=folder,
            settings=self.settings,
            task=self.learner.task,
            shown=self.shown or [],
            references=self.references,
            progress=self.progress,
            train_examples=len(self.training),
            trainable_parameters=sum(parameter.numel() for parameter in trainable_parameters(model).values()),
            all_parameters=count_parameters(model)[1],
        )
        if not write:
            return run
        answers = zip(run.shown, run.references, run.final.predictions, strict=True)
        predictions = [{"label": right, "prediction": found, "text": text} for text, right, found in answers]
        write_json(folder / RESULT_NAME, run.summary() | {"predictions": predictions})
        return run

    def write_metrics(self, folder: Path) -> None:
        """Write `metrics.jsonl` as far as the progress goes."""
        lines = [json.dumps(line, sort_keys=True) for line in self.progress.lines(self.learner.task.method)]
        write_atomically(folder / METRICS_NAME, "".join(f"{line}\n" for line in lines).encode())

    def save_adapter(self, folder: Path) -> Path:
        """Save the model's adapter with its task; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.learner.model.save_pretrained(folder)
        save_task(folder, self.learner.task)
        return folder
