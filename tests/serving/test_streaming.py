"""An answer over HTTP while it is written."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx2
import pytest
from fleet import TEXTS, ask, at_step, never_ending, save_fleet
from stand_in import site, until

from ia3.tasks.task import TaskKind

TASKS = {"long": {"kind": TaskKind.GENERATION, "max_length": 64, "max_new_tokens": 24}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("fleet"), TASKS)


def test_the_first_piece_comes_long_before_the_last(fleet: Path) -> None:
    with never_ending(fleet) as engine:
        whole, is_seen = ask(engine, "long", TEXTS[1]), threading.Event()
        waited = at_step(engine, 6, lambda: is_seen.wait(60))
        with site(engine, keys=()) as served:
            asked = {"model": "long", "prompt": TEXTS[1], "stream": True}
            pieces: list[str] = []
            with httpx2.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=120) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        is_seen.set()
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        pieces.append(choice["text"])
    assert waited == [True]
    assert "".join(pieces) == whole.text
    assert len([piece for piece in pieces if piece]) > 5
    assert [piece.strip() for piece in pieces[:3]] == whole.text.split()[:3]


def test_who_hangs_up_is_written_no_more(fleet: Path) -> None:
    with never_ending(fleet) as engine:
        ask(engine, "long", TEXTS[0])
        has_left = threading.Event()
        waited = at_step(engine, 6, lambda: has_left.wait(60))
        with site(engine, keys=()) as served:
            asked = {"model": "long", "prompt": TEXTS[1], "stream": True}
            with httpx2.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=60) as response:
                next(response.iter_lines())
                until(lambda: engine.stats()["running"] == 1)
                (work,) = engine._written.values()
            until(work.future.done)
            has_left.set()
            until(lambda: not engine.stats()["running"])
            stats = engine.stats()
    assert waited in ([], [True])  # or it left before
    assert (stats["requests_answered"], stats["requests_cancelled"], stats["running"]) == (1, 1, 0)
