from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from running import call, message, succeed

from ia3.cli.sweep import parse_grid
from ia3.fast.sweep import SweepStep

OPTIONS = ("--epochs", 1, "--test-size", 0.2, "--no-dropout")


def test_a_sweep_ranks_its_runs_and_keeps_the_best(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    over = ("--over", "lr=0.1,1e-3", "--over", "seed=0", "--over", "seed=1")
    result = succeed("sweep", base, data, *over, "--output", folder, *OPTIONS)
    lines = result.stdout.splitlines()
    header = next(place for place, line in enumerate(lines) if line.startswith("learning_rate"))
    assert lines[header].split()[:3] == ["learning_rate", "seed", "accuracy"]
    rows = [line.split()[:2] for line in lines[header + 1 : header + 5]]
    assert sorted(rows) == [["0.001", "0"], ["0.001", "1"], ["0.1", "0"], ["0.1", "1"]]
    assert {row[0] for row in rows[:2]} == {"0.1"}
    assert f"best adapter: {folder / 'best'}" in lines
    assert "asked for: the likeliest label" in lines
    assert (folder / "learning_rate-0.1-seed-0" / "adapter" / "adapter_config.json").is_file()
    answered = succeed("predict", folder / "best", "the share rises")
    assert answered.stdout.strip()
    assert len(json.loads(succeed("runs", folder, "--json").stdout)["runs"]) == 4


def test_both_figures_where_answers_are_written(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    how = ("--over", "seed=0,1", "--answer-by", "generation", "--output", folder, *OPTIONS)
    result = succeed("sweep", base, data, *how)
    header = next(line for line in result.stdout.splitlines() if line.startswith("seed"))
    assert header.split()[:5] == ["seed", "accuracy", "95", "%", "interval"]
    assert "by rank" in header
    assert "asked for: written answers, exact match" in result.stdout
    shown = succeed("runs", folder).stdout
    assert "accuracy by written answers, exact match" in shown
    records = json.loads(succeed("runs", folder, "--json").stdout)["runs"]
    assert all("accuracy_by_rank" in record["evaluations"][-1] for record in records)


def test_json_is_the_sweeps_own(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    result = succeed("sweep", base, data, "--output", folder, *OPTIONS, "--json")
    content = json.loads(result.stdout)
    assert content.pop("picture") == str(folder / "sweep.png")
    assert content.pop("folder") == str(folder)
    assert content == json.loads((folder / "sweep.json").read_text())
    assert sorted(run["settings"]["learning_rate"] for run in content["runs"]) == [0.003, 0.008, 0.02, 0.04, 0.08]


def test_templates_may_hold_commas() -> None:
    grid = parse_grid(["template=Well, {text}", "template={text}", "warmup-steps=0, 5"])
    assert grid == {"template": ["Well, {text}", "{text}"], "warmup_steps": ["0", "5"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--over", "learning_rate"), "--over 'learning_rate': expected a setting and its values"),
        (("--over", "seed=1,,2"), "--over 'seed=1,,2': expected a setting and its values"),
        (("--over", "seed=one,2"), "--seed is 'one'"),
        (("--over", "precision=bf16"), "can't differ in precision"),
        (("--over", "lr=1e-3", "--lr", 1e-3), "learning_rate is given for all runs and in over"),
        (
            ("--lr", 1e-3),
            "A sweep tries five learning rates itself: leave --learning-rate out, or name yours in --over",
        ),
        (("--recipe", "t-few", "--over", "seed=1,2"), "train without a sweep. The recipe t-few has"),
    ],
)
def test_what_cannot_work(base: Path, data: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = call("sweep", base, data, "--output", tmp_path / "none", *arguments)
    assert result.exit_code == 2
    assert says in message(result)
    assert not (tmp_path / "none").exists()


def test_an_interrupted_sweep_goes_on(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, whole = tmp_path / "parts", tmp_path / "whole"
    over = ("--over", "seed=0,1", *OPTIONS)
    succeed("sweep", base, data, *over, "--output", whole)
    step, calls = SweepStep.__call__, []

    def interrupted(self: SweepStep, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SweepStep, "__call__", interrupted)
        result = call("sweep", base, data, *over, "--output", folder)
    assert result.exit_code == 130
    assert f"Go on: ia3 sweep --resume {folder}" in result.stderr
    refused = call("sweep", base, "--resume", folder, "--over", "seed=3", "--epochs", 2)
    assert "can't be given beside it: --model, --epochs, --over" in message(refused)
    assert f"go on by `ia3 sweep --resume {folder}`" in message(call("train", "--resume", folder))
    result = succeed("sweep", "--resume", folder, "--json")
    found, expected = json.loads(result.stdout), json.loads((whole / "sweep.json").read_text())
    assert [run["loss"] for run in found["runs"]] == [run["loss"] for run in expected["runs"]]
    assert "the sweep is complete" in message(call("sweep", "--resume", folder))
    assert "holds no sweep, since it has no sweep.yaml" in message(call("sweep", "--resume", base))
