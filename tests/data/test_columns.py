"""Rows and examples kept as columns against the same ones kept one by one: equal examples, errors and remarks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ia3.data.columns import ColumnRows, digest_of, gather
from ia3.data.loading import load_examples
from ia3.data.records import Records
from ia3.tasks.example import Example, ExampleRows
from ia3.tasks.examples import Examples, conflicts_of, split_examples
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

WORDS = st.sampled_from(["", " ", "good", " Good\t", "GOOD  one", "bad", "nan", "NaN", "7", "\u00e9", "%s", "{"])
CELLS = st.one_of(WORDS, st.none(), st.integers(0, 9), st.sampled_from([1.5, 2.0, float("nan")]), st.booleans())
ODD = st.one_of(CELLS, st.just(["a", "list"]))
TABLES = st.lists(st.fixed_dictionaries({"text": WORDS, "more": ODD, "label": ODD}), min_size=1, max_size=8)
PLAIN = st.lists(st.fixed_dictionaries({"text": CELLS, "more": CELLS, "label": WORDS}), min_size=1, max_size=8)
TEMPLATES = ["{text}", "Is {text} 100 %s {{or}} {more}?", "{text}{\n\nmore}", "{more}{\nmissing}"]


def in_both_ways(table: list[dict[str, Any]]) -> tuple[Records, Records]:
    """As columns, and row by row."""
    names = ("text", "more", "label")
    rows = tuple((f"line {number}", {name: row[name] for name in names}) for number, row in enumerate(table, start=2))
    columns, blank = gather(rows)
    assert isinstance(columns, ColumnRows)
    assert blank == 0
    records = Records("rows.csv", names, columns)
    return records, replace(records, rows=rows)


def outcome(records: Records, kind: TaskKind, pattern: str) -> Any:
    try:
        found = load_examples(records, template=Template(pattern), kind=kind)
    except ValueError as error:
        return str(error)
    return found, found.describe(), found.digest(), found.reading


@settings(max_examples=200, deadline=None)
@given(st.one_of(TABLES, PLAIN), st.sampled_from(TaskKind), st.sampled_from(TEMPLATES))
def test_columns_are_read_as_rows_are(table: list[dict[str, Any]], kind: TaskKind, pattern: str) -> None:
    columns, rows = in_both_ways(table)
    assert outcome(columns, kind, pattern) == outcome(rows, kind, pattern)


def test_nan_is_an_answer_where_answers_are_free_text() -> None:
    columns, _ = in_both_ways([{"text": "a", "more": "", "label": "nan"}, {"text": "b", "more": "", "label": "x"}])
    assert load_examples(columns, kind=TaskKind.GENERATION).rows.labels == ["nan", "x"]
    with pytest.raises(ValueError, match="line 2: the text has no label"):
        load_examples(columns, kind=TaskKind.LABEL_WORDS)


@given(st.lists(st.one_of(st.none(), st.dictionaries(st.sampled_from("abc"), st.integers(), min_size=1)), max_size=6))
def test_rows_come_back_whatever_columns_they_have(table: list[dict[str, Any] | None]) -> None:
    rows = [(f"line {number}", record) for number, record in enumerate(table)]
    found, blank = gather(rows)
    assert [*found] == [row for row in rows if row[1] is not None]
    assert blank == table.count(None)
    assert [found[place] for place in range(len(found))] == [*found]
    assert [*found[1:]] == [*found][1:]


def test_a_row_where_columns_change_is_kept_as_it_is() -> None:
    found, _ = gather([("line 1", {"a": 1, "b": 2}), ("line 2", {"b": 1, "a": 2}), ("line 3", {"a": 3})])
    assert [list(record) for _, record in found] == [["a", "b"], ["b", "a"], ["a"]]


def test_the_digest_of_rows_tells_cells_apart() -> None:
    tables = [{"a": ["1", "2"]}, {"a": ["12", ""]}, {"a": [1, 2]}, {"b": ["1", "2"]}, {"a": ["2", "1"]}]
    assert len({digest_of(ColumnRows(["line 1", "line 2"], each)) for each in tables}) == len(tables)


def test_repeated_labels_are_one_object() -> None:
    rows, _ = gather((f"line {number}", {"label": "ab"[number % 2] * 3 + ""}) for number in range(2000))
    assert isinstance(rows, ColumnRows)
    assert len({id(cell) for cell in rows.columns["label"]}) == 2


EXAMPLES = st.lists(
    st.builds(
        Example, st.sampled_from(["a", "A ", "b", "c  d", "C d", "e"]), st.sampled_from("xyz"),
        st.sampled_from([(), (("user", "hi"),)]),
    ),
    max_size=12,
)  # fmt: skip


def read(row: Example) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).casefold() for text in [*(content for _, content in row.turns), row.text])


@given(EXAMPLES, st.lists(st.integers(0, 11), max_size=5))
def test_keys_tell_what_is_read_apart(rows: list[Example], places: list[int]) -> None:
    columns = ExampleRows.of(rows)
    assert [*columns] == rows
    assert columns == tuple(rows)
    for one, mine in zip(columns.keys, rows, strict=True):
        for other, its in zip(columns.keys, rows, strict=True):
            assert (one == other) is (read(mine) == read(its))
    places = [place for place in places if place < len(rows)]
    taken = columns.take(places)
    assert [*taken] == [rows[place] for place in places]
    assert [*taken.keys] == [columns.keys[place] for place in places]


@given(EXAMPLES)
def test_conflicts_are_counted_as_one_by_one(rows: list[Example]) -> None:
    answers: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        answers.setdefault(read(row), []).append(row.label)
    several = {text: found for text, found in answers.items() if len({*found}) > 1}
    found = conflicts_of(rows)
    assert (found.texts, found.rows) == (len(several), sum(map(len, several.values())))
    if several:
        most = max(several, key=lambda text: len({*several[text]}))
        assert found.answers == len({*several[most]})
        assert found.text == next(row.text for row in rows if read(row) == most)


@given(EXAMPLES, st.sampled_from([TaskKind.LABEL_WORDS, TaskKind.GENERATION]))
def test_a_split_keeps_equal_texts_together(rows: list[Example], kind: TaskKind) -> None:
    examples = Examples(ExampleRows.of(rows), ("x", "y", "z"), "rows", 0, 0, kind)
    try:
        parts = split_examples(examples, 0.4)
    except ValueError:
        return
    assert sorted(map(repr, [*parts[0], *parts[1]])) == sorted(map(repr, rows))
    assert not {*map(read, parts[0])} & {*map(read, parts[1])}


def test_rows_are_those_of_any_sequence() -> None:
    rows = (Example("a", "x"), Example("b", "y"))
    examples = Examples(rows, ("x", "y"), "here", 0, 0)  # type: ignore[arg-type]
    assert examples[:1].rows == rows[:1]
    assert examples[1] == rows[1]
    with pytest.raises(IndexError):
        examples[2]
