"""What an adapter was trained to do, in `ia3_task.json` beside it: template, label words, lengths, generation.

PEFT ignores the file; `ia3 predict` reads it and then needs no flags.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ia3.files import fetch, write_atomically
from ia3.training.data import Example, Examples, _as_text, _collect, _decode, _require_columns, load_examples

TASK_NAME = "ia3_task.json"
_LABEL_WORDS = "label_words"
_KEYS = {"base_model", "generation", "label_column", "labels", "max_length", "template", "type"}
_PIECES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """The text that the model reads, with the columns' names in braces: `"Review: {text} Sentiment?"`.

    Args:
        pattern: the text; a brace that is meant as such is doubled.

    Raises:
        ValueError: no field, or a brace that belongs to none.
    """

    pattern: str

    def __post_init__(self) -> None:
        stray = [piece.group() for piece in _PIECES.finditer(self.pattern) if piece.group() in ("{", "}")]
        if stray:
            raise ValueError(
                f"The template {self.pattern!r} has a {stray[0]!r} that belongs to no field: name a column, as in "
                "{text}, and double a brace that is meant as one: {{ or }}."
            )
        if not self.fields:
            raise ValueError(
                f"The template {self.pattern!r} shows no column to the model: name one in braces, such as {{text}}."
            )

    @classmethod
    def of_column(cls, column: str) -> Template:
        """The text of one column as it is."""
        return cls(f"{{{column}}}")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The columns that it names, in order."""
        return tuple(dict.fromkeys(piece[1] for piece in _PIECES.finditer(self.pattern) if piece[1]))

    def with_column(self, column: str) -> Template:
        """The same text around another column.

        Raises:
            ValueError: it names several columns.
        """
        if len(self.fields) > 1:
            raise ValueError(
                f"The template {self.pattern!r} reads the columns {list(self.fields)}, so one text column can't "
                "replace them: leave --text-column out, and name the columns of the file as the template does."
            )
        return Template(_PIECES.sub(lambda piece: f"{{{column}}}" if piece[1] else piece.group(), self.pattern))

    def render(self, record: Mapping[str, Any], place: str = "the record") -> str:
        """The text for one record; empty where all of its fields are.

        Args:
            record: column to cell; a missing cell is empty.
            place: where the record was read, for the error.

        Raises:
            ValueError: a column is not there, or a cell holds neither text nor a number.
        """
        _require_columns(place, record, *self.fields)
        cells = {field: _as_text(record[field], f"{place}: {field!r}") for field in self.fields}
        if not any(cells.values()):
            return ""
        return _PIECES.sub(lambda piece: cells[piece[1]] if piece[1] else piece.group()[0], self.pattern)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Answering a text with one of the label words.

    Args:
        template: what the model reads.
        labels: the label words, in the order of their source.
        max_length: where longer inputs are cut, in tokens.
        max_new_tokens: the longest answer that is generated, in tokens; every label fits into it.
        base_model: the base model's name.
        label_column: the column that held the labels.
    """

    template: Template
    labels: tuple[str, ...]
    max_length: int
    max_new_tokens: int
    base_model: str | None = None
    label_column: str = "label"


def save_task(directory: str | Path, task: Task) -> Path:
    """Write `ia3_task.json` into an adapter's directory, atomically.

    Returns:
        The file's path.
    """
    content = {
        "base_model": task.base_model,
        "generation": {"max_new_tokens": task.max_new_tokens},
        "label_column": task.label_column,
        "labels": list(task.labels),
        "max_length": task.max_length,
        "template": task.template.pattern,
        "type": _LABEL_WORDS,
    }
    path = Path(directory) / TASK_NAME
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
    return path


def load_task(adapter: str | Path, **hub: Any) -> Task | None:
    """Read the task of a saved adapter.

    Args:
        adapter: a directory or a hub repository.
        hub: arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The task; None where the adapter has none, as when PEFT saved it.

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: the file is damaged, or says something that this version doesn't know.
    """
    path = fetch(adapter, TASK_NAME, optional=True, **hub)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Copy it again, or remove it and pass flags.") from error
    return _task_of(content, str(path))


def _task_of(content: Any, source: str) -> Task:
    if not isinstance(content, dict) or content.get("type") != _LABEL_WORDS:
        raise ValueError(f"{source} describes no task of the type {_LABEL_WORDS!r}: upgrade ia3, or remove the file.")
    generation = content.get("generation", {})
    unknown = sorted({*content} - _KEYS) + sorted({*generation} - {"max_new_tokens"})
    if unknown:
        raise ValueError(f"{source} has fields that this version of ia3 doesn't know: {unknown}. Upgrade ia3.")
    labels = content.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{source}: labels is {labels!r}, expected a list of words.")
    if not isinstance(content.get("template"), str):
        raise ValueError(f"{source}: template is {content.get('template')!r}, expected a text such as '{{text}}'.")
    return Task(
        template=Template(content["template"]),
        labels=tuple(labels),
        max_length=_positive(content.get("max_length"), "max_length", source),
        max_new_tokens=_positive(generation.get("max_new_tokens"), "generation.max_new_tokens", source),
        base_model=content.get("base_model"),
        label_column=str(content.get("label_column", "label")),
    )


def _positive(value: Any, name: str, source: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{source}: {name} is {value!r}, expected a positive whole number.")
    return value


def load_task_examples(source: str | Path, template: Template, label_column: str = "label") -> Examples:
    """Read labelled texts as the model will see them.

    Args:
        source: what `load_examples` takes; a template with several fields needs a `.csv`, `.jsonl`, `.json` or
            `.parquet` file.
        template: the text around the columns.
        label_column: the column with the label.

    Raises:
        FileNotFoundError, ValueError: what `load_examples` raises, or a template that shows the label.
    """
    if label_column in template.fields:
        raise ValueError(
            f"The template {template.pattern!r} shows the label column {label_column!r} to the model, which would "
            "only copy it: take it out, or name another --label-column."
        )
    if len(template.fields) == 1:
        (field,) = template.fields
        examples = load_examples(source, text_column=field, label_column=label_column)
        rows = tuple(Example(template.render({field: row.text}), row.label) for row in examples)
        return replace(examples, rows=rows)
    records = read_records(source)
    _require_columns(records.source, records.columns, *template.fields, label_column)
    table = (
        (place, template.render(record, f"{records.source}, {place}"), record.get(label_column))
        for place, record in records
    )
    return _collect(records.source, (table, None))


@dataclass(frozen=True)
class Records:
    """The rows of a file with all their columns.

    Args:
        source: the file.
        columns: their names, in order.
        rows: where each row stood ("line 7"), and its cells by column.
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, Any]], ...]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_records(path: str | Path, line_column: str = "text") -> Records:
    """Read a `.csv`, `.jsonl`, `.json` (one object a line), `.parquet` or `.txt` file (one text a line).

    Args:
        path: the file.
        line_column: what to call the column of a `.txt` file.

    Returns:
        Its rows; blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, an encoding that cannot be read, no rows, damaged lines.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path} is not of a kind whose columns can be read: expected {', '.join(_READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: check the name.")
    rows = tuple(read(path, line_column))
    if not rows:
        raise ValueError(f"{path} has no rows: expected at least one.")
    columns = tuple(dict.fromkeys(column for _, record in rows for column in record))
    return Records(str(path), columns, rows)


_Rows = Iterator[tuple[str, dict[str, Any]]]


def _read_lines(path: Path, line_column: str) -> _Rows:
    for number, line in enumerate(_decode(path.read_bytes(), str(path)).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", {line_column: line.strip()}


def _read_csv(path: Path, line_column: str) -> _Rows:
    reader = csv.reader(io.StringIO(_decode(path.read_bytes(), str(path)), newline=""), strict=True)
    try:
        header = next(reader, [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise ValueError(f"{path} has several columns named {twice}: give each a name of its own.")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells, and the header {len(header)}: "
                    "put texts with commas in double quotes."
                )
            if cells:
                yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} is not CSV: {error}. Close each double quote, one text a line."
        ) from error


def _read_json(path: Path, line_column: str) -> _Rows:
    for place, line in _read_lines(path, line_column):
        try:
            record = json.loads(line[line_column])
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, {place} is not JSON: {error}; expected one object a line.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {place} is a {type(record).__name__}; expected one JSON object a line.")
        yield place, record


def _read_parquet(path: Path, line_column: str) -> _Rows:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}).") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", record


_READERS = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
