"""Rank classification: the label word that the model finds likeliest, instead of one that it generates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ia3.errors import listed, shorten
from ia3.fast import scores as fused
from ia3.fast.cache import additive_mask, fill_up
from ia3.fast.capture import GraphedCallable
from ia3.fast.generate import capture_unsupported_reason
from ia3.fast.guard import Guard
from ia3.fast.sessions import BUCKET
from ia3.inference.predict import Beat, names_of, pad_rows, sorted_batches, tokenise_inputs
from ia3.mixing import gather_rows
from ia3.rows import act_here, acting
from ia3.sites import logger
from ia3.tasks.losses import choice_log_probabilities, choice_scores, hides_choices, pad_choices

# Logits that are held at once: with many labels, batches are smaller.
_MOST_LOGITS = 2**28
# Batches that are under way before the scores of the first are looked at.
_AHEAD = 8


@dataclass(frozen=True)
class Ranking:
    """The likeliest label of a text, and the probability of each label among all of them."""

    label: str
    probabilities: dict[str, float]


def rank(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    length_normalised: bool = True,
    max_length: int = 128,
    batch_size: int = 32,
) -> list[Ranking]:
    """Choose a label for each text by its probability, so that the answer is always one of the labels.

    The probabilities are the softmax of the scores over the labels (Liu et al. 2022, sections 3.2 and 3.4);
    of equal ones the first label wins. The arguments are those of `LabelScorer`.

    Returns:
        One ranking a text, in the order of `texts`.

    Raises:
        ValueError: what `LabelScorer` raises.
    """
    how: dict[str, Any] = {"length_normalised": length_normalised, "max_length": max_length, "batch_size": batch_size}
    return rankings(labels, LabelScorer(model, tokenizer, labels, **how)(texts))


def rankings(labels: Sequence[str], scores: Tensor) -> list[Ranking]:
    """The likeliest label of each row of scores `[texts, labels]`, with all probabilities."""
    shares = scores.softmax(dim=-1).tolist()
    return [
        Ranking(labels[best], dict(zip(labels, row, strict=True)))
        for best, row in zip(likeliest(scores), shares, strict=True)
    ]


def likeliest(scores: Tensor) -> list[int]:
    """The place of the highest score of each row of `[rows, labels]`, of equal ones the first; every task's rule."""
    return [max(range(len(row)), key=row.__getitem__) for row in scores.tolist()]


class LabelScorer:
    """The log-probability of each label after each text; on a GPU recorded once a length of texts and replayed.

    All that ranks labels scores them here: evaluations in training and in sweeps, `rank`, and the commands.

    Args:
        model: a seq2seq model, with or without an adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        labels: the label words.
        length_normalised: the mean over a label's tokens; False takes their sum, which favours short labels.
        max_length: where longer inputs are cut, in tokens. Labels are never cut.
        batch_size: sentences a batch, sorted by length; fewer where there are many labels. The encoder runs once a
            sentence, the decoder on all labels of each.

    Raises:
        ValueError: fewer than two labels, or labels that the tokenizer can't tell apart.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        length_normalised: bool = True,
        max_length: int = 128,
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer, self.max_length, self.labels = model.eval(), tokenizer, max_length, labels
        self.tokens = pad_choices(tokenise_labels(labels, tokenizer))
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
        self.batch_size = max(1, min(batch_size, _MOST_LOGITS // (self.tokens.numel() * vocabulary)))
        self.length_normalised, self.rows = length_normalised, 0
        self._record_anew()

    def _record_anew(self) -> None:
        """By the fused forward, where an adapter acts alone on a T5; else by the model's own."""
        self.choices, self.reason = self.tokens.to(self.model.device), _why_not(self.model)
        self.path = "captured" if self.reason is None else "eager"
        self.fused = None
        if self.reason is None and fused.unsupported_reason(self.model) is None:
            self.fused = fused.ChoiceScores(self.model, self.choices)
        score = partial(_under_masks, self.model, self.choices)
        self.guard = Guard(self.model) if self.fused is None else self.fused.guard
        self.captured = GraphedCallable(score, self.model.device)

    def __call__(
        self, texts: Sequence[str], beat: Beat | None = None, adapter_names: Sequence[str] | None = None
    ) -> Tensor:
        """Scores `[texts, labels]` on the CPU in float64, in the order of `texts`.

        Args:
            texts: the texts.
            beat: called with a number of texts once that many more are scored.
            adapter_names: the adapter of each text, attached or in the model's table; the active ones where left out.

        Raises:
            ValueError: a model without encoder and decoder.
        """
        rows = tokenise_inputs(self.tokenizer, texts, self.max_length)
        scores = torch.empty(len(rows), len(self.labels), dtype=torch.float64)
        batches = list(sorted_batches(rows.lengths, self.batch_size))
        for start in range(0, len(batches), _AHEAD):
            ahead = batches[start : start + _AHEAD]
            # Nothing is looked at before all of it is under way.
            found = [self._mixed(rows, adapter_names, indices) for indices in ahead]
            for indices, part in zip(ahead, found, strict=True):
                scores[indices] = self.scores(part)
                if beat is not None:
                    beat(len(indices))
        return scores

    def _mixed(self, rows: Sequence[list[int]], adapter_names: Sequence[str] | None, indices: list[int]) -> Tensor:
        """`log_probabilities` of one batch, each row under its own adapter where they are named."""
        names = names_of(adapter_names, indices)
        with nullcontext() if names is None else acting(gather_rows(self.model, names)):
            return self.log_probabilities([rows[i] for i in indices])

    @torch.inference_mode()
    def log_probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Those of each token of each label after each row of `tokenise_inputs`, one batch.

        Rows of vectors that act in this thread, one a row, are heard.

        Returns:
            `[rows, labels, length]` on the model's device, 0 behind a label's end.
        """
        self.model.eval()
        if not self.guard.is_valid():
            self._record_anew()
        if self.reason is None and not act_here():
            return self._filled_up(rows)
        batch = pad_rows(rows, self.tokenizer.pad_token_id)
        shared, device = self.choices.expand(len(rows), -1, -1), self.model.device
        return choice_log_probabilities(self.model, shared, **{name: its.to(device) for name, its in batch.items()})

    def scores(self, log_probabilities: Tensor) -> Tensor:
        """One score a label of what `log_probabilities` gives: `[rows, labels]` on the CPU, summed in float64."""
        found = log_probabilities.cpu().double()
        shared = self.tokens.expand(len(found), -1, -1)
        return choice_scores(found, shared, length_normalised=self.length_normalised)

    def _filled_up(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Of a batch that is filled up to one of few shapes."""
        if self.fused is not None:
            batch = pad_rows(rows, self.tokenizer.pad_token_id)
            difference = self.fused.difference(**batch)
            if difference is None:
                return self.fused(**batch)
            logger.warning("Labels are scored by the model's own forward from now on: %s.", difference)
            self.fused = None
        self.rows = max(self.rows, len(rows))
        batch = pad_rows(rows, self.tokenizer.pad_token_id, BUCKET)
        found: Tensor = self.captured(**{name: fill_up(tensor, self.rows) for name, tensor in batch.items()})
        return found[: len(rows)].clone()


def _why_not(model: Any) -> str | None:
    """Why the scores can't be recorded; None where they can."""
    if model.device.type != "cuda":
        return "there is no GPU"
    if not hides_choices(model):
        return f"it is written for T5 and mT5, and this is a {type(model).__name__}"
    return capture_unsupported_reason(model)


def _under_masks(model: Any, choices: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Those of all choices `[choices, length]` after each row; the model looks at no mask's values on the host."""
    mask = additive_mask(attention_mask[:, None, None] != 0, model.dtype)
    shared = choices.expand(len(input_ids), -1, -1)
    return choice_log_probabilities(model, shared, input_ids=input_ids, attention_mask=mask)


def tokenise_labels(labels: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each label, its end token included.

    Raises:
        ValueError: fewer than two labels, or labels that the tokenizer can't tell apart.
    """
    if len(labels) < 2:
        raise ValueError(f"The labels are [{listed(labels)}]: expected at least two to choose from.")
    tokens: list[list[int]] = tokenizer(text_target=list(labels))["input_ids"]
    known: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, tokens, strict=True):
        if tuple(ids) in known:
            raise ValueError(
                f"The labels {shorten(known[tuple(ids)])} and {shorten(label)} are the same to the tokenizer, so their "
                "scores would be too: leave out repeated labels, or choose words that it knows."
            )
        known[tuple(ids)] = label
    return tokens
