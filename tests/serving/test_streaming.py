"""An answer over HTTP while it is written."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fleet import TEXTS, ask, save_fleet, serving
from stand_in import until

from ia3.serving.engine import Engine
from ia3.serving.http import make_app
from ia3.serving.listening import bind
from ia3.serving.writing import Size
from ia3.tasks.task import TaskKind

TASKS = {"long": {"kind": TaskKind.GENERATION, "max_length": 64, "max_new_tokens": 24}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("fleet"), TASKS)


@contextmanager
def listening(engine: Engine, gate: threading.Event) -> Iterator[str]:
    """An address at which an engine is asked; behind its fifth step it waits for a gate to open."""
    step, count = engine._writing.step, 0

    def gated(size: Size) -> Any:
        nonlocal count
        count += 1
        assert count <= 5 or gate.wait(60)
        return step(size)

    engine._writing.step = gated  # type: ignore[method-assign]
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(make_app(engine), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(1e-2)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            gate.set()
            server.should_exit = True
            thread.join(60)


def test_the_first_piece_comes_long_before_the_last(fleet: Path) -> None:
    with serving(fleet) as engine:
        engine._writing.model.generation_config.eos_token_id = None
        whole, is_seen = ask(engine, "long", TEXTS[1]), threading.Event()
        with listening(engine, is_seen) as url:
            asked = {"model": "long", "prompt": TEXTS[1], "stream": True}
            pieces: list[str] = []
            with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        is_seen.set()
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        pieces.append(choice["text"])
    assert "".join(pieces) == whole.text
    assert len([piece for piece in pieces if piece]) > 5
    assert [piece.strip() for piece in pieces[:3]] == whole.text.split()[:3]


def test_who_hangs_up_is_written_no_more(fleet: Path) -> None:
    with serving(fleet) as engine:
        engine._writing.model.generation_config.eos_token_id = None
        ask(engine, "long", TEXTS[0])
        has_left = threading.Event()
        with listening(engine, has_left) as url:
            asked = {"model": "long", "prompt": TEXTS[1], "stream": True}
            with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
                next(response.iter_lines())
                until(lambda: engine.stats()["running"] == 1)
                (work,) = engine._written.values()
            until(work.future.done)
            has_left.set()
            until(lambda: not engine.stats()["running"])
            stats = engine.stats()
    assert (stats["requests_answered"], stats["requests_cancelled"], stats["running"]) == (1, 1, 0)
