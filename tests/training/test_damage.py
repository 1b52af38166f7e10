"""What is damaged in a run's folder is named, or written anew: nothing is trained on in silence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tiny_seq2seq
from ia3.inference.loading import load_adapter
from ia3.runs.comparison import read_runs
from ia3.runs.sums import SUMS_NAME, changed_files, expect_adapter_unchanged
from ia3.training import plan
from ia3.training.learners.words import Words
from ia3.training.loop import Interrupted
from ia3.training.resuming import resume
from ia3.training.train import train

OPTIONS: dict[str, Any] = {"steps": 4, "evaluate_every": 2, "batch_size": 6, "test_size": 0.25, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its data, a whole run, and one that was stopped after its first evaluation in training."""
    folder = tmp_path_factory.mktemp("home")
    base, data = str(tiny_seq2seq.save_base(folder / "base")), str(tiny_seq2seq.write_csv(folder / "data.csv", 24))
    train(base, data, output=folder / "whole", console=Console(quiet=True), **OPTIONS)
    with stopped_at_batch(4), pytest.raises(Interrupted):
        train(base, data, output=folder / "stopped", console=Console(quiet=True), **OPTIONS)
    return folder


class stopped_at_batch:  # noqa: N801 (it is used as a function would be)
    """Within it a training is asked to stop at its n-th batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        import signal

        self.collate, made = Words.collate, []

        def collate(learner: Words, rows: Any) -> Any:
            made.append(rows)
            if len(made) == self.number:
                signal.raise_signal(signal.SIGINT)
            return self.collate(learner, rows)

        Words.collate = collate  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        Words.collate = self.collate  # type: ignore[method-assign]


def kept(folder: Path) -> dict[str, bytes]:
    """What a run comes to, without times."""
    files = [path for name in ("adapter", "best") for path in sorted((folder / name).iterdir())]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.get("evaluation", {}).pop("seconds", None)
    return found | {"metrics.jsonl": json.dumps(lines).encode()}


def gone_on(folder: Path) -> tuple[str, str | None]:
    """Go on with a run: what it said, and its error if that is one that is expected of wrong input."""
    console, error = Console(file=StringIO(), width=1000), None
    try:
        resume(folder, console=console)
    except (ValueError, OSError) as raised:
        error = str(raised)
    return console.file.getvalue(), error  # type: ignore[attr-defined]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def make_folder(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"no folder")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()


def other_json(path: Path) -> None:
    path.write_text('{"data": {"train": 3}, "steps": "many", "versions": []}\n')


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


FILES = ("recipe.yaml", "environment.json", "state.pt", "metrics.jsonl", "best/adapter_model.safetensors")
DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    *((name, damage) for name in FILES for damage in (remove, empty, cut, flip, make_folder, other_json)),
    *((name, make_folder) for name in ("result.json", "report.md", "report.png", "best", "adapter", SUMS_NAME)),
    *((name, remove) for name in ("best", "adapter", SUMS_NAME)),
    *((SUMS_NAME, damage) for damage in (empty, cut)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda each: getattr(each, "__name__", each))
def test_a_damaged_run_is_named_or_comes_out_the_same(
    home: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(home / "stopped", tmp_path / "run")
    damage(folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said, error = gone_on(folder)
    if error is not None:
        assert name.partition("/")[0] in error
        assert len(error) < 1200
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        return
    assert kept(folder) == kept(home / "whole")
    assert changed_files(folder) == []
    if name not in (SUMS_NAME, "recipe.yaml") and damage != make_folder:
        assert name in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "best/adapter_model.safetensors", "best/ia3_task.json"])
@pytest.mark.parametrize("damage", [remove, empty, flip])
def test_a_damaged_run_that_was_killed_comes_out_the_same(
    home: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """It has no digests of its files: what its state has of them is written again."""
    folder = shutil.copytree(home / "stopped", tmp_path / "run")
    (folder / SUMS_NAME).unlink()
    damage(folder / name)
    assert gone_on(folder)[1] is None
    assert kept(folder) == kept(home / "whole")


@pytest.fixture
def finished(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "whole", tmp_path / "run")


@pytest.mark.parametrize("name", ["result.json", "recipe.yaml", "metrics.jsonl", "environment.json"])
def test_a_flipped_bit_of_a_finished_run_is_noticed_by_who_compares(finished: Path, name: str) -> None:
    assert read_runs([finished])
    flip(finished / name)
    with pytest.raises(ValueError, match=rf"{name} is not what its training left, by SHA256SUMS"):
        read_runs([finished])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "ia3_task.json"])
@pytest.mark.parametrize("which", ["adapter", "best"])
def test_a_flipped_bit_of_an_adapter_is_noticed_in_its_folder_alone(
    finished: Path, tmp_path: Path, which: str, name: str
) -> None:
    load_adapter(finished / which)
    (finished / which / "README.md").write_text("a card is its owner's")
    load_adapter(finished / which)
    flip(finished / which / name)
    with pytest.raises(ValueError, match=rf"{which}/{name} is not what its training left"):
        load_adapter(finished / which)
    copied = shutil.copytree(finished / which, tmp_path / "elsewhere" / which)
    expect_adapter_unchanged(copied)
    (finished / SUMS_NAME).unlink()
    expect_adapter_unchanged(finished / which)


def test_what_killed_processes_left_half_written_is_removed(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "stopped", tmp_path / "run")
    halves = [folder / ".state.pt.1-2", folder / "best" / f".adapter_model.safetensors.{os.getpid()}-1"]
    for path in halves:
        path.write_bytes(b"half")
    (folder / ".lock").write_bytes(b"")
    assert gone_on(folder)[1] is None
    assert [str(path) for path in folder.rglob(".*")] == []


def test_a_full_disk_loses_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(home / "stopped", tmp_path / "run")
    fsync = os.fsync
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"could not be written \(No space.*make room.*\n.*go on: ia3 train --resume"
    ) as caught:
        resume(folder, console=Console(quiet=True))
    assert caught.value.errno == 28
    assert str(folder) in str(caught.value)
    monkeypatch.undo()
    assert gone_on(folder)[1] is None
    assert kept(folder) == kept(home / "whole")


def test_who_is_in_the_folder_is_not_disturbed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(home / "stopped", tmp_path / "run")
    add, caught = plan.RunPlan.add, []

    def others_come(self: plan.RunPlan, evaluation: Any) -> bool:
        base, data = home / "base", home / "data.csv"
        for attempt in (lambda: resume(folder), lambda: train(base, data, output=folder, **OPTIONS)):
            with pytest.raises(BlockingIOError, match="is in use by the process") as error:
                attempt()
            caught.append(error)
        return add(self, evaluation)

    monkeypatch.setattr(plan.RunPlan, "add", others_come)
    assert gone_on(folder)[1] is None
    assert caught
    assert kept(folder) == kept(home / "whole")
