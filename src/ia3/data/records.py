"""Rows with all their columns, from files, from the hub and from the package itself."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ia3.data.columns import ColumnRows, Row, gather, shared, without_collecting
from ia3.data.limits import (
    expect_archive,
    expect_json,
    expect_names,
    expect_parquet,
    read_data,
    short_lines,
)
from ia3.data.tables import ENCODINGS, Dialect, Table, Wanted, decode, read_csv, read_xlsx, remark_of, require_package
from ia3.documents import expect_sound
from ia3.errors import fit_screen, listed, shorten
from ia3.files import expect_path, nearest_beside

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
        rows: where each row stood ("line 7"), and its cells by column; made when asked for where all rows have the
            same columns.
        classes: the names of each column of classes in their source's order; the cells hold names, or lists of
            names, and None where the class is hidden.
        blank: how many blank lines were left out.
        remarks: how they were read, where that is not as the kind of file tells: a line each.
        dialect: how a table stands in its file.
    """

    source: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blank: int = 0
    remarks: tuple[str, ...] = ()
    dialect: Dialect | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The cells of a column, None where a row has none."""
        if isinstance(self.rows, ColumnRows):
            return self.rows.columns.get(name) or [None] * len(self.rows)
        return [record.get(name) for _, record in self.rows]


def read_records(
    source: str | Path,
    *,
    line_column: str = "text",
    line_label: str | None = None,
    named: Sequence[str] = (),
    split: str | None = None,
) -> Records:
    """Read rows.

    Args:
        source: a `.csv`, `.tsv` or `.xlsx` table, `.jsonl`, `.json` (one object a line, or one list of objects),
            `.parquet` or `.txt` file; `"bundled:tweets"`; `"financial_phrasebank"`, its all-agree part from the hub, or
            PhraseBank's own `.zip`; any other name is a data set on the hub. Its split may follow a colon, as in
            `"stanfordnlp/imdb:test"`, and so may the sheet of an `.xlsx`, whose first is read otherwise.
        line_column: what to call the texts of a source without names of columns: a `.txt` file, PhraseBank, the
            bundled tweets, and a table without a header where it is plain which column they are.
        line_label: what to call their labels. A `.txt` is read as PhraseBank's lines, `sentence@label`, if this
            is given, and otherwise as one text a line.
        named: columns that were asked for. `"2"` is a table's second one, where none has that name.
        split: which split of a data set; by default `"train"`.

    Returns:
        Its rows. Numbers of a `ClassLabel` are replaced by their names.

    Raises:
        FileNotFoundError: no such file or data set, or the hub cannot be reached.
        ImportError: `datasets` or `openpyxl` is needed and not installed.
        ValueError: no rows, another kind of file, an encoding that cannot be read, damaged lines, a table without a
            header whose columns must be named, or a `split` of a source that has none.
    """
    name, split = _name_and_split(str(source), split)
    if not name:
        raise ValueError("The data's name is empty: pass a file, a hub data set, or bundled:tweets.")
    expect_path(name, "data")
    try:
        with without_collecting():
            table = _read(name, Wanted(line_column, line_label, tuple(named), split))
            rows, blank = (table.rows, table.blank) if isinstance(table.rows, ColumnRows) else gather(table.rows)
    except OverflowError as error:  # of arrow's times, which go further than Python's
        raise ValueError(f"{name} holds a time that Python has no value for ({error}): write it as text.") from error
    if not rows:
        raise ValueError(f"{table.source} has no rows: expected at least one.")
    if isinstance(rows, ColumnRows):
        columns = tuple(rows.columns)
    else:
        columns = tuple(dict.fromkeys(column for _, record in rows for column in record))
    expect_names(columns, table.source)
    return Records(table.source, columns, rows, table.classes, blank, table.remarks, table.dialect)


def _name_and_split(source: str, split: str | None) -> tuple[str, str | None]:
    """Take the split or sheet off a name such as `"stanfordnlp/imdb:test"`."""
    name, colon, part = source.rpartition(":")
    is_part = part.isidentifier() or name.lower().endswith(".xlsx")
    if split is None and colon and name != "bundled" and is_part and not Path(source).exists():
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


# A row is where it stood and its cells, None for a blank line.
_Rows = Iterable[tuple[str, dict[str, Any] | None]]


def _read(name: str, wanted: Wanted) -> Table:
    if name.startswith("bundled:"):
        return _read_bundled(name, wanted)
    suffix = Path(name).suffix.lower()
    read = _read_zip if name in _PHRASEBANK else _READERS.get(suffix)
    if read is None:
        return _read_hub(name, wanted.part)
    if wanted.part not in (None, "train") and suffix != ".xlsx":
        raise ValueError(f"{name} has no splits; split={shorten(wanted.part)} is for data sets on the hub.")
    path = _download_phrasebank() if name in _PHRASEBANK else Path(name)
    if not path.exists():
        near = nearest_beside(path, Path.is_file)
        meant = f"Did you mean {near}?" if near else f"The data may be {_KINDS}."
        raise FileNotFoundError(f"There is no file {name}. {meant}")
    return read(path, wanted)._replace(source=name)


def _read_bundled(name: str, wanted: Wanted) -> Table:
    part = wanted.part or "train"
    if name != TWEETS:
        raise ValueError(f"No bundled data {shorten(name)}; there is {TWEETS!r}.")
    if part not in ("train", "test"):
        raise ValueError(f"{name} has no split {shorten(part)}; expected 'train' or 'test'.")
    table = read_csv(TWEETS_FOLDER / f"{part}.csv", Wanted("text", "label"))
    rows = ((place, _labelled(wanted, *record.values())) for place, record in table.rows if record is not None)
    return Table(f"{name} ({part})", rows, {wanted.label or "label": SENTIMENTS})


def _labelled(wanted: Wanted, text: str, label: str) -> dict[str, Any]:
    return {wanted.text: text, wanted.label or "label": label}


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


def _read_zip(path: Path, wanted: Wanted) -> Table:
    try:
        with zipfile.ZipFile(io.BytesIO(read_data(path))) as archive:
            names = archive.namelist()
            inside = next((name for name in names if PurePosixPath(name).name == _PHRASEBANK_FILE), None)
            if inside is None:
                raise ValueError(
                    f"{path} holds no {_PHRASEBANK_FILE}; it holds {listed(names)}. "
                    "A .zip is expected to be Financial PhraseBank."
                )
            expect_archive(archive, [inside], str(path))
            content = archive.read(inside)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:  # of a password or method, too
        raise ValueError(f"{path} is not a whole .zip file ({error}); download it again.") from error
    return _phrasebank(content, f"{path}/{inside}", wanted)


def _read_txt(path: Path, wanted: Wanted) -> Table:
    if wanted.label is not None:
        return _phrasebank(read_data(path), str(path), wanted)
    text, remarks = _text_of(read_data(path), str(path))
    rows = ((place, {wanted.text: line} if line else None) for place, line in _stripped_lines(text, str(path)))
    return Table(str(path), rows, {}, remarks)


def is_phrasebank(path: Path) -> bool:
    """Whether a file is a `.txt` of whose lines each ends in `@` and one of PhraseBank's labels."""
    if path.suffix.lower() != ".txt" or not path.is_file():
        return False
    text, _ = _text_of(read_data(path), str(path))
    lines = (line for _, line in _stripped_lines(text, str(path)) if line)
    return all(line.rpartition("@")[2].strip() in SENTIMENTS and "@" in line for line in lines)


def _phrasebank(content: bytes, source: str, wanted: Wanted) -> Table:
    """`sentence@label` lines, in UTF-8 or, as first published, ISO-8859-1, which is part of Windows-1252."""
    text, remarks = _text_of(content, source)
    return Table(source, _phrasebank_rows(text, source, wanted), {wanted.label or "label": SENTIMENTS}, remarks)


def _phrasebank_rows(text: str, source: str, wanted: Wanted) -> _Rows:
    for place, line in _stripped_lines(text, source):
        sentence, at, label = line.rpartition("@")
        if not line:
            yield place, None
        elif not at or label.strip() not in SENTIMENTS:
            raise ValueError(
                f"{source}, {place} does not end in @ and one of {', '.join(SENTIMENTS)}: {line[-60:]!r}. "
                "A .txt of labelled texts is expected to be Financial PhraseBank's; use .csv or .jsonl for others. To "
                "learn its lines alone, as texts: `task='language-modelling'`, with a causal model."
            )
        else:
            yield place, _labelled(wanted, sentence.strip(), label.strip())


def _stripped_lines(text: str, source: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(), which also breaks at characters that are legal inside a sentence.
    for number, line in enumerate(short_lines(text.removesuffix("\n").split("\n"), source), start=1):
        yield f"line {number}", line.strip()


def _text_of(content: bytes, source: str) -> tuple[str, tuple[str, ...]]:
    """A file's text, and what to say of its encoding."""
    text, encoding, _ = decode(content, source)
    return text, remark_of(source, ENCODINGS.get(encoding, ()))


def _read_json(path: Path, wanted: Wanted) -> Table:
    text, remarks = _text_of(read_data(path), str(path))
    return Table(str(path), _json_rows(text, path), {}, remarks)


def _json_rows(text: str, path: Path) -> _Rows:
    if (whole := _objects_of_a_list(text, path)) is not None:
        for number, record in enumerate(whole, start=1):
            yield f"row {number}", record
        return
    for place, line in _stripped_lines(text, str(path)):
        if not line:
            yield place, None
            continue
        try:
            record = json.loads(line)
            expect_sound(record, line)
        except (ValueError, RecursionError) as error:
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
    expect_json(text, str(path))
    try:
        whole = json.loads(text)
        expect_sound(whole, text)
    except (ValueError, RecursionError) as error:
        if "]" in text.lstrip().split("\n", 1)[0]:  # a list a line: reading them says what is wrong
            return None
        raise ValueError(f"{path} is a list that is not JSON: {error}; expected one list of objects.") from error
    return whole if all(isinstance(record, dict) for record in whole) else None


def _read_parquet(path: Path, wanted: Wanted) -> Table:
    require_package("datasets", "train", f"Reading {path}")
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import Features

    try:
        expect_parquet(path)
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({fit_screen(str(error), 300)}).") from error
    # Without these metadata `datasets` guesses, and not all of pyarrow's types are known to it.
    try:
        features = Features.from_arrow_schema(table.schema) if b"huggingface" in (table.schema.metadata or {}) else {}
    except Exception as error:  # whatever stands there is taken for its own classes
        said = fit_screen(str(error), 300)
        raise ValueError(f"{path} has metadata of Hugging Face's `datasets` that it can't read ({said}).") from error
    classes = _classes_of(features)
    return Table(str(path), _table_rows(table, classes), classes)


def _read_hub(name: str, split: str | None) -> Table:
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file of a kind that is not read: expected {', '.join(_READERS)}. "
            + ("Save it as .xlsx." if Path(name).suffix.lower() in _SHEETS else f"The data may be {_KINDS}.")
        )
    require_package("datasets", "train", f"Reading {name}")
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{name} could not be loaded as a data set of the hub (split {shorten(split or 'train')}): "
            f"{fit_screen(str(error), 600)} "
            f"The data may be {_KINDS}."
        ) from error
    classes = _classes_of(dataset.features)
    return Table(name, _table_rows(dataset.with_format("arrow")[:], classes), classes)


def _classes_of(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of the columns that are a `ClassLabel` or lists of one."""
    names = {column: getattr(getattr(kind, "feature", kind), "names", None) for column, kind in features.items()}
    return {column: tuple(found) for column, found in names.items() if found is not None}


def _table_rows(table: Any, classes: dict[str, tuple[str, ...]]) -> ColumnRows:
    columns = {name: shared(table.column(place).to_pylist()) for place, name in enumerate(table.column_names)}
    for name, names in classes.items():
        columns[name] = [_class_names(cell, names) for cell in columns[name]]
    return ColumnRows([f"row {number}" for number in range(1, table.num_rows + 1)], columns)


def _class_names(cell: Any, names: tuple[str, ...]) -> Any:
    if isinstance(cell, list):
        return [_class_names(each, names) for each in cell]
    # The hub marks a hidden class by -1.
    return names[cell] if cell is not None and 0 <= cell < len(names) else None


_READERS = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".xlsx": read_xlsx,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    ".zip": _read_zip,
}
_SHEETS = (".xls", ".xlsb", ".xlsm", ".ods", ".numbers")

_KINDS = (
    f"{TWEETS!r}, {_PHRASEBANK[0]!r}, a .csv, .tsv, .xlsx, .jsonl, .json or .parquet file, PhraseBank's .zip or .txt, "
    "or a data set on the hub"
)
