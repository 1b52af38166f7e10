"""Classes of texts, chosen by a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ia3.inference.classify import batched_logits, class_labels, padding_token, tokenise_texts
from ia3.inference.predict import pad_rows
from ia3.inference.rank import likeliest
from ia3.tasks.examples import Example
from ia3.training.learner import EvalOutput, Learner


@dataclass(frozen=True)
class ClassRow:
    """A text's tokens, cut at the longest length allowed, and its class."""

    input_ids: list[int]
    class_id: int
    text: str


@dataclass(frozen=True)
class SequenceClasses(Learner[ClassRow]):
    """One class a text, by the cross-entropy of a head's answers.

    Raises:
        ValueError: the model's labels are not the task's, or its configuration names no padding token.
    """

    def __post_init__(self) -> None:
        check_head(self.model, self.task.labels)

    def tokenise(self, examples: Sequence[Example]) -> list[ClassRow]:
        """Texts cut at the task's length; a label must be one of the task's."""
        classes = [class_of(row.label, self.task.labels, row.text) for row in examples]
        texts = [row.text for row in examples]
        rows = tokenise_texts(texts, self.model, self.tokenizer, self.task.max_length)
        return [ClassRow(*row) for row in zip(rows, classes, texts, strict=True)]

    def length(self, row: ClassRow) -> int:
        """Of the text."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[ClassRow]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` `[batch, length]`, padded at the right, and `labels` `[batch]`."""
        batch = pad_rows([row.input_ids for row in rows], padding_token(self.model), self.settings.pad_to_multiple_of)
        return batch | {"labels": torch.tensor([row.class_id for row in rows])}

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The texts."""
        return len(batch["labels"])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a text."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return cross_entropy(in_full_precision(self.model(**inputs).logits), batch["labels"])

    def measure(self, rows: Sequence[ClassRow], beat: Callable[[int], None]) -> EvalOutput:
        """The cross-entropy a text, and the likeliest labels."""
        labels = self.task.labels
        references = torch.tensor([row.class_id for row in rows])
        answers, loss = torch.empty_like(references), 0.0
        tokens = [row.input_ids for row in rows]
        for indices, logits in batched_logits(self.model, tokens, self.settings.evaluation_batch_size, beat):
            loss += float(cross_entropy(logits, references[indices], reduction="sum"))
            answers[indices] = torch.tensor(likeliest(logits))
        return EvalOutput(
            loss / len(rows),
            [row.text for row in rows],
            [labels[index] for index in references.tolist()],
            [labels[index] for index in answers.tolist()],
        )


def check_head(model: Any, labels: Sequence[str]) -> None:
    """Expect a head for these labels and a way to tell padding.

    Raises:
        ValueError: it is for others, or the configuration names no padding token.
    """
    padding_token(model)
    found = class_labels(model)
    if found != tuple(labels):
        raise ValueError(
            f"The model's head is for the labels {list(found)}, and the task has {list(labels)}: load it with "
            "load_classifier(model_name, kind, labels)."
        )


def class_of(label: str, labels: Sequence[str], text: str) -> int:
    """The class of a label.

    Raises:
        ValueError: it is not among the task's.
    """
    if label not in labels:
        raise ValueError(
            f"The label {label!r} of the text {text[:60]!r} is not among the task's labels {list(labels)}: correct "
            "it, or give the text another."
        )
    return labels.index(label)


def in_full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits in fp32, for a cross-entropy that is exact."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
