"""The same rows as users save them: delimiters, encodings, sheets, without a header; no row is lost."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from ia3.data.loading import load_examples
from ia3.data.records import read_records
from ia3.tasks.examples import Examples

LABELS = ("schlecht", "geht so", "sehr gut")
PIECES = (
    "Größe passt, Farbe nicht; schade.",
    'Er sagte: "Nie wieder!" – für 12,50 € zu teuer',
    "Erste Zeile\nzweite Zeile, mit | Strich",
    "Tab\tim Text; und „Anführung“",
    "Kurz",
    "=SUMME(A1) war leer",
)
ROWS = [(f"{PIECES[number % len(PIECES)]} ({number})", LABELS[number % 7 % 3]) for number in range(200)]


def table(delimiter: str = ",", line_end: str = "\n", header: bool = True, **how: Any) -> str:
    text = io.StringIO(newline="")
    rows = [("text", "label"), *ROWS] if header else ROWS
    csv.writer(text, delimiter=delimiter, lineterminator=line_end, **how).writerows(rows)
    return text.getvalue()


def sheet(header: bool) -> bytes:
    book = openpyxl.Workbook()
    page = book.active
    assert page is not None
    for row in [("text", "label"), *ROWS] if header else ROWS:
        page.append(row)
        for cell in page[page.max_row]:
            cell.data_type = "s"
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def ragged() -> str:
    """A delimiter at the end of each line, all quoted, blank lines between."""
    lines = [";".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [("text", "label"), *ROWS]]
    return ";\r\n\r\n".join(lines) + ";\r\n"


PAIR = "column 1 is the text, column 2 the label (`text_column='1'`, `label_column='2'`)"
LAYOUTS: dict[str, tuple[str, Callable[[], bytes], str | None]] = {
    "plain": ("a.csv", lambda: table().encode(), None),
    "with a byte order mark": ("a.csv", lambda: table(line_end="\r\n").encode("utf-8-sig"), None),
    "semicolons": ("a.csv", lambda: table(";").encode(), "with semicolons between the cells"),
    "Excel's in Germany": (
        "a.csv",
        lambda: table(";", "\r\n").encode("cp1252"),
        "with semicolons between the cells, as Windows-1252 (not UTF-8)",
    ),
    "sep=": ("a.csv", lambda: b"sep=;\r\n" + table(";", "\r\n").encode(), "with semicolons between the cells"),
    "tabs": ("a.tsv", lambda: table("\t").encode(), None),
    "Excel's Unicode text": (
        "a.csv",
        lambda: table("\t", "\r\n").encode("utf-16"),
        "with tabs between the cells, as UTF-16",
    ),
    "bars": ("a.csv", lambda: table("|", "\r").encode("utf-8-sig"), "with bars between the cells"),
    "delimiters at the ends and blank lines": ("a.csv", lambda: ragged().encode(), "with semicolons between the cells"),
    "without a header": ("a.csv", lambda: table(header=False).encode(), f"without a header: {PAIR}"),
    "semicolons without a header": (
        "a.csv",
        lambda: table(";", header=False, quoting=csv.QUOTE_ALL).encode("cp1252"),
        f"with semicolons between the cells, as Windows-1252 (not UTF-8), without a header: {PAIR}",
    ),
    "a sheet": ("a.xlsx", lambda: sheet(header=True), None),
    "a sheet without a header": ("a.xlsx", lambda: sheet(header=False), f"without a header: {PAIR}"),
}


def pairs(examples: Examples) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in examples]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_examples_of_each_layout(layout: str, tmp_path: Path) -> None:
    name, write, said = LAYOUTS[layout]
    (tmp_path / name).write_bytes(write())
    found = load_examples(tmp_path / name)
    assert pairs(found) == ROWS
    assert found.labels == tuple(sorted(LABELS))
    assert found.remarks == ((f"{name} is read {said}.",) if said else ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_by_number_in_each_layout(layout: str, tmp_path: Path) -> None:
    name, write, _ = LAYOUTS[layout]
    (tmp_path / name).write_bytes(write())
    found = load_examples(tmp_path / name, text_column="1", label_column="2")
    assert pairs(found) == ROWS
    said = "without a header: its columns are numbers" if "without" in layout else "Column 1 is 'text'"
    assert said in " ".join(found.remarks)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "a.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


HEADERS = {
    "unusual names": "Aussage,Stimmung\nDas hat mir gar nicht gefallen,mies\nIch komme gerne wieder,toll\n",
    "a question as a name": "Wie war Ihr Besuch?;Sterne\nDas hat mir gar nicht gefallen;2\nIch komme gerne wieder;5\n",
    "years": "text,2019,2020\nSo ein Unsinn,1,2\nNa gut,3,4\n",
    "numbers below": "a,b\n1,2\n",
    "one put after the other": "text,label\nja,x\ntext,label\nnein,y\n",
    "a number's name": "Nr,Aussage\n1,Das war nichts.\n2,Das war gut.\n",
    "labels below": "Aussage,Stimmung\nDas war nichts.,mies\nDas war gut.,toll\nNie wieder.,mies\nGerne wieder.,toll\n",
    "the header alone with one row": "Aussage,Stimmung\nDas hat mir gar nicht gefallen,mies\n",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_header_is_none_of_the_rows(content: str, write: Callable[..., Path]) -> None:
    records = read_records(write(content))
    assert len(records) == content.count("\n") - 1
    assert records.dialect is not None
    assert records.dialect.header == records.columns


NO_HEADERS = {
    "labels": "Nie wieder,mies\nGerne wieder,toll\nNa ja,mies\nImmer,toll\n",
    "a first label that doesn't recur": "Das war nichts.,naja\nGut war es,toll\nNicht,mies\nSo gut,toll\nAch,mies\n",
    "numbers": "Das gefiel mir nicht,1\nDas gefiel mir sehr,5\n",
    "decimal commas": "Das gefiel mir, na ja;1,5\nDas gefiel mir sehr;5,0\n",
    "dates": "2024-05-01|Das gefiel mir|x\n2024-05-02|Das nicht|y\n",
    "long texts": "Ein Satz mit vielen Wörtern\nNoch ein Satz mit Wörtern\n",
    "one row": "Ein Satz mit vielen Wörtern,und noch einer mit mehr\n",
    "a label called as a column": "Was ist das?,question\nDas ist es.,answer\nWer ist da?,question\nIch.,answer\n",
    "rows that are the same": "Gut war das,x\nGut war das,x\nSchlecht war es,y\nNa ja,y\n",
    "short texts": "the falls\nit rises\nhe stays\n",
    "a short text first": "Na ja\nDas gefiel mir sehr\nDas gefiel mir aber gar nicht\n",
    "an empty cell": ",Das gefiel mir nicht,1\na,Das gefiel mir sehr,5\n",
}


@pytest.mark.parametrize("content", NO_HEADERS.values(), ids=NO_HEADERS)
def test_a_first_row_is_not_lost(content: str, write: Callable[..., Path]) -> None:
    records = read_records(write(content), named=("1",))
    assert len(records) == content.count("\n")
    assert records.dialect is not None
    assert records.dialect.header is None
    assert "without a header: its columns are numbers" in records.remarks[0]


def test_a_doubtful_first_row_is_neither_lost_nor_taken_for_one(write: Callable[..., Path]) -> None:
    path = write("the falls\nit rises\nhe stays\n")
    with pytest.raises(ValueError, match=r"no header with 'text'.*, if the first row is a header, by name; they are 1"):
        read_records(path)
    assert len(read_records(path, named=("1",))) == 3
    assert len(read_records(path, named=("the falls",))) == 2


def test_columns_that_must_be_named_are_offered_by_number(write: Callable[..., Path]) -> None:
    path = write("17,Das gefiel mir gar nicht,mies\n18,Das gefiel mir sehr,toll\n19,Na ja,mies\n20,Gut,toll\n")
    expected = (
        r"no header with 'text'. Name its columns by number, such as `text_column='1'` and `label_column='2'`, or, if "
        r"the first row is a header, by name; they are 1 \('17'\), 2 \('Das gefiel mir gar nicht'\), 3 \('mies'\)\."
    )
    with pytest.raises(ValueError, match=expected):
        load_examples(path)
    found = load_examples(path, text_column="2", label_column="3")
    assert pairs(found)[0] == ("Das gefiel mir gar nicht", "mies")
    assert len(found) == 4
    assert len(load_examples(path, text_column="Das gefiel mir gar nicht", label_column="mies")) == 3


def test_a_first_label_that_comes_once_is_no_header(write: Callable[..., Path]) -> None:
    path = write("So war es.,naja\n" + "".join(f"Text {number},{'xy'[number % 2]}\n" for number in range(8)))
    found = load_examples(path)
    assert found.labels == ("naja", "x", "y")
    assert pairs(found)[0] == ("So war es.", "naja")


def test_a_single_column_is_the_text_where_no_label_is_asked_for(write: Callable[..., Path]) -> None:
    path = write("Ein Satz mit vielen Wörtern\nNoch ein Satz mit Wörtern\n".encode("cp1252"))
    records = read_records(path, line_column="review")
    assert [record["review"] for _, record in records] == ["Ein Satz mit vielen Wörtern", "Noch ein Satz mit Wörtern"]
    said = "a.csv is read as Windows-1252 (not UTF-8), without a header: its column is the text."
    assert records.remarks == (said,)


def test_a_number_is_a_position_unless_it_is_a_name(write: Callable[..., Path]) -> None:
    records = read_records(write("text,1\na,b\n"), named=("1",))
    assert records.columns == ("text", "1")
    records = read_records(write("Text ,Mein Label\na b,b\n"), named=("2",))
    assert records.columns == ("Text ", "2")
    assert records.remarks == ("Column 2 is 'Mein Label'.",)


CELLS = {
    "decimal commas and commas in texts": ("id;text;n\n1;Gut, aber teuer;1,5\n2;Na, ja;2,5\n", ("id", "text", "n")),
    "the same number of commas": ("Name, Vorname;Alter\nMüller, Eva;33\n", ("Name, Vorname", "Alter")),
    "an index without a name": (",text,label\n0,a,x\n", ("1", "text", "label")),
    "longer lines": ("text,label\na,x,,\n", ("text", "label")),
    "one column with a delimiter quoted": ('text\n"a, b; c"\n', ("text",)),
    "commas after quotes": ('text;label\n"a", sagte er;x\n', None),
    "a text with the delimiter": ("text;label\na;b;x\n", None),
    "a shorter line": ("text;label;id\na;b\n", None),
}


@pytest.mark.parametrize(("content", "columns"), CELLS.values(), ids=CELLS)
def test_cells_are_neither_split_nor_joined(
    content: str, columns: tuple[str, ...] | None, write: Callable[..., Path]
) -> None:
    path = write(content)
    if columns is None:
        with pytest.raises(ValueError, match=r"line 2 (is not CSV|has \d cells, and the header \d: put .*semicolons)"):
            read_records(path)
    else:
        assert read_records(path).columns == columns


def test_thousands_of_columns(write: Callable[..., Path]) -> None:
    names = ["label", *(f"c{number}" for number in range(2999))]
    path = write(";".join(names) + "\n" + ";".join("x" * 3000) + "\n")
    assert read_records(path).columns == tuple(names)
    with pytest.raises(
        ValueError, match=r"no column 'text'; its columns are 'label', 'c0', .* and 2,980 more"
    ) as caught:
        load_examples(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("name", "wanted"), [("Text ", "text"), ("TEXT", "text"), ("Reveiw", "review")])
def test_a_name_that_is_nearly_right(name: str, wanted: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=rf"no column '{wanted}'.* Did you mean {name!r}\?"):
        load_examples(write(f'"{name}","label"\na,b\n'), text_column=wanted)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"text,label\n\xe4\x81,x\n",
            r"neither UTF-8 \(byte 0xe4 at position 11\) nor Windows-1252 \(byte 0x81 at posi",
        ),
        (
            "text,label\nä„ö“,x\n".encode() + b"\xe4,y\n",
            r"UTF-8 but for byte 0xe4 at position 24: save it again as UTF-8",
        ),
        (
            "text,label\na,x\n".encode("utf-16-be"),
            r"no text in .* UTF-16 with a byte order mark \(zero byte at position 0",
        ),
        ("text,label\na,x\n".encode("utf-16")[:-1], r"UTF-16 but for byte 0x0a at position 30"),
    ],
)
def test_no_other_letters_in_silence(content: bytes, said: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=rf"a.csv is {said}"):
        read_records(write(content))


def test_german_quotes_of_windows_are_no_utf_8(write: Callable[..., Path]) -> None:
    text = "text;label\n„Spaß“ und »groß«;x\nÄrger über Öl;y\n"
    assert next(iter(read_records(write(text.encode("cp1252")))))[1]["text"] == "„Spaß“ und »groß«"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_lines_in_the_encoding_of_windows(name: str, write: Callable[..., Path]) -> None:
    line = "Größe" if name == "a.txt" else '{"text": "Größe"}'
    records = read_records(write(line.encode("utf-16"), name))
    assert list(records) == [("line 1", {"text": "Größe"})]
    assert records.remarks == (f"{name} is read as UTF-16.",)


def test_places_count_the_lines_of_the_file(write: Callable[..., Path]) -> None:
    path = write('sep=;\n\ntext;label\n"a\nb";x\n  \nc;y;z\n')
    with pytest.raises(ValueError, match="line 7 has 3 cells"):
        read_records(path)


class TestSheets:
    @pytest.fixture
    def book(self, tmp_path: Path) -> Callable[..., Path]:
        def book(*rows: tuple[Any, ...], more: dict[str, list[tuple[Any, ...]]] | None = None) -> Path:
            made = openpyxl.Workbook()
            sheets = {"Tabelle 1": list(rows), **(more or {})}
            for name, content in sheets.items():
                page = made.create_sheet(name)
                for row in content:
                    page.append(row)
            made.remove(made.worksheets[0])
            made.save(tmp_path / "a.xlsx")
            return tmp_path / "a.xlsx"

        return book

    def test_cells_as_they_are_shown(self, book: Callable[..., Path]) -> None:
        from datetime import datetime

        path = book(
            *(("text", "n", "date", "at"), ("a_x000D_\nb", 3.0, datetime(2024, 5, 1), datetime(2024, 5, 1, 12, 30))),
            *((), ("c", 0.1, None, True), ("d", None, None, "#N/A")),
        )
        records = read_records(path)
        assert list(records) == [
            ("row 2", {"text": "a\nb", "n": 3, "date": "2024-05-01", "at": "2024-05-01 12:30:00"}),
            ("row 4", {"text": "c", "n": 0.1, "date": "", "at": True}),
            ("row 5", {"text": "d", "n": "", "date": "", "at": ""}),
        ]
        assert records.blank == 1
        assert records.remarks == ("a.xlsx is read with 1 cells of Excel's errors, such as #N/A, as empty.",)

    def test_a_size_that_is_written_wrong(self, book: Callable[..., Path], tmp_path: Path) -> None:
        with (
            zipfile.ZipFile(book(("text", "label"), ("a", "x"))) as right,
            zipfile.ZipFile(tmp_path / "b.xlsx", "w") as wrong,
        ):
            for name in right.namelist():
                wrong.writestr(name, right.read(name).replace(b'<dimension ref="A1:B2"', b'<dimension ref="A1:A1"'))
        assert list(read_records(tmp_path / "b.xlsx")) == [("row 2", {"text": "a", "label": "x"})]

    def test_another_sheet(self, book: Callable[..., Path]) -> None:
        path = book(("text", "label"), ("a", "x"), more={"2. Blatt": [("text", "label"), ("b", "y")]})
        assert [record["text"] for _, record in read_records(path)] == ["a"]
        other = read_records(f"{path}:2. Blatt")
        assert [record["text"] for _, record in other] == ["b"]
        assert other.remarks == ("a.xlsx is read from the sheet '2. Blatt' of 'Tabelle 1', '2. Blatt'.",)
        with pytest.raises(ValueError, match=r"a.xlsx has no sheet 'drei'; it has 'Tabelle 1', '2. Blatt'"):
            read_records(f"{path}:drei")

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ([("text", None, "label"), ("a", "b", "x")], "no name in the header for column B: give it one; of merged"),
            (
                [("text", "label"), ("=A1", "x")],
                r"cell A2 is a formula without its result \(=A1\): open the file in Ex",
            ),
            ([("text", "text"), ("a", "x")], r"several columns named \['text'\]"),
            ([("text", "label")], "has no rows: expected at least one"),
            ([], "a.xlsx is empty"),
        ],
    )
    def test_what_is_no_table(self, rows: list[tuple[Any, ...]], said: str, book: Callable[..., Path]) -> None:
        with pytest.raises(ValueError, match=said):
            read_records(book(*rows))

    def test_what_is_no_workbook(self, write: Callable[..., Path]) -> None:
        with pytest.raises(ValueError, match=r"a.xlsx is not a whole .xlsx file"):
            read_records(write(b"text;label", "a.xlsx"))

    def test_without_the_extra(self, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ia3.data.tables.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r'a.xlsx needs `openpyxl`: pip install "ia3\[excel\]"'):
            read_records(write(b"", "a.xlsx"))
