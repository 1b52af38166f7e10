"""What a seq2seq model writes: one of a few label words, or free text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ia3 import rows as mixed
from ia3.fast.decode import Generate
from ia3.fast.scores import ChoiceScores, why_not
from ia3.inference.predict import as_words, compile_words, generate_words, sorted_batches
from ia3.inference.rank import tokenise_labels
from ia3.training.collate import IGNORED, TokenisedExample, collate, tokenise
from ia3.training.data import Example
from ia3.training.learner import Answers, Measurement, Writer
from ia3.training.losses import (
    choice_log_probabilities,
    choice_logits,
    choice_scores,
    pad_choices,
    tfew_losses,
    token_log_probabilities,
)


@dataclass(frozen=True)
class _Fast:
    """What is recorded for evaluations on a GPU."""

    scores: ChoiceScores
    generate: Generate


@dataclass(frozen=True)
class Words(Writer[TokenisedExample]):
    """Label words or free text, by the model's own loss or by T-Few's three."""

    @property
    def is_the_models_loss(self) -> bool:
        """Without T-Few's other losses."""
        return self.settings.objective == "lm"

    def tokenise(self, examples: Sequence[Example]) -> list[TokenisedExample]:
        """Inputs cut at the task's length, answers whole; a label must be one that the tokenizer gives back."""
        return tokenise(
            examples,
            self.tokenizer,
            max_length=self.task.max_length,
            max_label_length=self.settings.max_label_length,
            as_words=self.task.kind.has_labels,
        )

    def length(self, row: TokenisedExample) -> int:
        """Of the input."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[TokenisedExample]) -> dict[str, Tensor]:
        """As `collate`; for T-Few's losses `choices` `[batch, labels, length]` and `correct` `[batch]` as well."""
        batch = collate(
            rows, pad_token_id=self.tokenizer.pad_token_id, pad_to_multiple_of=self.settings.pad_to_multiple_of
        )
        if self.settings.objective == "t-few":
            batch["choices"] = self._choices().expand(len(rows), -1, -1)
            batch["correct"] = self._correct(rows)
        return batch

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The label tokens; for T-Few's losses, whose parts are means over different things, the examples."""
        return len(batch["correct"]) if "correct" in batch else int((batch["labels"] != IGNORED).sum())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a label token, or L_LM + L_UL + L_LN."""
        if "choices" not in batch:
            return _mean_loss(self.model(**batch, use_cache=False), batch["labels"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = choice_logits(self.model, batch["choices"], **inputs)
        return tfew_losses(logits, batch["choices"], batch["correct"]).total

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """By the model's own forward, summed in fp32 at least."""
        logits = self.model(**batch, use_cache=False).logits
        return -token_log_probabilities(logits, batch["labels"]), batch["labels"] != IGNORED

    @torch.inference_mode()
    def measure(self, rows: Sequence[TokenisedExample], beat: Callable[[int], None]) -> Measurement:
        """Teacher-forced loss and the answers, generated greedily or ranked, one encoder pass for both."""
        self.model.eval()
        predictions, loss, tokens = [""] * len(rows), 0.0, 0
        for indices in sorted_batches([len(row.input_ids) for row in rows], self.settings.evaluation_batch_size):
            found = self.answer([rows[i] for i in indices])
            loss, tokens = loss + sum(found.losses), tokens + sum(found.targets)
            for index, word in zip(indices, found.predictions, strict=True):
                predictions[index] = word
            beat(len(indices))
        texts = [row.text for row in rows]
        return Measurement(loss / tokens, texts, [row.label for row in rows], predictions)

    @torch.inference_mode()
    def answer(self, rows: Sequence[TokenisedExample]) -> Answers:
        """Generated greedily or ranked."""
        words, losses = self._rank(rows) if self.settings.answer_by == "rank" else self._write(rows)
        return Answers(words, losses.double().tolist(), [len(row.label_ids) for row in rows])

    def _write(self, rows: Sequence[TokenisedExample]) -> tuple[list[str], Tensor]:
        """What the model writes, and the summed loss of each label's tokens."""
        assert self.task.max_new_tokens is not None
        fast = self._fast
        if fast is not None:
            batch = self._evaluation_batch(rows, torch.device("cpu"))
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            found = fast.scores(**inputs)
            words = as_words(self.tokenizer, fast.generate(batch["input_ids"], batch["attention_mask"]))
            return words, -found[torch.arange(len(rows)), self._correct(rows)].double().sum(1)
        batch = self._evaluation_batch(rows, self.model.device)
        labels = batch.pop("labels")
        known = {"encoder_outputs": self.model.get_encoder()(**batch), "attention_mask": batch["attention_mask"]}
        losses, _ = self.token_losses({**known, "labels": labels})
        return generate_words(self.model, self.tokenizer, self.task.max_new_tokens, **known), losses.double().sum(1)

    def _rank(self, rows: Sequence[TokenisedExample]) -> tuple[list[str], Tensor]:
        """The likeliest labels, and the summed loss of each right one's tokens."""
        fast = self._fast
        batch = self._evaluation_batch(rows, torch.device("cpu") if fast is not None else self.model.device)
        choices = self._choices().expand(len(rows), -1, -1).to(self.model.device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = fast.scores(**inputs) if fast is not None else choice_log_probabilities(self.model, choices, **inputs)
        best = choice_scores(found, choices).argmax(dim=-1).tolist()
        losses = -found[torch.arange(len(rows)), self._correct(rows)].double().sum(1)
        return [self.task.labels[index] for index in best], losses

    @property
    def _fast(self) -> _Fast | None:
        """For label words on a GPU, unless a batch mixes adapters; made anew where the model stands otherwise."""
        if not _on_a_gpu(self.model) or not self.task.kind.has_labels or mixed.under_way:
            return None
        kept = self._kept.get("fast")
        if kept is None or not kept.scores.standing.holds():
            if why_not(self.model) is not None:
                return None
            assert self.task.max_new_tokens is not None
            generate = compile_words(self.model, self.task.max_new_tokens)
            kept = self._kept["fast"] = _Fast(ChoiceScores(self.model, self._choices()), generate)
        return kept

    @cached_property
    def _kept(self) -> dict[str, _Fast]:
        return {}

    def _evaluation_batch(self, rows: Sequence[TokenisedExample], device: torch.device) -> dict[str, Tensor]:
        batch = collate(
            rows, pad_token_id=self.tokenizer.pad_token_id, pad_to_multiple_of=self.settings.pad_to_multiple_of
        )
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _choices(self) -> Tensor:
        return pad_choices(tokenise_labels(self.task.labels, self.tokenizer))

    def _correct(self, rows: Sequence[TokenisedExample]) -> Tensor:
        return torch.tensor([self.task.labels.index(row.label) for row in rows])


def _on_a_gpu(model: Any) -> bool:
    return bool(model.device.type == "cuda")


def _mean_loss(output: Any, labels: Tensor) -> Tensor:
    """The model's own loss; of logits in half precision it is summed in fp32, which few models do."""
    if output.loss.dtype not in (torch.bfloat16, torch.float16):
        loss: Tensor = output.loss
        return loss
    return -token_log_probabilities(output.logits, labels).sum() / (labels != IGNORED).sum()
