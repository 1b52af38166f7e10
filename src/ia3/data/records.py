"""Rows with all their columns, from files, from the hub and from the package itself."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

SENTIMENTS = ("negative", "neutral", "positive")

TWEETS = "bundled:tweets"
TWEETS_FOLDER = Path(__file__).with_name("tweets")

_PHRASEBANK = ("financial_phrasebank", "takala/financial_phrasebank")
_PHRASEBANK_ZIP = "data/FinancialPhraseBank-v1.0.zip"
_PHRASEBANK_FILE = "Sentences_AllAgree.txt"


@dataclass(frozen=True)
class Records:
    """The rows of a table with all their columns.

    Args:
        source: where they were read.
        columns: their names, in order.
        rows: where each row stood ("line 7"), and its cells by column.
        classes: the names of each column of classes in their source's order; the cells hold names, or lists of
            names, and None where the class is hidden.
        blank: how many blank lines were left out.
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, Any]], ...]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blank: int = 0

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_records(
    source: str | Path, *, line_column: str = "text", line_label: str | None = None, split: str | None = None
) -> Records:
    """Read rows.

    Args:
        source: a `.csv`, `.jsonl`, `.json` (one object a line, or one list of objects), `.parquet` or `.txt` file;
            `"bundled:tweets"`; `"financial_phrasebank"`, its all-agree part from the hub, or PhraseBank's own `.zip`;
            any other name is a data set on the hub. Its split may follow a colon, as in `"stanfordnlp/imdb:test"`.
        line_column: what to call the texts of a source without names of columns: a `.txt` file, PhraseBank and
            the bundled tweets.
        line_label: what to call their labels. A `.txt` is read as PhraseBank's lines, `sentence@label`, if this
            is given, and otherwise as one text a line.
        split: which split of a data set; by default `"train"`.

    Returns:
        Its rows. Numbers of a `ClassLabel` are replaced by their names.

    Raises:
        FileNotFoundError: no such file or data set, or the hub cannot be reached.
        ImportError: `datasets` is needed and not installed.
        ValueError: no rows, another kind of file, an encoding that cannot be read, damaged lines, or a `split` of
            a source that has none.
    """
    name, split = _name_and_split(str(source), split)
    if not name:
        raise ValueError("The data's name is empty: pass a file, a hub data set, or bundled:tweets.")
    table = _read(name, _LineColumns(line_column, line_label), split)
    read = list(table.rows)
    rows = tuple((place, record) for place, record in read if record is not None)
    if not rows:
        raise ValueError(f"{table.source} has no rows: expected at least one.")
    columns = tuple(dict.fromkeys(column for _, record in rows for column in record))
    return Records(table.source, columns, rows, table.classes, len(read) - len(rows))


def _name_and_split(source: str, split: str | None) -> tuple[str, str | None]:
    """Take the split off a name such as `"stanfordnlp/imdb:test"`."""
    name, colon, part = source.rpartition(":")
    if split is None and colon and name != "bundled" and part.isidentifier() and not Path(source).exists():
        return name, part
    return source, split


def decode_text(content: bytes, source: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is in another encoding.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 (byte {content[error.start]:#04x} at position {error.start}); save it as UTF-8."
        ) from error


class _LineColumns(NamedTuple):
    """What the columns of a source without names of columns are called."""

    text: str
    label: str | None

    def labelled(self, text: str, label: str) -> dict[str, Any]:
        return {self.text: text, self._label: label}

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        return {self._label: SENTIMENTS}

    @property
    def _label(self) -> str:
        return self.label or "label"


# A row is where it stood and its cells, None for a blank line.
_Rows = Iterable[tuple[str, dict[str, Any] | None]]


class _Table(NamedTuple):
    source: str
    rows: _Rows
    classes: dict[str, tuple[str, ...]]


def _read(name: str, lines: _LineColumns, split: str | None) -> _Table:
    if name.startswith("bundled:"):
        return _read_bundled(name, lines, split)
    read = _read_zip if name in _PHRASEBANK else _READERS.get(Path(name).suffix.lower())
    if read is None:
        return _read_hub(name, split)
    if split not in (None, "train"):
        raise ValueError(f"{name} has no splits; split={split!r} is for data sets on the hub.")
    path = _download_phrasebank() if name in _PHRASEBANK else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {name}. The data may be {_KINDS}.")
    return read(path, lines)._replace(source=name)


def _read_bundled(name: str, lines: _LineColumns, split: str | None) -> _Table:
    if name != TWEETS:
        raise ValueError(f"No bundled data {name!r}; there is {TWEETS!r}.")
    if split not in (None, "train", "test"):
        raise ValueError(f"{name} has no split {split!r}; expected 'train' or 'test'.")
    part = split or "train"
    rows = (
        (place, lines.labelled(record["text"], record["label"]))
        for place, record in _csv_rows(TWEETS_FOLDER / f"{part}.csv")
        if record is not None
    )
    return _Table(f"{name} ({part})", rows, lines.classes)


def _download_phrasebank() -> Path:
    """The hub's zip: the data set's loading script, which `datasets` no longer runs, read the same file."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_PHRASEBANK[1], _PHRASEBANK_ZIP, repo_type="dataset"))
    except Exception as error:  # the hub's, the network's and the cache's: one remedy
        raise FileNotFoundError(
            f"{_PHRASEBANK_ZIP} of {_PHRASEBANK[1]} could not be fetched from the hub ({error}). Download "
            f"Financial PhraseBank elsewhere and give the path of its .zip or of {_PHRASEBANK_FILE}."
        ) from error


def _read_zip(path: Path, lines: _LineColumns) -> _Table:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inside = next((name for name in names if PurePosixPath(name).name == _PHRASEBANK_FILE), None)
            if inside is None:
                raise ValueError(
                    f"{path} holds no {_PHRASEBANK_FILE}; it holds {', '.join(names[:10])}. "
                    "A .zip is expected to be Financial PhraseBank."
                )
            content = archive.read(inside)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole .zip file ({error}); download it again.") from error
    return _Table(str(path), _phrasebank_rows(content, f"{path}/{inside}", lines), lines.classes)


def _read_txt(path: Path, lines: _LineColumns) -> _Table:
    if lines.label is not None:
        return _Table(str(path), _phrasebank_rows(path.read_bytes(), str(path), lines), lines.classes)
    rows = ((place, {lines.text: line} if line else None) for place, line in _stripped_lines(_text_of(path)))
    return _Table(str(path), rows, {})


def _phrasebank_rows(content: bytes, source: str, lines: _LineColumns) -> _Rows:
    """`sentence@label` lines, in UTF-8 or, as first published, ISO-8859-1."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("iso-8859-1")
    if "\0" in text:
        raise ValueError(f"{source} is not text in UTF-8 or ISO-8859-1 (it has zero bytes); save it as UTF-8.")
    for place, line in _stripped_lines(text):
        sentence, at, label = line.rpartition("@")
        if not line:
            yield place, None
        elif not at or label.strip() not in SENTIMENTS:
            raise ValueError(
                f"{source}, {place} does not end in @ and one of {', '.join(SENTIMENTS)}: {line[-60:]!r}. "
                "A .txt of labelled texts is expected to be Financial PhraseBank's; use .csv or .jsonl for others."
            )
        else:
            yield place, lines.labelled(sentence.strip(), label.strip())


def _stripped_lines(text: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(), which also breaks at characters that are legal inside a sentence.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        yield f"line {number}", line.strip()


def _text_of(path: Path) -> str:
    return decode_text(path.read_bytes(), str(path))


def _read_csv(path: Path, lines: _LineColumns) -> _Table:
    return _Table(str(path), _csv_rows(path), {})


def _csv_rows(path: Path) -> _Rows:
    csv.field_size_limit(1 << 30)  # the module's own limit is 128 KiB
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True)
    try:
        header = next((cells for cells in reader if cells), None)
        if header is None:
            raise ValueError(
                f"{path} is empty; expected a header with the columns' names, such as 'text' and 'label', and rows."
            )
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise ValueError(f"{path} has several columns named {twice}: give each a name of its own.")
        for cells in reader:
            place = f"line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{path}, {place} has {len(cells)} cells, and the header {len(header)}: "
                    "put texts with commas in double quotes."
                )
            yield place, dict(zip(header, cells, strict=True)) if cells else None
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} is not CSV: {error}. Close each double quote, and double those that "
            "are meant as such."
        ) from error


def _read_json(path: Path, lines: _LineColumns) -> _Table:
    return _Table(str(path), _json_rows(path), {})


def _json_rows(path: Path) -> _Rows:
    text = _text_of(path)
    if (whole := _objects_of_a_list(text, path)) is not None:
        for number, record in enumerate(whole, start=1):
            yield f"row {number}", record
        return
    for place, line in _stripped_lines(text):
        if not line:
            yield place, None
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, {place} is not JSON: {error}; expected one object a line, or one list of objects."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {place} is a {type(record).__name__}; expected one JSON object a line.")
        yield place, record


def _objects_of_a_list(text: str, path: Path) -> list[dict[str, Any]] | None:
    """The objects of a file that is one list of them, on however many lines; None of other files."""
    if not text.lstrip().startswith("["):
        return None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if "]" in text.lstrip().split("\n", 1)[0]:  # a list a line: reading them says what is wrong
            return None
        raise ValueError(f"{path} is a list that is not JSON: {error}; expected one list of objects.") from error
    return whole if all(isinstance(record, dict) for record in whole) else None


def _read_parquet(path: Path, lines: _LineColumns) -> _Table:
    _require_datasets(str(path))
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import Features

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}).") from error
    # Without these metadata `datasets` guesses, and not all of pyarrow's types are known to it.
    features = Features.from_arrow_schema(table.schema) if b"huggingface" in (table.schema.metadata or {}) else {}
    classes = _classes_of(features)
    return _Table(str(path), _table_rows(table, classes), classes)


def _read_hub(name: str, split: str | None) -> _Table:
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file of a kind that is not read: expected {', '.join(_READERS)}. The data may be {_KINDS}."
        )
    _require_datasets(name)
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{name} could not be loaded as a data set of the hub (split {split or 'train'!r}): {error}. "
            f"The data may be {_KINDS}."
        ) from error
    classes = _classes_of(dataset.features)
    return _Table(name, _table_rows(dataset.with_format("arrow")[:], classes), classes)


def _require_datasets(source: str) -> None:
    if find_spec("datasets") is None:
        raise ImportError(f'Reading {source} needs `datasets`: pip install "ia3[train]"')


def _classes_of(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of the columns that are a `ClassLabel` or lists of one."""
    names = {column: getattr(getattr(kind, "feature", kind), "names", None) for column, kind in features.items()}
    return {column: tuple(found) for column, found in names.items() if found is not None}


def _table_rows(table: Any, classes: dict[str, tuple[str, ...]]) -> _Rows:
    for number, record in enumerate(table.to_pylist(), start=1):
        named = {column: _class_names(record[column], names) for column, names in classes.items()}
        yield f"row {number}", record | named


def _class_names(cell: Any, names: tuple[str, ...]) -> Any:
    if isinstance(cell, list):
        return [_class_names(each, names) for each in cell]
    # The hub marks a hidden class by -1.
    return names[cell] if cell is not None and 0 <= cell < len(names) else None


_READERS = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    ".zip": _read_zip,
}

_KINDS = (
    f"{TWEETS!r}, {_PHRASEBANK[0]!r}, a .csv, .jsonl, .json or .parquet file, PhraseBank's .zip or .txt, "
    "or a data set on the hub"
)
