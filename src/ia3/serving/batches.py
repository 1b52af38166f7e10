"""One batch of tokens that mixes adapters to its answers, by what `Answerer` answers with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ia3.config import TaskType
from ia3.fast.batch import rounded_length
from ia3.fast.generate import Generate
from ia3.inference.answering import Answerer
from ia3.inference.complete import end_tokens
from ia3.inference.predict import pad_rows
from ia3.inference.rank import LabelScorer, rankings
from ia3.mixing import gather_rows
from ia3.rows import acting
from ia3.serving.reading import Prompt
from ia3.serving.requests import FinishReason
from ia3.tasks.losses import choice_log_probabilities
from ia3.tasks.task import Task

# Tasks whose labels or generation are kept ready.
_KEPT = 16
# Of a batch whose shape is always the same.
_ROWS = 8


class Found(NamedTuple):
    """An answer.

    Args:
        text: the label or what was written.
        probabilities: of each label, where they were ranked.
        tokens: how many were written, the end's included.
        finish_reason: whether the answer came to its end.
    """

    text: str
    probabilities: dict[str, float] | None = None
    tokens: int = 0
    finish_reason: FinishReason = "stop"


class Batches:
    """Answers batches of one task each. One thread at a time may call it.

    Args:
        model: the base model with its table.
        tokenizer: its tokenizer.
        batch_size: the most prompts of a batch.
        invariant: whether the shape of all that is computed depends on a prompt's own length and task alone: batches of
            a fixed number of rows, filled up with copies, padded to one of few lengths, by the model's own forward.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, *, invariant: bool = False) -> None:
        self.model, self.tokenizer, self.batch_size, self.invariant = model, tokenizer, batch_size, invariant
        self._answerers: OrderedDict[Task, Answerer] = OrderedDict()

    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        """One answer a prompt, in order.

        Args:
            prompts: of one task.
            rows: the table's name for the adapter of each.

        Raises:
            ValueError: labels that the tokenizer can't tell apart.
        """
        answerer = self._answerer(prompts[0].task)
        if self.invariant:
            return self._in_fixed_shapes(answerer, prompts, rows)
        if answerer.scorer is not None:
            size = answerer.scorer.batch_size  # smaller with many labels
            parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
            return [each for part in parts for each in self._rank(answerer.scorer, prompts[part], rows[part])]
        return self._write(answerer, prompts, rows)

    def _answerer(self, task: Task) -> Answerer:
        if task not in self._answerers:
            self._answerers[task] = Answerer(self.model, self.tokenizer, task, batch_size=self.batch_size)
        self._answerers.move_to_end(task)
        while len(self._answerers) > _KEPT:
            self._answerers.popitem(last=False)
        return self._answerers[task]

    def _rank(self, scorer: LabelScorer, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        with acting(gather_rows(self.model, rows)):
            scores = scorer.scores(scorer.log_probabilities([prompt.tokens for prompt in prompts]))
        return [Found(each.label, each.probabilities) for each in rankings(scorer.labels, scores)]

    def _write(self, answerer: Answerer, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        assert answerer.generate is not None
        return self._written(answerer, answerer.generate, prompts, rows, max(len(each.tokens) for each in prompts))

    def _written(
        self, answerer: Answerer, generate: Generate, prompts: Sequence[Prompt], rows: Sequence[str], length: int
    ) -> list[Found]:
        """What is written for prompts that are padded to a length."""
        is_causal = answerer.task.kind.task_type is TaskType.CAUSAL_LM
        ends = end_tokens(self.model, self.tokenizer)
        batch = pad_rows([prompt.tokens for prompt in prompts], self._padding, length, left=is_causal)
        tokens = generate(batch["input_ids"], batch["attention_mask"], adapter_names=list(rows))
        written = tokens[:, length if is_causal else 1 :].tolist()
        return [
            found_of(self.tokenizer, ends, row[: prompt.longest]) for row, prompt in zip(written, prompts, strict=True)
        ]

    @property
    def _padding(self) -> int:
        """Padding is masked, so any token will do where there is none for it."""
        pad: int | None = self.tokenizer.pad_token_id
        return end_tokens(self.model, self.tokenizer)[0] if pad is None else pad

    # Whatever else is in the batch

    def _in_fixed_shapes(self, answerer: Answerer, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            # One more, so that each row has padding: a batch without any has other kernels.
            by_length.setdefault(rounded_length(len(prompt.tokens) + 1), []).append(index)
        most = _ROWS if answerer.scorer is None else min(_ROWS, answerer.scorer.batch_size)
        found: dict[int, Found] = {}
        for length, indices in by_length.items():
            for start in range(0, len(indices), most):
                some = indices[start : start + most]
                filled = some + some[:1] * (most - len(some))
                own, names = [prompts[index] for index in filled], [rows[index] for index in filled]
                if answerer.scorer is not None:
                    answers = self._rank_padded(answerer.scorer, own, names, length)
                else:
                    assert answerer.generate is not None
                    # Where steps are recorded, a batch's shape is that of a session of earlier batches.
                    generate = getattr(answerer.generate, "own", answerer.generate)
                    answers = self._written(answerer, generate, own, names, length)
                found |= zip(some, answers, strict=False)
        return [found[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def _rank_padded(
        self, scorer: LabelScorer, prompts: Sequence[Prompt], rows: Sequence[str], length: int
    ) -> list[Found]:
        batch = pad_rows([prompt.tokens for prompt in prompts], self._padding, length)
        shared = scorer.choices.expand(len(prompts), -1, -1)
        moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with acting(gather_rows(self.model, rows)):
            scores = scorer.scores(choice_log_probabilities(self.model, shared, **moved))
        return [Found(each.label, each.probabilities) for each in rankings(scorer.labels, scores)]


def found_of(tokenizer: Any, ends: Sequence[int], written: list[int]) -> Found:
    """The answer that these tokens are, which come to their end at the first end token."""
    place = next((place for place, token in enumerate(written) if token in ends), None)
    text: str = tokenizer.decode(written[:place], skip_special_tokens=True).strip()
    return Found(text, None, len(written), "length") if place is None else Found(text, None, place + 1)
