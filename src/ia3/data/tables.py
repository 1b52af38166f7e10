"""Tables as users save them: CSV of any delimiter and encoding, sheets of Excel, with a header or without one."""

from __future__ import annotations

import codecs
import csv
import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ia3.data.columns import ColumnRows, shared
from ia3.data.limits import (
    LONGEST_LINE,
    TooMuchError,
    bounded,
    expect_archive,
    expect_names,
    read_data,
    sample,
    short_lines,
)
from ia3.errors import fit_screen, listed, shorten
from ia3.tasks.columns import is_usual

# `csv` of the standard library rather than pyarrow's reader, which takes about half the time for a million rows: that
# one reads an open quote to the file's end and `"a"b` as `ab` without a word, and doesn't tell lines apart where
# cells have line breaks or lines are blank.
csv.field_size_limit(LONGEST_LINE)  # the module's own limit is 128 KiB

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAMPLE = 1000
_SHEET_ROWS = 1_048_576  # Excel's own limit
_SHEET_CELLS = 5_000_000  # openpyxl reads some 100,000 a second
_NAMED = 5  # of columns without names so many are told
_NUMBER = re.compile(r"(?=.*\d)[\d.,:/%€$+\s-]+")  # dates and prices, too
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
ENCODINGS = {"utf-16-le": ["as UTF-16"], "utf-16-be": ["as UTF-16"], "cp1252": ["as Windows-1252 (not UTF-8)"]}
"""What to say of encodings."""

_ERRORS = ("#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A")

# Where each row stood and its cells, none in a blank one.
_Rows = Sequence[tuple[str, list[Any]]]


@dataclass(frozen=True)
class Dialect:
    """How a table stands in its file, so that another is written as it is.

    Args:
        delimiter: what stands between cells.
        encoding: Python's name for it, without the mark.
        mark: the byte order mark, or nothing.
        line_end: what ends a line.
        sep_line: whether Excel's `sep=` is the first line.
        decimal: what stands before the decimals of numbers.
        header: the names of the columns as they stand there; None without a header.
    """

    delimiter: str = ","
    encoding: str = "utf-8"
    mark: bytes = b""
    line_end: str = "\n"
    sep_line: bool = False
    decimal: str = "."
    header: tuple[str, ...] | None = None


class Wanted(NamedTuple):
    """What is asked of a source: what to call texts and labels without names, columns by name, a split or sheet."""

    text: str
    label: str | None
    named: tuple[str, ...] = ()
    part: str | None = None

    @property
    def numbers(self) -> set[str]:
        """The columns that are asked for by number."""
        return {name for name in (*self.named, self.text) if name.isdecimal()}


class Table(NamedTuple):
    """What a source holds: rows with None for a blank line, names of classes, lines on how it was read.

    Of `ColumnRows` the blank ones are left out already, and `blank` counts them.
    """

    source: str
    rows: Any
    classes: dict[str, tuple[str, ...]]
    remarks: tuple[str, ...] = ()
    dialect: Dialect | None = None
    blank: int = 0


def require_package(package: str, extra: str, what: str) -> None:
    """Refuse what needs a package that isn't installed."""
    if find_spec(package) is None:
        raise ImportError(f'{what} needs `{package}`: pip install "ia3[{extra}]"')


def decode(content: bytes, source: str) -> tuple[str, str, bytes]:
    """The text of a file, its encoding and its byte order mark: UTF-8, UTF-16 with a mark, else Windows-1252.

    Raises:
        ValueError: it is in another encoding, or no text.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        known = Counter(each == "\ufffd" for each in content.decode("utf-8", "replace") if each > "\x7f")
        if mark or known[False] > known[True]:
            at = error.start + len(mark)
            raise ValueError(
                f"{source} is {encoding[:6].upper()} but for byte {content[at]:#04x} at position {at}: save it again "
                "as UTF-8."
            ) from error
        encoding = "cp1252"
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as other:
            raise ValueError(
                f"{source} is neither UTF-8 (byte {content[error.start]:#04x} at position {error.start}) nor "
                f"Windows-1252 (byte {content[other.start]:#04x} at position {other.start}): save it as UTF-8."
            ) from other
    if "\0" in text:
        raise ValueError(
            f"{source} is no text in UTF-8, Windows-1252 or UTF-16 with a byte order mark (zero byte at position "
            f"{content.find(0)}): save it as UTF-8."
        )
    return text, encoding, mark


def remark_of(source: str, said: Sequence[str]) -> tuple[str, ...]:
    """The line on how a source is read, if there is anything to say."""
    return (f"{Path(source).name} is read {', '.join(said)}.",) if said else ()


def read_csv(path: Path, wanted: Wanted) -> Table:
    """Read a `.csv` or `.tsv`, the delimiter by what is in it."""
    content = read_data(path)
    text, encoding, mark = decode(content, str(path))
    asked = re.match(r'"?sep=(.)"?(\r\n|\r|\n)', text, re.IGNORECASE)
    line_end = "\r\n" if "\r\n" in text else "\n" if "\n" in text or "\r" not in text else "\r"
    start = len(mark) + len(text[: asked.end()].encode(encoding) if asked else b"")
    del text  # lines are decoded one by one

    def lines() -> Iterable[str]:
        file = io.BytesIO(content)
        file.seek(start)
        return io.TextIOWrapper(file, encoding, newline="")

    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = asked[1] if asked else _sniff(lines, usual, str(path))
    dialect = Dialect(delimiter, encoding, mark, line_end, bool(asked))
    rows = list(_csv_rows(lines(), delimiter, str(path), 1 if asked else 0))
    said = [f"with {_DELIMITERS.get(delimiter, repr(delimiter))} between the cells"] if delimiter != usual else []
    return _as_table(str(path), rows, wanted, dialect, [*said, *ENCODINGS.get(encoding, ())])


def _csv_rows(lines: Iterable[str], delimiter: str, source: str, before: int) -> Iterator[tuple[str, list[Any]]]:
    reader = csv.reader(short_lines(lines, source), delimiter=delimiter, strict=True)
    try:
        for cells in bounded(reader, source):
            yield f"line {reader.line_num + before}", cells if len(cells) > 1 or "".join(cells).strip() else []
    except csv.Error as error:
        raise ValueError(
            f"{source}, line {reader.line_num + before} is not CSV: {error}. Close each double quote, and double those "
            "that are meant as such."
        ) from error


def _sniff(lines: Callable[[], Iterable[str]], usual: str, source: str) -> str:
    """The delimiter by which the rows have equally many cells, more than one; of several the least like text."""

    def fit(delimiter: str) -> tuple[float, float, bool]:
        reader = csv.reader(short_lines(lines(), source), delimiter=delimiter, strict=True)
        rows: list[list[str]] = []
        try:
            rows.extend(cells for cells in sample(reader, _SAMPLE) if cells)
        except csv.Error:
            rows.append([])
        width = len(rows[0]) if rows else 0
        even = sum(len(cells) == width for cells in rows) / len(rows) if width > 1 else 0.0
        # "Good, but dear;1,5": commas are followed by blanks in texts, and by digits in numbers.
        cells = [cell for row in rows for cell in row[1:]]
        like_text = sum(cell[:1] in {" ", *"0123456789"} for cell in cells) if delimiter == "," else 0
        return even, -like_text, delimiter == usual

    return max(dict.fromkeys((usual, *_DELIMITERS)), key=fit)


def read_xlsx(path: Path, wanted: Wanted) -> Table:
    """Read the first sheet of an `.xlsx`, or that of the name `wanted.part`."""
    require_package("openpyxl", "excel", f"Reading {path}")
    from openpyxl.utils import get_column_letter

    content = read_data(path)
    book = _open_book(content, path, data_only=True)
    names = [sheet.title for sheet in book.worksheets]
    if not names:
        raise ValueError(f"{path} has no sheet with cells: expected one.")
    name = wanted.part or names[0]
    if name not in names:
        raise ValueError(f"{path} has no sheet {shorten(name)}; it has {listed(names)}.")
    shown = written = _cells_of(book, name, path)
    if any(None in cells for cells in shown):
        written = _cells_of(_open_book(content, path), name, path)
    rows: list[tuple[str, list[Any]]] = []
    errors = 0
    for number, pair in enumerate(zip(shown, written, strict=True), start=1):
        if not pair[1]:
            rows.append(("", []))  # the rows between others
            continue
        for index, (cell, formula) in enumerate(zip(*pair, strict=True), start=1):
            if cell is None and formula is not None:
                raise ValueError(
                    f"{path}, cell {get_column_letter(index)}{number} is a formula without its result "
                    f"({formula!s:.40}): open the file in Excel and save it."
                )
        errors += sum(cell in _ERRORS for cell in pair[0])
        cells = ["" if cell is None or cell in _ERRORS else _as_shown(cell) for cell in pair[0]]
        rows.append((f"row {number}", cells if any(cell != "" for cell in cells) else []))
    width = max((len(cells) for _, cells in rows), default=0)
    rows = [(place, cells + [""] * (width - len(cells)) if cells else []) for place, cells in rows]
    said = [f"from the sheet {shorten(name)} of {listed(names, 10)}"] if len(names) > 1 else []
    said += [f"with {errors:,} cells of Excel's errors, such as #N/A, as empty"] if errors else []
    return _as_table(str(path), rows, wanted, Dialect(), said)


def _open_book(content: bytes, path: Path, **how: bool) -> Any:
    import openpyxl

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            expect_archive(archive, archive.namelist(), str(path))
        return openpyxl.load_workbook(io.BytesIO(content), read_only=True, **how)
    except TooMuchError:
        raise
    except Exception as error:  # zipfile's, the XML parser's and openpyxl's own
        raise _not_whole(path, error) from error


def _cells_of(book: Any, name: str, path: Path) -> list[tuple[Any, ...]]:
    try:
        book[name].reset_dimensions()  # some programs write wrong ones
        return list(bounded(book[name].values, str(path), _SHEET_CELLS, _SHEET_ROWS))
    except TooMuchError:
        raise
    except Exception as error:  # what is read only now, by the XML parser and openpyxl
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a whole .xlsx file ({fit_screen(str(error), 300)}); save it in Excel again.")


def _as_shown(cell: Any) -> Any:
    """Numbers as they are, which a sheet can be given back; dates as text."""
    if isinstance(cell, datetime) and cell.time() == time():
        cell = cell.date()
    return cell if isinstance(cell, int | float) else str(cell).replace("_x000D_", "")


def _as_table(source: str, rows: _Rows, wanted: Wanted, dialect: Dialect, said: list[str]) -> Table:
    """Name the columns, by the header or without one, and see that each row has a cell for each."""
    number = next((number for number, (_, cells) in enumerate(rows) if cells), None)
    if number is None:
        raise ValueError(
            f"{source} is empty; expected a header with the columns' names, such as 'text' and 'label', and rows."
        )
    first = [str(cell) for cell in rows[number][1]]
    few = sample((cells for _, cells in islice(rows, number + 1, None)), _SAMPLE - 1)
    below = [[str(cell) for cell in cells] for cells in few if cells]
    if first[-1] == "":  # delimiters at the end of each line
        width = max(_filled(cells) for _, cells in rows)
        first = first[:width]
    certainty = _as_header(first, below, wanted)
    if certainty > 0:
        expect_names(first, source)
        dialect = replace(dialect, header=tuple(first))
        names = _names_in_header(source, first, rows[number + 1 :], wanted)
        own = {*first}
        remarks = [f"Column {name} is {shorten(first[int(name) - 1])}." for name in names if name not in own][:_NAMED]
        start = number + 1
    else:
        names, meaning = _names_without_header(source, [first, *below], wanted, certain=certainty < 0)
        remarks, start = [], number
        said = [*said, f"without a header: {meaning}"]
    if dialect.delimiter != "," and any(re.fullmatch(r"-?\d+,\d+", cell) for cells in below for cell in cells):
        dialect = replace(dialect, decimal=",")
    found, blank = _in_columns(source, names, rows[start:], dialect)
    return Table(source, found, {}, (*remark_of(source, said), *remarks), dialect, blank)


def _in_columns(source: str, names: list[str], rows: _Rows, dialect: Dialect) -> tuple[ColumnRows, int]:
    """The rows that aren't blank, and how many are."""
    filled = [row for row in rows if row[1]]
    if {len(cells) for _, cells in filled} - {len(names)}:
        _expect_width(source, names, filled, dialect)
    columns = {name: shared([cells[index] for _, cells in filled]) for index, name in enumerate(names)}
    return ColumnRows([place for place, _ in filled], columns), len(rows) - len(filled)


def _expect_width(source: str, names: list[str], rows: _Rows, dialect: Dialect) -> None:
    """Refuse a row that hasn't one cell a column; empty ones behind them don't count."""
    for place, cells in rows:
        if len(cells) != len(names) and not _filled(cells) <= len(names) <= len(cells):
            first = "the header" if dialect.header else "the first row"
            raise ValueError(
                f"{source}, {place} has {len(cells)} cells, and {first} {len(names)}: "
                f"put texts with {_DELIMITERS.get(dialect.delimiter, dialect.delimiter)} in double quotes."
            )


def _filled(cells: Sequence[Any]) -> int:
    """How many cells there are without the empty ones at the end."""
    return next((number for number in range(len(cells), 0, -1) if cells[number - 1] != ""), 0)


def _names_in_header(source: str, header: list[str], rows: _Rows, wanted: Wanted) -> list[str]:
    """The columns' names: numbers for those without a name, and for those that are asked for by number."""
    twice = sorted(column for column, count in Counter(header).items() if column and count > 1)
    if twice:
        raise ValueError(f"{source} has several columns named [{listed(twice)}]: give each a name of its own.")
    if source.lower().endswith(".xlsx") and "" in header:
        from openpyxl.utils import get_column_letter

        filled = {index for _, cells in rows for index, cell in enumerate(cells) if cell != "" and not header[index]}
        if filled:
            raise ValueError(
                f"{source} has no name in the header for column {get_column_letter(min(filled) + 1)}: give it one; of "
                "merged cells only the first has the name."
            )
    own = {*header}
    return [
        number if not column or (number in wanted.numbers and number not in own) else column
        for number, column in ((str(index), column) for index, column in enumerate(header, start=1))
    ]


def _as_header(first: list[str], below: list[list[str]], wanted: Wanted) -> int:
    """How surely the first row names columns, by a usual name or one that is asked for, or else by what is below it.

    Negative where it is one more of the rows, 0 in doubt.
    """
    asked = {*wanted.named, wanted.text, wanted.label} - wanted.numbers
    columns = [[cells[index] for cells in below if index < len(cells) and cells[index]] for index in range(len(first))]
    copies = below.count(first)  # files put one after the other repeat their header
    for cell, column in zip(first, columns, strict=True):
        if (cell in asked or is_usual(cell)) and column.count(cell) == copies:
            return 1
    votes = sum(_unlike(cell, column) for cell, column in zip(first, columns, strict=True))
    return votes - bool(wanted.numbers) + (not below)  # who asks by number has no names; a header alone has no rows


def _unlike(cell: str, column: list[str]) -> int:
    """How much a cell looks like the name of what stands below it: negative where it is one more of them."""
    if not cell:
        return 0
    if cell in column:
        return -2
    if column and all(_NUMBER.fullmatch(other) for other in column):
        return -2 if _NUMBER.fullmatch(cell) else 2
    usual = median([len(other) for other in column] or [0])
    is_sentence = cell.endswith((".", "!"))
    if is_sentence or len(cell.split()) > 3 or cell.endswith("?"):
        return -1 - is_sentence if len(cell) >= usual / 2 else 0
    recurring = len(column) > 3 and min(Counter(column).values()) > 1
    return int(recurring or len(cell) < usual / 2)


def _names_without_header(
    source: str, rows: list[list[str]], wanted: Wanted, *, certain: bool
) -> tuple[list[str], str]:
    """Names of columns that have none, and what they are: numbers, or those of the text and its label if it's plain."""
    numbers = [str(number) for number in range(1, len(rows[0]) + 1)]
    if wanted.numbers:
        return numbers, "its columns are numbers"
    if certain and not wanted.named and len(numbers) == 1 and wanted.label is None:
        return [wanted.text], "its column is the text"
    if certain and not wanted.named and len(numbers) == 2:
        pairs = [cells for cells in rows if len(cells) == 2]
        labels = [2 * len({cells[index] for cells in pairs}) <= len(pairs) for index in (0, 1)]
        if labels[0] != labels[1]:
            text, label = (str(labels.index(each) + 1) for each in (False, True))
            flags = f"(`text_column='{text}'`, `label_column='{label}'`)"
            names = [wanted.label or "label" if each else wanted.text for each in labels]
            return names, f"column {text} is the text, column {label} the label {flags}"
    cells = ", ".join(f"{number} ({cell[:40]!r})" for number, cell in islice(zip(numbers, rows[0], strict=True), 20))
    raise ValueError(
        f"{source} has no header with {wanted.text!r}. Name its columns by number, such as `text_column='1'` and "
        f"`label_column='2'`, or, if the first row is a header, by name; they are {cells}."
    )
