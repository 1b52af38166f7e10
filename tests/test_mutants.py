"""Each mutation of `tests/mutants` still finds its one place, and what it makes of the code can be compiled."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

MUTANTS = Path(__file__).parent / "mutants"
sys.path.insert(0, str(MUTANTS))

import changes  # noqa: E402 (after what it needs is set)

import mutants  # noqa: E402 (after what it needs is set)

EVERY = [mutant for of_tests in mutants.MUTANTS.values() for mutant in of_tests]
# Modules in which nothing can go wrong that a test of `make test` would see: names, classes of errors, a table of
# files, and what needs Ray.
WITHOUT = {"__init__", "__main__", "bundled", "elsewhere", "errors", "on_ray", "utils"}


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: f"{mutant.function}: {mutant.breaks}")
def test_a_mutation_that_found_no_place_any_more(mutant: changes.Mutant) -> None:
    mutated = changes.mutate(mutant)
    compile(mutated.source, mutated.file, "exec")


def test_tests_that_are_not_there() -> None:
    named = {test for tests in mutants.MUTANTS for test in tests}
    assert {test for test in named if not (MUTANTS.parent / test).is_file()} == set()


def test_a_room_without_a_mutation() -> None:
    folders = {path.name for path in changes.PACKAGE.iterdir() if any(path.glob("*.py"))}
    rooms = folders | {path.stem for path in changes.PACKAGE.glob("*.py")}
    assert rooms - {changes.mutate(mutant).room for mutant in EVERY} - WITHOUT == set()


SOURCE = """
class Holder:
    def scale(self, x, side):
        total = 0
        if side == "output":
            total = x.double().sum() * 2
        keep(total)
        return total if total is not None else 1
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changes.Instead("x.double().sum() * 2", "x"), "total = (x)"),
        (changes.Flip("side"), "if (not (side == 'output')):"),
        (changes.Never("side"), "if False:"),
        (changes.Always("total"), "return total if True else 1"),
        (changes.Skip("double"), "total = (x).sum() * 2"),
        (changes.Skip("keep"), "        None\n"),
    ],
)
def test_a_change_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: changes.Change, expected: str
) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "holder.py").write_text(SOURCE)
    monkeypatch.setattr(changes, "PACKAGE", tmp_path)
    changes._functions.cache_clear()
    changes.mutate.cache_clear()
    try:
        mutated = changes.mutate(changes.Mutant("Holder.scale", change, ""))
        assert expected in mutated.source
        assert mutated.room == "room"
        assert ast.parse(mutated.source)
        with pytest.raises(LookupError, match=r"has 2 places for Drop"):
            changes.mutate(changes.Mutant("Holder.scale", changes.Drop("total"), ""))
        with pytest.raises(LookupError, match=r"No function .* called Holder.gone"):
            changes.mutate(changes.Mutant("Holder.gone", change, ""))
    finally:
        changes._functions.cache_clear()
        changes.mutate.cache_clear()
