"""An interrupted training goes on to the very numbers of one that was not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_seq2seq
from fitted import fit
from ia3.runs.run import Run
from ia3.runs.settings import TrainSettings
from ia3.tasks.task import Task, load_task
from ia3.tasks.template import Template
from ia3.tensors import load_peft_weights
from ia3.training.learner import EvalOutput
from ia3.training.learners.words import Words
from ia3.training.loop import Interrupted
from ia3.training.state import SavedTraining, read_state

TOKENIZER = tiny_seq2seq.tokenizer()
TASK = Task(template=Template.of_column("text"), labels=tiny_seq2seq.LABELS, max_length=128, max_new_tokens=5)
SETTINGS = TrainSettings(learning_rate=0.05, epochs=3, evaluation_batch_size=4, warmup_steps=2, weight_decay=0.1)


@dataclass(frozen=True)
class Signalling(Words):
    """Sends a signal while the given batch is made or in the given call of `measure`'s beat."""

    at_batch: int = -1
    at_beat: int = -1
    number: int = signal.SIGINT
    calls: dict[str, int] = field(default_factory=lambda: {"batch": 0, "beat": 0})

    def _count(self, name: str, at: int) -> None:
        self.calls[name] += 1
        if self.calls[name] == at:
            signal.raise_signal(self.number)

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        self._count("batch", self.at_batch)
        return super().collate(rows)

    def measure(self, rows: Sequence[Any], beat: Callable[[int], None], *processes: Any) -> EvalOutput:
        def counted(count: int) -> None:
            self._count("beat", self.at_beat)
            beat(count)

        return super().measure(rows, counted, *processes)


def run(
    folder: Path, settings: TrainSettings = SETTINGS, *, head: bool = True, resume: bool = False, **signals: int
) -> Run:
    """Without a head trained in full it goes by the fast step."""
    learner = Signalling(tiny_seq2seq.adapted(head=head), TOKENIZER, TASK, settings, **signals)
    training, test = tiny_seq2seq.examples(43), tiny_seq2seq.examples(12, 43)
    return fit(learner, training, test, folder, resume=resume)


def assert_the_same(one: Run, other: Run) -> None:
    assert one.progress.steps == other.progress.steps
    for a, b in zip(one.evaluations, other.evaluations, strict=True):
        assert replace(a, seconds=0, predictions=[]) == replace(b, seconds=0, predictions=[])
    assert one.final.predictions == other.final.predictions
    assert one.progress.best == other.progress.best
    for folder in ("adapter", "best"):
        own, others = (load_peft_weights(each.output_dir / folder) for each in (one, other))
        assert own.keys() == others.keys()
        assert all(torch.equal(own[name], others[name]) for name in own)
    lines = [[json.loads(line) for line in (each.output_dir / "metrics.jsonl").open()] for each in (one, other)]
    for line in [*lines[0], *lines[1]]:
        line.get("evaluation", {}).pop("seconds", None)
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, gradient_accumulation=2, batch_size=4, evaluate_every=2, max_gradient_norm=0.5),
        replace(SETTINGS, optimizer="adafactor", steps=16, balance=True),
    ],
    ids=["dropout", "accumulation", "adafactor"],
)
@pytest.mark.parametrize(
    "signals", [{"at_batch": 5}, {"at_batch": 6, "number": signal.SIGTERM}, {"at_beat": 5}], ids=str
)
def test_it_goes_on_bit_for_bit(tmp_path: Path, settings: TrainSettings, signals: dict[str, int]) -> None:
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(Interrupted, match=r"at step \d+ of 1[68]\. Go on: the same, resumed"):
        run(tmp_path / "parts", settings, **signals)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", settings, resume=True, at_batch=4)
    torch.rand(3)
    assert_the_same(run(tmp_path / "parts", settings, resume=True), whole)


def test_the_fast_step_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", head=False)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", head=False, at_batch=5)
    torch.rand(3)
    assert_the_same(run(tmp_path / "parts", head=False, resume=True), whole)


@pytest.mark.parametrize("head", [True, False], ids=["ordinary", "fused"])
def test_an_evaluation_that_draws_leaves_no_draw_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bool
) -> None:
    """As a GPU's evaluations do, whose kernels are given seeds: the one that is interrupted is done again."""
    measure = Signalling.measure

    def drawing(self: Signalling, rows: Sequence[Any], beat: Callable[[int], None], *processes: Any) -> EvalOutput:
        torch.rand(3)
        return measure(self, rows, beat, *processes)

    monkeypatch.setattr(Signalling, "measure", drawing)
    whole = run(tmp_path / "whole", head=head)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", head=head, at_beat=5)
    assert_the_same(run(tmp_path / "parts", head=head, resume=True), whole)


def test_after_a_crash_it_goes_on_from_the_last_evaluation(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    learner_dies = RuntimeError("the machine is gone")

    @dataclass(frozen=True)
    class Dying(Words):
        calls: list[int] = field(default_factory=list)

        def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
            self.calls.append(1)
            if len(self.calls) == 9:
                raise learner_dies
            return super().collate(rows)

    learner = Dying(tiny_seq2seq.adapted(head=True), TOKENIZER, TASK, SETTINGS)
    training, test = tiny_seq2seq.examples(43), tiny_seq2seq.examples(12, 43)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit(learner, training, test, tmp_path / "parts")
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 10
    assert_the_same(run(tmp_path / "parts", resume=True), whole)


def test_the_adapter_as_it_is_at_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"The adapter as it is now: .*adapter"):
        run(tmp_path, at_batch=3)
    assert load_task(tmp_path / "adapter") == TASK
    saved = load_peft_weights(tmp_path / "adapter")
    state = read_state(tmp_path / "state.pt", SavedTraining).parameters
    vectors = {name: tensor for name, tensor in state.items() if ".ia3_l." in name}
    assert vectors
    for name, vector in vectors.items():
        assert torch.equal(saved[f"base_model.model.{name.removesuffix('.default')}"], vector)


def test_finishing_what_was_all_but_finished(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    state = (tmp_path / "whole" / "state.pt").read_bytes()
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "state.pt").write_bytes(state)
    again = run(tmp_path / "again", resume=True)
    assert again.progress.steps == whole.progress.steps
    assert again.final.predictions == whole.final.predictions
    assert again.shown == whole.shown


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, at_batch=3)
    learner = Words(tiny_seq2seq.adapted(), TOKENIZER, TASK, SETTINGS)
    examples = tiny_seq2seq.examples(43)
    with pytest.raises(ValueError, match=r"holds \d+ trained tensors that are not those of this model"):
        fit(learner, examples, examples, tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes | None) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, at_batch=3)
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match="is no whole state of a training"):
        run(tmp_path, resume=True)


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Impatient(Words):
        def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second one ends the step")

    learner = Impatient(tiny_seq2seq.adapted(head=True), TOKENIZER, TASK, SETTINGS)
    examples = tiny_seq2seq.examples(12)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(learner, examples, examples, tmp_path)
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before
