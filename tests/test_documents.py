"""JSON that is read back: what is refused, and that types are those of the annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from ia3.documents import fits, parse_json, read_json, wrong_field


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (str, ["", "a"], [None, 1, ["a"]]),
        (bool, [True, False], [0, 1, "true", None]),
        (int, [0, -3, 10**30], [True, 1.0, "1", None]),
        (float, [0, 0.5], [True, "1", None]),
        (str | None, ["a", None], [1, False]),
        (list[str], [[], ["a"], ("a",), {"a"}], ["a", [1], [["a"]], {"a": 1}, None]),
        (set[str] | str, [{"a"}, "a", ["a"]], [1, [None], {"a": "b"}]),
        (dict[str, str], [{}, {"a": "b"}], [{"a": 1}, [], "a"]),
        (Literal["a", "b"], ["a"], ["c", ["a"], None, {}]),
        (Literal["a"] | None, ["a", None], ["b", []]),
        (Colour, ["red", Colour.RED], ["blue", ["red"], {}]),
        (Any, [1, None, [{}]], []),
    ],
)
def test_values_fit_their_annotation(kind: Any, right: list[Any], wrong: list[Any]) -> None:
    assert all(fits(value, kind) for value in right)
    assert not any(fits(value, kind) for value in wrong)


def test_a_wrong_field_is_named_with_what_was_expected() -> None:
    fields = {"names": list[str] | str | None, "how": Literal["a", "b"], "colour": Colour, "map": dict[str, str]}
    assert wrong_field({"names": ["a"], "other": 5}, fields) is None
    assert wrong_field({"names": 5}, fields) == "names is 5, expected a list of texts, a text or null."
    assert wrong_field({"how": ["a"]}, fields) == "how is ['a'], expected one of ['a', 'b']."
    assert wrong_field({"colour": "x" * 10_000}, fields).endswith("…, expected one of ['red'].")  # type: ignore[union-attr]
    assert wrong_field({"map": {"a": 1}}, fields) == "map is {'a': 1}, expected an object of texts."


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid JSON"),
    "half": (b'{"a": ', "not valid JSON"),
    "a list": (b"[1]", "holds a list, not a JSON object"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8. Save it as UTF-8"),
    "null bytes": (b"\0" * 9, "not valid JSON"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands there twice"),
    "NaN": (b'{"a": NaN}', "NaN is no number of JSON"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is no number of JSON"),
    "1e400": (b'{"a": 1e400}', "'1e400' is too large a number"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
    "half a character": (b'{"a": ["\\ud83d"]}', r"'\\ud83d' is half a character"),
    "half a character as key": (b'{"\\udc00": 1}', "half a character"),
    "deep": (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 deep"),
    "a million lists": (b'{"a": [' + b"[]," * 1_000_000 + b"1]}", "more than 1,000,000 lists and objects"),
    "very deep": (b"[" * 100_000, "more than 64 deep"),
    "a megabyte": (b'{"a": 1, "' + b"x" * 1_000_000 + b'": 1, "' + b"x" * 1_000_000 + b'": 1}', "twice"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_can_not_be_used_is_refused_with_its_file(case: str, tmp_path: Path) -> None:
    content, said = UNREADABLE[case]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 2_000


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_without_waiting(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "a.json")
    with pytest.raises(ValueError, match="expected a file"):
        read_json(tmp_path / "a.json")


def test_what_is_whole_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}', "a") == {"a": "😀"}  # with a mark, and a whole pair
    assert parse_json(json.dumps({"a": [[{}] * 100] * 100}), "a")["a"][0][0] == {}  # wide is not deep
    assert parse_json('{"a": Infinity}', "a", finite=False) == {"a": float("inf")}


def test_a_file_has_a_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="has 8 bytes, and such a file has 7 at most"):
        read_json(tmp_path / "a.json", 7)
