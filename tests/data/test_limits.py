"""Tables that would unfold to more than memory are refused before they do."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ia3.data import limits
from ia3.data.limits import bounded, expect_parquet, sample
from ia3.data.records import read_records

BANK = "FinancialPhraseBank-v1.0/Sentences_AllAgree.txt"


def refuse(path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_records(path)
    assert path.name in str(error.value)
    assert len(str(error.value)) < 2_000


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"c{number}" for number in range(100_000)) + "\n")
    refuse(path, "100,000 columns; expected at most 10,000: is a line break missing")
    path.write_text(f"text,{'x' * 2_000}\na,b\n")
    refuse(path, "names of more than 1,000 characters: 'xxx")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"k{number}": 1}}\n' for number in range(10_001)))
    refuse(path, "10,001 columns")


def test_many_columns_are_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text((",".join(f"c{number}" for number in range(9_999)) + "\n") * 2)
    assert len(read_records(path, named=("c0",)).columns) == 9_999


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_lines(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("x" * (limits.LONGEST_LINE + 1))
    refuse(path, "line 1 has 8,388,609 characters")
    monkeypatch.setattr(limits, "_MOST_ROWS", 99)
    path.write_text("\n" * 100)
    refuse(path, "100 lines; expected at most 99")
    monkeypatch.setattr(limits, "_MOST_BYTES", 50)
    refuse(path, "100 bytes; expected at most 50")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "jsonl", "json", "xlsx", "parquet", "zip"])
def test_what_is_no_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    os.mkfifo(path)
    refuse(path, "is a pipe: expected a file")
    path.unlink()
    path.mkdir()
    refuse(path, "is a folder: expected a file")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refuse(path, "is a device: expected a file")


def test_archives(tmp_path: Path) -> None:
    for name, inside in (("a.xlsx", "xl/worksheets/sheet1.xml"), ("a.zip", BANK)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(inside, b" " * (limits._SMALL + 1))
        refuse(tmp_path / name, "33,554,433 bytes packed into")


def test_sheets(tmp_path: Path) -> None:
    import openpyxl

    content = io.BytesIO()
    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    book.save(content)
    with zipfile.ZipFile(content) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}

    def write(rows: bytes, before: bytes = b"") -> Path:
        name, space = "xl/worksheets/sheet1.xml", b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
        sheet = before + b'<worksheet xmlns="' + space + b'"><sheetData>' + rows + b"</sheetData></worksheet>"
        with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
            for each, held in (files | {name: sheet}).items():
                archive.writestr(each, held)
        return tmp_path / "a.xlsx"

    refuse(write(b'<row r="1"><c r="XFD1"><v>1</v></c></row>'), "16,384 columns")
    refuse(
        write(b'<row r="99999999999"><c r="A99999999999"><v>1</v></c></row>'), "more rows; expected at most 1,048,576"
    )
    refuse(write(b'<row r="1"><c r="A1"><v>'), "not a whole .xlsx file")
    bomb = b'<!DOCTYPE a [<!ENTITY a0 "aaaaaaaaaa">'
    bomb += b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10) for n in range(1, 10)) + b"]>"
    refuse(write(b'<row r="1"><c t="inlineStr"><is><t>&a9;</t></is></c></row>', bomb), "not a whole .xlsx file")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({f"c{number}": [1] for number in range(10_001)}), path)
    refuse(path, "10,001 columns")
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), ["x" * 1_000_000])
    for column in (texts, pa.StructArray.from_arrays([texts], ["inner"])):
        pq.write_table(pa.table({"text": column}), path)
        refuse(path, "2,000,000,000 bytes of text; expected at most 1,073,741,824")
    pq.write_table(pa.table({"text": pa.array([[1] * 100] * 100)}), path)
    expect_parquet(path)
    monkeypatch.setattr(limits, "_MOST_CELLS", 9_999)
    refuse(path, "10,000 cells")
    monkeypatch.setattr(limits, "_MOST_ROWS", 99)
    refuse(path, "100 rows")


def test_metadata_that_means_nothing(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": "[["})
    pq.write_table(table, tmp_path / "a.parquet")
    refuse(tmp_path / "a.parquet", "has metadata of Hugging Face's `datasets`")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + "[]," * 12_000_000 + "[]]")
    refuse(path, "12,000,002 lists and objects")
    for value, said in (('"\\ud800"', "half a character"), ("[" * 100 + "]" * 100, "64 deep"), ("9" * 5000, "limit")):
        (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n')
        refuse(tmp_path / "a.jsonl", said)


def test_names_are_no_texts() -> None:
    with pytest.raises(FileNotFoundError, match="of 1,000,000 characters: expected a path") as error:
        read_records("x" * 1_000_000)
    assert len(str(error.value)) < 2_000


def test_rows_are_counted_as_they_come() -> None:
    assert list(bounded([[1], [1, 2]], "a", 3, 2)) == [[1], [1, 2]]
    with pytest.raises(ValueError, match="a has more cells; expected at most 2"):
        list(bounded([[1], [1, 2]], "a", 2))
    with pytest.raises(ValueError, match="a has more rows; expected at most 1"):
        list(bounded([[], []], "a", 2, 1))
    assert list(sample([[1]] * 9, 3)) == [[1]] * 3
    assert list(sample([[1, 2]] * 9, 9, 5)) == [[1, 2]] * 2
    assert list(sample([[1, 2]] * 9, 9, 1)) == [[1, 2]]
