"""One batch of tokens that mixes adapters to its answers, by what `Answerer` answers with."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ia3.config import TaskType
from ia3.fast.batch import rounded_length
from ia3.inference.answering import Answerer, Answerers
from ia3.inference.complete import end_tokens
from ia3.inference.predict import most_positions, pad_rows
from ia3.inference.rank import LabelScorer, rankings
from ia3.mixing import gather_rows
from ia3.rows import acting
from ia3.serving.encoders import Encoder
from ia3.serving.found import Found, found_of
from ia3.serving.reading import CLASSES, VECTORS, Prompt
from ia3.tasks.losses import choice_log_probabilities
from ia3.tasks.task import Task

# Of a batch whose shape is always the same.
_ROWS = 8


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
        self._answerers = Answerers(model, tokenizer, batch_size=batch_size)
        self._encoder = Encoder(model)
        self._positions = most_positions(model)

    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        """One answer a prompt, in order.

        Args:
            prompts: of one task.
            rows: the table's name for the adapter of each.

        Raises:
            ValueError: labels that the tokenizer can't tell apart.
        """
        if self.invariant:
            return self._in_fixed_shapes(prompts, rows)
        scorer = self._scorer(prompts[0].task)
        most = len(prompts) if scorer is None else scorer.most_answers  # with many labels few
        size = math.ceil(len(prompts) / math.ceil(len(prompts) / most))
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        return [each for part in parts for each in self._run(prompts[part], rows[part])]

    def _run(self, prompts: Sequence[Prompt], rows: Sequence[str], length: int | None = None) -> list[Found]:
        """The answers, all computed at once; with a length padded to it, by the model's own forward."""
        task = prompts[0].task
        if task in (CLASSES, VECTORS):
            return self._encode(prompts, rows, length)
        answerer = self._answerers.for_task(task)
        if answerer.scorer is not None:
            return self._rank(answerer.scorer, prompts, rows, length)
        return self._write(answerer, prompts, rows, length)

    def _encode(self, prompts: Sequence[Prompt], rows: Sequence[str], length: int | None) -> list[Found]:
        texts = [prompt.tokens for prompt in prompts]
        if prompts[0].task == VECTORS:
            return [Found("", vector=each) for each in self._encoder.vectors(texts, rows, length)]
        found = self._encoder.classes(texts, rows, [prompt.labels for prompt in prompts], length)
        return [Found(each.label, each.probabilities) for each in found]

    def _scorer(self, task: Task) -> LabelScorer | None:
        return None if task in (CLASSES, VECTORS) else self._answerers.for_task(task).scorer

    def _rank(
        self, scorer: LabelScorer, prompts: Sequence[Prompt], rows: Sequence[str], length: int | None
    ) -> list[Found]:
        tokens = [prompt.tokens for prompt in prompts]
        with acting(gather_rows(self.model, rows)):
            padded = length is not None
            found = self._padded(scorer, tokens, length) if padded else scorer.log_probabilities(tokens)
            scores = scorer.scores(found)
        return [Found(each.label, each.probabilities) for each in rankings(scorer.labels, scores)]

    @torch.inference_mode()
    def _padded(self, scorer: LabelScorer, tokens: Sequence[Sequence[int]], length: int | None) -> Tensor:
        """What `LabelScorer.log_probabilities` gives, in one shape."""
        batch = pad_rows(tokens, self._padding, length)
        shared = scorer.choices.expand(len(tokens), -1, -1)
        moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return choice_log_probabilities(self.model, shared, **moved)

    def _write(
        self, answerer: Answerer, prompts: Sequence[Prompt], rows: Sequence[str], length: int | None
    ) -> list[Found]:
        generate = answerer.generate
        assert generate is not None
        if length is None:
            length = max(len(each.tokens) for each in prompts)
        else:  # where steps are recorded, a batch's shape is that of a session of earlier batches
            generate = getattr(generate, "own", generate)
        is_causal = answerer.task.kind.task_type is TaskType.CAUSAL_LM
        ends = end_tokens(self.model, self.tokenizer)
        batch = pad_rows([prompt.tokens for prompt in prompts], self._padding, length, left=is_causal)
        most = max(prompt.longest for prompt in prompts)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        tokens = generate(ids, mask, adapter_names=list(rows), max_new_tokens=most)
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

    def _in_fixed_shapes(self, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        alike: dict[tuple[int, bool, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            own = len(prompt.tokens)
            # One more, so that each row has padding: a batch without any has other kernels, and those that fill all of
            # the model's positions are such batches.
            length = min(rounded_length(own + 1), self._positions or sys.maxsize)
            # Heads of one shape are run together.
            alike.setdefault((length, own == length, len(prompt.labels)), []).append(index)
        found: dict[int, Found] = {}
        for (length, *_), indices in alike.items():
            scorer = self._scorer(prompts[0].task)
            size = _ROWS if scorer is None else min(_ROWS, scorer.batch_size)  # with many labels fewer
            for start in range(0, len(indices), size):
                some = indices[start : start + size]
                filled = some + some[:1] * (size - len(some))
                answers = self._run([prompts[each] for each in filled], [rows[each] for each in filled], length)
                found |= zip(some, answers, strict=False)
        return [found[index] for index in range(len(prompts))]
