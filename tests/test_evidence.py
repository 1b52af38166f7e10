"""The benchmark of methods: what is chosen by what, what is run again, and one loop for all of them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import evidence_carry as carry
import evidence_table
from evidence import data, intervals, loop, methods, report, results, units
from evidence.bases import Base, MeanClassifier, MiniLM, SmolLM2, Titler
from evidence.data import FOLDS, RAFT, RAFT_TASKS, Plan, Row
from evidence.memory import Alive

LABELS = ("no", "yes")
ROWS = tuple(Row("ab" * (1 + n % 5), LABELS[n % 2]) for n in range(24))
TINY = data.Data("tiny", LABELS, "", ROWS[:16], ROWS[16:20], ROWS[20:])
PLAN = Plan(test=4, validation=4, train=16, steps=3, batch_size=4, max_length=16)


class Letters:
    """A tokenizer of letters, 4 and more; 1 ends."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts: Any, **kwargs: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [4 + ord(letter) % 20 for letter in texts]}
        return {"input_ids": [self(text)["input_ids"] for text in texts]}


def tiny(kind: type[Base]) -> Base:
    """A base of a kind with a small random model and the letters' tokenizer."""
    small = {"vocab_size": 32, "pad_token_id": 0}

    class Tiny(kind):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            Base.__init__(self)

        def _load_tokenizer(self) -> Any:
            return Letters()

        def tokens(self, texts: Any, instruction: str, max_length: int) -> Any:
            return self.tokenizer(texts)["input_ids"]

        def model(self, classes: int) -> nn.Module:
            torch.manual_seed(0)
            if kind is Titler:
                config = T5Config(
                    d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **small
                )
                return T5ForConditionalGeneration(config)
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            if kind is SmolLM2:
                return LlamaForCausalLM(LlamaConfig(**sizes, **small))
            return MeanClassifier(BertModel(BertConfig(**sizes, **small), add_pooling_layer=False), classes)

    return Tiny()


def record(**given: Any) -> dict[str, Any]:
    made = {"kind": "run", "base": "minilm", "data": "tweets", "digest": "d", "method": "ia3", "rate": 1e-2}
    made |= {"seed": 0, "steps": 500, "trained": 7, "machine": {}, "validation_rows": 4, "validation_loss": 0.5}
    made |= given
    plan = data.PLANS[made["data"].partition("/")[0]]
    made |= {"batch_size": plan.batch_size, "max_length": plan.max_length}
    correct = made.pop("correct", [True, False])
    return made | {
        "test_accuracy": sum(correct) / len(correct),
        "test_correct": results.pack_bits(correct),
        "test_rows": len(correct),
    }


# Results -------------------------------------------------------------------------------------------------------------


def test_a_line_torn_by_a_kill_is_passed_over_and_written_after(tmp_path: Path) -> None:
    file = results.Results(tmp_path / "runs.jsonl")
    file.add(record(seed=0))
    with file.path.open("a") as torn:
        torn.write('{"kind": "run", "seed"')
    again = results.Results(file.path)
    again.add(record(seed=1))
    assert [each["seed"] for each in results.read(file.path)] == [0, 1]


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = units.Settings(tmp_path, tmp_path / "runs.jsonl", "cpu", False, False, float("inf"), 1)
    monkeypatch.setattr(units, "_base", tiny_base := lambda name: tiny(MiniLM))
    monkeypatch.setattr(units, "_encoded", lambda *given: loop.encode(tiny_base(""), TINY, PLAN, "cpu"))

    def made(given: units.Settings) -> units.Worker:
        worker = units.Worker(units.Unit("runs", "minilm", "tweets", "head"), given)
        worker.plan = PLAN
        return worker

    first = made(settings)._run(TINY, 1e-2, 0)
    assert first["trained"] == 2 * 16 + 2
    assert made(replace(settings, until=0.0))._run(TINY, 1e-2, 0) == first
    with pytest.raises(units.OutOfTimeError):
        made(replace(settings, until=0.0))._run(TINY, 1e-2, 1)
    for other in (replace(TINY, test=TINY.test[:3]), replace(TINY, instruction="Which?")):
        with pytest.raises(units.OutOfTimeError):  # other rows, or rows asked otherwise, are another run
            made(replace(settings, until=0.0))._run(other, 1e-2, 0)
    longer = made(replace(settings, until=0.0))
    longer.plan = replace(PLAN, max_length=PLAN.max_length + 1)
    with pytest.raises(units.OutOfTimeError):
        longer._run(TINY, 1e-2, 0)


@pytest.mark.parametrize("correct", [[True], [False, True, True, False, True], [True] * 8, [False] * 3])
def test_answers_are_kept_row_by_row(correct: list[bool]) -> None:
    assert results.unpack_bits(results.pack_bits(correct), len(correct)) == correct


# The choice of a rate ------------------------------------------------------------------------------------------------


def test_the_walk_goes_on_until_the_best_rate_has_its_neighbours() -> None:
    wanted = {1e-3: 0.1, 3e-3: 0.2, 1e-2: 0.3, 3e-2: 0.5, 1e-1: 0.4, 3e-1: 0.0, 3e-4: 0.05}
    assert results.walk(3e-3, 1, wanted.get) == {rate: wanted[rate] for rate in (3e-3, 1e-3, 1e-2, 3e-2, 1e-1)}
    assert {*results.walk(1e-2, 2, wanted.get)} == {3e-3, 1e-2, 3e-2, 1e-1, 3e-1}


def test_the_walk_ends_where_the_grid_does_or_there_is_no_time() -> None:
    assert [*results.walk(1e-5, 1, lambda rate: -rate)] == [1e-5, 3e-5]
    assert results.walk(1e-2, 1, lambda rate: None) == {}


def test_a_rate_is_chosen_without_a_look_at_the_test_set() -> None:
    runs = [record(rate=1e-3, validation_accuracy=0.75), record(rate=1e-2, validation_accuracy=0.5)]
    for run in runs:
        for name in ("test_accuracy", "test_correct", "test_rows"):
            del run[name]  # or it would be a KeyError
    assert results.best_rate(results.validation_scores(runs)) == 1e-3


def test_equal_accuracies_are_told_apart_by_the_validation_loss_alone() -> None:
    same = {"validation_accuracy": 0.75}
    runs = [record(rate=1e-3, **same), record(rate=1e-2, **same) | {"validation_loss": 0.1}]
    assert results.best_rate(results.validation_scores(runs)) == 1e-2
    one_row_more = record(rate=3e-2, validation_accuracy=1.0) | {"validation_loss": None}
    assert results.best_rate(results.validation_scores([*runs, one_row_more])) == 3e-2


def test_a_task_has_no_say_in_its_own_rate() -> None:
    by_task = {1e-3: {"a": 1.0, "b": 0.2, "c": 0.3}, 1e-2: {"a": 0.0, "b": 0.4, "c": 0.5}}
    assert results.rate_of_task(by_task, "a") == 1e-2
    assert results.rate_of_task(by_task, "b") == 1e-3


def test_the_report_judges_by_validation_and_pairs_rows_and_seeds() -> None:
    steps = data.plan_of("minilm", "tweets").steps
    good, bad = [True, True, True, False], [False, False, True, False]
    runs = [record(steps=steps, rate=1e-2, validation_accuracy=0.9, correct=bad, seed=seed) for seed in (0, 1)]
    runs += [record(steps=steps, rate=3e-2, validation_accuracy=0.8, correct=good)]
    runs += [
        record(steps=steps, method="full", rate=1e-4, validation_accuracy=0.9, correct=good, seed=seed)
        for seed in (0, 1)
    ]
    runs += [record(steps=6, rate=1e-1, validation_accuracy=1.0, correct=good)]  # a trial's
    vectors, full = report.cell(runs, "minilm", "tweets")
    assert (vectors.rates, vectors.accuracy, vectors.seeds) == ([1e-2], 0.25, 2)
    assert vectors.by_rate == {1e-2: 0.25, 3e-2: 0.75}
    assert vectors.accuracy - full.accuracy == -0.5
    assert not vectors.against  # whose rates are not all tried
    # A rate that the search did not come to, as a sweep may choose one, is not judged by.
    beyond = record(steps=steps, rate=3e-1, validation_accuracy=1.0, correct=good)
    assert report.cell([*runs, beyond], "minilm", "tweets")[0].rates == [1e-2]


def test_of_two_versions_of_the_data_the_last_is_reported() -> None:
    steps = data.plan_of("minilm", "tweets").steps
    same = {"steps": steps, "rate": 1e-2, "validation_accuracy": 0.9}
    runs = [record(**same, digest="before", seed=seed, correct=[True]) for seed in range(5)]
    runs += [record(**same, digest="now", seed=seed, correct=[False]) for seed in range(2)]
    cost = {"base": "minilm", "data": "tweets", "method": "ia3", "machine": {}, "kind": "speed"}
    runs += [cost | {"digest": "before", "eager_ms": 1.0}]
    (row,) = report.cell(runs, "minilm", "tweets")
    assert (row.seeds, row.accuracy, row.costs) == (2, 0.0, {})


def test_raft_counts_rates_that_every_fold_of_every_task_was_run_with() -> None:
    steps = data.plan_of("minilm", RAFT).steps
    runs = [
        record(steps=steps, data=f"{RAFT}/{task}", rate=rate, seed=fold, correct=[True, rate == 1e-2])
        for rate in (1e-2, 3e-2)
        for task in RAFT_TASKS
        for fold in range(FOLDS)
    ]
    (row,) = report.cell(runs[:-1], "minilm", RAFT)
    assert (row.by_rate, row.accuracy, row.low, row.seeds) == ({1e-2: 1.0}, 1.0, pytest.approx(1.0), FOLDS)
    assert report.cell(runs[FOLDS * len(RAFT_TASKS) + 1 :], "minilm", RAFT) == []


def test_a_report_of_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = data.plan_of("titler", "tweets").steps
    own = {"base": "titler", "steps": steps}
    lines = [
        record(**own, rate=rate, seed=seed, validation_accuracy=rate if rate < 1e-1 else 0.0, correct=[seed > 0, True])
        for rate in (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
        for seed in (range(5) if rate in (1e-2, 3e-2) else (0,))
    ]
    lines.append(record(**own, method="lora", rate=1e-3, validation_accuracy=0.5))  # with neither neighbours nor seeds
    lines.append(lines[1] | {"kind": "sweep", "chosen": 1e-2, "seconds": 3.0})
    own_cost = {"base": "titler", "data": "phrasebank", "digest": "d", "method": "ia3", "machine": {}}
    lines.append(own_cost | {"kind": "speed", "eager_ms": 2.5})
    lines.append(own_cost | {"kind": "memory", "peak_bytes": 3_000_000_000})
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    report.write(tmp_path / "runs.jsonl", tmp_path / "out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert [row["accuracy"] for row in summary["rows"]] == [0.9]
    assert summary["runs"] == 14
    assert summary["sweeps"][0]["difference"] == [0.0, 0.0, 0.0]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png"}
    assert summary["rows"][0]["costs"] == {"eager_ms": 2.5, "peak_bytes": 3_000_000_000}
    assert "90.0%" in (printed := capsys.readouterr().out)
    assert "not complete: titler tweets lora" in printed
    assert "sweep chose 0.01 in 3 s, the runs 0.03" in printed


# Intervals -----------------------------------------------------------------------------------------------------------


def test_an_interval_of_many_rows_is_as_wide_as_theirs() -> None:
    right = np.random.default_rng(1).random((1, 400)) < 0.8
    low, high = intervals.interval(intervals.bootstrap([right]))
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 400) ** 0.5, rel=0.15)


def test_seeds_that_answer_alike_are_no_more_rows_and_unlike_ones_widen() -> None:
    right = np.random.default_rng(1).random((1, 400)) < 0.8
    (one, alike, unlike) = (
        np.subtract(*intervals.interval(intervals.bootstrap([group]))[::-1])
        for group in (right, np.repeat(right, 5, 0), np.concatenate([np.repeat(right, 4, 0), 0 * right]))
    )
    assert alike == pytest.approx(one, rel=0.1)
    assert unlike > 3 * one


def test_differences_are_paired() -> None:
    right = np.random.default_rng(1).random((2, 50)) < 0.5
    better = right.copy()
    better[:, 0] = True
    right[:, 0] = False
    here, low, high = intervals.Answered([better]).beside(intervals.Answered([right]))
    assert here == pytest.approx(0.02)
    assert 0 <= low < high < 0.1
    with pytest.raises(ValueError, match="different test sets or seeds"):
        intervals.Answered([right]).beside(intervals.Answered([right[:1]]))


# Data ----------------------------------------------------------------------------------------------------------------


def test_folds_hold_each_row_out_once_and_labels_evenly() -> None:
    rows = [Row(str(n), "few" if n < 10 else "many") for n in range(50)]
    folds = [data.fold(rows, number) for number in range(FOLDS)]
    assert sorted(int(row.text) for _, test in folds for row in test) == [*range(50)]
    for train, test in folds:
        assert not {*train} & {*test}
        assert len(train) == 40
        assert sum(row.label == "few" for row in test) == 2


def test_no_text_is_on_two_sides() -> None:
    rows = [Row(str(n % 40), "a") for n in range(60)]
    parts = data.split(rows, (10, 10, 100))
    texts = [row.text for part in parts for row in part]
    assert len(texts) == len({*texts}) == 40
    assert data.split(rows, (10, 10, 100)) == parts


# The loop ------------------------------------------------------------------------------------------------------------


def test_batches_go_through_all_rows_before_any_comes_again() -> None:
    order = loop.batches(10, 4, 5, seed=3)
    assert order.shape == (5, 4)
    assert sorted(order.flatten()[:10].tolist()) == [*range(10)]
    assert torch.equal(order, loop.batches(10, 4, 5, seed=3))
    assert not torch.equal(order, loop.batches(10, 4, 5, seed=4))


def test_the_rate_rises_and_falls() -> None:
    rates = [loop.schedule(step, 100) for step in range(100)]
    assert max(rates) == 1.0
    assert rates[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0])
    assert rates[-1] == pytest.approx(1 / 94)


def test_every_row_is_evaluated_once() -> None:
    lengths = torch.tensor([3, 9_000, 5, 20_000, 4])
    found = [*loop.sorted_batches(lengths, 1)]
    assert [batch.tolist() for batch in found][:2] == [[3], [1]]
    assert sorted(torch.cat(found).tolist()) == [*range(5)]


# Of one block of width 16 with 32 in its feed-forward: what a method trains of a Bert, a T5 and a Llama.
COUNTS = {
    (MiniLM, "ia3"): 16 + 16 + 32,
    (MiniLM, "ia3-both"): 4 * (16 + 16) + 2 * (16 + 32),
    (MiniLM, "ia3-linear"): 4 * 16 + 32 + 32,
    (MiniLM, "lora"): 16 * (4 * (16 + 16) + 2 * (16 + 32)),
    (MiniLM, "head"): 0,
    (SmolLM2, "ia3"): 16 + 16 + 32,
    (SmolLM2, "bitfit"): 3 * 16,
    (Titler, "ia3"): 3 * (8 + 8) + 2 * 32,  # attention of the encoder, of the decoder, and across
    (Titler, "bitfit"): (2 + 3 + 2) * 16,
}


@pytest.mark.parametrize("kind", [MiniLM, Titler, SmolLM2], ids=lambda kind: kind.name)
def test_each_method_begins_as_the_base_learns_and_begins_again_to_the_bit(kind: type[Base]) -> None:
    base = tiny(kind)
    plain = base.model(2).eval()
    encoded = loop.encode(base, TINY, PLAN, "cpu")
    every = encoded.choices.expand(4, -1, -1)
    ids, mask = base.take(encoded.test, torch.arange(4), encoded.test.lengths, 10)
    before = base.logits(plain, ids, mask, every)
    for method in methods.METHODS_OF[kind.name]:
        if method == methods.FROZEN:
            continue
        trainer = loop.Trainer(base, method, 2, "cpu")
        trainer.trained.reset(0)
        if kind is not MiniLM:  # a new head is drawn
            torch.testing.assert_close(base.logits(trainer.model.eval(), ids, mask, every), before)
        first, other = (trainer.run(encoded, 1e-2, seed) for seed in (0, 1))
        again = trainer.run(encoded, 1e-2, 0)
        assert (first.last_loss, first.test) == (again.last_loss, again.test), method
        assert first.last_loss != other.last_loss, method
        head = 2 * 16 + 2 if kind is MiniLM else 0
        if (kind, method) in COUNTS:
            assert trainer.trained.count - head == COUNTS[kind, method], method
        moved = [
            name
            for name, value in trainer.trained.parameters.items()
            if not torch.equal(value.detach(), trainer.trained._initial[name])
        ]
        assert len(moved) >= 0.9 * len(trainer.trained.parameters), method


@pytest.mark.parametrize("kind", [MiniLM, Titler, SmolLM2], ids=lambda kind: kind.name)
def test_padding_changes_no_answer(kind: type[Base]) -> None:
    base = tiny(kind)
    model, encoded = base.model(2).eval(), loop.encode(tiny(kind), TINY, PLAN, "cpu")
    every = encoded.choices.expand(4, -1, -1)
    short, long = (
        base.logits(model, *base.take(encoded.test, torch.arange(4), encoded.test.lengths, length), every)
        for length in (10, 16)
    )
    present = slice(None) if kind is MiniLM else every != -100
    torch.testing.assert_close(short[present], long[present])


@pytest.mark.parametrize("kind", [Titler, SmolLM2], ids=lambda kind: kind.name)
def test_an_answer_to_write_counts_where_greedy_writing_finds_it(kind: type[Base]) -> None:
    base = tiny(kind)
    model = base.model(2).eval()
    trainer = loop.Trainer(base, methods.IA3, 2, "cpu")
    rows = [[4 + number, 9, 6 + number] for number in range(8)]
    ids, mask = torch.tensor(rows), torch.ones(8, 3, dtype=torch.long)
    model.generation_config.eos_token_id = None
    written = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4)
    answers = written[:, -4:].clone()
    answers[torch.arange(4), torch.arange(4)] += 1  # the first four, one letter each
    trainer.model.eval()
    right, losses = trainer._written(ids, mask, answers, torch.arange(8))
    assert right.tolist() == [False] * 4 + [True] * 4
    asked = base.logits(model, ids, mask, answers[:, None]).log_softmax(-1)
    expected = -asked.gather(-1, answers[:, None, :, None]).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected)


def test_customers_of_held_out_orders_are_others() -> None:
    found = data.load(Path(), "orders", data.plan_of("smollm2", "orders"))
    names = [{row.label.split(" | ")[0] for row in rows} for rows in (found.train, found.validation, found.test)]
    assert found.written
    assert not names[0] & names[1] | names[1] & names[2] | names[0] & names[2]
    assert [len(rows) for rows in (found.train, found.validation, found.test)] == [64, 200, 500]


def test_every_unit_once_and_no_sweep_of_a_classifier() -> None:
    from evidence.bases import BASES
    from evidence.data import PLANS

    found = units.units(["runs", "speed", "memory", "sweep", "sweep-own"], [*BASES], [*PLANS], [*methods.WORDS])
    assert len(found) == len({*found})
    assert {(unit.base, unit.data) for unit in found if unit.part == "sweep-own"} == {
        *((base, name) for base in ("titler", "smollm2") for name in ("phrasebank", "tweets")),
        ("smollm2", "orders"),
    }
    assert not [unit for unit in found if unit.part in ("speed", "memory") and unit.method == methods.FROZEN]


def test_a_base_that_is_not_installed_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units._base.cache_clear()
    monkeypatch.setattr("evidence.bases.importlib.util.find_spec", lambda name: None)
    settings = units.Settings(tmp_path, tmp_path / "runs.jsonl", "cpu", False, True, float("inf"), 1)
    for base in ("minilm", "smollm2"):
        line, failed = evidence_table.attempt(units.Unit("runs", base, "tweets", "ia3"), settings)
        assert failed
        assert "The model is not installed: pip install" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--small", "--data-folder", "."], "--small is for trying things: name a file of its own"),
        (["--bases", "minilm", "--data", "orders"], "none of these bases has such data, methods and parts"),
        (["--report", "--results", "missing.jsonl"], "no results at missing.jsonl"),
        (["--data", "tweets"], "where are the data sets? --data-folder, or IA3_DATA"),
    ],
)
def test_what_can_not_be_worked_on_is_said(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("IA3_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["evidence_table.py", *given])
    with pytest.raises(SystemExit, match="2"):
        evidence_table.main()
    assert message in capsys.readouterr().err


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "tensors"), [(False, 3), (True, 4)])
def test_memory_is_what_is_alive_at_once(trained: bool, tensors: int) -> None:
    given = torch.rand(1000, requires_grad=trained)
    with Alive([given, given.view(10, 100)]) as alive:  # a view is no second tensor
        given.exp().exp().exp()  # backward needs all of them, the next alone the last
    assert (alive.peak, alive.now) == (4000 * tensors, 4000)


def test_memory_of_a_unit_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = units.Settings(tmp_path, tmp_path / "runs.jsonl", "cpu", False, False, 0.0, 1)
    monkeypatch.setattr(units, "_base", lambda name: tiny(MiniLM))
    monkeypatch.setattr(units, "_encoded", lambda *given: loop.encode(tiny(MiniLM), TINY, PLAN, "cpu"))
    monkeypatch.setattr(units, "load", lambda *given: TINY)

    def peak(method: str) -> int:
        asked = units.Unit("memory", "minilm", "tweets", method)
        units.Worker(asked, settings).memory()
        assert units.Worker(asked, settings).memory() == "known"
        return int(results.read(settings.results)[-1]["peak_bytes"])

    numbers = sum(each.numel() for each in tiny(MiniLM).model(2).parameters())
    assert peak("full") > 4 * 4 * numbers > peak("head") > 4 * numbers  # weights, gradients, AdamW's two


# Carrying ------------------------------------------------------------------------------------------------------------


def test_parts_come_together_whatever_their_order_and_a_damaged_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(base: str, _: Path) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo(f"site/{base}.bin")
            info.size = 5_000
            tar.addfile(info, io.BytesIO(bytes(range(250)) * 20))
        return buffer.getvalue()

    monkeypatch.setattr(carry, "_tar", packed)
    with pytest.raises(ValueError, match=f"{tmp_path} lacks financial_phrasebank, "):
        carry.pack(tmp_path / "packed", tmp_path, size=4_096)
    for name in carry.SETS:
        (tmp_path / name).mkdir()
    carry.pack(tmp_path / "packed", tmp_path, size=1_024)
    carry.pack(tmp_path / "packed", tmp_path, size=4_096)  # in fewer parts
    parts = sorted((tmp_path / "packed").iterdir())
    assert len(parts) == 3 * len(carry.PACKAGES)
    for part in parts[::-1]:
        carry.unpack(part, tmp_path / "there")
    for base in carry.PACKAGES:
        assert (tmp_path / "there" / "site" / f"{base}.bin").read_bytes() == bytes(range(250)) * 20
    (parts[0] / "content").write_bytes(b"other")
    with pytest.raises(ValueError, match=f"{parts[0].name} is damaged"):
        carry.unpack(parts[0], tmp_path / "there")


def test_a_trial_is_small_and_a_large_base_takes_fewer_steps() -> None:
    assert data.plan_of("smollm2", "tweets").steps < data.plan_of("titler", "tweets").steps
    assert data.plan_of("smollm2", "tweets", small=True).steps < 10
