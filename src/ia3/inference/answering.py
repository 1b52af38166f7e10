"""The answers of an adapter to its task, whichever kind that is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ia3.config import TaskType
from ia3.inference.classify import classify, tag
from ia3.inference.complete import compile_answers, complete, encode, prompt_text, without_template
from ia3.inference.predict import Beat, compile_words, count_truncated, predict
from ia3.inference.rank import LabelScorer, rankings
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind

# Stands for the tag of a word that the model did not read, since its text was cut before.
_UNREAD = "?"
# Tasks whose labels or generation are kept ready.
_KEPT = 16


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Args:
        label: a label, a text, or one tag a word with a blank between.
        probabilities: of each label, where they were ranked.
        tags: the words' tags, None of a word that the model did not read; None where words get no tags.
    """

    label: str
    probabilities: dict[str, float] | None = None
    tags: tuple[str | None, ...] | None = None

    @property
    def probability(self) -> float | None:
        """The label's own probability."""
        return None if self.probabilities is None else self.probabilities[self.label]


def cut_line(length: int, cut: int, count: int) -> str:
    """That some of so many texts were cut."""
    return f"Cut at {length} tokens: {cut:,} of {count:,} texts."


class Answerer:
    """Answers texts as a task asks for; what a GPU has recorded for one call serves the next.

    The texts of one call are answered in the batches, and by the code, that measured them in training.

    Args:
        model: the base model with its adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        task: what to answer, and by which way.
        batch_size: texts at once.

    Raises:
        ValueError: labels that `LabelScorer` refuses.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, *, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.task, self.batch_size = model.eval(), tokenizer, task, batch_size
        self.scorer = self.generate = None
        if task.ranks:
            self.scorer = LabelScorer(model, tokenizer, task.labels, max_length=task.max_length, batch_size=batch_size)
        elif task.kind.task_type is TaskType.CAUSAL_LM:
            self.generate = compile_answers(model, tokenizer, _longest(task))
        elif task.kind.writes:
            self.generate = compile_words(model, _longest(task))

    def describe_path(self) -> str | None:
        """Which way the answers are found on a GPU, and why, in a line; None where there is but one way."""
        made = self.scorer or self.generate
        if made is None or self.model.device.type != "cuda":
            return None
        what = "The labels are scored" if self.scorer is not None else "The answers are written"
        how = "by captured CUDA graphs" if made.reason is None else f"the ordinary way, since {made.reason}"
        return f"{what} {how}."

    def count_cut(self, examples: Sequence[Example]) -> int:
        """How many of the examples are longer than the task's length, so that they are cut."""
        if self.task.kind is TaskKind.INSTRUCTIONS:
            whole = [prompt_text(self.tokenizer, each.text, each.turns, self.task.system) for each in examples]
            return sum(len(prompt) > self.task.max_length for prompt in encode(self.tokenizer, whole))
        return count_truncated([example.text for example in examples], self.tokenizer, self.task.max_length)

    def __call__(
        self, examples: Sequence[Example], beat: Beat | None = None, adapter_names: Sequence[str] | None = None
    ) -> list[Answer]:
        """One answer an example, in order.

        Args:
            examples: rendered texts and earlier turns; their labels are not looked at.
            beat: called after each batch with its number of examples.
            adapter_names: the adapter of each example, attached or in the model's table; the active ones where left
                out. Not for a head, of which each adapter has its own.

        Raises:
            ValueError: what `LabelScorer`, `complete`, `classify` and `tag` raise.
        """
        model, tokenizer, task = self.model, self.tokenizer, self.task
        texts = [example.text for example in examples]
        if self.scorer is not None:
            found = rankings(task.labels, self.scorer(texts, beat, adapter_names))
            return [Answer(ranking.label, ranking.probabilities) for ranking in found]
        how: dict[str, Any] = {"max_length": task.max_length, "batch_size": self.batch_size, "beat": beat}
        if task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
            return [Answer(found.label, found.probabilities) for found in classify(model, tokenizer, texts, **how)]
        if task.kind is TaskKind.TOKEN_CLASSIFICATION:
            tagged = tag(model, tokenizer, [text.split(" ") for text in texts], **how)
            tags = [tuple(word.tag for word in words) for words in tagged]
            return [Answer(" ".join(each or _UNREAD for each in own), tags=own) for own in tags]
        how |= {"max_new_tokens": _longest(task), "generate": self.generate, "adapter_names": adapter_names}
        if task.kind.task_type is TaskType.CAUSAL_LM:
            tokenizer = tokenizer if task.kind.has_answers else without_template(tokenizer)
            turns = [example.turns for example in examples]
            written = complete(model, tokenizer, texts, system=task.system, turns=turns, **how)
        else:
            written = predict(model, tokenizer, texts, **how)
        return [Answer(text) for text in written]


class Answerers:
    """An `Answerer` for each task, made when it is first asked for; those that were used last are kept.

    Each holds what was recorded for its labels or its lengths, which of thousands of tasks would fill a GPU.

    Args:
        model, tokenizer, batch_size: see `Answerer`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._kept: OrderedDict[Task, Answerer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def for_task(self, task: Task) -> Answerer:
        """The one of a task.

        Raises:
            ValueError: labels that `LabelScorer` refuses.
        """
        if task not in self._kept:
            self._kept[task] = Answerer(self.model, self.tokenizer, task, batch_size=self.batch_size)
        self._kept.move_to_end(task)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[task]


def _longest(task: Task) -> int:
    """The most tokens that are written; every task that writes has a number."""
    assert task.max_new_tokens is not None
    return task.max_new_tokens
