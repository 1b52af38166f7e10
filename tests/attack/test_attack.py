"""A fixed sample of the attacks; `make attack` runs all of them at all doors."""

from __future__ import annotations

import runpy
import sys

import harness
import pytest
from harness import BAD, DOORS, Attack, Ground, every_attack, prepare, run

EVERY = list(every_attack())
_ONE_IN = 20
# Those that take seconds to build.
_LARGE = ("million", "MB", "packed", "many times")
SAMPLE = [each for each in EVERY if not any(word in each.name for word in _LARGE)][::_ONE_IN]


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return prepare(tmp_path_factory.mktemp("attack") / "ground")


@pytest.mark.parametrize("attack", SAMPLE, ids=lambda attack: f"{attack.kind}: {attack.name}"[:60])
def test_no_harm_is_done(attack: Attack, ground: Ground) -> None:
    for outcome in run(attack, ground, attack.doors[:1]):
        assert outcome.verdict not in BAD, f"{outcome.door}: {outcome.verdict}, {outcome.said}"


def test_harm_is_seen(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness tells a traceback, a hang, code that ran, a file outside and a message without a name."""

    def fail(folder, ground):
        raise KeyError("x")

    def wait(folder, ground):
        while True:
            pass

    def leave(folder, ground):
        (folder.parent / "canary").touch()

    def write(folder, ground):
        (ground.root / "written").touch()

    def refuse(folder, ground):
        raise ValueError("no")

    def fill(folder, ground):
        bytearray(b"x" * (3 << 30))

    seen = {}
    for verdict, door in {
        **{"traceback": fail, "hang": wait, "ran": leave, "outside": write},
        **{"unnamed": refuse, "memory": fill, "fine": lambda folder, ground: None},
    }.items():
        monkeypatch.setitem(DOORS, "door", door)
        [outcome] = run(Attack("kind", "name", lambda folder, ground: None, ("door",)), ground)
        seen[verdict] = outcome.verdict
    assert seen == {verdict: verdict for verdict in seen}


def test_attacks_are_told_apart_and_knock_at_doors_that_are_there() -> None:
    names = [(each.kind, each.name) for each in EVERY]
    assert len(names) == len(set(names))
    assert {door for each in EVERY for door in each.doors} <= set(DOORS)


def test_the_command_is_the_module_that_generators_give_their_doors_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "main", lambda words: int(words == ["some", "words"]))
    monkeypatch.setattr(sys, "argv", ["harness.py", "some", "words"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(harness.__file__, run_name="__main__")
    assert ended.value.code == 1
