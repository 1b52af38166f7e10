"""Several processes train one adapter: to one process's numbers, into one folder, and none of them is lost unheard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

import tiny_causal
import tiny_classifier
import tiny_seq2seq
from fitted import fit
from ia3 import IA3Config, get_peft_model
from ia3.inference.complete import end_tokens
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
from ia3.training.loop import Interrupted
from ia3.training.processes import join
from two_processes import free_port, in_two_processes

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


def run_all(rank: int, folder: Path) -> dict[str, Run]:
    """Each case into a folder that only the first process knows, so that nothing of the other's is seen."""
    return {name: fit(*case(), folder / str(rank) / name) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], Path]:
    folder = tmp_path_factory.mktemp("two")
    return in_two_processes(run_all, folder), folder


def assert_near(one: Path, other: Path, name: str = "adapter") -> None:
    own, others = (load_peft_weights(each / name) for each in (one, other))
    assert own.keys() == others.keys()
    for key, tensor in own.items():
        torch.testing.assert_close(others[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_reach_ones_numbers(trained: tuple[dict[str, Run], Path], name: str, tmp_path: Path) -> None:
    runs, folder = trained
    both, alone = runs[name], fit(*CASES[name](), tmp_path / name)
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


def test_only_the_first_process_writes(trained: tuple[dict[str, Run], Path]) -> None:
    _, folder = trained
    assert [path.name for path in folder.iterdir()] == ["0"]
    lines = (folder / "0" / "fast" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "evaluation" not in line]
    assert steps == list(range(1, 13))
