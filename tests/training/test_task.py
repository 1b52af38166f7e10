from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ia3.training.data import load_examples
from ia3.training.task import Task, Template, load_task, load_task_examples, read_records, save_task

TASK = Task(
    template=Template("Review: {text} {{ok}}"),
    labels=("gut", "schlecht – ja"),
    max_length=64,
    max_new_tokens=5,
    base_model="some/base",
    label_column="tone",
)


def test_a_task_comes_back(tmp_path: Path) -> None:
    path = save_task(tmp_path / "adapter", TASK)
    assert path.name == "ia3_task.json"
    assert load_task(tmp_path / "adapter") == TASK
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == sorted(content)
    assert content["labels"] == ["gut", "schlecht – ja"]


def test_an_adapter_of_peft_has_no_task(tmp_path: Path) -> None:
    assert load_task(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "chat"}, "describes no task of the type 'label_words'"),
        ({"loudness": 3}, r"doesn't know: \['loudness'\]"),
        ({"generation": {"max_new_tokens": 3, "beams": 2}}, r"doesn't know: \['beams'\]"),
        ({"labels": []}, "expected a list of words"),
        ({"labels": [1]}, "expected a list of words"),
        ({"template": 7}, "template is 7, expected a text"),
        ({"template": "text"}, "shows no column"),
        ({"max_length": 0}, "max_length is 0, expected a positive whole number"),
        ({"generation": {}}, "max_new_tokens is None, expected a positive whole number"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = save_task(tmp_path, TASK)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        load_task(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "ia3_task.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_task(tmp_path)


def test_a_template_fills_its_fields() -> None:
    template = Template("{{{a b}}} and {c:d}: {a b}")
    assert template.fields == ("a b", "c:d")
    assert template.render({"a b": " x ", "c:d": 3, "more": [1]}) == "{x} and 3: x"
    assert template.render({"a b": "{c:d}", "c:d": None}) == "{{c:d}} and : {c:d}"
    assert template.render({"a b": "", "c:d": float("nan")}) == ""


def test_a_template_around_another_column() -> None:
    assert Template("{{}} {text}, {text}!").with_column("review") == Template("{{}} {review}, {review}!")
    with pytest.raises(ValueError, match="one text column can't replace them"):
        Template("{a} {b}").with_column("review")


@pytest.mark.parametrize("pattern", ["{text", "text} {text}", "{} {text}"])
def test_stray_braces(pattern: str) -> None:
    with pytest.raises(ValueError, match="belongs to no field"):
        Template(pattern)


def test_a_missing_column() -> None:
    with pytest.raises(ValueError, match=r"line 3 has no column 'b'; its columns are 'a'"):
        Template("{a} {b}").render({"a": "x"}, "line 3")


def test_one_field_reads_every_source() -> None:
    plain = load_examples("bundled:tweets")
    examples = load_task_examples("bundled:tweets", Template("Tweet: {text}"))
    assert examples.labels == plain.labels
    assert examples.texts == [f"Tweet: {text}" for text in plain.texts]


def write_pairs(folder: Path, kind: str) -> Path:
    path = folder / f"pairs.{kind}"
    rows = [
        {"a": "one", "b": "two", "label": "yes"},
        {"a": "", "b": "", "label": "no"},
        {"a": "3", "b": "", "label": "no"},
    ]
    if kind == "csv":
        path.write_text("a,b,label\n" + "".join(",".join(row.values()) + "\n" for row in rows) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_several_fields(kind: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path, kind)
    examples = load_task_examples(path, Template("{a}, {b}?"))
    assert [(row.text, row.label) for row in examples] == [("one, two?", "yes"), ("3, ?", "no")]
    assert (examples.empty, examples.labels, examples.source) == (1, ("no", "yes"), str(path))


def test_a_row_without_a_label(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": 1, "b": 2, "label": "x"}\n{"a": 1, "b": 2}\n')
    with pytest.raises(ValueError, match="line 2: the text has no label"):
        load_task_examples(path, Template("{a} {b}"))


def test_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    records = read_records(tmp_path / "rows.jsonl")
    assert records.columns == ("a", "b")
    assert list(records) == [("line 1", {"a": 1}), ("line 2", {"b": 2})]
