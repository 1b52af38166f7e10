"""Rows with predictions: in the dialect of the input, in another kind of file, and what such a file can't hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from ia3.data.records import Records, read_records
from ia3.data.writing import check_output, check_rows, write_rows

FOUND: list[dict[str, Any]] = [
    {"prediction": "böse", "probability": 0.75, "probabilities": {"böse": 0.75, "gut": 0.25}},
    {"prediction": None},
]
ADDED = "prediction,probability,probability_böse,probability_gut"


@pytest.fixture
def rewrite(tmp_path: Path) -> Callable[..., tuple[bytes, list[str]]]:
    def rewrite(name: str, content: bytes, output: str, found: Any = FOUND) -> tuple[bytes, list[str]]:
        (tmp_path / name).write_bytes(content)
        records = read_records(tmp_path / name)
        check_output(tmp_path / output, tmp_path / name)
        check_rows(tmp_path / output, records, {"prediction"})
        remarks = write_rows(tmp_path / output, records, found)
        return (tmp_path / output).read_bytes(), [remark.replace(f"{tmp_path}/", "") for remark in remarks]

    return rewrite


def plain(delimiter: str = ",", line_end: str = "\n", decimal: str = ".") -> str:
    rows = [("text", "n", *ADDED.split(",")), ("Öl", "1", "böse", "0.75", "0.75", "0.25"), ("b", "2", "", "", "", "")]
    lines = [delimiter.join(cell.replace(".", decimal) for cell in row) + line_end for row in rows]
    return "".join(lines)


SAME = {
    "plain": ("a.csv", "text,n\nÖl,1\nb,2\n".encode(), plain().encode()),
    "Excel's in Germany": ("a.csv", "text;n\r\nÖl;1\r\nb;2\r\n".encode("cp1252"), plain(";", "\r\n").encode("cp1252")),
    "a mark": ("a.csv", "text,n\r\nÖl,1\r\nb,2".encode("utf-8-sig"), plain(",", "\r\n").encode("utf-8-sig")),
    "UTF-16": ("a.csv", "text\tn\nÖl\t1\nb\t2\n".encode("utf-16"), plain("\t").encode("utf-16")),
    "UTF-16, the other": (
        "a.csv",
        "\ufefftext|n\nÖl|1\nb|2\n".encode("utf-16-be"),
        ("\ufeff" + plain("|")).encode("utf-16-be"),
    ),
    "sep=": ("a.csv", "sep=;\r\ntext;n\r\nÖl;1\r\nb;2\r\n".encode(), b"sep=;\r\n" + plain(";", "\r\n").encode()),
    "tabs": ("a.tsv", "text\tn\nÖl\t1\nb\t2\n".encode(), plain("\t").encode()),
    "decimal commas": (
        "a.csv",
        "text;n\nÖl;1,5\nb;2,5\n".encode(),
        plain(";", decimal=",").replace(";1;", ";1,5;").replace(";2;", ";2,5;").encode(),
    ),
    "an index without a name": (
        "a.csv",
        b",text\n0,a\n1,b\n",
        f",text,{ADDED}\n0,a,böse,0.75,0.75,0.25\n1,b,,,,\n".encode(),
    ),
}


@pytest.mark.parametrize(("name", "content", "written"), SAME.values(), ids=SAME)
def test_the_dialect_of_the_input(name: str, content: bytes, written: bytes, rewrite: Callable[..., Any]) -> None:
    assert rewrite(name, content, f"out{Path(name).suffix}") == (written, [])


def test_no_header_where_the_input_has_none(tmp_path: Path) -> None:
    path, output = tmp_path / "a.csv", tmp_path / "b.csv"
    path.write_text("Das war gut.;1\nDas war nichts.;2\n")
    records = read_records(path, named=("1",))
    (said,) = write_rows(output, records, FOUND)
    assert output.read_text() == "Das war gut.;1;böse;0.75;0.75;0.25\nDas war nichts.;2;;;;\n"
    assert said.endswith(f"its last columns are {ADDED.replace(',', ', ')}.")
    write_rows(tmp_path / "b.xlsx", records, FOUND)
    rows = list(openpyxl.load_workbook(tmp_path / "b.xlsx").worksheets[0].values)
    assert [row[:3] for row in rows] == [("Das war gut.", "1", "böse"), ("Das war nichts.", "2", None)]


def test_a_column_asked_for_by_number_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Kommentar,n\na,b\n")
    write_rows(tmp_path / "b.csv", read_records(path, named=("1",)), [{"prediction": "x"}])
    assert (tmp_path / "b.csv").read_text() == "Kommentar,n,prediction\na,b,x\n"


OTHERS = {
    "semicolons to tabs": ("a.csv", "text;n\nÖl;1,5\nb;2,5\n", "o.tsv", f"text\tn\t{ADDED}\n".replace(",", "\t")),
    "tabs to commas": ("a.tsv", "text\tn\nÖl\t1\nb\t2\n", "o.csv", f"text,n,{ADDED}\nÖl,1,böse,0.75,"),
    "objects to commas": (
        "a.jsonl",
        '{"text": "a", "n": ["ö"]}\n{"text": "b"}\n',
        "o.csv",
        f'text,n,{ADDED}\na,"[""ö""]",böse',
    ),
}


@pytest.mark.parametrize(("name", "content", "output", "start"), OTHERS.values(), ids=OTHERS)
def test_another_kind_of_file(name: str, content: str, output: str, start: str, rewrite: Callable[..., Any]) -> None:
    written, remarks = rewrite(name, content.encode(), output)
    assert written.decode().startswith(start)
    assert remarks == []


def test_rows_as_objects(rewrite: Callable[..., Any]) -> None:
    written, _ = rewrite("a.csv", "text;n\nÖl;1\nb;2\n".encode("cp1252"), "o.jsonl")
    assert [json.loads(line) for line in written.decode().splitlines()] == [
        {"text": "Öl", "n": "1", **FOUND[0]},
        {"text": "b", "n": "2", "prediction": None},
    ]


class TestSheets:
    @pytest.fixture
    def rows(self, tmp_path: Path) -> Callable[..., list[Any]]:
        def rows(records: Records, found: Any = FOUND) -> list[Any]:
            self.said = write_rows(tmp_path / "o.xlsx", records, found)
            return list(openpyxl.load_workbook(tmp_path / "o.xlsx").worksheets[0].values)

        return rows

    def test_numbers_stay_numbers(self, tmp_path: Path, rows: Callable[..., list[Any]]) -> None:
        book = openpyxl.Workbook()
        for row in (("text", "n"), ("a", 1.5), ("b", None)):
            book.worksheets[0].append(row)
        book.save(tmp_path / "a.xlsx")
        assert rows(read_records(tmp_path / "a.xlsx")) == [
            ("text", "n", *ADDED.split(",")),
            ("a", 1.5, "böse", 0.75, 0.75, 0.25),
            ("b", None, None, None, None, None),
        ]

    def test_texts_are_no_formulas(self, tmp_path: Path, rows: Callable[..., list[Any]]) -> None:
        (tmp_path / "a.csv").write_text('text\n"=HYPERLINK(""x"")"\n')
        rows(read_records(tmp_path / "a.csv"), [{"prediction": "=1+1"}])
        page = openpyxl.load_workbook(tmp_path / "o.xlsx").worksheets[0]
        assert [(cell.value, cell.data_type) for cell in page[2]] == [('=HYPERLINK("x")', "s"), ("=1+1", "s")]

    def test_control_characters_are_left_out_and_counted(self, tmp_path: Path, rows: Callable[..., list[Any]]) -> None:
        (tmp_path / "a.csv").write_text("text\na\x0bb\n")
        assert rows(read_records(tmp_path / "a.csv"), [{"prediction": "x\x01"}]) == [
            ("text", "prediction"),
            ("ab", "x"),
        ]
        assert self.said == [f"{tmp_path}/o.xlsx lacks 2 control characters, which Excel can't hold."]

    def test_what_a_sheet_can_not_hold(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(f"text\na\n{'x' * 32_768}\n")
        records = read_records(tmp_path / "a.csv")
        with pytest.raises(ValueError, match=r"32,767 characters a cell, and line 3 has a longer text: write a .csv"):
            check_rows(tmp_path / "o.xlsx", records, set())
        check_rows(tmp_path / "o.csv", records, set())

    def test_without_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ia3.data.tables.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r'Writing .*o.xlsx needs `openpyxl`: pip install "ia3\[excel\]"'):
            check_output(tmp_path / "o.xlsx", None)


def test_a_prediction_that_the_encoding_lacks(rewrite: Callable[..., Any]) -> None:
    content = "text;label\r\nÖl;x\r\n".encode("cp1252")
    written, remarks = rewrite("a.csv", content, "o.csv", [{"prediction": "→"}])
    assert written == "text;label;prediction\r\nÖl;x;→\r\n".encode("utf-8-sig")
    assert remarks == ["o.csv is UTF-8, since the encoding of a.csv has no '→'."]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("a.csv", "is the input: it would be overwritten"),
        ("o.parquet", "of no known kind: expected one that ends in .csv, .tsv, .xlsx or .jsonl"),
        ("none/o.csv", "can't be written: expected a file name in a folder that exists"),
    ],
)
def test_an_output_that_can_not_be(output: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=said):
        check_output(tmp_path / output, tmp_path / "a.csv")


def test_columns_of_ours_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,prediction\na,b\n")
    for named in ((), ("2",)):
        with pytest.raises(ValueError, match=r"has columns named \['prediction'\] already"):
            check_rows(tmp_path / "o.csv", read_records(tmp_path / "a.csv", named=named), {"prediction"})
