"""The answers of an adapter to its task, whichever kind that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ia3.inference.classify import classify, tag
from ia3.inference.complete import complete
from ia3.inference.predict import predict
from ia3.inference.rank import rank
from ia3.training.data import Example
from ia3.training.task import Task, TaskKind

# Stands for the tag of a word that the model did not read, since its text was cut before.
UNREAD = "?"


@dataclass(frozen=True)
class Answer:
    """A label, a text, or one tag a word with a blank between; the probability of each label where they were ranked."""

    label: str
    probabilities: dict[str, float] | None = None

    @property
    def probability(self) -> float | None:
        """The label's own probability."""
        return None if self.probabilities is None else self.probabilities[self.label]


def answer(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    generate: bool = False,
    batch_size: int = 32,
) -> list[Answer]:
    """Answer texts as the task asks for.

    Args:
        model: the base model with its adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        task: what to answer; its texts are rendered already.
        examples: texts and earlier turns; their labels are not looked at.
        generate: let the model write a label word, instead of taking the likeliest.
        batch_size: texts at once.

    Returns:
        One answer an example, in order.

    Raises:
        ValueError: what `rank`, `complete`, `classify` and `tag` raise.
    """
    texts = [example.text for example in examples]
    how: dict[str, Any] = {"max_length": task.max_length, "batch_size": batch_size}
    if task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
        return [Answer(found.label, found.probabilities) for found in classify(model, tokenizer, texts, **how)]
    if task.kind is TaskKind.TOKEN_CLASSIFICATION:
        tagged = tag(model, tokenizer, [text.split() for text in texts], **how)
        return [Answer(" ".join(word.tag or UNREAD for word in words)) for words in tagged]
    if task.kind is TaskKind.LABEL_WORDS and not generate:
        found = rank(model, tokenizer, texts, task.labels, **how)
        return [Answer(ranking.label, ranking.probabilities) for ranking in found]
    how["max_new_tokens"] = task.max_new_tokens
    if task.kind is TaskKind.INSTRUCTIONS:
        turns = [example.turns for example in examples]
        written = complete(model, tokenizer, texts, system=task.system, turns=turns, **how)
    else:
        written = predict(model, tokenizer, texts, **how)
    return [Answer(text) for text in written]
