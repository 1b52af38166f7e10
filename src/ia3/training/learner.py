"""What the training loop asks of a kind of task: rows, batches, a loss, a measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from ia3.training.data import Example
from ia3.training.settings import TrainSettings
from ia3.training.task import Task

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Measurement:
    """Held-out rows, as the model answers them.

    Args:
        loss: the mean over all targets: label tokens, completion tokens, texts or words.
        shown: the units that were answered: the texts, or the words of a token classification.
        truth: the right answer of each unit.
        predictions: the model's answer to each.
        scores: further figures by name, such as `entity_f1`.
    """

    loss: float
    shown: list[str] = field(repr=False)
    truth: list[str] = field(repr=False)
    predictions: list[str] = field(repr=False)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """A batch of held-out rows, as the model answers them.

    Args:
        predictions: one a row.
        losses: of each row, summed over the targets of its right answer.
        targets: how many these are.
    """

    predictions: list[str]
    losses: list[float]
    targets: list[int]


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
    def tokenise(self, examples: Sequence[Example]) -> list[RowT]:
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

    @abstractmethod
    def measure(self, rows: Sequence[RowT], beat: Callable[[int], None]) -> Measurement:
        """Answer held-out rows; the model is left in evaluation mode.

        Args:
            rows: what `tokenise` gave.
            beat: called after each batch with its number of rows; what it raises ends the measurement.
        """


class Writer(Learner[RowT]):
    """A kind of task whose answers the model writes: each row of a batch may be another adapter's."""

    @abstractmethod
    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each token, 0 where none is learned, and where one is: both `[batch, tokens]`."""

    @abstractmethod
    def answer(self, rows: Sequence[RowT]) -> Answers:
        """Answer one batch of rows, in their order, each of them one example."""
