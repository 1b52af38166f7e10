"""An interrupted sweep goes on to the very numbers, and files, of one that was not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import tiny_seq2seq
from ia3.runs.run import RESULT_NAME, SWEEP_NAME, SWEEP_RECIPES_NAME
from ia3.runs.sums import changed_files
from ia3.training.learners.words import Words
from ia3.training.loop import Interrupted
from ia3.training.resuming import resume
from ia3.training.sweep import Sweep, sweep
from ia3.training.train import train

QUIET = Console(quiet=True)
# Runs of different lengths, of which one stops early and one diverges.
OVER = [
    {"learning_rate": 0.1, "steps": 6},
    {"learning_rate": 0.1, "steps": 10},
    {"learning_rate": 1e30, "steps": 10, "patience": 1},
    {"learning_rate": 1e38, "steps": 10},
]
OPTIONS: dict[str, Any] = {
    "evaluate_every": 2,
    "batch_size": 6,
    "test_size": 0.25,
    "best_by": "loss",
    "warmup_steps": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_seq2seq.save_base(folder / "base")
    tiny_seq2seq.write_csv(folder / "data.csv", 24)
    return folder


def swept(home: Path, output: Path, **more: Any) -> Sweep:
    options = {"console": QUIET, **OPTIONS, **more}
    return sweep(home / "base", options.pop("data", home / "data.csv"), over=OVER, output=output, **options)


@pytest.fixture(scope="module", params=[True, False], ids=["dropout", "no dropout"])
def whole(request: pytest.FixtureRequest, home: Path) -> Sweep:
    return swept(home, home / f"whole-{request.param}", dropout=request.param)


def stopping(monkeypatch: pytest.MonkeyPatch, *, batch: int = 0, answer: int = 0, number: int = signal.SIGINT) -> None:
    """Send a signal while the n-th batch is made, or the n-th answers are found."""
    for name, at in (("collate", batch), ("answer", answer)):
        original: Callable[..., Any] = getattr(Words, name)
        calls: list[int] = []

        def counted(learner: Words, rows: Any, original: Any = original, at: int = at, calls: Any = calls) -> Any:
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(number)
            return original(learner, rows)

        monkeypatch.setattr(Words, name, counted)


def kept(folder: Path) -> dict[str, Any]:
    """What a sweep comes to, without times and its own path."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("SHA256SUMS", "sweep.png") or path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line), folder) for line in path.read_text().splitlines()]
        elif path.name in ("result.json", SWEEP_NAME):
            found[name] = timeless(json.loads(path.read_text()), folder)
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: timeless(each, folder) for key, each in value.items() if "seconds" not in key}
    if isinstance(value, list):
        return [timeless(each, folder) for each in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def test_the_sweep_of_these_tests(whole: Sweep) -> None:
    ended = {run.output_dir.name: (len(run.losses), run.progress.stopped_early) for run in whole.runs}
    assert sorted(ended.values()) == [(4, True), (6, False), (10, False)]
    assert [given["learning_rate"] for given, _ in whole.failed] == [1e38]
    folder = next(whole.output_dir.glob("*1e*38*"))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) > 1


@pytest.mark.parametrize(
    "at",
    [{"batch": 1}, {"batch": 4, "number": signal.SIGTERM}, {"batch": 8}, {"answer": 1}, {"answer": 3}, {"answer": 5}],
    ids=str,
)
def test_it_goes_on_bit_for_bit(
    whole: Sweep, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: dict[str, int]
) -> None:
    dropout = whole.best.settings.dropout
    with monkeypatch.context() as patch:
        stopping(patch, **at)
        says = rf"Interrupted at step \d of 10\. Go on: ia3 sweep --resume {tmp_path / 'parts'}"
        with pytest.raises(Interrupted, match=says):
            swept(home, tmp_path / "parts", dropout=dropout)
    with monkeypatch.context() as patch:
        stopping(patch, batch=1)
        with pytest.raises(Interrupted):
            resume(tmp_path / "parts", console=QUIET)
    found = resume(tmp_path / "parts", console=QUIET)
    assert isinstance(found, Sweep)
    assert found.settings == whole.settings
    assert found.failed == whole.failed
    assert kept(found.output_dir) == kept(whole.output_dir)
    for folder in (found.output_dir, *(run.output_dir for run in found.runs)):
        assert changed_files(folder) == []
    assert not (found.output_dir / "state.pt").exists()
    one = found.runs[0].output_dir
    (one / RESULT_NAME).unlink()  # as in an interrupted sweep
    with pytest.raises(
        ValueError, match=f"one run of a sweep. Go on with all of them by `ia3 sweep --resume {one.parent}`"
    ):
        resume(one)
    with pytest.raises(ValueError, match=r"nothing in .* to go on from: the sweep is complete"):
        resume(tmp_path / "parts", console=QUIET)


@pytest.fixture
def parts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep that was stopped when two runs had left it."""
    with monkeypatch.context() as patch:
        stopping(patch, batch=8)
        with pytest.raises(Interrupted):
            swept(home, tmp_path / "parts", dropout=False)
    return tmp_path / "parts"


def test_what_is_lost_of_runs_that_had_ended_is_written_again(home: Path, parts: Path) -> None:
    folders = [path for path in parts.iterdir() if (path / "result.json").is_file()]
    assert folders
    for folder in folders:
        shutil.rmtree(folder / "adapter")
        (folder / "result.json").write_bytes(b"")
        (folder / "metrics.jsonl").unlink()
    resume(parts, console=QUIET)
    unharmed = swept(home, home / "unharmed", dropout=False)
    assert kept(parts) == kept(unharmed.output_dir)


def test_what_stands_in_the_way_is_said(home: Path, parts: Path) -> None:
    with pytest.raises(ValueError, match=r"holds an unfinished sweep: go on with it by `ia3 sweep --resume .*parts`"):
        swept(home, parts)
    with pytest.raises(ValueError, match="holds an unfinished run: go on with it by `ia3 sweep --resume"):
        train(home / "base", home / "data.csv", output=parts, console=QUIET)
    path = parts / SWEEP_RECIPES_NAME
    content = path.read_text()
    for wrong, says in (
        ("", r"sweep\.yaml is no recipe"),
        ("runs: []\ndiffer_in: [seed]\n", r"sweep\.yaml is damaged.*runs is \[\]"),
        ("runs: 3\n", r"sweep\.yaml is damaged"),
        (content.replace("batch_size: 6", "batch_size: 7"), "says other batch_size than when the run began"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=says):
            resume(parts, console=QUIET)
    path.write_text(yaml.safe_dump({**yaml.safe_load(content), "runs": yaml.safe_load(content)["runs"][:2]}))
    with pytest.raises(ValueError, match=r"state\.pt is the state of 4 runs of other vectors than these 2"):
        resume(parts, console=QUIET)
    path.write_text(content)
    state = bytearray((parts / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (parts / "state.pt").write_bytes(state)
    with pytest.raises(ValueError, match=r"state\.pt is no whole state of a training \(its digest is another"):
        resume(parts, console=QUIET)


def test_data_in_memory_are_given_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_seq2seq.examples(24)
    with monkeypatch.context() as patch:
        stopping(patch, batch=3)
        with pytest.raises(Interrupted, match=r"Go on: ia3\.resume\('.*', data=…\)"):
            swept(home, tmp_path / "parts", data=data, dropout=False)
    with pytest.raises(ValueError, match=r"had its data in memory: give them again"):
        resume(tmp_path / "parts", console=QUIET)
    assert len(resume(tmp_path / "parts", data=data, console=QUIET).runs) == 3  # type: ignore[union-attr]
    two = {"data": [data, data[:20]]}
    with monkeypatch.context() as patch:
        stopping(patch, batch=3)
        with pytest.raises(Interrupted):
            sweep(
                home / "base", over=two, output=tmp_path / "own", console=QUIET, steps=4, dropout=False, test_size=0.25
            )
    with pytest.raises(ValueError, match="had data of their own in memory"):
        resume(tmp_path / "own", data=data, console=QUIET)


def test_one_that_ended_before_its_first_save_begins_anew(home: Path, parts: Path) -> None:
    (parts / "state.pt").unlink()
    console = Console(file=StringIO(), width=200)
    resume(parts, console=console)
    assert "begins anew" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (parts / SWEEP_NAME).is_file()
