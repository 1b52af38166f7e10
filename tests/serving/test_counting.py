"""What /metrics says: each thing once, under one name, and nobody's; and who answered lately, for the page alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import RANKED, save_fleet, serving
from prometheus_client.parser import text_string_to_metric_families
from stand_in import FIGURES, Site, StandIn, site, until

from ia3.serving import recent
from ia3.serving.metrics import Metrics
from ia3.serving.recent import Recent
from ia3.serving.requests import Request


def values(text: str) -> dict[str, float]:
    """Samples by name and labels."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {" ".join([each.name, *each.labels.values()]): each.value for each in found}


def test_the_engines_figures_have_their_names() -> None:
    """Those that vLLM counts are called as vLLM calls them."""
    found = values(Metrics(StandIn()).text().decode())
    stats = StandIn().stats()
    expected = {
        "ia3_num_requests_waiting": "queued",
        "ia3_num_requests_running": "running",
        "ia3_adapters": "adapters",
        "ia3_adapters_refused": "refused",
        "ia3_adapter_versions": "versions",
        "ia3_adapters_resident": "resident",
        "ia3_batches_total": "batches",
        "ia3_batch_seconds_total": "ran_s",
        "ia3_request_success_total": "requests_answered",
        "ia3_prompt_tokens_total": "prompt_tokens",
        "ia3_generation_tokens_total": "completion_tokens",
    } | {f"ia3_request_failures_total {each.removeprefix('requests_')}": each for each in FIGURES[-5:]}
    assert {name: found[name] for name in expected} == {name: stats[figure] for name, figure in expected.items()}


def test_the_engine_has_these_figures(tmp_path: Path) -> None:
    with serving(save_fleet(tmp_path, {"news": RANKED})) as engine:
        assert set(engine.stats()) == set(FIGURES)
        assert engine.stats()["resident"] == 0
        engine.submit(Request("the share rose", "news")).result(60)
        assert engine.stats()["resident"] == 1


def test_each_thing_is_said_once() -> None:
    """A figure of the engine is shown once, but for the seconds in the queue, which are a histogram's sum."""
    text = Metrics(StandIn()).text().decode()
    families = [*text_string_to_metric_families(text)]
    kinds = {family.name: family.type for family in families}
    assert len(kinds) == len(families)
    assert kinds["ia3_request_queue_time_seconds"] == kinds["ia3_request_inference_time_seconds"] == "histogram"
    figures = [value for name, value in values(text).items() if value in StandIn().stats().values()]
    assert sorted(figures) == sorted(set(StandIn().stats().values()))


def test_an_answer_is_timed_whoever_is_there_to_read_it() -> None:
    server = StandIn()
    metrics = Metrics(server)
    for text in ("hello", "fault", "drop", "hello"):
        metrics.submit(Request(text, "writer"))
    until(lambda: metrics.recent.counts() == {"writer": 2} and all(each.done() for each in server.futures))
    found = values(metrics.text().decode())
    assert found["ia3_request_queue_time_seconds_count"] == found["ia3_request_inference_time_seconds_count"] == 2
    assert found["ia3_request_queue_time_seconds_sum"] == pytest.approx(0.2)
    assert found["ia3_request_inference_time_seconds_sum"] == pytest.approx(0.4)


def test_old_answers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(recent.time, "monotonic", lambda: now)
    counts = Recent()
    for adapter in ("news", "news", "writer"):
        counts.add(adapter)
        now += 100
    assert counts.counts() == {"news": 1, "writer": 1}
    now += 200
    assert counts.counts() == {}


class TestActivity:
    @pytest.fixture
    def served(self) -> Iterator[Site]:
        with site() as running:
            yield running

    def test_who_answered(self, served: Site) -> None:
        served.post("/v1/classify", models=["news", "prod"], input=["a", "b"])
        served.post("/v1/completions", model="writer", prompt="hello")
        served.post("/v1/completions", model="writer", prompt="fault")
        found = served.get("/v1/activity").json()
        assert found.pop("data") == [{"adapter": "news", "answers": 4}, {"adapter": "writer", "answers": 1}]
        stats = StandIn().stats()
        now = {name: stats[name] for name in ("queued", "running", "adapters", "refused", "resident")}
        assert found == {"object": "activity", "ready": True, "seconds": 300, **now}

    def test_of_very_many_the_busiest(self, served: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ia3.serving.http._BUSIEST", 1)
        served.post("/v1/classify", models=["news", "prod"], input="a")
        served.post("/v1/completions", model="writer", prompt="hello")
        assert served.get("/v1/activity").json()["data"] == [{"adapter": "news", "answers": 2}]

    def test_how_long_it_took_stands_beside_each_choice(self, served: Site) -> None:
        (choice,) = served.post("/v1/completions", model="writer", prompt="hello").json()["choices"]
        assert (choice["queued_ms"], choice["ran_ms"]) == (100, 200)
