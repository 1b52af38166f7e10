"""How much a table may be, found out before memory is taken: of files, archives and columns that unfold to more."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ia3.errors import listed
from ia3.files import open_file, read_file

RowT = TypeVar("RowT", bound=Sequence[Any])

# Python keeps some 60 bytes for a short cell and 200 for a row, so that each of these is about a gigabyte.
_MOST_BYTES = 1 << 29
_MOST_ROWS = 5_000_000
_MOST_CELLS = 25_000_000
_MOST_COLUMNS = 10_000
_LONGEST_NAME = 1000
LONGEST_LINE = 1 << 23
"""The most characters of a line and of a cell."""

# An archive that is much smaller than what is in it. A sheet of Excel shrinks to a tenth or so.
_SMALL = 1 << 25
_USUAL_RATIO = 60

# What Python keeps for an empty list or object, and for a number.
_OF_A_LIST, _OF_A_NUMBER = 70, 32


class TooMuchError(ValueError):
    """A table that would take more memory than one is meant to."""


def read_data(path: Path) -> bytes:
    """A data file's content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder, a pipe, a device, or more bytes or lines than a table has.
    """
    with open_file(path, 1 << 62) as file:
        if (size := file.seek(0, 2)) > _MOST_BYTES:
            raise _too_much(str(path), f"{size:,} bytes", f"{_MOST_BYTES:,}")
    content = read_file(path, _MOST_BYTES)
    if (lines := max(content.count(b"\n"), content.count(b"\r"))) > _MOST_ROWS:
        raise _too_much(str(path), f"{lines:,} lines", f"{_MOST_ROWS:,}")
    return content


def short_lines(lines: Iterable[str], source: str) -> Iterator[str]:
    """The lines, none of them longer than any row of a table."""
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE:
            raise _too_much(f"{source}, line {number}", f"{len(line):,} characters", f"{LONGEST_LINE:,}")
        yield line


def bounded(rows: Iterable[RowT], source: str, most: int = _MOST_CELLS, most_rows: int = _MOST_ROWS) -> Iterator[RowT]:
    """The rows of cells as they come, as long as they are not too many, not too wide, nor too many cells together."""
    cells = 0
    for number, row in enumerate(rows, start=1):
        cells += len(row)
        if number > most_rows:
            raise _too_much(source, "more rows", f"{most_rows:,}")
        if len(row) > _MOST_COLUMNS:
            raise _too_much(source, f"{len(row):,} columns", f"{_MOST_COLUMNS:,}", "is a line break missing? Else, ")
        if cells > most:
            raise _too_much(source, "more cells", f"{most:,}")
        yield row


def sample(rows: Iterable[RowT], most_rows: int, most_cells: int = 200_000) -> Iterator[RowT]:
    """The first rows: so many, or fewer where they are wide."""
    cells = 0
    for number, row in enumerate(rows):
        if number >= most_rows or (number and cells + len(row) > most_cells):
            return
        cells += len(row)
        yield row


def expect_names(names: Sequence[str], source: str) -> None:
    """Refuse columns that no table has: too many, or with a name like a text."""
    if len(names) > _MOST_COLUMNS:
        raise _too_much(source, f"{len(names):,} columns", f"{_MOST_COLUMNS:,}")
    if longest := [name for name in names if len(name) > _LONGEST_NAME]:
        raise ValueError(
            f"{source} has columns with names of more than {_LONGEST_NAME:,} characters: {listed(longest, 2)}. Give "
            "them shorter ones."
        )


def expect_json(text: str, source: str) -> None:
    """Refuse JSON that is read at once, and would take much more memory than its text."""
    lists = text.count("[") + text.count("{")
    if lists * _OF_A_LIST + text.count(",") * _OF_A_NUMBER > 2 * _MOST_BYTES:
        raise _too_much(source, f"{lists:,} lists and objects", f"{_MOST_ROWS:,} or so")


def expect_archive(archive: zipfile.ZipFile, names: Iterable[str], source: str) -> None:
    """Refuse what unfolds to more than a table has; more than it declares no entry of a .zip gives."""
    entries = [archive.getinfo(name) for name in names]
    size, packed = sum(each.file_size for each in entries), sum(each.compress_size for each in entries)
    if size > _MOST_BYTES or size > max(_SMALL, _USUAL_RATIO * packed):
        raise _too_much(source, f"{size:,} bytes packed into {packed:,}", f"{_MOST_BYTES:,}, packed to a sixtieth")


def expect_parquet(path: Path) -> None:
    """Refuse a parquet file that unfolds to more than a table has: rows, cells, bytes, or one text in many rows.

    Raises:
        ValueError: it does.
        pyarrow.ArrowException: it is damaged.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]

    source = str(path)
    with open_file(path, 1 << 62):
        pass  # a pipe would let pyarrow wait
    told = pyarrow.parquet.ParquetFile(path)
    groups = [told.metadata.row_group(number) for number in range(told.metadata.num_row_groups)]
    if told.metadata.num_columns > _MOST_COLUMNS:
        raise _too_much(source, f"{told.metadata.num_columns:,} columns", f"{_MOST_COLUMNS:,}")
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    for most, count, what in (
        (_MOST_ROWS, told.metadata.num_rows, "rows"),
        (_MOST_CELLS, sum(chunk.num_values for chunk in chunks), "cells"),
        (2 * _MOST_BYTES, sum(chunk.total_uncompressed_size for chunk in chunks), "bytes"),
    ):
        if count > most:
            raise _too_much(source, f"{count:,} {what}", f"{most:,}")
    leaves = [told.schema.column(number) for number in range(told.metadata.num_columns)]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    read = pyarrow.parquet.ParquetFile(path, read_dictionary=texts).read(columns=texts)
    if (size := sum(_unfolded(chunk) for column in read.columns for chunk in column.chunks)) > 2 * _MOST_BYTES:
        raise _too_much(source, f"{size:,} bytes of text", f"{2 * _MOST_BYTES:,}")


def _unfolded(array: Any) -> int:
    """The bytes of an arrow array's texts, each row's by itself."""
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary)
        return int(compute.sum(compute.cast(lengths.take(array.indices), "int64")).as_py() or 0)
    if pyarrow.types.is_struct(kind):
        return sum(map(_unfolded, array.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_map(kind):
        inner = [array.keys, array.items] if pyarrow.types.is_map(kind) else [array.flatten()]
        return sum(map(_unfolded, inner))
    return int(array.nbytes)


def _too_much(source: str, found: str, most: str, hint: str = "") -> TooMuchError:
    return TooMuchError(f"{source} has {found}; expected at most {most}: {hint}split it, or take a part.")
