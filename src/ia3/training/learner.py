"""What the training loop asks of a kind of task: rows, batches, a loss, a measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ia3.inference.predict import sorted_batches
from ia3.inference.processes import ALONE, Processes
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Example
from ia3.tasks.metrics import count_correct
from ia3.tasks.task import Task

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class EvalOutput:
    """Held-out rows, as the model answers them.

    Args:
        loss: the mean over all targets: label tokens, completion tokens, texts or words.
        shown: the units that were answered: the texts, or the words of a token classification; none of texts alone.
        references: the right answer of each unit.
        predictions: the model's answer to each.
        scores: further figures by name, such as `entity_f1`.
    """

    loss: float
    shown: list[str] = field(repr=False)
    references: list[str] = field(repr=False)
    predictions: list[str] = field(repr=False)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """A held-out example, as the model answers it.

    Args:
        text: what was read.
        reference: the right answer; None where none was asked for.
        prediction: the model's.
        loss: of the right answer, summed over its targets.
        targets: how many these are.
        ranked: where the prediction is written, the likeliest of the labels, if there are any.
    """

    text: str
    reference: str | None
    prediction: str
    loss: float
    targets: int
    ranked: str | None = None


@dataclass(frozen=True)
class Learner(ABC, Generic[RowT]):
    """One kind of task on one model.

    Args:
        model: the model with its adapter.
        tokenizer: the base model's tokenizer.
        task: template, labels and lengths.
        settings: how to train.
    """

    model: Any
    tokenizer: Any
    task: Task
    settings: TrainSettings

    @property
    def is_the_models_loss(self) -> bool:
        """Whether `loss` is what the model's own forward gives for the batch, so that a compiled step may take it."""
        return False

    @abstractmethod
    def tokenise(self, examples: Sequence[Example]) -> Sequence[RowT]:
        """Turn examples into rows of token ids, cut at the task's length.

        Raises:
            ValueError: a label that cannot be learned, with the remedy.
        """

    @abstractmethod
    def length(self, row: RowT) -> int:
        """A row's length in tokens, by which rows are grouped."""

    @abstractmethod
    def collate(self, rows: Sequence[RowT]) -> dict[str, Tensor]:
        """Stack rows into one batch on the CPU."""

    @abstractmethod
    def targets(self, batch: dict[str, Tensor]) -> int:
        """How many targets `loss` is the mean of: the batch's weight among those of one step."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch on the model's device, with its graph."""

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The parts that `loss` is the sum of, `[parts]`, each a mean over targets of its own."""
        return self.loss(batch).reshape(1)

    def counts(self, batch: dict[str, Tensor]) -> list[int]:
        """How many targets each part of `losses` is the mean of."""
        return [self.targets(batch)]

    @abstractmethod
    def measure(self, rows: Sequence[RowT], beat: Callable[[int], None], processes: Processes = ALONE) -> EvalOutput:
        """Answer held-out rows; the model is left in evaluation mode.

        Args:
            rows: what `tokenise` gave.
            beat: called after each batch with its number of rows; what it raises ends the measurement.
            processes: which share the batches; all of them get the whole measurement.
        """


class Writer(Learner[RowT]):
    """A kind of task whose answers the model writes or ranks: each row of a batch may be another adapter's."""

    @abstractmethod
    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each token, 0 where none is learned, and where one is: both `[batch, tokens]`."""

    @abstractmethod
    def answer(self, rows: Sequence[RowT]) -> list[Answered]:
        """Answer one batch of `batches`, in the rows' order, each of them one example."""

    def asked(self, row: RowT) -> int:
        """How many tokens of an example are read before its answer."""
        return self.length(row)

    def batches(self, lengths: Sequence[int]) -> Iterable[list[int]]:
        """The indices of examples in batches, in which they are answered as after training.

        Args:
            lengths: what `asked` says of each.
        """
        return sorted_batches(lengths, self.settings.evaluation_batch_size)

    @torch.inference_mode()
    def measure(self, rows: Sequence[RowT], beat: Callable[[int], None], processes: Processes = ALONE) -> EvalOutput:
        """The loss of the right answers, and the model's own."""
        self.model.eval()
        batches = self.batches([self.asked(row) for row in rows])
        return measurement(
            processes.answer_in_batches(batches, lambda indices: self.answer([rows[i] for i in indices]), beat)
        )


def measurement(answers: Sequence[Answered]) -> EvalOutput:
    """What the answers to all held-out examples come to; where some were ranked too, `accuracy_by_rank`."""
    loss, targets = sum(each.loss for each in answers), sum(each.targets for each in answers)
    asked = [each for each in answers if each.reference is not None]
    references = [str(each.reference) for each in asked]
    ranked = [each.ranked for each in asked if each.ranked is not None]
    scores = {"accuracy_by_rank": count_correct(references, ranked) / len(references)} if ranked else {}
    return EvalOutput(
        loss / targets, [each.text for each in asked], references, [each.prediction for each in asked], scores
    )
