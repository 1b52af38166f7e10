"""What fails below the engine, and the process itself: who waits is told, and what can't go on ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fleet import TEXTS, alone, serving
from stand_in import StandIn, site, until

from ia3.serving.engine import Engine
from ia3.serving.requests import Dropped, Request

SERVING = """
import sys
from pathlib import Path
from fleet import serving
from ia3.serving.http import make_app
from ia3.serving.listening import bind, listen

with serving(Path(sys.argv[1])) as engine, bind("127.0.0.1", int(sys.argv[2])) as bound:
    bound.listen()
    print(bound.getsockname()[1], flush=True)
    listen(make_app(engine), engine, bound)
"""
ASKED = ("news", "sports", "writes", "free")


def fail_by(engine: Engine, error: BaseException, when: threading.Event | None = None) -> None:
    """Let whatever the model computes fail, when it is time."""

    def fail(*_: Any, **__: Any) -> Any:
        assert when is None or when.wait(60)
        raise error

    engine._answer = fail  # type: ignore[assignment]
    engine._writing.admit = fail  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), MemoryError(), torch.OutOfMemoryError(), RecursionError()]
)
def test_an_error_of_some_requests_ends_nothing(fleet: Path, error: Exception) -> None:
    with serving(fleet) as engine:
        mended = engine._answer, engine._writing.admit
        fail_by(engine, error)
        for some in [engine.submit(Request(text, name)) for name in ASKED for text in TEXTS[:3]]:
            with pytest.raises(type(error)):
                some.result(60)
        assert engine.ready
        engine._answer, engine._writing.admit = mended  # type: ignore[method-assign]
        for name in ASKED:
            assert engine.submit(Request(TEXTS[0], name)).result(60).text == alone(fleet / name, TEXTS[:1])[0].label


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), SystemExit()])
def test_an_engine_that_cannot_go_on_leaves_nobody_waiting(
    fleet: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that computes nothing any more, or the end of the thread."""
    with serving(fleet) as engine:
        monkeypatch.setattr("ia3.serving.engine._computes", lambda device: False)
        all_are_there = threading.Event()
        fail_by(engine, error, all_are_there)
        some = [engine.submit(Request(text, name)) for name in ASKED for text in TEXTS[:3]]
        all_are_there.set()
        for each in some:
            with pytest.raises(Dropped, match="try another, or later"):
                each.result(60)
        until(lambda: not engine.ready)
        with pytest.raises(Dropped):
            engine.submit(Request(TEXTS[0], "news"))
        assert "The engine has failed" in caplog.text
        until(lambda: {version.holders for version in engine.registry._versions.values()} == {1})


def test_an_engine_that_failed_is_seen_and_then_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """First /health says so, so that nobody sends more; then nothing listens, for who starts processes again."""
    with site(StandIn()) as served:
        waiting = served.engine.submit(Request("wait", "writer"))
        monkeypatch.setattr("ia3.serving.listening._FAILED_S", 600.0)
        served.engine.ready = False
        assert served.get("/health", None).status_code == 503
        assert served.get("/health/live", None).status_code == 200
        response = served.post("/v1/completions", model="writer", prompt="hello")
        assert response.status_code == 503
        assert response.headers["retry-after"]
        monkeypatch.setattr("ia3.serving.listening._FAILED_S", 0.5)
        served.engine.released.set()
        waiting.result(60)
        served.thread.join(60)
        assert not served.thread.is_alive()
        assert served.listener.is_over


def start(folder: Path, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    paths = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, str(folder), str(port)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.slow
def test_a_process_that_is_killed_under_load(fleet: Path) -> None:
    """Clients have right answers or broken connections; the next process at the same port answers everybody."""
    expected = {name: alone(fleet / name, TEXTS[:3]) for name in ASKED}
    process, port = start(fleet)
    enough, dead = threading.Semaphore(0), threading.Event()

    def ask(number: int) -> list[str]:
        """Ask until the connection breaks, and then until there is another process."""
        outcomes: list[str] = []
        while not outcomes or outcomes[-1] != "answered again":
            name, place = ASKED[number % len(ASKED)], number % 3
            body = {"model": name, "prompt": TEXTS[place]}
            try:
                response = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            except httpx2.TransportError:
                outcomes.append("broken")
                dead.wait(30)
                time.sleep(0.05)
                continue
            assert response.status_code == 200
            assert response.json()["choices"][0]["text"] == expected[name][place].label
            outcomes.append("answered again" if "broken" in outcomes else "answered")
            enough.release()
        return outcomes

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        for _ in range(24):
            assert enough.acquire(timeout=60)
        process.kill()
        process.wait(120)
        process, _ = start(fleet, port)
        dead.set()
        try:
            found = [each.result(60) for each in asking]
        finally:
            process.terminate()
            assert process.wait(120) == 0
    assert all("broken" in outcomes and outcomes[-1] == "answered again" for outcomes in found)
