"""What a seq2seq model writes: one of a few label words, or free text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ia3.fast.generate import Generate
from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.predict import compile_words, sorted_batches, write_words
from ia3.inference.rank import LabelScorer, likeliest, tokenise_labels
from ia3.tasks.examples import Example
from ia3.tasks.losses import choice_logits, pad_choices, tfew_losses, token_log_probabilities
from ia3.training.collate import TokenisedExample, collate, tokenise
from ia3.training.learner import Answered, Writer


@dataclass(frozen=True)
class Words(Writer[TokenisedExample]):
    """Label words or free text, by the model's own loss or by T-Few's three.

    Label words are answered as `settings.answer_by` says, else as the task does.
    """

    def __post_init__(self) -> None:
        if self.settings.answer_by is not None:
            object.__setattr__(self, "task", self.task.answered_by(self.settings.answer_by))

    @property
    def is_the_models_loss(self) -> bool:
        """Without T-Few's other losses."""
        return self.settings.objective == "lm"

    def tokenise(self, examples: Sequence[Example]) -> Sequence[TokenisedExample]:
        """Inputs cut at the task's length, answers whole; a label must be one that the tokenizer gives back."""
        if self.task.kind.has_labels:
            tokenise_labels(self.task.labels, self.tokenizer)  # refuses what could not be ranked
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
            choices = pad_choices(tokenise_labels(self.task.labels, self.tokenizer))
            batch["choices"] = choices.expand(len(rows), -1, -1)
            batch["correct"] = self._correct(rows)
        return batch

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The label tokens; for T-Few's losses, whose parts are means over different things, the examples."""
        return len(batch["correct"]) if "correct" in batch else int((batch["labels"] != IGNORE_INDEX).sum())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a label token, or L_LM + L_UL + L_LN."""
        return self.losses(batch).sum()

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a label token, `[1]`, or L_LM, L_UL and L_LN, `[3]`."""
        if "choices" not in batch:
            return _mean_loss(self.model(**batch, use_cache=False), batch["labels"]).reshape(1)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = choice_logits(self.model, batch["choices"], **inputs)
        found = tfew_losses(logits, batch["choices"], batch["correct"])
        return torch.stack([found.language_model, found.unlikelihood, found.length_normalised])

    def counts(self, batch: dict[str, Tensor]) -> list[int]:
        """The label tokens; of T-Few's losses the tokens of right labels, those of wrong ones, and the examples."""
        if "choices" not in batch:
            return [self.targets(batch)]
        right = int((batch["labels"] != IGNORE_INDEX).sum())
        return [right, int((batch["choices"] != IGNORE_INDEX).sum()) - right, len(batch["correct"])]

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """By the model's own forward, summed in fp32 at least."""
        logits = self.model(**batch, use_cache=False).logits
        return -token_log_probabilities(logits, batch["labels"]), batch["labels"] != IGNORE_INDEX

    def batches(self, lengths: Sequence[int]) -> Iterable[list[int]]:
        """Smaller than asked for where there are many labels."""
        return (
            sorted_batches(lengths, self._scorer.batch_size) if self.task.kind.has_labels else super().batches(lengths)
        )

    @torch.inference_mode()
    def answer(self, rows: Sequence[TokenisedExample]) -> list[Answered]:
        """The likeliest labels, or what the model writes, by what answers texts after training, too."""
        found = self._scored(rows) if self.task.kind.has_labels else [(loss, None) for loss in self._losses(rows)]
        ranked = [label for _, label in found]
        tokens = [row.input_ids for row in rows]
        written = ranked if self.task.ranks else write_words(self.tokenizer, tokens, self._generate)
        return [
            Answered(row.text, row.label, str(answer), loss, len(row.label_ids), None if self.task.ranks else label)
            for row, answer, (loss, label) in zip(rows, written, found, strict=True)
        ]

    def _scored(self, rows: Sequence[TokenisedExample]) -> list[tuple[float, str | None]]:
        """The summed loss of each right label's tokens, and the likeliest label."""
        found = self._scorer.log_probabilities([row.input_ids for row in rows]).cpu().double()
        losses = -found[torch.arange(len(rows)), self._correct(rows)].sum(1)
        best = likeliest(self._scorer.scores(found))
        return [(loss, self.task.labels[index]) for loss, index in zip(losses.tolist(), best, strict=True)]

    def _losses(self, rows: Sequence[TokenisedExample]) -> list[float]:
        """The summed loss of each right text's tokens."""
        batch = collate(rows, pad_token_id=self.tokenizer.pad_token_id)
        losses, _ = self.token_losses({name: tensor.to(self.model.device) for name, tensor in batch.items()})
        found: list[float] = losses.double().sum(1).tolist()
        return found

    @cached_property
    def _scorer(self) -> LabelScorer:
        """What is recorded on a GPU for one evaluation serves the next."""
        return LabelScorer(self.model, self.tokenizer, self.task.labels, batch_size=self.settings.evaluation_batch_size)

    @cached_property
    def _generate(self) -> Generate:
        assert self.task.max_new_tokens is not None
        return compile_words(self.model, self.task.max_new_tokens)

    def _correct(self, rows: Sequence[TokenisedExample]) -> Tensor:
        return torch.tensor([self.task.labels.index(row.label) for row in rows])


def _mean_loss(output: Any, labels: Tensor) -> Tensor:
    """The model's own loss; of logits in half precision it is summed in fp32, which few models do."""
    if output.loss.dtype not in (torch.bfloat16, torch.float16):
        loss: Tensor = output.loss
        return loss
    return -token_log_probabilities(output.logits, labels).sum() / (labels != IGNORE_INDEX).sum()
