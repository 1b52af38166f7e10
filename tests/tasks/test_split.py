"""What is held out: each label's part of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import pytest

from ia3.tasks.examples import Example, Examples, split_examples
from ia3.tasks.task import TaskKind


def examples(counts: Mapping[str, int], kind: TaskKind = TaskKind.LABEL_WORDS, *, copies: int = 1) -> Examples:
    """So many different texts of each label, each in so many rows, label after label."""
    rows = [
        Example(f"text {number} of {label}" + " " * copy, label)
        for label, count in counts.items()
        for number in range(count)
        for copy in range(copies)
    ]
    return Examples(tuple(rows), tuple(counts), "rows", 0, 0, kind=kind)


@pytest.mark.parametrize("kind", [TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION])
@pytest.mark.parametrize(
    "counts", [{"a": 70, "b": 20, "c": 10}, {"a": 333, "b": 34, "c": 5}, dict.fromkeys("abcdefg", 11)]
)
@pytest.mark.parametrize("size", [0.1, 0.25, 0.5])
def test_each_label_has_its_part_to_a_row(counts: dict[str, int], size: float, kind: TaskKind) -> None:
    found = examples(counts, kind)
    for seed in range(5):
        train, test = split_examples(found, size, seed)
        held_out = Counter(row.label for row in test)
        assert len(test) == -(-len(found) * size // 1)
        for label, count in counts.items():
            assert abs(held_out[label] - count * len(test) / len(found)) < 1
        assert {*train, *test} == {*found}


def test_ties_are_broken_by_the_seed() -> None:
    found = examples(dict.fromkeys("abcdefghij", 4))
    held_out = [frozenset(row.label for row in split_examples(found, 0.1, seed)[1]) for seed in range(20)]
    assert all(len(labels) == 4 for labels in held_out)
    assert len({*held_out}) > 10


def test_many_labels_of_one_row_leave_the_others_their_part() -> None:
    found = examples({"common": 10} | {f"rare {number}": 1 for number in range(90)})
    train, test = split_examples(found, 0.1)
    assert Counter(row.label for row in test) == {"common": 2}
    assert len({row.label for row in train}) == 91


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_text_stay_together_and_may_be_more_than_a_labels_part(seed: int) -> None:
    found = examples({"a": 5, "b": 5}, copies=10)
    train, test = split_examples(found, 0.1, seed)
    assert len(test) == 10
    assert not {row.text.strip() for row in train} & {row.text.strip() for row in test}


def test_a_text_with_several_labels_is_on_one_side() -> None:
    rows = [Example(f"text {number % 30}", random.Random(number).choice("ab")) for number in range(90)]
    found = Examples(tuple(rows), ("a", "b"), "rows", 0, 0)
    train, test = split_examples(found, 0.2)
    assert len(test) == 18
    assert not {*train.texts} & {*test.texts}


@pytest.mark.parametrize("kind", [TaskKind.GENERATION, TaskKind.INSTRUCTIONS, TaskKind.TOKEN_CLASSIFICATION])
def test_where_texts_have_no_label_the_first_of_the_shuffled_rows_are_held_out(kind: TaskKind) -> None:
    found = examples({"a": 70, "b": 20, "c": 10}, kind)
    shuffled = list(found.rows)
    random.Random(3).shuffle(shuffled)
    assert list(split_examples(found, 0.1, 3)[1]) == shuffled[:10]
