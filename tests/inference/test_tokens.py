"""Tokens in one array, and rows that are made when they are asked for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ia3.inference.predict import tokenise_inputs
from ia3.inference.tokens import RowsOnDemand, TokenRows
from tiny_classifier import tokenizer


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=5))
def test_rows_are_those_that_were_given(rows: list[list[int]]) -> None:
    found = TokenRows(rows)
    assert [*found] == rows
    assert found == rows
    assert found.lengths == [len(row) for row in rows]
    assert [*found[1:]] == rows[1:]
    assert [found[place] for place in range(-len(rows), 0)] == rows
    with pytest.raises(IndexError):
        found[len(rows)]


def test_rows_on_demand_are_made_where_they_are_asked_for() -> None:
    made: list[int] = []
    rows = RowsOnDemand(5, lambda place: made.append(place) or place * 10)
    assert (len(rows), rows[1], rows[-1], rows[1:3], made) == (5, 10, 40, [10, 20], [1, 4, 1, 2])
    assert [*rows] == [0, 10, 20, 30, 40]


def test_texts_are_tokenised_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the share rises", "a", "", "much of the share falls today"]
    monkeypatch.setattr("ia3.inference.predict._TEXTS_AT_ONCE", 3)
    assert tokenise_inputs(tokenizer(), texts, 4) == tokenizer()(texts, truncation=True, max_length=4)["input_ids"]
    assert len(tokenise_inputs(tokenizer(), [], 4)) == 0
