from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_seq2seq
from ia3.tasks.examples import Example
from ia3.training.collate import TokenisedExample, collate, shuffled_batches, tokenise

TOKENIZER = tiny_seq2seq.tokenizer()


def test_inputs_are_cut_and_keep_their_end_labels_are_whole() -> None:
    rows = [Example("the share falls", "negative"), Example("the share of a company stays", "neutral very much")]
    short, long = tokenise(rows, TOKENIZER, max_length=5)
    assert TOKENIZER.decode(short.input_ids) == "the share falls </s>"
    assert TOKENIZER.decode(long.input_ids) == "the share of a </s>"
    assert TOKENIZER.decode(long.label_ids) == "neutral very much </s>"
    assert long.label == "neutral very much"


def test_no_rows() -> None:
    assert tokenise([], TOKENIZER, max_length=8) == []


def test_a_label_longer_than_allowed_is_refused_not_cut() -> None:
    rows = [Example("the share", "neutral"), Example("a share", "very very neutral")]
    assert len(tokenise(rows, TOKENIZER, max_length=8, max_label_length=4)) == 2
    with pytest.raises(ValueError, match=r"'very very neutral' takes 4 tokens.*length is 3: labels are never cut"):
        tokenise(rows, TOKENIZER, max_length=8, max_label_length=3)


def test_a_label_that_could_never_be_generated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spells the label 'bullish' as ''"):
        tokenise([Example("the share rises", "bullish")], TOKENIZER, max_length=8)
    named = copy.copy(TOKENIZER)
    named.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"^The tokenizer of 'some/model' spells the label"):
        tokenise([Example("the share rises", "bullish")], named, max_length=8)


def test_padding_goes_to_the_longest_row_of_the_batch() -> None:
    rows = [TokenisedExample([5, 6, 1], [3, 1], "text", "x"), TokenisedExample([7, 1], [3, 4, 1], "text", "y")]
    batch = collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[3, 1, -100], [3, 4, 1]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_padding_can_be_rounded_up(multiple: int, length: int) -> None:
    batch = collate([TokenisedExample([5, 6, 1], [3, 1], "text", "x")], pad_token_id=9, pad_to_multiple_of=multiple)
    assert batch["input_ids"].tolist() == [[5, 6, 1] + [9] * (length - 3)]
    assert batch["attention_mask"].sum() == 3
    assert batch["labels"].shape == (1, 2)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=700),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_every_example_comes_once_an_epoch(lengths: list[int], batch_size: int, seed: int, grouped: bool) -> None:
    batches = shuffled_batches(lengths, batch_size, seed=seed, epoch=0, group_by_length=grouped)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)
    assert batches == shuffled_batches(lengths, batch_size, seed=seed, epoch=0, group_by_length=grouped)


@pytest.mark.parametrize("grouped", [False, True])
def test_seed_and_epoch_both_change_the_order(grouped: bool) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return shuffled_batches([3] * 100, 4, seed=seed, epoch=epoch, group_by_length=grouped)

    orders = [order(1, 1), order(1, 2), order(2, 1), order(2, 0)]
    assert all(one != other for place, one in enumerate(orders) for other in orders[:place])


def test_grouping_saves_padding_and_keeps_the_order_of_lengths_random() -> None:
    lengths = [1 + index * 7 % 40 for index in range(400)]

    def padded(grouped: bool) -> int:
        batches = shuffled_batches(lengths, 8, seed=0, epoch=0, group_by_length=grouped)
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)

    assert sum(lengths) <= padded(True) < 1.05 * sum(lengths) < padded(False)
    longest = [
        max(lengths[index] for index in batch)
        for batch in shuffled_batches(lengths, 8, seed=0, epoch=0, group_by_length=True)
    ]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=90),
    batch_size=st.integers(1, 9),
    group=st.booleans(),
)
def test_balanced_epochs_show_each_label_equally_often(labels: list[str], batch_size: int, group: bool) -> None:
    lengths = [1 + index % 7 for index in range(len(labels))]
    batches = shuffled_batches(lengths, batch_size, seed=1, epoch=0, group_by_length=group, balanced=labels)
    drawn = [index for batch in batches for index in batch]
    shown = Counter(labels[index] for index in drawn)
    share = math.ceil(len(labels) / len(set(labels)))
    assert shown == dict.fromkeys(set(labels), share)
    times = Counter(drawn)
    for label in set(labels):
        own = [times[index] for index, each in enumerate(labels) if each == label]
        assert max(own) - min(own) <= 1


def test_free_text_may_be_spelt_otherwise() -> None:
    (row,) = tokenise([Example("the share rises", "bullish")], TOKENIZER, max_length=8, as_words=False)
    assert row.label_ids == [2, 1]
