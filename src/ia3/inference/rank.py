"""Rank classification: the label word that the model finds likeliest, instead of one that it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ia3.inference.predict import sorted_batches
from ia3.training.losses import choice_log_probabilities, choice_scores, pad_choices


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
    of equal ones the first label wins. The arguments are those of `score_labels`.

    Returns:
        One ranking a text, in the order of `texts`.

    Raises:
        ValueError: what `score_labels` raises.
    """
    scores = score_labels(
        model,
        tokenizer,
        texts,
        labels,
        length_normalised=length_normalised,
        max_length=max_length,
        batch_size=batch_size,
    )
    return [
        Ranking(labels[max(range(len(labels)), key=row.__getitem__)], dict(zip(labels, row, strict=True)))
        for row in scores.softmax(dim=-1).tolist()
    ]


@torch.inference_mode()
def score_labels(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    length_normalised: bool = True,
    max_length: int = 128,
    batch_size: int = 32,
) -> Tensor:
    """The log-probability of each label after each text, its end token included.

    Args:
        model: a seq2seq model, with or without an adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        texts: the sentences.
        labels: the label words.
        length_normalised: the mean over a label's tokens; False takes their sum, which favours short labels.
        max_length: where longer inputs are cut, in tokens. Labels are never cut.
        batch_size: sentences a batch, sorted by length. The encoder runs once a sentence, the decoder on a
            row for each sentence and label, so lower it for many labels.

    Returns:
        Scores `[texts, labels]` on the CPU in float64, in the order of `texts`.

    Raises:
        ValueError: fewer than two labels, labels that the tokenizer can't tell apart, or a model without
            encoder and decoder.
    """
    choices = pad_choices(tokenise_labels(labels, tokenizer)).to(model.device)
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    scores = torch.empty(len(rows), len(labels), dtype=torch.float64)
    model.eval()
    for indices in sorted_batches([len(row) for row in rows], batch_size):
        inputs = tokenizer.pad({"input_ids": [rows[i] for i in indices]}, return_tensors="pt").to(model.device)
        shared = choices.expand(len(indices), -1, -1)
        found = choice_log_probabilities(model, shared, **inputs)
        scores[indices] = choice_scores(found, shared, length_normalised=length_normalised).cpu().double()
    return scores


def tokenise_labels(labels: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each label, its end token included.

    Raises:
        ValueError: fewer than two labels, or labels that the tokenizer can't tell apart.
    """
    if len(labels) < 2:
        raise ValueError(f"The labels are {list(labels)}: expected at least two to choose from.")
    tokens: list[list[int]] = tokenizer(text_target=list(labels))["input_ids"]
    known: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, tokens, strict=True):
        if tuple(ids) in known:
            raise ValueError(
                f"The labels {known[tuple(ids)]!r} and {label!r} are the same to the tokenizer, so their scores "
                "would be too: leave out repeated labels, or choose words that it knows."
            )
        known[tuple(ids)] = label
    return tokens
