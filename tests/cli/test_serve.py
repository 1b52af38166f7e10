"""`ia3 serve`: its flags, and what it says before it listens."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import call, message, succeed

from ia3.serving import listening
from ia3.serving.intake import Limits
from ia3.serving.limits import RequestLimits
from ia3.serving.requests import Served

NEWS = Served("news", "d" * 64, "tiny", ("prod",), "label-words", ("good", "bad"))
KEY = "0123456789abcdef"


class Registry:
    def refused(self) -> dict[str, str]:
        return {"broken": "The adapter in 'broken' can't be served: it has no task."}


class Engine:
    registry = Registry()

    def models(self) -> list[Served]:
        return [Served("tiny", None, None), NEWS]

    def stats(self) -> dict[str, float]:
        return {}


@pytest.fixture
def listened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been listened with, and the arguments of the start."""
    seen: list[Any] = []

    def start(*given: Any, **more: Any) -> Engine:
        seen.append((given, more))
        return Engine()

    def make_app(engine: Any, **more: Any) -> None:
        seen.append(more)

    monkeypatch.setattr("ia3.serving.starting.start", start)
    monkeypatch.setattr("ia3.serving.http.make_app", make_app)
    monkeypatch.setattr(listening, "listen", lambda *given, **more: seen.append((given, more)) or True)
    monkeypatch.setattr("ia3.serving.metrics.log_in_lines", lambda: None)
    monkeypatch.delenv("IA3_API_KEYS", raising=False)
    monkeypatch.delenv("IA3_ADMIN_KEY", raising=False)
    return seen


def test_what_is_served_is_shown(listened: list[Any], tmp_path: Path) -> None:
    shown = succeed("serve", "tiny", "--adapters", tmp_path, "--port", 0, "--gather-ms", 5, "--batch-size", 8)
    assert "news" in shown.output
    assert "d" * 12 in shown.output
    assert "good, bad" in shown.output
    assert "/ serves the base tiny and its adapters, 1 so far." in shown.output
    assert "broken is not served" in shown.stderr
    (given, how), made, (_, more) = listened
    assert made["limits"] == RequestLimits()
    assert made["hosts"] == listening.own_names("127.0.0.1") >= {"localhost", "127.0.0.1"}
    assert given == ("tiny", tmp_path, Limits(batch_size=8, gather_s=0.005))
    assert how.pop("tell")
    assert how == {"trust_remote_code": False}
    assert more == {"drain_s": 30.0}


def test_limits_and_keys(listened: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IA3_API_KEYS", KEY)
    flags = ("--max-running", 9, "--timeout-s", 600, "--drain-s", 2.5)
    succeed("serve", "tiny", "--adapters", tmp_path, "--port", 0, *flags)
    _, made, (_, more) = listened
    assert made["limits"] == RequestLimits(running=9, answer_s=600)
    assert made["hosts"] is None  # a key is what lets in
    assert more == {"drain_s": 2.5}


def test_as_json(listened: list[Any], tmp_path: Path) -> None:
    shown = json.loads(succeed("serve", "tiny", "--adapters", tmp_path, "--port", 0, "--json").stdout)
    assert shown["base"] == "tiny"
    assert shown["adapters"][0]["name"] == "news"
    assert shown["refused"].keys() == {"broken"}
    assert shown["url"].startswith("http://127.0.0.1:")


@pytest.mark.usefixtures("listened")
class TestWhatIsRefused:
    def test_other_machines_without_keys(self, tmp_path: Path) -> None:
        result = call("serve", "tiny", "--adapters", tmp_path, "--host", "0.0.0.0", "--port", 0)
        assert result.exit_code == 2
        assert "anybody could ask: give --api-keys, or the keys in $IA3_API_KEYS" in message(result)

    def test_other_machines_with_keys(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IA3_API_KEYS", KEY)
        succeed("serve", "tiny", "--adapters", tmp_path, "--host", "0.0.0.0", "--port", 0)

    @pytest.mark.parametrize("flag", ["--api-keys", "--admin-key-file"])
    def test_keys_that_are_none(self, tmp_path: Path, flag: str) -> None:
        (tmp_path / "keys").write_text("secret\n")
        result = call("serve", "tiny", "--adapters", tmp_path, flag, tmp_path / "keys")
        assert result.exit_code == 2
        assert "Key 1 can't be taken" in message(result)
        assert call("serve", "tiny", "--adapters", tmp_path, flag, tmp_path / "none").exit_code == 2

    def test_a_port_that_is_taken(self, tmp_path: Path) -> None:
        with listening.bind("127.0.0.1", 0) as bound:
            bound.listen()
            result = call("serve", "tiny", "--adapters", tmp_path, "--port", bound.getsockname()[1])
        assert result.exit_code == 2
        assert "Give another --host or --port" in message(result)

    def test_without_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
        result = call("serve", "tiny", "--adapters", tmp_path)
        assert result.exit_code == 2
        assert 'pip install "ia3[serve]"' in message(result)


def test_no_folder(tmp_path: Path) -> None:
    result = call("serve", "tiny", "--adapters", tmp_path / "none", "--port", 0)
    assert result.exit_code == 2
    assert "--adapters is one that holds a folder for each adapter" in message(result)


def test_from_the_folder_to_an_answer(adapter: Path, base: Path, data: Path, tmp_path: Path) -> None:
    """A process of its own: what it answers is what `ia3 predict` does; SIGTERM ends it with 0."""
    shutil.copytree(adapter, tmp_path / "adapters" / "reviews")
    (tmp_path / "adapters" / "broken").mkdir()
    (tmp_path / "adapters" / "broken" / "adapter_config.json").write_text("{}")
    (tmp_path / "keys").write_text(f"{KEY}\n")
    command = [sys.executable, "-m", "ia3", "serve", str(base), "--adapters", str(tmp_path / "adapters")]
    more = ["--port", "0", "--api-keys", str(tmp_path / "keys"), "--batch-invariant", "--json"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *more], **pipes) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        try:
            assert [each["name"] for each in said["adapters"]] == ["reviews"]
            assert said["refused"].keys() == {"broken"}
            own: Any = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 60}
            asked = {"models": ["reviews", f"{said['base']}:reviews"], "input": "the share rises"}
            found = httpx2.post(f"{said['url']}/v1/classify", json=asked, **own).json()["data"]
            cards = httpx2.get(f"{said['url']}/v1/models", **own).text
        finally:
            process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=120)[1]
    assert process.returncode == 0, log
    predicted = json.loads(succeed("predict", adapter, "the share rises", "--json").stdout)["predictions"][0]
    for each in found:
        assert each["label"] == predicted["label"]
        assert each["probabilities"] == pytest.approx(predicted["probabilities"], rel=1e-4)
    assert str(tmp_path) not in cards
    assert "the share rises" not in log
    assert KEY not in log
