"""Hostile files of every kind that the library reads back, but weights: configurations, tasks, recipes, runs, tables.

Each generator gives names and builders; a builder puts one hostile file into a folder that is whole otherwise.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (before children are forked, since it takes seconds)
import openpyxl
from harness import Attack, Ground, command, door

Build = Callable[[Path], None]
Attacks = Iterator[tuple[str, Build]]

MEGABYTE = "x" * 1_000_000
ESCAPES = "\x1b[31m\x1b]0;owned\x07\u202e"

# Values as they stand in JSON.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "fraction": "0.5",
    "10^30": str(10**30),
    "1e400": "1e400",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "5,000 digits": "9" * 5000,
    "empty text": '""',
    "a megabyte": json.dumps(MEGABYTE),
    "escapes": json.dumps(ESCAPES),
    "null byte": '"a\\u0000b"',
    "half a character": '"\\ud800"',
    "empty list": "[]",
    "list of numbers": "[1, 2]",
    "list of null": "[null]",
    "list of lists": '[["a"]]',
    "100,000 texts": json.dumps([f"n{number}" for number in range(100_000)]),
    "megabyte in a list": json.dumps([MEGABYTE]),
    "object": '{"a": 1}',
    "deep": "[" * 5000 + "]" * 5000,
    "deep object": '{"a":' * 900 + "1" + "}" * 900,
    "path up": '"../../../etc/passwd"',
    "braces": '"{text:>1000000000}{0.__class__}"',
}


def whole_files(valid: str) -> dict[str, bytes]:
    """What may stand in a file in place of what belongs there."""
    return {
        "empty": b"",
        "blank": b" \n\n",
        "cut": valid.encode()[: len(valid) // 2],
        "list": b"[1, 2]",
        "text": b'"text"',
        "null": b"null",
        "number": b"17",
        "NaN": b"NaN",
        "UTF-16": valid.encode("utf-16"),
        "UTF-32": valid.encode("utf-32"),
        "latin-1": valid.replace("text", "t\xe4xt").encode("latin-1") + b"\xe4",
        "null bytes": b"\0" * 1000,
        "null byte within": valid.encode().replace(b":", b":\0", 1),
        "random": bytes(range(256)) * 40,
        "deep list": b"[" * 200_000,
        "deep object": b'{"a":' * 200_000,
        "two documents": valid.encode() * 2,
        "more behind": valid.encode() + b"}",
        "comment": b"// hello\n" + valid.encode(),
        "20 MB of blanks": valid.encode() + b" " * 20_000_000,
        "20 MB of lists": b'{"a": [' + b"[]," * 6_000_000 + b"[]]}",
        "a million keys": json.dumps({f"k{number}": None for number in range(300_000)}).encode(),
        "a million telling keys": json.dumps({f"k{number}": 1 for number in range(300_000)}).encode(),
        "megabyte key": json.dumps({MEGABYTE: 1}).encode(),
        "escapes as key": json.dumps({ESCAPES: 1}).encode(),
        "key twice": valid.replace("{", '{"a": 1, "a": 2, ', 1).encode(),
        "a pickle": b"\x80\x04\x95cos\nsystem\n(S'touch owned'\ntR.",
    }


def special_files(path: Path) -> dict[str, Callable[[], None]]:
    """What may stand in a file's place without being a file."""

    def listen() -> None:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)

    return {
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
        "circle of links": lambda: path.symlink_to(path.name),
        "link to nothing": lambda: path.symlink_to("nothing"),
        "link to zeros": lambda: path.symlink_to("/dev/zero"),
        "link to a terminal": lambda: path.symlink_to("/dev/tty"),
        "link to a process": lambda: path.symlink_to("/proc/self/environ"),
        "socket": listen,
        "100 GB of nothing": lambda: _write_sparse(path),
    }


def _write_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 30)


def _write(name: str, content: bytes, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def _write_made(name: str, make: Callable[[], bytes], folder: Path) -> None:
    _write(name, make(), folder)


def _put(name: str, what: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    special_files(folder / name)[what]()


def _replaced(name: str, key: str, value: str, folder: Path) -> None:
    """One key of a file in JSON with another value, which stands there as it is."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    *outer, last = key.split("/")
    inner = content
    for part in outer:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[last] = "@@"
    text = json.dumps(content).replace('"@@"', value)
    _write(name, text.encode(), folder)


def json_files(name: str, valid: Mapping[str, Any], keys: list[str]) -> Attacks:
    """Hostile forms of a file in JSON: each value at each key, and whole files."""
    for key in keys:
        for what, value in VALUES.items():
            yield f"{name}: {key} is {what}", partial(_replaced, name, key, value)
    for what, content in whole_files(json.dumps(valid)).items():
        yield f"{name}: {what}", partial(_write, name, content)
    for what in special_files(Path()):
        yield f"{name}: {what}", partial(_put, name, what)


CONFIG_KEYS = [
    *("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save", "task_type", "peft_type"),
    *("base_model_name_or_path", "revision", "inference_mode", "init_ia3_weights", "fan_in_fan_out", "auto_mapping"),
    *("peft_version", "layers_to_transform", "layers_pattern", "towers", "runtime_config", "unknown"),
]
TASK_KEYS = [
    *("type", "template", "labels", "max_length", "generation", "generation/max_new_tokens", "base_model"),
    *("label_column", "answer_by", "precision", "quantize", "system", "unknown"),
]


def configurations() -> Attacks:
    """`adapter_config.json`."""
    return json_files("adapter_config.json", {"peft_type": "IA3", "target_modules": ["k", "v"]}, CONFIG_KEYS)


def tasks() -> Attacks:
    """`ia3_task.json`."""
    yield from json_files("ia3_task.json", {"type": "label-words", "template": "{text}"}, TASK_KEYS)
    for what, template in {
        "many fields": "{text}" * 1_000_000,
        "many doubled braces": "{{" * 1_000_000 + "{text}",
        "open braces": "{" * 1_000_000,
        "breaks": "{" + "\n" * 1_000_000,
        "an attribute": "{text.__class__.__mro__}",
        "jinja": "{% for x in range(10**9) %}{{ x }}{% endfor %}{text}",
        "many columns": "".join(f"{{c{number}}}" for number in range(900)),
    }.items():
        yield (
            f"ia3_task.json: template of {what}",
            partial(_replaced, "ia3_task.json", "template", json.dumps(template)),
        )
    for what, labels in {
        "a million": [f"l{number}" for number in range(1_000_000)],
        "100,000": [f"l{number}" for number in range(100_000)],
        "none": [],
        "one": ["a"],
        "equal ones": ["a", "a", "a"],
        "a megabyte each": [MEGABYTE, MEGABYTE + "y"],
        "20,000 letters": ["x" * 20_000, "y"],
        "escapes": [ESCAPES, ESCAPES * 2],
        "blanks": [" ", "\n", ""],
    }.items():
        yield f"ia3_task.json: labels, {what}", partial(_replaced, "ia3_task.json", "labels", json.dumps(labels))


RECIPE_KEYS = [
    *("epochs", "steps", "learning_rate", "seed", "split_seed", "batch_size", "max_length", "template", "model"),
    *("data", "target_modules", "trackers", "test_size", "task", "output", "pad_to_multiple_of", "limit", "zebra"),
]
YAML_VALUES = {
    "null": "null",
    "a list": "[1, 2]",
    "an object": "{a: 1}",
    "10^30": str(10**30),
    "1e400": "1.0e+400",
    "nan": ".nan",
    "inf": ".inf",
    "a date": "2024-01-01",
    "no date": "2024-99-99",
    "5,000 digits": "9" * 5000,
    "100,000 letters": "x" * 100_000,
    "escapes": json.dumps(ESCAPES),
    "null byte": '"a\\0b"',
    "half a character": '"\\ud800"',
    "base 60": ":".join(["59"] * 5000),
    "tag": "!!python/object/apply:os.system ['touch owned']",
    "no number": "!!int x",
    "no boolean": "!!bool x",
    "deep": "[" * 3000 + "]" * 3000,
}


def recipes() -> Attacks:
    """`recipe.yaml`, given by name."""
    for key in RECIPE_KEYS:
        for what, value in YAML_VALUES.items():
            yield (
                f"recipe.yaml: {key} is {what}",
                partial(_write, "recipe.yaml", f"{key}: {value}\n".encode("utf-8", "surrogatepass")),
            )
    texts = {
        "aliases": "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)),
        "alias to itself": "a: &a [*a]\n",
        "merge of an alias": "a: &a {epochs: 3}\nb:\n  <<: *a\n",
        "merge": "<<: {epochs: 3}\n",
        "merge of a number": "<<: 5\n",
        "many keys": "".join(f"k{number}: 1\n" for number in range(10_000)),
        "key of a list": "? [a, b]\n: 1\n",
        "key of 1,000 letters": "k" * 1000 + ": 1\n",
        "keys twice": "a: 1\n" * 20_000,
        "deep": "a: " + "[" * 100_000,
        "deep blocks": "".join(" " * depth + f"k{depth}:\n" for depth in range(400)),
        "several documents": "a: 1\n---\nb: 2\n",
        "another version": "%YAML 9.9\n---\na: 1\n",
        "omap": "!!omap [a]\n",
        "set": "!!set {a, b}\n",
        "map of a list": "!!map [a]\n",
        "timestamp": "a: !!timestamp x\n",
        "binary": "a: !!binary \u00e9\n",
        "tabs": "\ta: 1\n",
        "a scalar": "hello",
        "anchors": "".join(f"- &a{number} x\n" for number in range(8_000)),
        "long flow": "a: [" + "x," * 60_000 + "]",
        "another recipe": "recipe: recipe.yaml\n",
        "5 MB": "# " + "x" * 5_000_000,
        "quotes": '"' * 100_000,
    }
    for what, text in texts.items():
        yield f"recipe.yaml: {what}", partial(_write, "recipe.yaml", text.encode())
    for what, content in whole_files("epochs: 3\n").items():
        yield f"recipe.yaml: {what}", partial(_write, "recipe.yaml", content)
    for what in special_files(Path()):
        yield f"recipe.yaml: {what}", partial(_put, "recipe.yaml", what)


RESULT_KEYS = [
    *("accuracy_interval_95", "best", "evaluations", "steps", "stopped_early", "train_seconds", "task", "labels"),
    *("train_examples", "best/loss", "best/step", "best/accuracy", "evaluations/0/loss", "perplexity"),
]
ENVIRONMENT_KEYS = ["base_model", "data", "data/test", "data/train/sha256", "recipe", "threads", "versions"]


def runs() -> Attacks:
    """The files of a run's folder."""
    yield from json_files("result.json", {"steps": 1}, RESULT_KEYS)
    yield from json_files("environment.json", {"threads": 1}, ENVIRONMENT_KEYS)
    yield from sweeps()
    for what, content in whole_files("task: label-words\nmodel: a\ndata: b\n").items():
        yield f"run's recipe.yaml: {what}", partial(_write, "recipe.yaml", content)


def sweeps() -> Attacks:
    """`metrics.jsonl`, which is read where there is no result."""

    def unfinished(content: bytes, folder: Path) -> None:
        (folder / "result.json").unlink(missing_ok=True)
        _write("metrics.jsonl", content, folder)

    line = '{"step": 1, "loss": 1.0}\n{"step": 1, "evaluation": {"step": 1, "loss": 1.0}}\n'
    for key in ("step", "loss", "evaluation"):
        for what, value in VALUES.items():
            yield f"metrics.jsonl: {key} is {what}", partial(unfinished, f'{{"step": 1, "{key}": {value}}}\n'.encode())
    for what, content in whole_files(line).items():
        yield f"metrics.jsonl: {what}", partial(unfinished, content + b"\n")


def tables() -> Attacks:
    """Data files of every kind, each named `data.<suffix>`."""
    row = "the share falls,negative\na company rises,positive\n"
    wide = 100_000
    csv = {
        "100,000 columns": ",".join(f"c{number}" for number in range(wide)) + "\n" + "1," * (wide - 1) + "1\n",
        "100,000 equal columns": ",".join(["c"] * wide) + "\n",
        "100,000 columns, many rows": (",".join(f"c{number}" for number in range(wide)) + "\n") * 20,
        "9,000 columns": (",".join(f"c{number}" for number in range(9000)) + "\n") * 50,
        "a megabyte of a name": f"text,{MEGABYTE}\na,b\n",
        "a megabyte of a label": f"text,label\na,{MEGABYTE}\nb,c\n",
        "a megabyte of a text": f"text,label\n{MEGABYTE},a\nb,c\n",
        "a field of 50 MB": "text,label\n" + "x" * 50_000_000 + ",a\n",
        "an open quote": 'text,label\n"' + "x,y\n" * 2_000_000,
        "commas alone": "," * 30_000_000,
        "line breaks alone": "\n" * 30_000_000,
        "returns alone": "\r" * 10_000_000,
        "quotes alone": '"' * 10_000_000,
        "escapes": f"text,label\n{ESCAPES},{ESCAPES}\nb,c\n",
        "escapes as a name": f"{ESCAPES},label\nb,c\n",
        "many labels": "text,label\n" + "".join(f"t{number},l{number}\n" for number in range(5_000)),
        "null bytes": "text,label\na\0,b\n",
        "odd separator": "sep=\x1b\ntext\x1blabel\na\x1bb\n",
        "rows of all widths": "text,label\n" + "".join("x," * number + "\n" for number in range(500)),
        "half a pair": "text,label\n\udc80,a\n",
        "braces": "{text},{label}\na,b\n",
        "markup": "text,[/red]\na,[/b]\n",
    }
    for what, text in csv.items():
        yield f"data.csv: {what}", partial(_write, "data.csv", text.encode("utf-8", "surrogateescape"))
    bytes_of = {
        "UTF-16 without mark": f"text,label\n{row}".encode("utf-16-le"),
        "UTF-32": f"text,label\n{row}".encode("utf-32"),
        "a cut UTF-16": f"text,label\n{row}".encode("utf-16")[:-1],
        "a mark alone": b"\xff\xfe",
        "random": bytes(range(256)) * 1000,
        "a zip": zipped({"data.csv": b"text,label\n"}),
        "a gzip": b"\x1f\x8b\x08" + b"\0" * 100,
        "empty": b"",
    }
    for suffix in ("csv", "tsv", "txt", "jsonl", "json", "xlsx", "parquet", "zip"):
        for what, content in bytes_of.items():
            yield f"data.{suffix}: {what}", partial(_write, f"data.{suffix}", content)
        for what in special_files(Path()):
            yield f"data.{suffix}: {what}", partial(_put, f"data.{suffix}", what)
    yield from lines_of_json()
    yield from archives()
    yield from parquets()


def lines_of_json() -> Attacks:
    """`.jsonl` and `.json`."""
    good = '{"text": "the share falls", "label": "negative"}\n'
    for key in ("text", "label"):
        for what, value in VALUES.items():
            line = f'{{"text": "a", "label": "b", "{key}": {value}}}\n'
            yield f"data.jsonl: {key} is {what}", partial(_write, "data.jsonl", (good + line).encode())
    texts = {
        "a line of 30 MB": '{"text": "' + "x" * 30_000_000 + '"}\n',
        "a line of lists": '{"text": [' + "[]," * 5_000_000 + "[]]}\n",
        "deep": '{"text": ' + "[" * 100_000 + "\n",
        "100,000 keys": json.dumps({f"k{number}": 1 for number in range(100_000)}) + "\n",
        "new keys in each line": "".join(json.dumps({f"k{number}": 1}) + "\n" for number in range(100_000)),
        "megabyte key": json.dumps({MEGABYTE: 1}) + "\n",
        "blank lines": "\n" * 4_000_000,
        "too many lines": "\n" * 6_000_000,
        "a list a line": "[1]\n" * 10,
        "messages of numbers": '{"messages": [1, 2]}\n',
        "messages of a megabyte": json.dumps({"messages": [{"role": MEGABYTE, "content": "x"}]}) + "\n",
        "a message of a megabyte": json.dumps({"messages": [{MEGABYTE: MEGABYTE}]}) + "\n",
        "deep messages": '{"messages": [' + '{"role": "user", "content": [' * 30 + "]}" * 30 + "]}\n",
    }
    for what, text in texts.items():
        yield f"data.jsonl: {what}", partial(_write, "data.jsonl", text.encode())
    lists = {
        "one list of lists": "[" + "[]," * 20_000_000 + "[]]",
        "one list of numbers": "[" + "1," * 20_000_000 + "1]",
        "one list of objects": "[" + "{}," * 20_000_000 + "{}]",
        "deep": "[" * 1_000_000,
        "open": "[" + good,
        "an object": "{}",
    }
    for what, text in lists.items():
        yield f"data.json: {what}", partial(_write, "data.json", text.encode())


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A .zip of these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


_NAMESPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def _book(sheet: bytes, strings: bytes = b"", declared: str = "") -> bytes:
    """An .xlsx of one sheet."""
    empty = io.BytesIO()
    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    book.save(empty)
    with zipfile.ZipFile(empty) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if sheet:
        start = f'<?xml version="1.0"?>{declared}<worksheet {_NAMESPACE}><sheetData>'.encode()
        files["xl/worksheets/sheet1.xml"] = start + sheet + b"</sheetData></worksheet>"
    if strings:
        files["xl/sharedStrings.xml"] = strings
    return zipped(files)


def archives() -> Attacks:
    """`.xlsx`, and PhraseBank's `.zip`."""
    header = b'<row r="1"><c r="A1" t="inlineStr"><is><t>text</t></is></c></row>'
    far = b"".join(b'<row r="%d"><c r="XFD%d"><v>1</v></c></row>' % (number, number) for number in range(2, 60_000))
    entities = '<!DOCTYPE a [<!ENTITY a0 "xxxxxxxxxx">' + "".join(
        f'<!ENTITY a{number} "{f"&a{number - 1};" * 10}">' for number in range(1, 10)
    )
    books: dict[str, Callable[[], bytes]] = {
        "1.5 GB of blanks": lambda: _book(header + b" " * 1_500_000_000),
        "100 MB of blanks": lambda: _book(header + b" " * 100_000_000),
        "100 MB of empty cells": lambda: _book(b"<row>" + b"<c/>" * 25_000_000 + b"</row>"),
        "cells far to the right": lambda: _book(header + far),
        "a cell at the end": lambda: _book(header + b'<row r="1048576"><c r="A1048576"><v>1</v></c></row>'),
        "a row beyond": lambda: _book(header + b'<row r="99999999999"><c r="A99999999999"><v>1</v></c></row>'),
        "entities": lambda: _book(
            b'<row r="1"><c t="inlineStr"><is><t>&a9;</t></is></c></row>', declared=entities + "]>"
        ),
        "entity of a file": lambda: _book(
            b'<row r="1"><c t="inlineStr"><is><t>&a;</t></is></c></row>',
            declared='<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
        ),
        "broken within": lambda: _book(header + b"<row><c><v>"),
        "no number": lambda: _book(b'<row r="1"><c r="A1"><v>x</v></c></row>'),
        "no such string": lambda: _book(b'<row r="1"><c r="A1" t="s"><v>99999</v></c></row>'),
        "no date": lambda: _book(b'<row r="1"><c r="A1" t="d"><v>never</v></c></row>'),
        "a date beyond": lambda: _book(b'<row r="1"><c r="A1" s="1"><v>1e300</v></c></row>'),
        "deep": lambda: _book(b"<row>" * 100_000),
        "strings": lambda: _book(header, f"<sst {_NAMESPACE}>".encode() + b"<si><t/></si>" * 2_000_000 + b"</sst>"),
        "a megabyte of a cell": lambda: _book(
            b'<row r="1"><c r="A1" t="inlineStr"><is><t>' + MEGABYTE.encode() + b"</t></is></c></row>"
        ),
        "an empty archive": lambda: zipped({}),
        "another archive": lambda: zipped({"hello.txt": b"hello"}),
        "paths up": lambda: zipped({"../../owned": b"x", "xl/workbook.xml": b"<x/>", "[Content_Types].xml": b"<x/>"}),
        "20,000 entries": lambda: zipped({f"e{number}": b"" for number in range(20_000)}),
    }
    for what, make in books.items():
        yield f"data.xlsx: {what}", partial(_write_made, "data.xlsx", make)
    bank = "FinancialPhraseBank-v1.0/Sentences_AllAgree.txt"
    zips = {
        "1 GB": lambda: zipped({bank: b"a" * 1_000_000_000}),
        "100 MB": lambda: zipped({bank: b"a@neutral\n" * 10_000_000}),
        "a zip within": lambda: zipped({bank: zipped({bank: b"x"})}),
        "names of 60 kB": lambda: zipped({"n" * 60_000 + str(number): b"" for number in range(20)}),
        "escapes": lambda: zipped({ESCAPES: b"x"}),
        "path up": lambda: zipped({f"../../{bank}": b"good@positive\n"}),
        "a password": lambda: (
            zipped({bank: b"x"})
            .replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\x01\0")
            .replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0")
        ),
        "another method": lambda: zipped({bank: b"x"}).replace(b"\x08\0", b"\x63\0"),
        "spoilt": lambda: zipped({bank: bytes(range(256)) * 100}).replace(b"\x05", b"\x06"),
    }
    for what, make in zips.items():
        yield f"data.zip: {what}", partial(_write_made, "data.zip", make)


def parquets() -> Attacks:
    """`.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(make: Callable[[], Any], folder: Path, **how: Any) -> None:
        pq.write_table(make(), folder / "data.parquet", **how)

    def long_text(rows: int) -> Any:
        return pa.table(
            {
                "text": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [MEGABYTE]),
                "label": ["a"] * rows,
            }
        )

    def many_rows(rows: int) -> Any:
        import numpy as np

        return pa.table({"text": pa.array(np.zeros(rows, "int8"))})

    names = {"names": ["a"], "_type": "ClassLabel"}
    classes = {"text": {"dtype": "string", "_type": "Value"}, "label": names}
    tables: dict[str, Callable[[], Any]] = {
        "20,000 columns": lambda: pa.table({f"c{number}": [1] for number in range(20_000)}),
        "9,000 columns": lambda: pa.table({f"c{number}": [1] for number in range(9_000)}),
        "a megabyte in 100,000 rows": lambda: long_text(100_000),
        "100 million rows": lambda: many_rows(100_000_000),
        "4 million rows of lists": lambda: pa.table({"text": pa.array([[1, 2, 3, 4, 5, 6, 7, 8]] * 4_000_000)}),
        "megabyte name": lambda: pa.table({MEGABYTE: ["a"], "label": ["b"]}),
        "escapes": lambda: pa.table({ESCAPES: [ESCAPES], "label": [ESCAPES]}),
        "bytes": lambda: pa.table({"text": pa.array([b"\xff\xfe"]), "label": ["b"]}),
        "no columns": lambda: pa.table({}),
        "no rows": lambda: pa.table({"text": pa.array([], pa.string())}),
        "structs": lambda: pa.table({"text": [{"a": {"b": [1]}}], "label": ["b"]}),
        "times": lambda: pa.table({"text": pa.array([10**18], pa.timestamp("ns")), "label": ["b"]}),
        "times beyond": lambda: pa.table({"text": pa.array([2**62], pa.timestamp("us")), "label": ["b"]}),
        "decimals": lambda: pa.table({"text": pa.array([None], pa.decimal128(38, 3)), "label": ["b"]}),
        "huggingface's metadata": lambda: pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": "[[["}),
        "metadata of another kind": lambda: pa.table({"text": ["a"]}).replace_schema_metadata(
            {"huggingface": '{"info": {"features": {"text": {"_type": "Nothing"}}}}'}
        ),
        "classes beyond": lambda: pa.table({"text": ["a"], "label": [10**9]}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": classes}})}
        ),
        "columns twice": lambda: pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        "half a magic": lambda: pa.table({"text": ["a"]}),
    }
    for what, make in tables.items():
        yield f"data.parquet: {what}", partial(written, make)
    for what, content in {"magic alone": b"PAR1PAR1", "a length beyond": b"PAR1" + b"\xff" * 4 + b"PAR1"}.items():
        yield f"data.parquet: {what}", partial(_write, "data.parquet", content)


# Doors


def data_of(folder: Path) -> Path:
    """The hostile table."""
    return next(path for path in folder.iterdir() if path.name.startswith("data."))


@door
def load_task(folder: Path, ground: Ground) -> None:
    from ia3.tasks.task import load_task

    load_task(folder)


@door
def push(folder: Path, ground: Ground) -> None:
    command("push", folder, "me/hostile")


@door
def train_by_recipe(folder: Path, ground: Ground) -> None:
    command("train", ground.base, ground.data, "--recipe", folder / "recipe.yaml", "--output", "run", "--steps", 1)


@door
def make_recipe(folder: Path, ground: Ground) -> None:
    from ia3.runs.recipe import make_recipe

    make_recipe({"model": str(ground.base), "data": str(ground.data), "recipe": str(folder / "recipe.yaml")})


@door
def read_runs(folder: Path, ground: Ground) -> None:
    from ia3.runs.comparison import read_runs

    read_runs([folder])


@door
def show_runs(folder: Path, ground: Ground) -> None:
    """Beside a run of its own, in whose folder the picture is drawn."""
    Path("mine").mkdir()
    for name, content in honest_run(ground).items():
        Path("mine", name).write_text(content)
    command("runs", "mine", folder)


@door
def train_again(folder: Path, ground: Ground) -> None:
    """A recipe of several runs leaves out those that are done, which are read back."""
    from ia3.runs.recipe import make_recipe
    from ia3.training.train import finished_result

    finished_result(make_recipe({"model": str(ground.base), "data": str(ground.data), "steps": 1, "output": folder}))


@door
def check_environment(folder: Path, ground: Ground) -> None:
    from ia3.runs.schemas import Environment, read_written

    read_written(folder / "environment.json", Environment)


@door
def load_examples(folder: Path, ground: Ground) -> None:
    from ia3.data.loading import load_examples

    load_examples(data_of(folder))


@door
def load_texts(folder: Path, ground: Ground) -> None:
    from ia3.data.loading import load_examples
    from ia3.tasks.task import TaskKind

    load_examples(data_of(folder), kind=TaskKind.LANGUAGE_MODELLING)


@door
def train_on(folder: Path, ground: Ground) -> None:
    command("train", ground.base, data_of(folder), "--steps", 1, "--output", "run")


@door
def predict_rows(folder: Path, ground: Ground) -> None:
    command("predict", ground.adapter, "--file", data_of(folder), "--output", "answers.csv")


@door
def evaluate_on(folder: Path, ground: Ground) -> None:
    command("evaluate", ground.adapter, "--data", data_of(folder))


def _on_adapter(build: Build, folder: Path, ground: Ground) -> None:
    shutil.copytree(ground.adapter, folder, dirs_exist_ok=True)
    build(folder)


def _alone(build: Build, folder: Path, ground: Ground) -> None:
    """In a child, for what a build takes of memory would be inherited by the doors."""
    if not (child := os.fork()):
        try:
            build(folder)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _on_run(build: Build, folder: Path, ground: Ground) -> None:
    for name, content in honest_run(ground).items():
        (folder / name).write_text(content)
    build(folder)


def honest_run(ground: Ground) -> dict[str, str]:
    """The files of a finished run, without its adapters."""
    figures = {"accuracy": 0.5, "loss": 1.0, "macro_f1": 0.5, "seconds": 1.0, "step": 1}
    result = {
        "accuracy_interval_95": [0.1, 0.9],
        "best": figures,
        "evaluations": [{**figures, "step": 0}, figures],
        "labels": ["negative", "neutral", "positive"],
        "perplexity": 2.0,
        "predictions": [],
        "steps": 1,
        "stopped_early": False,
        "task": "label-words",
        "train_examples": 10,
        "train_seconds": 1.0,
    }
    data = {"rows": 10, "sha256": "0", "source": "data.csv"}
    environment = {
        "base_model": {"sha256_of_samples": "0"},
        "data": {"test": data, "train": data},
        "device": "cpu",
        "recipe": {},
        "threads": 1,
        "versions": {},
    }
    recipe = {"model": str(ground.base), "data": str(ground.data), "task": "label-words", "steps": 1}
    return {
        "environment.json": json.dumps(environment),
        "recipe.yaml": json.dumps(recipe),
        "result.json": json.dumps(result),
    }


# What is hostile, what it stands beside, and where it is tried.
_KINDS = {
    "adapter_config.json": (configurations, _on_adapter, ("from_pretrained", "register", "inspect", "predict")),
    "ia3_task.json": (tasks, _on_adapter, ("load_task", "auto_model", "inspect", "predict", "evaluate")),
    "recipe": (recipes, _alone, ("make_recipe", "train_by_recipe")),
    "run": (runs, _on_run, ("read_runs", "show_runs", "train_again", "check_environment")),
    "table": (tables, _alone, ("load_examples", "load_texts", "predict_rows", "train_on")),
}


def attacks() -> Iterator[Attack]:
    """All of them."""
    for kind, (generate, around, doors) in _KINDS.items():
        for name, build in generate():
            yield Attack(kind, name, partial(around, build), doors)
