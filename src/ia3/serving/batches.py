"""One batch of tokens that mixes adapters to its answers, by what `Answerer` answers with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ia3.config import TaskType
from ia3.inference.answering import Answerer
from ia3.inference.complete import end_tokens
from ia3.inference.predict import pad_rows
from ia3.inference.rank import LabelScorer, rankings
from ia3.mixing import gather_rows
from ia3.rows import acting
from ia3.serving.encoders import Encoder
from ia3.serving.reading import CLASSES, VECTORS, Prompt
from ia3.serving.requests import FinishReason
from ia3.tasks.task import Task

# Tasks whose labels or generation are kept ready.
_KEPT = 16


class Found(NamedTuple):
    """An answer.

    Args:
        text: the label or what was written.
        probabilities: of each label, where they were ranked.
        tokens: how many were written, the end's included.
        finish_reason: whether the answer came to its end.
        vector: the text's, where that was asked for.
    """

    text: str
    probabilities: dict[str, float] | None = None
    tokens: int = 0
    finish_reason: FinishReason = "stop"
    vector: Sequence[float] | None = None


class Batches:
    """Answers batches of one task each. One thread at a time may call it.

    Args:
        model: the base model with its table.
        tokenizer: its tokenizer.
        batch_size: the most prompts of a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._answerers: OrderedDict[Task, Answerer] = OrderedDict()
        self._encoder = Encoder(model)

    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        """One answer a prompt, in order.

        Args:
            prompts: of one task.
            rows: the table's name for the adapter of each.

        Raises:
            ValueError: labels that the tokenizer can't tell apart.
        """
        if prompts[0].task in (CLASSES, VECTORS):
            return self._encode(prompts, rows)
        answerer = self._answerer(prompts[0].task)
        if answerer.scorer is not None:
            size = answerer.scorer.batch_size  # smaller with many labels
            parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
            return [each for part in parts for each in self._rank(answerer.scorer, prompts[part], rows[part])]
        return self._write(answerer, prompts, rows)

    def _encode(self, prompts: Sequence[Prompt], rows: Sequence[str]) -> list[Found]:
        texts = [prompt.tokens for prompt in prompts]
        if prompts[0].task == VECTORS:
            return [Found("", vector=each) for each in self._encoder.vectors(texts, rows)]
        found = self._encoder.classes(texts, rows, [prompt.labels for prompt in prompts])
        return [Found(each.label, each.probabilities) for each in found]

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
        is_causal = answerer.task.kind.task_type is TaskType.CAUSAL_LM
        ends = end_tokens(self.model, self.tokenizer)
        # Padding is masked, so any token will do where there is none for it.
        padding = ends[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        batch = pad_rows([prompt.tokens for prompt in prompts], padding, left=is_causal)
        tokens = answerer.generate(batch["input_ids"], batch["attention_mask"], adapter_names=list(rows))
        start = batch["input_ids"].shape[1] if is_causal else 1
        written = [row[: prompt.longest] for row, prompt in zip(tokens[:, start:].tolist(), prompts, strict=True)]
        places = [next((place for place, token in enumerate(row) if token in ends), None) for row in written]
        bare = [row[:place] for row, place in zip(written, places, strict=True)]
        texts = self.tokenizer.batch_decode(bare, skip_special_tokens=True)
        return [
            Found(text.strip(), None, len(row), "length") if place is None else Found(text.strip(), None, place + 1)
            for text, row, place in zip(texts, written, places, strict=True)
        ]
