"""How to train: rates, batches, lengths, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ia3.tasks.task import AnswerBy, Precision


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train; the defaults are those of PEFT's guide to IA3, with batches padded to their longest row.

    Args:
        epochs: passes over the training examples.
        steps: how many steps to train for, instead of `epochs`.
        learning_rate: the highest rate; it falls linearly to 0 at the end.
        warmup_steps: over how many steps the rate rises linearly from 0 first.
        optimizer: AdamW, or Adafactor as in T-Few (transformers', without relative steps).
        weight_decay: how much of its way back a number goes a step, times the rate: a vector towards one,
            which is the base model, a module trained in full towards zero.
        batch_size: examples a step on the device at once.
        gradient_accumulation: batches a step; the gradient is that of all their examples as one batch.
        max_gradient_norm: scale a gradient of a larger norm down to this; None leaves it as it is.
        precision: the base model's numbers, `fp32` or `bf16`; the vectors are fp32 in both.
        objective: `lm`, the model's own loss, or `t-few`, which adds the unlikelihood of wrong labels and the
            length-normalised choice among all (Liu et al. 2022, section 3.2); for label words.
        max_length: where longer inputs are cut, in tokens.
        max_label_length: the most tokens a label may have; None for any number. Labels are never cut.
        balance: draw the same number of examples of each label in each epoch, rare ones more than once.
        group_by_length: put examples of like length into one batch, to save padding.
        packing: put several examples into one row of `max_length`, where a causal model learns conversations or texts.
        train_on: which of the assistant's answers in a conversation are learned, `all` or the `last`.
        dropout: train with the base model's own dropout. Without it the base runs in evaluation mode, where
            transformers doesn't checkpoint gradients.
        pad_to_multiple_of: round the padded lengths of training's batches up to a multiple of this.
        evaluate_every: evaluate after so many steps; None after each epoch, or where `steps` is given, ten
            times. The state that an interrupted run goes on from is saved then, too.
        answer_by: how label words are answered, in evaluations and by the finished adapter: `rank`, the likeliest
            label, or `generation`, what the model writes, beside which the accuracy by rank is told. None for rank;
            other kinds of tasks have one way each.
        best_by: what makes an evaluation the best: `accuracy`, `macro_f1` or `loss`; None for accuracy, the
            lower loss among equals, and for loss where the answers are free text.
        patience: stop after so many evaluations without a better one; None never does.
        evaluation_batch_size: examples a batch while evaluating.
        trackers: where to log besides the run's folder, by accelerate's names, such as `tensorboard`.
        seed: decides the order of the examples and the dropout.

    Raises:
        ValueError: a number out of its range, or settings that exclude each other.
    """

    epochs: int = 3
    steps: int | None = None
    learning_rate: float = 8e-3
    warmup_steps: int = 0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_gradient_norm: float | None = None
    precision: Precision = "fp32"
    objective: Literal["lm", "t-few"] = "lm"
    max_length: int = 128
    max_label_length: int | None = None
    balance: bool = False
    group_by_length: bool = True
    packing: bool = False
    train_on: Literal["all", "last"] = "all"
    dropout: bool = True
    pad_to_multiple_of: int | None = None
    evaluate_every: int | None = None
    answer_by: AnswerBy | None = None
    best_by: Literal["accuracy", "macro_f1", "loss"] | None = None
    patience: int | None = None
    evaluation_batch_size: int = 32
    trackers: tuple[str, ...] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}: expected a positive number.")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}: expected 0 or a positive number.")

    def total_steps(self, batches_an_epoch: int) -> int:
        """How many steps the training has.

        Args:
            batches_an_epoch: how many batches one pass over the examples makes.
        """
        return self.epochs * self.steps_an_epoch(batches_an_epoch) if self.steps is None else self.steps

    def steps_an_epoch(self, batches: int) -> int:
        """How many steps one pass over the examples makes; the last may have fewer batches."""
        return math.ceil(batches / self.gradient_accumulation)

    def evaluation_interval(self, batches_an_epoch: int) -> int:
        """After how many steps an evaluation is due."""
        if self.evaluate_every is not None:
            return self.evaluate_every
        if self.steps is not None:
            return max(1, self.steps // 10)
        return self.steps_an_epoch(batches_an_epoch)


_POSITIVE = (
    "epochs",
    "steps",
    "learning_rate",
    "batch_size",
    "gradient_accumulation",
    "max_gradient_norm",
    "max_length",
    "max_label_length",
    "pad_to_multiple_of",
    "evaluate_every",
    "patience",
    "evaluation_batch_size",
)
