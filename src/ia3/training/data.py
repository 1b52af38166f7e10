"""Labelled text from files, from the hub and from the package itself.

A source gives `Examples`: rows in the source's order, the labels in theirs, and what was odd about them.
Empty rows are dropped and counted. Duplicates are counted and kept, since published row counts include them,
and `split_examples` never puts one text on both sides.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, overload

SENTIMENTS = ("negative", "neutral", "positive")

_TWEETS = "bundled:tweets"
_TWEETS_FOLDER = Path(__file__).with_name("tweets")

_PHRASEBANK = ("financial_phrasebank", "takala/financial_phrasebank")
_PHRASEBANK_ZIP = "data/FinancialPhraseBank-v1.0.zip"
_PHRASEBANK_FILE = "Sentences_AllAgree.txt"

_KINDS = (
    f"{_TWEETS!r}, {_PHRASEBANK[0]!r}, a .csv, .jsonl, .json or .parquet file, PhraseBank's .zip or .txt, "
    "or a data set on the hub"
)


@dataclass(frozen=True)
class Example:
    """One text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Labelled texts and where they come from.

    Args:
        rows: the examples in order.
        labels: the classes in their source's order, those without a row too.
        source: where the rows were read.
        duplicates: rows whose text, case and white space aside, stood in an earlier row. They are kept.
        empty: rows without a text, dropped.
    """

    rows: tuple[Example, ...]
    labels: tuple[str, ...]
    source: str
    duplicates: int
    empty: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return _part(self, self.rows[index])
        return self.rows[index]

    @property
    def texts(self) -> list[str]:
        """The texts in order."""
        return [row.text for row in self.rows]

    def describe(self) -> str:
        """One line: rows, rows of each class, and what was odd about them."""
        counts = Counter(row.label for row in self.rows)
        classes = ", ".join(f"{counts[label]:,} {label}" for label in self.labels)
        parts = [f"{self.source}: {len(self.rows):,} rows ({classes})"]
        if self.duplicates:
            parts.append(f"{self.duplicates:,} duplicate{'s' * (self.duplicates > 1)} kept")
        if conflicts := _conflicts(self.rows):
            parts.append(f"{conflicts:,} text{'s' * (conflicts > 1)} with different labels")
        if self.empty:
            parts.append(f"{self.empty:,} empty row{'s' * (self.empty > 1)} dropped")
        return "; ".join(parts)


def load_examples(
    source: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    split: str | None = None,
) -> Examples:
    """Read labelled texts.

    Args:
        source: `"bundled:tweets"`; `"financial_phrasebank"`, its all-agree part from the hub; PhraseBank's
            own `.zip` or a `.txt` of `sentence@label` lines; a `.csv`, `.jsonl` or `.json` (one object a
            line) or `.parquet` file; any other name is a data set on the hub.
        text_column: the column with the text, where there are columns.
        label_column: the column with the label. Numbers of a `ClassLabel` become their names.
        split: which split of a data set; by default `"train"`.

    Returns:
        The rows that have a text.

    Raises:
        FileNotFoundError: no such file or data set, or the hub cannot be reached.
        ValueError: nothing in the file, a missing column, a row without label, an encoding that cannot be
            read, a line without `@`, or a `split` of a source that has none.
    """
    name = str(source)
    if not name:
        raise ValueError("The data's name is empty: pass a file, a hub data set, or bundled:tweets.")
    if name.startswith("bundled:"):
        return _bundled(name, split)
    read = _READERS[".zip"] if name in _PHRASEBANK else _READERS.get(Path(name).suffix.lower())
    if read is None:
        return _collect(name, _read_hub(name, text_column, label_column, split))
    if split not in (None, "train"):
        raise ValueError(f"{name} has no splits; split={split!r} is for data sets on the hub.")
    path = _download_phrasebank() if name in _PHRASEBANK else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {name}. The data may be {_KINDS}.")
    return _collect(name, read(path, text_column, label_column))


def split_examples(examples: Examples, test_size: float = 0.1, seed: int = 42) -> tuple[Examples, Examples]:
    """Split at random; rows with the same text, case and white space aside, stay together.

    Args:
        examples: what to split.
        test_size: the held-out part, between 0 and 1; rounded up to whole rows.
        seed: the same seed gives the same split.

    Returns:
        The training and the held-out examples, each in shuffled order.

    Raises:
        ValueError: `test_size` is not between 0 and 1, or a part would be empty.
    """
    if not 0 < test_size < 1:
        raise ValueError(f"test_size is {test_size}; expected a fraction between 0 and 1, such as 0.1.")
    rows = list(examples.rows)
    random.Random(seed).shuffle(rows)
    groups = Counter(_normalised(row.text) for row in rows)
    room = math.ceil(len(rows) * test_size)
    held_out = set()
    for text, size in groups.items():
        if size <= room:
            held_out.add(text)
            room -= size
    if not 0 < len(held_out) < len(groups):
        raise ValueError(
            f"{examples.source} cannot be split: test_size={test_size} holds out {len(held_out)} of its "
            f"{len(groups)} different texts. Give more rows, or another test_size."
        )
    train = [row for row in rows if _normalised(row.text) not in held_out]
    test = [row for row in rows if _normalised(row.text) in held_out]
    return _part(examples, train), _part(examples, test)


def bundled_tweets() -> tuple[Examples, Examples]:
    """The tweets that come with the package: 3,600 to train on and 300 held out, balanced over three classes.

    Any first N training rows are balanced too. From zeroshot/twitter-financial-news-sentiment 1.0.0 (MIT).

    Returns:
        The training and the held-out examples.
    """
    return _bundled(_TWEETS, "train"), _bundled(_TWEETS, "test")


def count_truncated(texts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """How many of `texts` have more than `max_length` tokens, special tokens included."""
    if not texts:
        return 0
    encoded = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(tokens) > max_length for tokens in encoded)


# A row as it was read: where it stood ("line 7"), its text and its label.
_Row = tuple[str, Any, Any]
_Table = tuple[Iterable[_Row], tuple[str, ...] | None]


def _collect(source: str, table: _Table) -> Examples:
    """Check each row, drop the empty ones, count what is odd."""
    read, labels = table
    rows, empty = [], 0
    for place, text, label in read:
        text = _as_text(text, f"{source}, {place}: the text")
        if not text:
            empty += 1
            continue
        label = _as_text(label, f"{source}, {place}: the label")
        if not label or label.casefold() == "nan":
            raise ValueError(
                f"{source}, {place}: the text has no label ({text[:60]!r}); every row needs one. "
                "Give it one, or remove the row."
            )
        rows.append(Example(text, label))
    if not rows:
        raise ValueError(f"{source} has no rows with a text ({empty} empty); expected labelled texts.")
    labels = labels or tuple(sorted({row.label for row in rows}, key=_label_order))
    return Examples(tuple(rows), labels, source, _duplicates(rows), empty)


def _part(whole: Examples, rows: Sequence[Example]) -> Examples:
    return Examples(tuple(rows), whole.labels, whole.source, _duplicates(rows), 0)


def _as_text(value: Any, what: str) -> str:
    """A cell as text: None and NaN are empty, a number is its digits, anything else than text is refused."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        # A column of integers with a gap in it comes as floats.
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise ValueError(f"{what} is a {type(value).__name__}, expected a text or a number.")
    return str(value).strip()


def _label_order(label: str) -> tuple[int, str]:
    """Sort "2" before "10", and words by the alphabet."""
    return (int(label), "") if label.isdecimal() else (-1, label)


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()


def _duplicates(rows: Sequence[Example]) -> int:
    return len(rows) - len({_normalised(row.text) for row in rows})


def _conflicts(rows: Sequence[Example]) -> int:
    """How many different texts have more than one label."""
    labels = defaultdict(set)
    for row in rows:
        labels[_normalised(row.text)].add(row.label)
    return sum(len(found) > 1 for found in labels.values())


def _bundled(name: str, split: str | None) -> Examples:
    if name != _TWEETS:
        raise ValueError(f"No bundled data {name!r}; there is {_TWEETS!r}.")
    if split not in (None, "train", "test"):
        raise ValueError(f"{name} has no split {split!r}; expected 'train' or 'test'.")
    read, _ = _read_csv(_TWEETS_FOLDER / f"{split or 'train'}.csv", "text", "label")
    return _collect(f"{name} ({split or 'train'})", (read, SENTIMENTS))


def _decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 (byte {content[error.start]:#04x} at position {error.start}); save it as UTF-8."
        ) from error


def _require_columns(source: str, found: Iterable[str], *wanted: str) -> None:
    found = list(found)
    for column in wanted:
        if column not in found:
            raise ValueError(
                f"{source} has no column {column!r}; its columns are {', '.join(map(repr, found))}. "
                "Name the right ones by text_column and label_column."
            )


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


def _read_zip(path: Path, text_column: str, label_column: str) -> _Table:
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
    return _parse_phrasebank(content, f"{path}/{inside}"), SENTIMENTS


def _read_txt(path: Path, text_column: str, label_column: str) -> _Table:
    return _parse_phrasebank(path.read_bytes(), str(path)), SENTIMENTS


def _parse_phrasebank(content: bytes, source: str) -> Iterator[_Row]:
    """`sentence@label` lines, in UTF-8 or, as first published, ISO-8859-1."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("iso-8859-1")
    if "\0" in text:
        raise ValueError(f"{source} is not text in UTF-8 or ISO-8859-1 (it has zero bytes); save it as UTF-8.")
    # Not splitlines(), which also breaks at characters that are legal inside a sentence.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        sentence, at, label = line.rpartition("@")
        if not line.strip():
            yield f"line {number}", "", ""
        elif not at or label.strip() not in SENTIMENTS:
            raise ValueError(
                f"{source}, line {number} does not end in @ and one of {', '.join(SENTIMENTS)}: "
                f"{line[-60:]!r}. A .txt is expected to be Financial PhraseBank's; "
                "use .csv or .jsonl for other texts."
            )
        else:
            yield f"line {number}", sentence, label


def _read_csv(path: Path, text_column: str, label_column: str) -> _Table:
    return _csv_rows(path, text_column, label_column), None


def _csv_rows(path: Path, text_column: str, label_column: str) -> Iterator[_Row]:
    csv.field_size_limit(1 << 30)  # the module's own limit is 128 KiB
    reader = csv.reader(io.StringIO(_decode(path.read_bytes(), str(path)), newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise ValueError(f"{path} is empty; expected a header with {text_column!r} and {label_column!r}.")
        _require_columns(str(path), header, text_column, label_column)
        text_at, label_at = header.index(text_column), header.index(label_column)
        for cells in reader:
            place = f"line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{path}, {place} has {len(cells)} cells, and the header {len(header)}: "
                    "put texts with commas in double quotes."
                )
            yield (place, cells[text_at], cells[label_at]) if cells else (place, None, None)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}.") from error


def _read_json(path: Path, text_column: str, label_column: str) -> _Table:
    return _json_rows(path, text_column, label_column), None


def _json_rows(path: Path, text_column: str, label_column: str) -> Iterator[_Row]:
    for number, line in enumerate(_decode(path.read_bytes(), str(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; expected one object a line.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is a {type(record).__name__}; expected one JSON object a line.")
        _require_columns(f"{path}, line {number}", record, text_column, label_column)
        yield f"line {number}", record[text_column], record[label_column]


def _read_parquet(path: Path, text_column: str, label_column: str) -> _Table:
    _require_datasets(str(path))
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import Features

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _require_columns(str(path), file.schema_arrow.names, text_column, label_column)
        table = file.read(columns=[text_column, label_column])
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}).") from error
    names = _class_names(Features.from_arrow_schema(table.schema), label_column)
    return _rows(table[text_column].to_pylist(), table[label_column].to_pylist(), names), names


def _read_hub(name: str, text_column: str, label_column: str, split: str | None) -> _Table:
    if Path(name).is_file():
        raise ValueError(f"{name} is a file of a kind that is not read. The data may be {_KINDS}.")
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
    _require_columns(name, dataset.column_names, text_column, label_column)
    names = _class_names(dataset.features, label_column)
    return _rows(dataset[text_column], dataset[label_column], names), names


def _require_datasets(source: str) -> None:
    if find_spec("datasets") is None:
        raise ImportError(f'Reading {source} needs `datasets`: pip install "ia3[train]"')


def _class_names(features: Any, label_column: str) -> tuple[str, ...] | None:
    """The names of a `ClassLabel` column, None for any other."""
    names = getattr(features[label_column], "names", None)
    return None if names is None else tuple(names)


def _rows(texts: Iterable[Any], labels: Iterable[Any], names: tuple[str, ...] | None) -> Iterator[_Row]:
    """Rows of columns; the hub marks a hidden label by -1."""
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if names is not None and label is not None:
            label = names[label] if 0 <= label < len(names) else None
        yield f"row {number}", text, label


_READERS = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    ".zip": _read_zip,
}
