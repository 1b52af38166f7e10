"""What a seq2seq model writes: one of a few label words, or free text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ia3.inference.predict import generate_words, sorted_batches
from ia3.inference.rank import tokenise_labels
from ia3.training.collate import IGNORED, TokenisedExample, collate, tokenise
from ia3.training.data import Example
from ia3.training.learner import Learner, Measurement
from ia3.training.losses import (
    choice_log_probabilities,
    choice_logits,
    choice_scores,
    pad_choices,
    tfew_losses,
    token_log_probabilities,
)


@dataclass(frozen=True)
class Words(Learner[TokenisedExample]):
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

    @torch.inference_mode()
    def measure(self, rows: Sequence[TokenisedExample], beat: Callable[[int], None]) -> Measurement:
        """Teacher-forced loss and the answers, generated greedily or ranked, one encoder pass for both."""
        self.model.eval()
        answer = self._rank if self.settings.answer_by == "rank" else self._write
        predictions, loss, tokens = [""] * len(rows), 0.0, 0
        for indices in sorted_batches([len(row.input_ids) for row in rows], self.settings.evaluation_batch_size):
            chosen = [rows[i] for i in indices]
            words, summed, count = answer(chosen)
            loss, tokens = loss + summed, tokens + count
            for index, word in zip(indices, words, strict=True):
                predictions[index] = word
            beat(len(indices))
        texts = [row.text for row in rows]
        return Measurement(loss / tokens, texts, [row.label for row in rows], predictions)

    def _write(self, rows: Sequence[TokenisedExample]) -> tuple[list[str], float, int]:
        """What the model writes, the summed loss of the labels' tokens, and their number."""
        batch = self._evaluation_batch(rows)
        labels = batch.pop("labels")
        known = {"encoder_outputs": self.model.get_encoder()(**batch), "attention_mask": batch["attention_mask"]}
        count = int((labels != IGNORED).sum())
        loss = float(_mean_loss(self.model(**known, labels=labels, use_cache=False), labels)) * count
        assert self.task.max_new_tokens is not None
        return generate_words(self.model, self.tokenizer, self.task.max_new_tokens, **known), loss, count

    def _rank(self, rows: Sequence[TokenisedExample]) -> tuple[list[str], float, int]:
        """The likeliest labels, the summed loss of the right ones' tokens, and their number."""
        batch = self._evaluation_batch(rows)
        choices = self._choices().expand(len(rows), -1, -1).to(self.model.device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = choice_log_probabilities(self.model, choices, **inputs)
        best = choice_scores(found, choices).argmax(dim=-1).tolist()
        right = self._correct(rows).to(found.device)
        loss = -float(found[torch.arange(len(rows)), right].double().sum())
        return [self.task.labels[index] for index in best], loss, int((batch["labels"] != IGNORED).sum())

    def _evaluation_batch(self, rows: Sequence[TokenisedExample]) -> dict[str, Tensor]:
        batch = collate(
            rows, pad_token_id=self.tokenizer.pad_token_id, pad_to_multiple_of=self.settings.pad_to_multiple_of
        )
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def _choices(self) -> Tensor:
        return pad_choices(tokenise_labels(self.task.labels, self.tokenizer))

    def _correct(self, rows: Sequence[TokenisedExample]) -> Tensor:
        return torch.tensor([self.task.labels.index(row.label) for row in rows])


def _mean_loss(output: Any, labels: Tensor) -> Tensor:
    """The model's own loss; of logits in half precision it is summed in fp32, which few models do."""
    if output.loss.dtype not in (torch.bfloat16, torch.float16):
        loss: Tensor = output.loss
        return loss
    return -token_log_probabilities(output.logits, labels).sum() / (labels != IGNORED).sum()
