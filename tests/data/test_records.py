"""Rows with all their columns: every kind of source, names of classes, and what is no table."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from ia3.data.records import SENTIMENTS, TWEETS_FOLDER, Records, read_records
from ia3.tasks.columns import as_text, require_columns

ROWS: list[dict[str, Any]] = [{"a": "one", "b": "two, three"}, {"a": 'a "b"\nc', "b": ""}]


def write_csv(path: Path) -> None:
    path.write_text('a,b\none,"two, three"\n\n"a ""b""\nc",\n')


def write_json(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "places", "blank"),
    [
        ("rows.csv", write_csv, ["line 2", "line 5"], 1),
        ("rows.CSV", write_csv, ["line 2", "line 5"], 1),
        ("rows.jsonl", write_json, ["line 1", "line 3"], 1),
        ("rows.json", write_json, ["line 1", "line 3"], 1),
        ("rows.parquet", write_parquet, ["row 1", "row 2"], 0),
    ],
)
def test_the_same_rows_of_each_kind(name: str, write: Any, places: list[str], blank: int, tmp_path: Path) -> None:
    write(tmp_path / name)
    records = read_records(tmp_path / name)
    assert records == Records(
        str(tmp_path / name), ("a", "b"), tuple(zip(places, ROWS, strict=True)), classes={}, blank=blank
    )
    assert len(records) == 2
    assert list(records) == list(records.rows)


def test_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    records = read_records(tmp_path / "rows.jsonl")
    assert records.columns == ("a", "b")
    assert list(records) == [("line 1", {"a": 1}), ("line 2", {"b": 2})]


def test_a_text_file_is_a_text_a_line_unless_its_labels_have_a_name(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("Write to me@example.com\n\n Sales rose@positive \n")
    records = read_records(path, line_column="review")
    assert list(records) == [
        ("line 1", {"review": "Write to me@example.com"}),
        ("line 3", {"review": "Sales rose@positive"}),
    ]
    assert (records.blank, records.classes) == (1, {})
    with pytest.raises(ValueError, match=r"lines.txt, line 1 does not end in @ and one of negative, neutral, positive"):
        read_records(path, line_label="tone")
    path.write_text("Sales rose @ noon .@positive\n")
    labelled = read_records(path, line_column="review", line_label="tone")
    assert list(labelled) == [("line 1", {"review": "Sales rose @ noon .", "tone": "positive"})]
    assert labelled.classes == {"tone": SENTIMENTS}


def test_an_archive_of_phrasebank(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bank.zip", "w") as archive:
        archive.writestr("bank/Sentences_AllAgree.txt", "In Köln@neutral\r\n".encode("iso-8859-1"))
    records = read_records(tmp_path / "bank.zip")
    assert list(records) == [("line 1", {"text": "In Köln", "label": "neutral"})]
    assert records.classes == {"label": SENTIMENTS}


def test_bundled_tweets_under_the_names_that_are_wanted() -> None:
    records = read_records("bundled:tweets", line_column="tweet", line_label="tone", split="test")
    assert read_records("bundled:tweets:test", line_column="tweet", line_label="tone") == records
    whole = read_records(TWEETS_FOLDER / "test.csv")
    assert [(row["tweet"], row["tone"]) for _, row in records] == [(row["text"], row["label"]) for _, row in whole]
    assert (records.columns, records.classes) == (("tweet", "tone"), {"tone": SENTIMENTS})


def classes() -> Dataset:
    features = Features(
        {"words": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X"])), "sex": ClassLabel(2)}
    )
    rows = {"words": [["a", "b"], []], "tags": [[1, -1], []], "sex": [1, -1]}
    return Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("where", ["hub", "parquet"])
def test_numbers_of_classes_become_names(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    classes().to_parquet(path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: classes())
    records = read_records(path if where == "parquet" else "someone/words")
    assert [record for _, record in records] == [
        {"words": ["a", "b"], "tags": ["B-X", None], "sex": "1"},
        {"words": [], "tags": [], "sex": None},
    ]
    assert records.classes == {"tags": ("O", "B-X"), "sex": ("0", "1")}


def test_a_column_type_that_datasets_does_not_know(tmp_path: Path) -> None:
    counts = pyarrow.array([[("x", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", "y"], "n": counts}), tmp_path / "rows.parquet")
    records = read_records(tmp_path / "rows.parquet")
    assert list(records) == [("row 1", {"a": "x", "n": [("x", 1)]}), ("row 2", {"a": "y", "n": []})]


def test_blank_lines_before_the_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\na,b\n1,2\n")
    assert list(read_records(tmp_path / "rows.csv")) == [("line 3", {"a": "1", "b": "2"})]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "a,b\n", "a.csv has no rows: expected at least one"),
        ("a.jsonl", "\n\n", "a.jsonl has no rows: expected at least one"),
        ("a.txt", "", "a.txt has no rows: expected at least one"),
        ("a.csv", "\n", "a.csv is empty; expected a header with the columns' names"),
        ("a.csv", "a,b,a,b\n1,2,3,4\n", r"several columns named \['a', 'b'\]: give each a name of its own"),
        ("a.csv", 'a,b\n1,"2\n', "line 2 is not CSV: .* Close each double quote"),
        (
            "a.yaml",
            "a: b\n",
            r"not read: expected .csv, .tsv, .xlsx, .jsonl, .json, .parquet, .txt, .zip. The data may",
        ),
        ("a.xls", "", r"not read: expected .csv, .* Save it as .xlsx."),
    ],
)
def test_what_is_no_table(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path / name)


def test_no_name() -> None:
    with pytest.raises(ValueError, match="The data's name is empty"):
        read_records("")


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, ""), (float("nan"), ""), (" a\n b ", "a\n b"), (3, "3"), (3.0, "3"), (2.5, "2.5"), (True, "True")],
)
def test_a_cell_as_text(cell: Any, text: str) -> None:
    assert as_text(cell, "the cell") == text


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        (["id", "prompt", "completion"], r"such as `text_column='prompt'` and `label_column='completion'`\."),
        (
            ["output", "input", "instruction"],
            r"such as `template='{instruction} {input}'` and `label_column='outp",
        ),
        (["tokens", "pos_tags", "ner_tags"], r"such as `text_column='tokens'` and `label_column='ner_tags'`\."),
        (["prompt", "answer"], r"such as `text_column='prompt'` and `label_column='answer'`\."),
        (
            ["context", "question", "answer"],
            r"by `template` and `label_column`, such as `template='{context} {question}'` and",
        ),
        (["premise", "hypothesis", "label"], r"such as `template='{premise} {hypothesis}'`\."),
        (["sentence1", "sentence2", "label"], r"such as `template='{sentence1} {sentence2}'`\."),
        (
            ["instruction", "context", "response"],
            r"such as `template='{instruction} {context}'` and `label_column=",
        ),
        (["words", "kind"], r"by `text_column` and `label_column`\.$"),
    ],
)
def test_a_missing_column_names_the_likely_pair(found: list[str], hint: str) -> None:
    require_columns("here", found, *found, labelled=True)
    with pytest.raises(ValueError, match=rf"here has no column 'text'; its columns are '{found[0]}', .*{hint}"):
        require_columns("here", found, found[0], "text", labelled=True)
