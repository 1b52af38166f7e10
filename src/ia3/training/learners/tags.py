"""Classes of the words of a text, such as named entities, chosen by a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.classify import batched_logits, padding_token, split_words
from ia3.inference.predict import pad_rows
from ia3.inference.rank import likeliest
from ia3.tasks.entities import tag_scores
from ia3.tasks.examples import Example
from ia3.training.learner import EvalOutput, Learner
from ia3.training.learners.classes import check_head, class_of, in_full_precision


@dataclass(frozen=True)
class TagRow:
    """The tokens of a text in words.

    Args:
        input_ids: the tokens, cut at the longest length allowed.
        words: the words that have a token.
        tag_ids: their classes.
        starts: where the first token of each stands.
        unread: how many words have no token, as those behind the cut.
    """

    input_ids: list[int]
    words: list[str]
    tag_ids: list[int]
    starts: list[int]
    unread: int


@dataclass(frozen=True)
class TokenClasses(Learner[TagRow]):
    """One class a word, by the cross-entropy of a head's answers at the words' first tokens.

    An example's text holds its words with single blanks between them, and its label their tags in the same way.

    Raises:
        ValueError: the model's labels are not the task's, or its configuration names no padding token.
    """

    def __post_init__(self) -> None:
        check_head(self.model, self.task.labels)

    def tokenise(self, examples: Sequence[Example]) -> list[TagRow]:
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
            rows.append(
                TagRow(
                    piece.input_ids,
                    [own[place] for place in read],
                    [classes[place] for place in read],
                    [piece.starts[place] for place in read],
                    len(own) - len(read),
                )
            )
        return rows

    def _tags(self, row: Example) -> list[int]:
        words, tags = row.text.split(" "), row.label.split(" ")
        if len(words) != len(tags):
            raise ValueError(
                f"The text {row.text[:60]!r} has {len(words)} words and {len(tags)} tags: expected one tag a word, "
                "single blanks between them."
            )
        return [class_of(tag, self.task.labels, row.text) for tag in tags]

    def length(self, row: TagRow) -> int:
        """Of the text."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[TagRow]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, padded at the right, and `labels`, all `[batch, length]`.

        A word's tag stands at its first token, -100 at all others.
        """
        batch = pad_rows([row.input_ids for row in rows], padding_token(self.model), self.settings.pad_to_multiple_of)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for index, row in enumerate(rows):
            labels[index, row.starts] = torch.tensor(row.tag_ids)
        return batch | {"labels": labels}

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The words."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a word."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = in_full_precision(self.model(**inputs).logits)
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX)

    def measure(self, rows: Sequence[TagRow], beat: Callable[[int], None]) -> EvalOutput:
        """The cross-entropy a word, the likeliest tags, and for IOB2 tags the scores of the entities they mark.

        The scores are `entity_precision`, `entity_recall` and `entity_f1`, and `words_left_out` where words had no
        token within the task's length: these are in no other figure.
        """
        answers: list[list[int]] = [[] for _ in rows]
        loss = 0.0
        tokens = [row.input_ids for row in rows]
        for indices, logits in batched_logits(self.model, tokens, self.settings.evaluation_batch_size, beat):
            for index, own in zip(indices, logits, strict=True):
                at_words = own[rows[index].starts]
                loss += float(cross_entropy(at_words, torch.tensor(rows[index].tag_ids), reduction="sum"))
                answers[index] = likeliest(at_words)
        references = [self._names(row.tag_ids) for row in rows]
        predictions = [self._names(tags) for tags in answers]
        words = [word for row in rows for word in row.words]
        scores = tag_scores(references, predictions, self.task.labels, words_left_out=sum(row.unread for row in rows))
        return EvalOutput(loss / len(words), words, _flat(references), _flat(predictions), scores)

    def _names(self, tag_ids: Sequence[int]) -> list[str]:
        return [self.task.labels[index] for index in tag_ids]


def _flat(texts: Sequence[list[str]]) -> list[str]:
    return [tag for text in texts for tag in text]
