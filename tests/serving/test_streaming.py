"""An answer over HTTP while it is written."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import uvicorn
from fleet import TEXTS, ask, save_fleet, serving

from ia3.serving.engine import Engine
from ia3.serving.http import make_app
from ia3.serving.listening import bind
from ia3.tasks.task import TaskKind

TASKS = {"long": {"kind": TaskKind.GENERATION, "max_length": 64, "max_new_tokens": 24}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("fleet"), TASKS)


@contextmanager
def listening(engine: Engine) -> Iterator[str]:
    """An address at which an engine is asked; each of its steps takes a moment."""
    step = engine._writing.step
    engine._writing.step = lambda size: time.sleep(0.02) or step(size)  # type: ignore[method-assign,func-returns-value]
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(make_app(engine), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(1e-2)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def test_the_first_piece_comes_long_before_the_last(fleet: Path) -> None:
    with serving(fleet) as engine:
        engine._writing.model.generation_config.eos_token_id = None
        whole = ask(engine, "long", TEXTS[1])
        with listening(engine) as url:
            asked = {"model": "long", "prompt": TEXTS[1], "stream": True}
            came: list[tuple[float, str]] = []
            with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        came.append((time.monotonic(), choice["text"]))
    assert "".join(piece for _, piece in came) == whole.text
    assert len([piece for _, piece in came if piece]) > 5
    assert came[-1][0] - came[0][0] > 0.2
    assert [piece.strip() for _, piece in came[:3]] == whole.text.split()[:3]


def test_who_hangs_up_is_written_no_more(fleet: Path) -> None:
    with serving(fleet) as engine:
        engine._writing.model.generation_config.eos_token_id = None
        ask(engine, "long", TEXTS[0])
        with listening(engine) as url:
            asked = {"model": "long", "prompt": TEXTS[1], "stream": True}
            with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
                next(response.iter_lines())
            assert engine.stats()["running"] == 1
            until = time.monotonic() + 10
            while engine.stats()["running"] and time.monotonic() < until:
                time.sleep(1e-2)
            stats = engine.stats()
    assert (stats["requests_answered"], stats["requests_cancelled"], stats["running"]) == (1, 1, 0)
