"""Several processes train one adapter: to one process's numbers, into one folder, and none of them is lost unheard."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import ia3
import tiny_causal
import tiny_classifier
import tiny_seq2seq
from fitted import fit
from ia3 import IA3Config, get_peft_model
from ia3.inference.complete import end_tokens
from ia3.inference.processes import LostProcessError, join
from ia3.runs.run import Run
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Examples
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from ia3.tensors import load_peft_weights
from ia3.training.learner import Learner
from ia3.training.learners.heads import SequenceClasses
from ia3.training.learners.instructions import Instructions
from ia3.training.learners.words import Words
from ia3.training.loop import Interrupted, Training
from ia3.training.plan import RunPlan
from ia3.training.sweep import Sweep
from ia3.training.train import check_environment
from two_processes import in_two_processes

QUIET = Console(quiet=True)
SETTINGS = TrainSettings(learning_rate=0.02, epochs=2, dropout=False, evaluation_batch_size=4, seed=1)
WORDS = Task(template=Template.of_column("text"), labels=tiny_seq2seq.LABELS, max_length=128, max_new_tokens=5)


def words(settings: TrainSettings, *, head: bool = False) -> tuple[Learner[Any], Examples, Examples]:
    """Without a head trained in full it goes by the fast step."""
    learner = Words(tiny_seq2seq.adapted(head=head), tiny_seq2seq.tokenizer(), WORDS, settings)
    return learner, tiny_seq2seq.examples(21), tiny_seq2seq.examples(11, 21)


def conversations(settings: TrainSettings) -> tuple[Learner[Any], Examples, Examples]:
    model = get_peft_model(tiny_causal.llama(), IA3Config(task_type="CAUSAL_LM"))
    task = Task(kind=TaskKind.INSTRUCTIONS, template=Template.of_column("text"), max_length=40, max_new_tokens=5)
    tokenizer = tiny_causal.tokenizer()
    assert end_tokens(model, tokenizer)
    training, test = (
        Examples(tuple(tiny_causal.examples(count)), (), "numbers", 0, 0, kind=TaskKind.INSTRUCTIONS)
        for count in (13, 5)
    )
    return Instructions(model, tokenizer, task, settings), training, test


def classes(settings: TrainSettings) -> tuple[Learner[Any], Examples, Examples]:
    kind = TaskKind.SEQUENCE_CLASSIFICATION
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        **tiny_classifier.names(tiny_classifier.LABELS),
    )  # fmt: skip
    base = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    learner = SequenceClasses(model, tiny_classifier.tokenizer(), tiny_classifier.task(kind), settings)
    training, test = (
        Examples(tuple(tiny_classifier.labelled(count)), tiny_classifier.LABELS, "sentences", 0, 0, kind=kind)
        for count in (19, 7)
    )
    return learner, training, test


# 21 examples in batches of 4: the last has one, so a process has none of it.
CASES: dict[str, Any] = {
    "fast": lambda: words(replace(SETTINGS, batch_size=4, max_gradient_norm=0.1, weight_decay=0.1)),
    "head": lambda: words(replace(SETTINGS, batch_size=4, weight_decay=0.1), head=True),
    "accumulated": lambda: words(
        replace(SETTINGS, batch_size=3, gradient_accumulation=2, max_gradient_norm=0.1, weight_decay=0.1)
    ),
    "t-few": lambda: words(replace(SETTINGS, batch_size=5, objective="t-few", optimizer="adafactor", epochs=1)),
    "stopped early": lambda: words(
        replace(SETTINGS, learning_rate=1e-9, epochs=9, patience=1, best_by="loss", answer_by="generation")
    ),
    "conversations": lambda: conversations(replace(SETTINGS, batch_size=4)),
    "packed": lambda: conversations(replace(SETTINGS, batch_size=3, packing=True)),
    "classes": lambda: classes(replace(SETTINGS, batch_size=4, learning_rate=0.01, weight_decay=0.1)),
}


@dataclass(frozen=True)
class Ending(Words):
    """Sends its own process a signal while it makes a batch."""

    at_batch: int = -1
    number: int = signal.SIGTERM
    calls: list[int] = field(default_factory=list)

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        self.calls.append(len(rows))
        if len(self.calls) == self.at_batch:
            signal.raise_signal(self.number)
        return super().collate(rows)


def go_on(folder: Path, settings: TrainSettings, *, resume: bool = False, **ending: int) -> Run | None:
    """A training that may be stopped, and then leaves nothing but its state."""
    _, training, test = words(settings)
    learner = Ending(tiny_seq2seq.adapted(), tiny_seq2seq.tokenizer(), WORDS, settings, **ending)
    try:
        return fit(learner, training, test, folder, resume=resume)
    except Interrupted:
        return None


DROPPING = replace(SETTINGS, batch_size=4, dropout=True, evaluate_every=2)
STEADY = replace(DROPPING, dropout=False)


SHARDED = ("fast", "t-few", "packed", "classes")


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    """Each case into a folder that only the first process knows, so that nothing of the other's is seen."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        learner, *examples = case()
        training = Training(RunPlan(learner, *examples))
        found[f"{name}: path"] = training.describe_path()
        found[name] = training.run(folder / str(rank) / name, QUIET)
    found["two, then one"] = go_on(folder / "two, then one", STEADY, at_batch=5 if rank == 1 else -1)
    found["one, then two"] = go_on(folder / "one, then two", STEADY, resume=True)
    found["two"] = go_on(folder / "two", DROPPING)
    found["two, then two"] = go_on(folder / "two, then two", DROPPING, at_batch=5 if rank == 1 else -1)
    assert found["two, then two"] is None
    torch.rand(3 + rank)
    found["two, then two"] = go_on(folder / "two, then two", DROPPING, resume=True)
    found["draws"] = join().gather(torch.initial_seed())
    for name, refused in (
        ("unlike", lambda: join().expect_alike({"base model": "same", "data": rank})),
        ("too many", lambda: go_on(folder / "none", replace(STEADY, batch_size=1))),
        ("too many for a sweep", lambda: sweep_of(folder, "none", 1)),
    ):
        with pytest.raises(ValueError, match="process") as caught:
            refused()
        found[name] = str(caught.value)
    found["sweep"] = sweep_of(folder, "sweep")
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp`
    for name in SHARDED:
        learner, *examples = CASES[name]()
        found[f"sharded {name}"] = Training(RunPlan(learner, *examples)).run(folder / "sharded" / name, QUIET)
        found[f"parts of {name}"] = parts_of(learner.model)
    return found


def sweep_of(folder: Path, name: str, count: int = 3) -> Sweep:
    """Three runs, of which two processes take two and one."""
    over = {"learning_rate": [1e-3, 1e-2, 3e-2][:count]}
    given = {"epochs": 2, "output": folder / name, "console": QUIET}
    return ia3.sweep(folder / "base", folder / "sentences.csv", over=over, **given)


def parts_of(model: Any) -> tuple[int, int, bool]:
    """How many numbers of the blocks this process holds, out of how many, and whether all that is trained is whole."""
    divided = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    held = sum(parameter.to_local().numel() for parameter in divided)
    whole = not any(isinstance(each, DTensor) for each in model.parameters() if each.requires_grad)
    return held, sum(parameter.numel() for parameter in divided), whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("two")
    tiny_seq2seq.save_base(folder / "base")
    tiny_seq2seq.write_csv(folder / "sentences.csv")
    assert go_on(folder / "one, then two", STEADY, at_batch=5) is None
    return in_two_processes(run_all, folder), folder


def assert_near(one: Path, other: Path, name: str = "adapter") -> None:
    own, others = (load_peft_weights(each / name) for each in (one, other))
    assert own.keys() == others.keys()
    for key, tensor in own.items():
        torch.testing.assert_close(others[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_reach_ones_numbers(trained: tuple[dict[str, Any], Path], name: str, tmp_path: Path) -> None:
    runs, folder = trained
    both, alone = runs[name], fit(*CASES[name](), tmp_path / name)
    fast = name in ("fast", "stopped early", "conversations")
    assert runs[f"{name}: path"].startswith("The fast step" if fast else "The ordinary step")
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    for one, other in zip(both.evaluations, alone.evaluations, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert (one.step, one.correct, one.total, one.scores) == (other.step, other.correct, other.total, other.scores)
    assert (both.shown, both.references) == (alone.shown, alone.references)
    assert both.final.predictions == alone.final.predictions
    assert both.progress.best == alone.progress.best
    assert both.progress.stopped_early == alone.progress.stopped_early == (name == "stopped early")
    for adapter in ("adapter", "best"):
        assert_near(alone.output_dir, folder / "0" / name, adapter)


@pytest.mark.parametrize("name", SHARDED)
def test_a_divided_base_trains_a_whole_adapter(trained: tuple[dict[str, Any], Path], name: str, tmp_path: Path) -> None:
    runs, folder = trained
    held, numbers, is_whole = runs[f"parts of {name}"]
    assert is_whole
    assert 0 < held < 0.6 * numbers
    both, alone = runs[f"sharded {name}"], fit(*CASES[name](), tmp_path / name)
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    assert [each.loss for each in both.evaluations] == pytest.approx(
        [each.loss for each in alone.evaluations], rel=1e-5
    )
    assert both.final.predictions == alone.final.predictions
    assert_near(alone.output_dir, folder / "sharded" / name)


def test_only_the_first_process_writes(trained: tuple[dict[str, Any], Path]) -> None:
    _, folder = trained
    assert "1" not in {path.name for path in folder.iterdir()}
    lines = (folder / "0" / "fast" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "evaluation" not in line]
    assert steps == list(range(1, 13))


def test_a_signal_to_one_stops_all_and_one_goes_on(trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    runs, folder = trained
    assert runs["two, then one"] is None
    run = go_on(folder / "two, then one", STEADY, resume=True)
    whole = go_on(tmp_path / "whole", STEADY)
    assert run is not None
    assert whole is not None
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert runs["one, then two"].losses == pytest.approx(whole.losses, rel=1e-5)
    for name in ("two, then one", "one, then two"):
        assert_near(whole.output_dir, folder / name)


def test_two_go_on_bit_for_bit_each_with_its_own_dropout(trained: tuple[dict[str, Any], Path]) -> None:
    runs, folder = trained
    assert runs["two, then two"].losses == runs["two"].losses
    assert runs["draws"] == [1, 2]
    own, others = (load_peft_weights(folder / name / "adapter") for name in ("two", "two, then two"))
    assert all(torch.equal(own[key], others[key]) for key in own)


def test_the_runs_of_a_sweep_are_divided(trained: tuple[dict[str, Any], Path]) -> None:
    runs, folder = trained
    both, alone = runs["sweep"], sweep_of(folder, "sweep alone")
    assert both.settings == alone.settings
    for one, other in zip(both.runs, alone.runs, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert_near(one.output_dir, other.output_dir)
    assert_near(both.output_dir, alone.output_dir, "best")
    names = [sorted(path.name for path in (folder / name).iterdir()) for name in ("sweep", "sweep alone")]
    assert names[0] == names[1]


def test_what_several_processes_are_refused(trained: tuple[dict[str, Any], Path]) -> None:
    runs, folder = trained
    assert runs["unlike"].startswith("The processes [1] have another data than process 0")
    assert runs["too many"].startswith("`batch_size` is 1, of which each of 2 processes takes its part")
    assert "there are 2 processes for 1 runs" in runs["too many for a sweep"]
    assert not (folder / "none").exists()


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    base, data = tiny_seq2seq.save_base(tmp_path / "base"), tiny_seq2seq.write_csv(tmp_path / "sentences.csv")
    run = ia3.train(base, data, epochs=1, output=tmp_path / "run", console=QUIET)
    began = json.loads((run.output_dir / "environment.json").read_text())
    told = Console(file=io.StringIO(), width=200)
    check_environment(run.output_dir, began | {"processes": 2}, told)
    assert told.file.getvalue() == "Other processes than when the run began: its numbers may differ.\n"


def lose_one(rank: int, folder: Path) -> str:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the one that is left would be ended, too
    try:
        go_on(folder / "lost", STEADY, at_batch=8 if rank else -1, number=signal.SIGKILL)
    except LostProcessError as error:
        (folder / "said").write_text(str(error))
    return ""


def test_a_process_that_is_killed_ends_the_others_with_a_message(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match="SIGKILL"):
        in_two_processes(lose_one, tmp_path)
    assert time.monotonic() - started < 300  # gloo's own patience is half an hour
    assert "Another of the processes that share this work ended or did not answer" in (tmp_path / "said").read_text()
    run = go_on(tmp_path / "lost", STEADY, resume=True)
    whole = go_on(tmp_path / "whole", STEADY)
    assert run is not None
    assert whole is not None
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)


def test_torchrun_trains_one_adapter(tmp_path: Path) -> None:
    base, data = tiny_seq2seq.save_base(tmp_path / "base"), tiny_seq2seq.write_csv(tmp_path / "sentences.csv")
    asked = ["-m", "ia3", "train", str(base), str(data), "--epochs", "1", "--no-dropout", "--output"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = subprocess.run(
        [sys.executable, *launcher, *asked, "both"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("Use it:") == 1
    assert both.stderr.count("step 0:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "both", "sentences.csv"]
    assert json.loads((tmp_path / "both" / "environment.json").read_text())["processes"] == 2
    alone = ia3.train(base, data, epochs=1, dropout=False, output=tmp_path / "alone", console=QUIET)
    assert_near(alone.output_dir, tmp_path / "both")


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "FSDP2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "`precision`"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "`gradient_accumulation`"),
    ],
)
def test_what_accelerate_is_told_and_is_not_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, instead: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value}, which is not heard here: .*{instead}"):
        join()


def test_a_launcher_that_cannot_be_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    PartialState._reset_state()
    monkeypatch.setattr("ia3.inference.processes.PartialState", lambda **how: PartialState())
    with pytest.raises(
        ValueError, match=r"there are 2 processes, and this one is joined with 1: start ia3 by `torchrun`"
    ):
        join()
