"""Classes that a head chooses: of texts, or of their words, such as named entities."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ia3.errors import listed, shorten
from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.classify import batched_logits, class_labels, padding_token, split_words, tokenise_texts
from ia3.inference.predict import pad_rows, sorted_batches
from ia3.inference.processes import ALONE, Processes
from ia3.inference.rank import likeliest
from ia3.inference.tokens import RowsOnDemand
from ia3.tasks.entities import tag_scores
from ia3.tasks.examples import Example, columns_of
from ia3.training.learner import EvalOutput, Learner


@dataclass(frozen=True)
class HeadRow:
    """The tokens of a text and what the head is to answer.

    Args:
        input_ids: the tokens, cut at the longest length allowed.
        units: what has a class: the text, or the words that have a token.
        class_ids: their classes.
        starts: where the first token of each word stands; None where the class is the text's.
        unread: how many words have no token, as those behind the cut.
    """

    input_ids: list[int]
    units: list[str]
    class_ids: list[int]
    starts: list[int] | None = None
    unread: int = 0


class HeadLearner(Learner[HeadRow]):
    """One class a text or a word, by the cross-entropy of a head's answers.

    Raises:
        ValueError: the model's labels are not the task's, or its configuration names no padding token.
    """

    def __post_init__(self) -> None:
        padding_token(self.model)
        found = class_labels(self.model)
        if found != self.task.labels:
            raise ValueError(
                f"The model's head is for the labels [{listed(found)}], and the task has [{listed(self.task.labels)}]: "
                "load it with load_classifier(model_name, kind, labels)."
            )

    def class_of(self, label: str, text: str) -> int:
        """The class of a label, which has to be among the task's."""
        if label not in self.task.labels:
            raise ValueError(
                f"The label {shorten(label)} of the text {text[:60]!r} is not among the task's labels "
                f"[{listed(self.task.labels, 10)}]: correct it, or give the text another."
            )
        return self.task.labels.index(label)

    def length(self, row: HeadRow) -> int:
        """Of the text."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[HeadRow]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` `[batch, length]`, padded at the right, and `labels`.

        These are `[batch]`, or for words `[batch, length]`: a word's class at its first token, -100 at all others.
        """
        batch = pad_rows([row.input_ids for row in rows], padding_token(self.model), self.settings.pad_to_multiple_of)
        if all(row.starts is None for row in rows):
            return batch | {"labels": torch.tensor([row.class_ids[0] for row in rows])}
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for index, row in enumerate(rows):
            labels[index, row.starts] = torch.tensor(row.class_ids)
        return batch | {"labels": labels}

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The texts, or the words."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a text or a word; of half-precision logits in fp32, so that it is exact."""
        logits = self.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORE_INDEX)

    def measure(self, rows: Sequence[HeadRow], beat: Callable[[int], None], processes: Processes = ALONE) -> EvalOutput:
        """The cross-entropy a text or a word, and the likeliest labels."""
        self.model.eval()
        batches = sorted_batches([len(row.input_ids) for row in rows], self.settings.evaluation_batch_size)
        answers = processes.answer_in_batches(batches, lambda indices: self._answer([rows[i] for i in indices]), beat)
        loss = sum(own for own, _ in answers)
        references, predictions = (
            [[self.task.labels[index] for index in own] for own in ids]
            for ids in ([row.class_ids for row in rows], [classes for _, classes in answers])
        )
        units = [unit for row in rows for unit in row.units]
        scores = self.scores(references, predictions, sum(row.unread for row in rows))
        right, found = (list(chain.from_iterable(each)) for each in (references, predictions))
        return EvalOutput(loss / len(units), units, right, found, scores)

    def _answer(self, rows: Sequence[HeadRow]) -> list[tuple[float, list[int]]]:
        """Of each text of a batch the summed cross-entropy and the likeliest classes, of itself or of its words."""
        found: dict[int, tuple[float, list[int]]] = {}
        for places, logits in batched_logits(self.model, [row.input_ids for row in rows], len(rows)):
            for place, own in zip(places, logits, strict=True):
                starts = rows[place].starts
                answered = own.unsqueeze(0) if starts is None else own[starts]
                loss = cross_entropy(answered, torch.tensor(rows[place].class_ids), reduction="sum")
                found[place] = float(loss), likeliest(answered)
        return [found[place] for place in range(len(rows))]

    def scores(self, references: list[list[str]], predictions: list[list[str]], unread: int) -> dict[str, float]:
        """Further figures of an evaluation, from the labels of each text."""
        return {}


@dataclass(frozen=True)
class SequenceClasses(HeadLearner):
    """One class a text."""

    def tokenise(self, examples: Sequence[Example]) -> Sequence[HeadRow]:
        """Texts cut at the task's length; a label must be one of the task's."""
        columns = columns_of(examples)
        classes = array("l", map(self.class_of, columns.labels, columns.texts))
        rows = tokenise_texts(columns.texts, self.model, self.tokenizer, self.task.max_length)

        def row(place: int) -> HeadRow:
            return HeadRow(rows[place], [columns.texts[place]], [classes[place]])

        return RowsOnDemand(len(rows), row)


@dataclass(frozen=True)
class TokenClasses(HeadLearner):
    """One class a word.

    An example's text holds its words with single blanks between them, and its label their tags in the same way.
    """

    def tokenise(self, examples: Sequence[Example]) -> list[HeadRow]:
        """Texts cut at the task's length; a warning counts the words that are cut, which are left out."""
        tags = [self._tags(row) for row in examples]
        words = [row.text.split(" ") for row in examples]
        pieces = split_words(words, self.model, self.tokenizer, self.task.max_length)
        rows = []
        for own, classes, piece in zip(words, tags, pieces, strict=True):
            if not piece.starts:
                raise ValueError(
                    f"No word of the text {' '.join(own)[:60]!r} has a token within the first "
                    f"{self.task.max_length}: raise max_length, or remove the text."
                )
            read = sorted(piece.starts)
            units, ids = [own[place] for place in read], [classes[place] for place in read]
            starts = [piece.starts[place] for place in read]
            rows.append(HeadRow(piece.input_ids, units, ids, starts, len(own) - len(read)))
        return rows

    def _tags(self, row: Example) -> list[int]:
        words, tags = row.text.split(" "), row.label.split(" ")
        if len(words) != len(tags):
            raise ValueError(
                f"The text {row.text[:60]!r} has {len(words)} words and {len(tags)} tags: expected one tag a word, "
                "single blanks between them."
            )
        return [self.class_of(tag, row.text) for tag in tags]

    def scores(self, references: list[list[str]], predictions: list[list[str]], unread: int) -> dict[str, float]:
        """For IOB2 tags the scores of the entities they mark, and how many words had no token.

        These are `entity_precision`, `entity_recall` and `entity_f1`, and `words_left_out`: words without a token
        within the task's length are in no other figure.
        """
        return tag_scores(references, predictions, self.task.labels, words_left_out=unread)
