"""The training loop of seq2seq label words: AdamW over the vectors, evaluation by loss and by generation."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ia3
from ia3.files import write_atomically
from ia3.inference.predict import generate_words, sorted_batches
from ia3.training.collate import IGNORED, TokenisedExample, collate, shuffled_batches, tokenise
from ia3.training.data import Examples
from ia3.training.metrics import count_correct, majority_baseline, wilson_interval

ADAPTER_FOLDER = "adapter"
METRICS_NAME = "metrics.json"
LOSSES_NAME = "losses.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train; the defaults are those of PEFT's guide to IA3, with batches padded to their longest row.

    Args:
        epochs: passes over the training examples.
        learning_rate: AdamW's rate at the first step; it falls linearly to 0 at the last.
        batch_size: examples a step.
        max_length: where longer inputs are cut, in tokens.
        max_label_length: the most tokens a label may have; None for any number. Labels are never cut.
        group_by_length: put examples of like length into one batch, to save padding.
        dropout: train with the base model's own dropout. Without it the base runs in evaluation mode, where
            transformers doesn't checkpoint gradients.
        pad_to_multiple_of: round padded lengths up to a multiple of this.
        evaluation_batch_size: examples a batch while evaluating.
        seed: decides the order of the examples and the dropout.

    Raises:
        ValueError: a number that is not positive.
    """

    epochs: int = 3
    learning_rate: float = 8e-3
    batch_size: int = 8
    max_length: int = 128
    max_label_length: int | None = None
    group_by_length: bool = True
    dropout: bool = True
    pad_to_multiple_of: int | None = None
    evaluation_batch_size: int = 32
    seed: int = 42

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "learning_rate",
            "batch_size",
            "max_length",
            "max_label_length",
            "pad_to_multiple_of",
            "evaluation_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}: expected a positive number.")


@dataclass(frozen=True)
class Evaluation:
    """The held-out examples after `step` steps: the mean loss a label token, and the generated words."""

    step: int
    loss: float
    correct: int
    total: int
    seconds: float
    predictions: list[str] = field(repr=False)

    @property
    def accuracy(self) -> float:
        """The share of generated words that equal the label."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % interval (Wilson)."""
        return wilson_interval(self.correct, self.total)


@dataclass(frozen=True)
class Run:
    """A finished training: what it cost, what it reached, and where its files are.

    `losses` holds one number a step; `evaluations` one entry before the first step and one an epoch.
    """

    output_dir: Path
    settings: TrainSettings
    labels: tuple[str, ...]
    texts: list[str] = field(repr=False)
    truth: list[str] = field(repr=False)
    losses: list[float] = field(repr=False)
    evaluations: list[Evaluation]
    train_seconds: float
    train_examples: int
    trainable_parameters: int
    all_parameters: int

    @property
    def adapter_dir(self) -> Path:
        """Where the adapter was saved."""
        return self.output_dir / ADAPTER_FOLDER

    @property
    def adapter_bytes(self) -> int:
        """The size of the adapter's tensors and configuration on disk."""
        return sum(path.stat().st_size for path in self.adapter_dir.glob("adapter_*"))

    @property
    def final(self) -> Evaluation:
        """The evaluation after the last step."""
        return self.evaluations[-1]

    @property
    def majority(self) -> float:
        """The accuracy of always answering the held-out set's most frequent label."""
        return majority_baseline(self.truth)

    def summary(self) -> dict[str, Any]:
        """The run's numbers as JSON writes them."""
        return {
            "accuracy": self.final.accuracy,
            "accuracy_interval_95": list(self.final.interval),
            "adapter_bytes": self.adapter_bytes,
            "all_parameters": self.all_parameters,
            "evaluations": [
                {"step": each.step, "loss": each.loss, "accuracy": each.accuracy, "seconds": each.seconds}
                for each in self.evaluations
            ],
            "labels": list(self.labels),
            "loss": self.final.loss,
            "majority_baseline": self.majority,
            "settings": asdict(self.settings),
            "steps": len(self.losses),
            "test_examples": self.final.total,
            "train_examples": self.train_examples,
            "train_seconds": self.train_seconds,
            "trainable_parameters": self.trainable_parameters,
            "versions": {
                "ia3": ia3.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def train(
    model: Any,
    tokenizer: Any,
    train_examples: Examples,
    test_examples: Examples,
    *,
    settings: TrainSettings,
    output_dir: str | Path,
    console: Console | None = None,
) -> Run:
    """Train a seq2seq model's trainable parameters to answer a text with its label word.

    AdamW without weight decay, a linear schedule without warm-up, in the model's own dtype. Evaluates before
    the first step and after each epoch, then saves the adapter, `metrics.json` (with each held-out text's
    prediction) and `losses.jsonl`.

    Args:
        model: a seq2seq model with an adapter attached.
        tokenizer: the base model's tokenizer.
        train_examples: what to learn from.
        test_examples: what to evaluate on.
        settings: lengths, rate, batches, seed.
        output_dir: the run's folder; files of an earlier run there are replaced.
        console: where the progress goes; standard error by default.

    Raises:
        NotADirectoryError, PermissionError: `output_dir` cannot be written.
        ValueError: nothing to train or to evaluate, a held-out label that training never shows, a label that
            the tokenizer cannot give back.
        FloatingPointError: a loss is not finite; nothing has been saved then.
    """
    _check_output(Path(output_dir).absolute())
    _check_examples(train_examples, test_examples)
    trainable = _trainable_parameters(model)
    train_rows = _tokenise(train_examples, tokenizer, settings)
    test_rows = _tokenise(test_examples, tokenizer, settings)
    total_steps = settings.epochs * math.ceil(len(train_rows) / settings.batch_size)

    torch.manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total_steps)
    losses: list[float] = []
    started = time.perf_counter()
    with _progress(console) as progress:
        bar = progress.add_task("evaluating", total=total_steps, loss="")
        evaluations = [evaluate(model, tokenizer, test_rows, settings, step=0)]
        for epoch in range(settings.epochs):
            progress.update(bar, description="training")
            model.train(settings.dropout)
            for batch in _batches(train_rows, tokenizer, settings, epoch):
                losses.append(_step(model, batch, optimiser, schedule))
                _check_finite(losses[-1], "training loss", len(losses), settings)
                progress.update(bar, advance=1, loss=f"loss {losses[-1]:.3f}")
            progress.update(bar, description="evaluating")
            evaluations.append(evaluate(model, tokenizer, test_rows, settings, step=len(losses)))
        progress.update(bar, description="trained")
    seconds = time.perf_counter() - started

    run = Run(
        output_dir=Path(output_dir),
        settings=settings,
        labels=tuple(train_examples.labels),
        texts=test_examples.texts,
        truth=[row.label for row in test_examples],
        losses=losses,
        evaluations=evaluations,
        train_seconds=seconds - sum(each.seconds for each in evaluations),
        train_examples=len(train_rows),
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
        all_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    _save(run, model)
    return run


@torch.inference_mode()
def evaluate(
    model: Any, tokenizer: Any, rows: Sequence[TokenisedExample], settings: TrainSettings, *, step: int
) -> Evaluation:
    """Teacher-forced loss and exact match of the generated words, one encoder pass for both.

    Args:
        model: the seq2seq model; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        rows: the held-out examples.
        settings: for the batch size.
        step: how many steps the model has been trained for.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.eval()
    started = time.perf_counter()
    answer_length = max(len(row.label_ids) for row in rows) + 1
    predictions, loss, tokens = [""] * len(rows), 0.0, 0
    for indices in sorted_batches([len(row.input_ids) for row in rows], settings.evaluation_batch_size):
        batch = _on_device(_collate([rows[i] for i in indices], tokenizer, settings), model)
        labels = batch.pop("labels")
        encoded = model.get_encoder()(**batch)
        known = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
        count = int((labels != IGNORED).sum())
        loss += float(model(**known, labels=labels, use_cache=False).loss) * count
        tokens += count
        for index, word in zip(indices, generate_words(model, tokenizer, answer_length, **known), strict=True):
            predictions[index] = word
    _check_finite(loss, "held-out loss", step, settings)
    correct = count_correct([row.label for row in rows], predictions)
    seconds = time.perf_counter() - started
    return Evaluation(step, loss / tokens, correct, len(rows), seconds, predictions)


def _check_output(folder: Path) -> None:
    """Find out before training, not after, that the run cannot be saved."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"The output {folder} cannot be a folder, since {nearest} is a file: name another.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"The output {folder} cannot be written, since {nearest} is read-only: name another.")


def _check_examples(train_examples: Examples, test_examples: Examples) -> None:
    for examples, purpose in ((train_examples, "train on"), (test_examples, "evaluate on")):
        if len(examples) == 0:
            raise ValueError(f"{examples.source} holds no examples to {purpose}: expected at least one.")
    known = {row.label for row in train_examples}
    unseen = sorted({row.label for row in test_examples} - known)
    if unseen:
        raise ValueError(
            f"The held-out labels {unseen} never occur in training, which knows {sorted(known)}: correct the "
            "labels, or add training examples with them."
        )


def _trainable_parameters(model: Any) -> list[Parameter]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "The model has no trainable parameters: attach an adapter with get_peft_model first, and load a "
            "saved one with is_trainable=True."
        )
    return trainable


def _tokenise(examples: Examples, tokenizer: Any, settings: TrainSettings) -> list[TokenisedExample]:
    return tokenise(
        examples,
        tokenizer,
        max_length=settings.max_length,
        max_label_length=settings.max_label_length,
    )


def _batches(
    rows: Sequence[TokenisedExample], tokenizer: Any, settings: TrainSettings, epoch: int
) -> Iterator[dict[str, Tensor]]:
    lengths = [len(row.input_ids) for row in rows]
    for indices in shuffled_batches(
        lengths,
        settings.batch_size,
        seed=settings.seed,
        epoch=epoch,
        group_by_length=settings.group_by_length,
    ):
        yield _collate([rows[i] for i in indices], tokenizer, settings)


def _collate(rows: Sequence[TokenisedExample], tokenizer: Any, settings: TrainSettings) -> dict[str, Tensor]:
    return collate(rows, pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=settings.pad_to_multiple_of)


def _on_device(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _step(model: Any, batch: dict[str, Tensor], optimiser: Optimizer, schedule: LRScheduler) -> float:
    loss: Tensor = model(**_on_device(batch, model), use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
    return loss.item()


def _check_finite(loss: float, name: str, step: int, settings: TrainSettings) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The {name} is {loss} at step {step}, so training stopped and nothing was saved. Lower the "
            f"learning rate (it is {settings.learning_rate:g}); T5 models overflow in float16: load them in "
            "float32 or bfloat16."
        )


def _save(run: Run, model: Any) -> None:
    run.adapter_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(run.adapter_dir)
    losses = (json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(run.losses, start=1))
    write_atomically(run.output_dir / LOSSES_NAME, "".join(f"{line}\n" for line in losses).encode())
    answers = zip(run.texts, run.truth, run.final.predictions, strict=True)
    content = run.summary() | {
        "predictions": [{"text": text, "label": right, "prediction": predicted} for text, right, predicted in answers]
    }
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(run.output_dir / METRICS_NAME, text.encode())


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2f} steps/s", style="progress.data.speed")


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _StepsPerSecond(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
