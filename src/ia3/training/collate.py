"""Labelled texts as batches of token ids: labels are never cut, batches padded to their longest row."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ia3.errors import shorten, tokenizer_named
from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.predict import pad_rows, tokenise_inputs
from ia3.inference.tokens import RowsOnDemand
from ia3.tasks.examples import Example, columns_of

# Batches in one stretch of the shuffled order that is sorted by length.
_BATCHES_A_GROUP = 50


@dataclass(frozen=True)
class TokenisedExample:
    """An input, cut at the longest length allowed, and its whole label, both with their end token."""

    input_ids: list[int]
    label_ids: list[int]
    text: str
    label: str


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    max_label_length: int | None = None,
    as_words: bool = True,
) -> Sequence[TokenisedExample]:
    """Turn examples into token ids, in an array of which a row is made when it is asked for.

    Args:
        examples: texts with their label words.
        tokenizer: the base model's tokenizer.
        max_length: where longer inputs are cut, in tokens.
        max_label_length: the most tokens a label may have, its end token included; None for any number.
        as_words: the labels are words that generated answers are compared with, against free text.

    Raises:
        ValueError: a label is longer than `max_label_length`, or is a word that the tokenizer spells differently.
    """
    if not examples:
        return []
    columns = columns_of(examples)
    texts, answers = columns.texts, columns.labels
    inputs = tokenise_inputs(tokenizer, texts, max_length)
    labels = {word: tokenise_label(word, tokenizer, max_label_length, as_words) for word in sorted({*columns.labels})}

    def row(place: int) -> TokenisedExample:
        return TokenisedExample(inputs[place], labels[answers[place]], texts[place], answers[place])

    return RowsOnDemand(len(inputs), row)


def tokenise_label(word: str, tokenizer: Any, max_label_length: int | None, as_word: bool) -> list[int]:
    """A label's tokens, its end token included; arguments and errors are those of `tokenise`."""
    ids: list[int] = tokenizer(text_target=word)["input_ids"]
    if max_label_length is not None and len(ids) > max_label_length:
        raise ValueError(
            f"The label {shorten(word)} takes {len(ids)} tokens, its end token included, but the label length is "
            f"{max_label_length}: labels are never cut. Raise the label length, or choose a shorter word."
        )
    if not as_word:
        return ids
    spelt = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if spelt != word:
        raise ValueError(
            f"The {tokenizer_named(tokenizer)} spells the label {shorten(word)} as {shorten(spelt)}, so no answer "
            "could ever match it. Choose a label word that the tokenizer gives back unchanged."
        )
    return ids


def collate(
    examples: Sequence[TokenisedExample], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Pad examples to the longest of them and stack them.

    Args:
        examples: the rows of the batch.
        pad_token_id: what input ids are padded with; the attention mask is 0 there.
        pad_to_multiple_of: round the input length up to a multiple of this, for fewer distinct shapes.

    Returns:
        `input_ids` and `attention_mask` `[batch, length]`, `labels` `[batch, label length]` padded with -100.
    """
    batch = pad_rows([row.input_ids for row in examples], pad_token_id, pad_to_multiple_of)
    return batch | {"labels": pad_rows([row.label_ids for row in examples], IGNORE_INDEX)["input_ids"]}


def shuffled_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    group_by_length: bool = False,
    balanced: Sequence[str] | None = None,
) -> list[list[int]]:
    """The batches of one epoch as indices, the same for the same seed and epoch.

    Args:
        lengths: the input length of each example.
        batch_size: examples a batch; the last batch of an epoch may be smaller.
        seed: the run's seed.
        epoch: counted from 0; each has its own order.
        group_by_length: put rows of like length together: the shuffled order is sorted within stretches of
            50 batches, then the batches are shuffled, which saves padding and keeps most of the chance.
        balanced: each example's label; then an epoch has as many of each label, and about as many in all as without.
    """
    chance = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths))) if balanced is None else _balanced(balanced, chance)
    chance.shuffle(order)
    if not group_by_length:
        return _cut(order, batch_size)
    stretches = _cut(order, batch_size * _BATCHES_A_GROUP)
    batches = [
        batch for stretch in stretches for batch in _cut(sorted(stretch, key=lambda index: lengths[index]), batch_size)
    ]
    chance.shuffle(batches)
    return batches


def _balanced(labels: Sequence[str], chance: random.Random) -> list[int]:
    """Equally many indices of each label: each of its examples as often as the others, or once more."""
    places: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        places.setdefault(label, []).append(index)
    share = math.ceil(len(labels) / len(places))
    drawn = []
    for own in places.values():
        rounds, rest = divmod(share, len(own))
        drawn += own * rounds + chance.sample(own, rest)
    return drawn


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
