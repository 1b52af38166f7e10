from __future__ import annotations

from math import isclose, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia3.tasks.metrics import confusion_matrix, count_correct, majority_baseline, wilson_interval

Z = 1.959963984540054


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(total=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_ends_are_where_the_score_test_just_rejects(total: int, share: float) -> None:
    correct = round(share * total)
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high
    for end in (low, high):
        if 0 < end < 1:
            score = abs(correct / total - end) / sqrt(end * (1 - end) / total)
            assert isclose(score, Z, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("correct", "total", "message"), [(0, 0, "no examples"), (5, 4, "5 correct of 4"), (-1, 4, "-1")]
)
def test_wilson_refuses_impossible_counts(correct: int, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(correct, total)


def test_counts() -> None:
    assert count_correct(["a", "b", "a"], ["a", "a", "a"]) == 2
    assert majority_baseline(["a", "b", "a", "c"]) == 0.5
    with pytest.raises(ValueError, match="2 predictions for 1 examples"):
        count_correct(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no examples"):
        majority_baseline([])


def test_confusion_has_a_column_for_answers_that_are_no_label() -> None:
    references = ["a", "a", "b", "b", "b"]
    predictions = ["a", "b", "b", "B", ""]
    assert confusion_matrix(references, predictions, ("a", "b")) == [[1, 1, 0], [0, 1, 2]]


def test_confusion_refuses_a_label_it_has_no_row_for() -> None:
    with pytest.raises(ValueError, match=r"\['c'\] are not among \['a', 'b'\]"):
        confusion_matrix(["a", "c"], ["a", "a"], ("a", "b"))
