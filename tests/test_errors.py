from __future__ import annotations

import pytest

from ia3.errors import fit_screen, listed, printable, shorten


@pytest.mark.parametrize("value", ["a", "it's", 7, 0.5, None, [1, "b"], {"b": 1, "a": [2]}, ("x",), {3}])
def test_short_values_stand_as_python_writes_them(value: object) -> None:
    assert shorten(value) == repr(value)


def test_long_values_are_cut() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 1_000_000, ["y" * 1_000] * 100, {str(n): "z" * 1_000 for n in range(100)}, deep, 10**10_000):
        assert len(shorten(value)) <= 100
    assert len(shorten("x" * 1_000_000, 30)) == 30
    while deep:  # taken apart, since Python's own way is recursive
        (deep,) = deep


def test_control_characters_are_escaped() -> None:
    assert shorten("\x1b[31m\u202e\ud800") == r"'\x1b[31m\u202e\ud800'"
    assert printable("a\nb\t\x1b[31m\x07\r\x9b\u202e\ud800é") == "a\nb\t\\x1b[31m\\x07\\r\\x9b\\u202e\\ud800é"


def test_some_of_many_are_listed() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(map(str, range(1234)), 2) == "'0', '1' and 1,232 more"


def test_the_end_of_a_message_stays() -> None:
    assert fit_screen("short") == "short"
    fitting = fit_screen("What was wrong. " + "x" * 5_000 + " What to do.")
    assert fitting.startswith("What was wrong. x")
    assert fitting.endswith("x What to do.")
    assert len(fitting) <= 1_510
