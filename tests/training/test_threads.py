"""Trainings in several threads of one process: to the numbers that each has alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tiny_seq2seq
from ia3.runs.run import Run
from ia3.training.generator import generator_alone
from ia3.training.learners.words import Words
from ia3.training.train import train

OPTIONS: dict[str, Any] = {"steps": 6, "evaluate_every": 2, "batch_size": 6, "test_size": 0.25, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_seq2seq.save_base(folder / "base")
    tiny_seq2seq.write_csv(folder / "data.csv", 24)
    return folder


def trained(home: Path, folder: Path, console: Console | None = None, **more: Any) -> Run:
    quiet = console or Console(quiet=True)
    return train(home / "base", home / "data.csv", output=folder, console=quiet, **{**OPTIONS, **more})


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each work gives in a thread of its own; an exception is raised here."""
    found: list[Any] = [None] * len(works)

    def do(place: int) -> None:
        try:
            found[place] = works[place]()
        except Exception as error:  # the thread's error is raised in the test's
            found[place] = error

    threads = [threading.Thread(target=do, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in two threads take turns by the batch where they may, and wait for nobody where they may not."""
    turn, collate = threading.Barrier(2), Words.collate

    def after_you(learner: Words, rows: Any) -> Any:
        try:
            turn.wait(timeout=1)
        except threading.BrokenBarrierError:
            turn.reset()
        return collate(learner, rows)

    monkeypatch.setattr(Words, "collate", after_you)


@pytest.mark.usefixtures("in_step")
def test_with_dropout_each_has_the_numbers_that_it_has_alone(home: Path, tmp_path: Path) -> None:
    said = Console(file=StringIO(), width=1000)
    found = at_once(
        lambda: trained(home, tmp_path / "a", said, dropout=True, seed=1),
        lambda: trained(home, tmp_path / "b", said, dropout=True, seed=2),
    )
    for run, seed in zip(found, (1, 2), strict=True):
        assert run.losses == trained(home, tmp_path / f"alone-{seed}", dropout=True, seed=seed).losses
    assert "Waiting for another training of this process" in said.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("in_step")
def test_without_dropout_they_run_at_once_and_draw_nothing(home: Path, tmp_path: Path) -> None:
    found = at_once(
        lambda: trained(home, tmp_path / "a", dropout=False, seed=1),
        lambda: trained(home, tmp_path / "b", dropout=False, seed=2),
    )
    for run, seed in zip(found, (1, 2), strict=True):
        assert run.losses == trained(home, tmp_path / f"alone-{seed}", dropout=False, seed=seed).losses


def test_one_that_draws_nothing_leaves_the_generator_to_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate, states = Words.collate, []

    def looking(learner: Words, rows: Any) -> Any:
        states.append(torch.get_rng_state())
        if len(states) == 1:
            assert at_once(lambda: generator_alone(Console(quiet=True)).__enter__()) == [None]
        return collate(learner, rows)

    monkeypatch.setattr(Words, "collate", looking)
    trained(home, tmp_path / "run", dropout=False)
    assert all(torch.equal(state, states[0]) for state in states)
    assert torch.equal(torch.get_rng_state(), states[0])


@pytest.mark.usefixtures("in_step")
def test_one_folder_is_one_training_s(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(BlockingIOError, match="is in use by"):
        at_once(*[lambda: trained(home, tmp_path / "run", dropout=False)] * 2)
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.usefixtures("in_step")
def test_a_new_folder_is_one_training_s(home: Path, tmp_path: Path) -> None:
    """Both find no folder, and the one that is later finds it taken when it would make it."""
    with pytest.raises((BlockingIOError, ValueError), match=r"is in use by|has begun there meanwhile"):
        at_once(*[lambda: trained(home, tmp_path / "new", dropout=False)] * 2)
    assert (tmp_path / "new" / "result.json").is_file()
