from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import call, succeed

from ia3.cli.quickstart import SIZES, choose_size
from ia3.training.loop import Training

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart_sizes.txt"


@pytest.mark.parametrize(
    ("seconds", "tweets", "expected"),
    [(0.01, 3600, 9), (0.25, 3600, 225), (0.26, 1800, 117), (0.436, 1800, 196), (0.6, 900, 135), (9.0, 450, 1012)],
)
def test_the_largest_size_that_fits(seconds: float, tweets: int, expected: float) -> None:
    found = choose_size(seconds)
    assert found == (tweets, pytest.approx(expected, abs=1))


def test_known_results_are_measured() -> None:
    """Those of the page of results."""
    rows = [line.split() for line in RESULTS.read_text().splitlines() if not line.startswith("#")]
    assert {int(row[0].replace(",", "")): row[3] for row in rows} == {
        tweets: f"{share:.1%}" for tweets, share in SIZES.items() if share is not None
    }


def test_it_says_what_it_did(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3.bundled.TITLER", str(base))
    monkeypatch.setattr("ia3.cli.quickstart.SIZES", {36: 0.8, 12: 0.7})
    monkeypatch.setattr(Training, "time_steps", lambda training, count: 100.0)
    result = succeed("quickstart", "--output", tmp_path / "slow")
    assert "A step takes 1e+02 s here, so it learns 12 of the 36 tweets, in about 300 s" in result.stderr
    assert "It learned 12 of 36 tweets, for which 70.0% is known; all of them give 80.0%." in result.stdout
    assert json.loads((tmp_path / "slow" / "result.json").read_text())["train_examples"] == 12
    monkeypatch.setattr(Training, "time_steps", lambda training, count: 0.01)
    content = json.loads(succeed("quickstart", "--output", tmp_path / "quick", "--json").stdout)
    assert (content["train_examples"], content["known_accuracy"], content["test_examples"]) == (36, 0.8, 300)


def test_a_limit_is_not_measured_for(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3.bundled.TITLER", str(base))
    monkeypatch.setattr(Training, "time_steps", None)
    result = call("quickstart", "--output", tmp_path / "run", "--limit", 12)
    assert result.exit_code == 0, result.output
    assert "is known" not in result.stdout
