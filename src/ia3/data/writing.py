"""Rows with what was found for them, written as the rows' own file is."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ia3.data.records import Records
from ia3.data.tables import Dialect, require_package
from ia3.files import replacing

_SHEET_ROWS, _CELL_LENGTH = 1_048_576, 32_767  # Excel's own limits

Found = Mapping[str, Any]
"""What is put beside a row, by column; in a table each of the `probabilities` gets one of its own."""


def check_output(output: Path, source: Path | None) -> None:
    """Refuse, before any work, an output that can't be written.

    Args:
        output: the file to write.
        source: the file that was read.

    Raises:
        ImportError: it needs a package that isn't installed.
        ValueError: another kind of file, the source itself, or no folder for it.
    """
    if output.suffix.lower() not in _WRITERS:
        *kinds, last = _WRITERS
        raise ValueError(
            f"The output {output} is of no known kind: expected one that ends in {', '.join(kinds)} or {last}."
        )
    if source is not None and source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"The output {output} is the input: it would be overwritten. Name another file.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"The output {output} can't be written: expected a file name in a folder that exists.")
    if output.suffix.lower() == ".xlsx":
        require_package("openpyxl", "excel", f"Writing {output}")


def check_rows(output: Path, records: Records, own: set[str]) -> None:
    """Refuse, before any work, rows that the output can't hold.

    Args:
        output: the file to write.
        records: the rows that were read.
        own: the columns that are put beside theirs.

    Raises:
        ValueError: a column is there already, or a sheet of Excel can't hold the rows.
    """
    taken = sorted(own & {*records.columns, *_header(records)})
    if taken:
        raise ValueError(
            f"{records.source} has columns named {taken} already, where the output puts its own: rename them."
        )
    if output.suffix.lower() == ".xlsx":
        long = [place for place, record in records for cell in record.values() if len(str(cell)) > _CELL_LENGTH]
        if long or len(records) >= _SHEET_ROWS:
            what = f"{long[0]} has a longer text" if long else f"there are {len(records):,} rows"
            raise ValueError(
                f"A sheet of Excel holds {_SHEET_ROWS:,} rows and {_CELL_LENGTH:,} characters a cell, and {what}: "
                "write a .csv."
            )


def write_rows(output: Path, records: Records, found: Iterable[Found], through: Path | None = None) -> list[str]:
    """Write rows with what was found for them, as they come: a table in the dialect of theirs.

    Args:
        output: the file to write, of a kind that `check_output` knows; it is replaced when all is written.
        records: the rows that were read.
        found: what is put beside each; looked through several times, and never held as a whole.
        through: the file to write first, on the output's disk; one beside the output by default.

    Returns:
        What to say of how they are written, a line each.
    """
    with replacing(output, through) as file:
        return _WRITERS[output.suffix.lower()](file, output, records, found)


def _as_jsonl(file: BinaryIO, output: Path, records: Records, found: Iterable[Found]) -> list[str]:
    for (_, record), more in zip(records, found, strict=True):
        file.write(json.dumps({**record, **more}, ensure_ascii=False, default=str).encode() + b"\n")
    return []


def _as_csv(file: BinaryIO, output: Path, records: Records, found: Iterable[Found]) -> list[str]:
    suffix = output.suffix.lower()
    dialect = records.dialect or Dialect(header=records.columns)
    if suffix != Path(records.source).suffix.lower():
        dialect = replace(dialect, delimiter="\t" if suffix == ".tsv" else ",", sep_line=False, decimal=".")
    remarks = []
    if not dialect.header:
        added = ", ".join(_added(found))
        remarks.append(f"{output} has no header, like {records.source}; its last columns are {added}.")
    try:
        _write_csv(file, dialect, records, found)
    except UnicodeEncodeError as error:
        missing = error.object[error.start]
        remarks.append(f"{output} is UTF-8, since the encoding of {records.source} has no {missing!r}.")
        file.seek(0)
        file.truncate()
        # With the mark, by which Excel knows it.
        _write_csv(file, replace(dialect, encoding="utf-8", mark=codecs.BOM_UTF8), records, found)
    return remarks


def _write_csv(file: BinaryIO, dialect: Dialect, records: Records, found: Iterable[Found]) -> None:
    file.write(dialect.mark)
    text = io.TextIOWrapper(file, dialect.encoding, newline="")
    try:
        if dialect.sep_line:
            text.write(f"sep={dialect.delimiter}{dialect.line_end}")
        writer = csv.writer(text, delimiter=dialect.delimiter, lineterminator=dialect.line_end)
        header, rows = _table(records, found)
        writer.writerows([header] if dialect.header else [])
        for row in rows:
            writer.writerow(
                [str(cell).replace(".", dialect.decimal) if isinstance(cell, float) else cell for cell in row]
            )
    finally:
        text.detach()


def _as_xlsx(file: BinaryIO, output: Path, records: Records, found: Iterable[Found]) -> list[str]:
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("predictions")
    left_out = 0

    def cell_of(value: Any) -> Any:
        nonlocal left_out
        if not isinstance(value, str):
            return value
        text, count = ILLEGAL_CHARACTERS_RE.subn("", value)
        left_out += count
        cell = WriteOnlyCell(sheet, text)
        cell.data_type = "s"  # not a formula, if it begins with =
        return cell

    header, rows = _table(records, found)
    for row in chain([header] if _header(records) else [], rows):
        sheet.append([cell_of(value) for value in row])
    book.save(file)
    remark = f"{output} lacks {left_out:,} control characters, which Excel can't hold."
    return [remark] if left_out else []


def _header(records: Records) -> tuple[str, ...]:
    """The names of the columns as they stood in the file; empty without a header."""
    return records.columns if records.dialect is None else records.dialect.header or ()


def _added(found: Iterable[Found]) -> list[str]:
    """The names of the columns that are put behind the rows' own."""
    return list(dict.fromkeys(column for more in found for column in _flat(more)))


def _table(records: Records, found: Iterable[Found]) -> tuple[list[str], Iterator[list[Any]]]:
    """The names of the columns, and the cells row by row, empty where something wasn't found."""
    added = _added(found)
    rows = (
        [
            *(_cell(record.get(column)) for column in records.columns),
            *(_cell(more.get(column)) for more in [_flat(each)] for column in added),
        ]
        for (_, record), each in zip(records, found, strict=True)
    )
    return [*(_header(records) or records.columns), *added], rows


def _flat(more: Found) -> dict[str, Any]:
    shares = more.get("probabilities") or {}
    own = {column: value for column, value in more.items() if column != "probabilities"}
    return own | {f"probability_{label}": share for label, share in shares.items()}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


_WRITERS: dict[str, Callable[[BinaryIO, Path, Records, Iterable[Found]], list[str]]] = {
    ".csv": _as_csv,
    ".tsv": _as_csv,
    ".xlsx": _as_xlsx,
    ".jsonl": _as_jsonl,
}
