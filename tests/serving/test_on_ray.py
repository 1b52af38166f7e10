"""`ia3 serve` in replicas on a Ray cluster of this machine: the same routes and errors, and replicas that are killed.

Ray is a quarter of a gigabyte, so `make test` passes this by: `make test-ray`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import tiny_seq2seq

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: make test-ray")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pydantic import ValidationError
from ray import serve

from ia3.serving.on_ray import Arguments, Replica, app
from serve_on_ray import NAMES, REPLICAS, TEXTS, Fleet, cluster, storm

pytestmark = pytest.mark.slow
KEY = "a-key-of-a-client"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with cluster() as address:
        yield address


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_seq2seq.save_base(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture(scope="module")
def fleet(base: str, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet.write(base, tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def served(url: str, base: str, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client with a key of one replica."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    # As `serve run` has them from its command line.
    serve.run(app({"base": base, "adapters": str(fleet.folder), "replicas": "1", "api_keys": str(keys)}))
    with httpx2.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


class TestOneReplica:
    def test_labels(self, served: httpx2.Client, fleet: Fleet) -> None:
        found = served.post("/v1/classify", json={"models": ["a", "b"], "input": TEXTS[0]}).json()["data"]
        assert [each["digest"] for each in found] == [fleet.now["a"], fleet.now["b"]]
        assert all(fleet.is_right(each["model"], TEXTS[0], each) for each in found)

    def test_a_stream_comes_through_rays_proxy(self, served: httpx2.Client, fleet: Fleet) -> None:
        asked = {"model": "c", "prompt": TEXTS[0], "stream": True}
        with served.stream("POST", "/v1/completions", json=asked) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *events, end = [line for line in response.iter_lines() if line]
        assert end == "data: [DONE]"
        pieces = [json.loads(event.removeprefix("data: ")) for event in events]
        text = "".join(each["choices"][0]["text"] for each in pieces)
        assert text == fleet.alone[fleet.now["c"]][TEXTS[0]].label
        assert pieces[-1]["system_fingerprint"] == fleet.now["c"]

    def test_errors_are_those_of_one_process(self, served: httpx2.Client) -> None:
        def error(response: Any) -> tuple[int, str]:
            return response.status_code, response.json()["error"]["message"]

        asked = {"model": "none", "input": "x"}
        status, said = error(served.post("/v1/classify", json=asked))
        assert (status, said[:26]) == (404, "There is no model 'none': ")
        assert error(served.post("/v1/classify", content=b"x" * (3 << 20)))[0] == 413
        assert error(served.post("/v1/classify", json=asked, headers={"Authorization": "Bearer no"}))[0] == 401

    @pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/aliases"])
    def test_what_would_change_one_replica_is_refused(self, served: httpx2.Client, path: str) -> None:
        method = "PUT" if path == "/v1/aliases" else "POST"
        response = served.request(method, path, json={"lora_name": "a", "lora_path": "a", "alias": "x", "model": "a"})
        assert response.status_code == 403
        assert "change the folder of adapters" in response.json()["error"]["message"]

    def test_a_copied_folder_is_served_and_a_removed_one_not(self, served: httpx2.Client, fleet: Fleet) -> None:
        def answers() -> Any:
            return served.post("/v1/classify", json={"model": "copied", "input": TEXTS[0]})

        fleet.put("copied", "one")
        _until(lambda: answers().status_code == 200)
        assert answers().json()["data"][0]["digest"] == fleet.digests["one"]
        (fleet.folder / "copied").rename(fleet.folder.parent / "removed")
        _until(lambda: answers().status_code == 404)

    def test_health(self, served: httpx2.Client) -> None:
        assert served.get("/health/ready").status_code == 200


@pytest.mark.timeout(1800)
def test_killed_replicas(url: str, base: str, fleet: Fleet) -> None:
    """Every request has the answer of its own adapter, or an error that its client sees and asks again after."""
    serve.run(app({"base": base, "adapters": fleet.folder, "replicas": REPLICAS}))
    clients = 6
    found = storm(url, fleet, clients, seconds=5)
    assert (found["killed"], found["wrong"], found["lost"]) == (2, 0, 0), found
    assert found["new_replicas_answer_all"], found
    # What a killed replica had under way.
    assert sum(found["errors"].values()) == found["retried"] <= 2 * clients, found
    assert found["answered"] > 100
    assert found["streams"] > 10
    assert found["contents_seen"] == len({each for names in NAMES.values() for each in names})
    assert found["adapters_replaced"] > 20


class TestArguments:
    @pytest.mark.parametrize(
        ("more", "named"),
        [({"replica": 3}, "replica\n"), ({"replicas": 0}, "replicas\n"), ({"gather_ms": -1}, "gather_ms\n")],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, more: dict[str, Any], named: str) -> None:
        with pytest.raises(ValidationError, match=named):
            app({"base": "tiny", "adapters": tmp_path, **more})

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="`adapters` is one that holds a folder for each adapter"):
            app({"base": "tiny", "adapters": tmp_path / "none"})

    def test_keys_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "keys").write_text("# none\n")
        with pytest.raises(ValueError, match="holds no key"):
            app({"base": "tiny", "adapters": tmp_path, "api_keys": tmp_path / "keys"})

    def test_keys_of_the_environment_are_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine where they lack would let everybody in."""
        monkeypatch.setenv("IA3_API_KEYS", KEY)
        assert not Arguments(base="tiny", adapters=tmp_path).keys()


def test_an_engine_that_stopped_is_not_healthy(base: str, fleet: Fleet) -> None:
    replica = Replica(Arguments(base=base, adapters=fleet.folder))
    replica.check_health()
    replica.__del__()
    with pytest.raises(RuntimeError, match="The engine has stopped"):
        replica.check_health()


def _until(reached: Any) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.2)
