from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import get_linear_schedule_with_warmup

import tiny_seq2seq
from builders import models_own
from fitted import fit
from ia3.fast.scores import ChoiceScores
from ia3.inference.predict import predict
from ia3.inference.rank import rank
from ia3.peft_model import PeftModel
from ia3.runs.run import Run, check_output, compute_metrics
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Example, Examples
from ia3.tasks.losses import choice_logits, pad_choices, tfew_losses
from ia3.tasks.task import Task, TaskKind, load_task
from ia3.tasks.template import Template
from ia3.training.collate import collate, shuffled_batches, tokenise
from ia3.training.data import check_examples
from ia3.training.learners.words import Words
from ia3.training.loop import TimeEstimate, Training, _in_words, progress_bars
from ia3.training.plan import RunPlan

TOKENIZER = tiny_seq2seq.tokenizer()
QUIET = Console(quiet=True)
FAST = TrainSettings(learning_rate=0.1, epochs=6, dropout=False, evaluation_batch_size=5, seed=1)
TASK = Task(
    template=Template.of_column("text"),
    labels=("negative", "neutral", "positive"),
    max_length=128,
    max_new_tokens=5,
)


def train(
    model: Any, training: Examples, test: Examples, folder: Path, settings: TrainSettings = FAST, **more: Any
) -> Run:
    learner = Words(model, TOKENIZER, TASK, settings)
    return fit(learner, training, test, folder, **more)


def run_on(
    model: Any,
    folder: Path,
    settings: TrainSettings = FAST,
    train_count: int = 60,
    test_count: int = 12,
    **more: Any,
) -> Run:
    training, test = tiny_seq2seq.examples(train_count), tiny_seq2seq.examples(test_count, train_count)
    return train(model, training, test, folder, settings, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    model = tiny_seq2seq.adapted(head=True)
    return run_on(model, tmp_path_factory.mktemp("runs") / "one"), model


def test_it_learns(finished: tuple[Run, Any]) -> None:
    run, model = finished
    assert run.final.accuracy == 1.0
    assert run.final.predictions == run.references
    assert run.final.interval == pytest.approx((0.7575, 1.0), abs=1e-4)
    assert run.majority == pytest.approx(1 / 3)
    assert run.losses[-1] < 0.2 * run.losses[0]
    assert [each.step for each in run.evaluations] == [0, 8, 16, 24, 32, 40, 48]
    assert len(run.losses) == 48
    assert not model.training


def test_only_the_adapter_changed(finished: tuple[Run, Any]) -> None:
    run, model = finished
    before = tiny_seq2seq.base().state_dict()
    after = {name: tensor for name, tensor in model.get_base_model().state_dict().items() if name in before}
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed <= {"lm_head.weight"}
    assert run.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_files_of_a_run(finished: tuple[Run, Any]) -> None:
    run, _ = finished
    lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["loss"] for line in steps] == run.losses
    assert [line["step"] for line in steps] == list(range(1, 49))
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.1 * (48 - step) / 48 for step in range(48)])
    assert [line["evaluation"] for line in lines if "evaluation" in line] == [e.summary() for e in run.evaluations]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    content = json.loads((run.output_dir / "result.json").read_text())
    assert content["accuracy"] == 1.0
    assert content["settings"]["learning_rate"] == 0.1
    assert content["evaluations"][0] == {
        "step": 0,
        "loss": run.evaluations[0].loss,
        "accuracy": run.evaluations[0].accuracy,
        "macro_f1": run.evaluations[0].macro_f1,
        "seconds": run.evaluations[0].seconds,
    }
    test = tiny_seq2seq.examples(12, 60)
    assert content["predictions"] == [{"text": row.text, "label": row.label, "prediction": row.label} for row in test]
    assert run.adapter_bytes == sum(
        (run.adapter_dir / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )


def test_the_saved_adapter_answers_alike(finished: tuple[Run, Any]) -> None:
    run, _ = finished
    loaded = PeftModel.from_pretrained(tiny_seq2seq.base(), run.adapter_dir)
    assert predict(loaded.eval(), TOKENIZER, run.shown) == run.final.predictions


def test_a_step_is_adamw_without_decay_on_a_linear_schedule(tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=0.05, epochs=2, batch_size=4, dropout=False, seed=3)
    run = run_on(tiny_seq2seq.adapted(), tmp_path / "run", settings, train_count=10, test_count=3)

    model = tiny_seq2seq.adapted()
    rows = tokenise(tiny_seq2seq.examples(10), TOKENIZER, max_length=128)
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(vectors, lr=0.05, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimiser, 0, 6)
    losses = []
    for epoch in range(2):
        lengths = [len(row.input_ids) for row in rows]
        for indices in shuffled_batches(lengths, 4, seed=3, epoch=epoch, group_by_length=True):
            loss = models_own(model, **collate([rows[index] for index in indices], pad_token_id=0)).loss
            loss.backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    assert run.losses == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "same"),
    [({}, True), ({"seed": 2}, False), ({"dropout": True}, False), ({"group_by_length": False}, False)],
)
def test_what_decides_the_losses(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    settings = TrainSettings(epochs=1, dropout=False, seed=1)
    one = run_on(tiny_seq2seq.adapted(), tmp_path / "one", settings, 24, 3)
    other = run_on(tiny_seq2seq.adapted(), tmp_path / "other", replace(settings, **change), 24, 3)
    assert (one.losses == other.losses) is same


def test_dropout_has_a_seed(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=1, dropout=True)
    one = run_on(tiny_seq2seq.adapted(), tmp_path / "one", settings, 24, 3)
    torch.rand(7)
    other = run_on(tiny_seq2seq.adapted(), tmp_path / "other", settings, 24, 3)
    assert one.losses == other.losses


@pytest.mark.parametrize("answer_by", ["generation", "rank"])
def test_evaluation_is_what_each_example_gives_alone(finished: tuple[Run, Any], answer_by: Any) -> None:
    _, model = finished
    rows = tokenise(
        [*tiny_seq2seq.examples(9, 100), Example("the share rises", "very very neutral")], TOKENIZER, max_length=128
    )
    beats: list[int] = []
    task = replace(TASK, labels=(*TASK.labels, "very very neutral"))
    together = Words(model, TOKENIZER, task, replace(FAST, answer_by=answer_by)).measure(rows, beats.append)

    total, tokens, written, ranked = 0.0, 0, [], []
    for row in rows:
        batch = collate([row], pad_token_id=0)
        with torch.inference_mode():
            logits = model(**batch).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="sum"))
            answer = model.generate(input_ids=batch["input_ids"], max_new_tokens=5, do_sample=False)
        tokens += len(row.label_ids)
        written.append(TOKENIZER.decode(answer[0], skip_special_tokens=True))
        losses = {}
        for label in task.labels:
            ids = TOKENIZER(text_target=label, return_tensors="pt")["input_ids"]
            losses[label] = model(input_ids=batch["input_ids"], labels=ids).loss.item()
        ranked.append(min(losses, key=losses.__getitem__))
    assert together.loss == pytest.approx(total / tokens, rel=1e-5)
    assert together.predictions == (written if answer_by == "generation" else ranked)
    right = sum(row.label == label for row, label in zip(rows, ranked, strict=True))
    assert together.scores == ({"accuracy_by_rank": right / 10} if answer_by == "generation" else {})
    assert together.references == [row.label for row in rows]
    assert together.shown[-1] == "the share rises"
    assert beats == [5, 5]


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=3e37, epochs=1)
    with pytest.raises(FloatingPointError, match=r"at step \d.*the adapter was not saved. .*rate .*3e\+37"):
        run_on(tiny_seq2seq.adapted(), tmp_path / "run", settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"metrics.jsonl"}


def test_a_model_that_is_broken_from_the_start_is_not_trained(tmp_path: Path) -> None:
    model = tiny_seq2seq.adapted()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"nan before the first step, so it is the base.*float32 or bfloat16"):
        run_on(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_label_that_training_never_shows_is_refused() -> None:
    training, test = tiny_seq2seq.examples(30), tiny_seq2seq.examples(6)
    training = replace(training, rows=tuple(row for row in training if row.label != "neutral"))
    with pytest.raises(
        ValueError, match=r"\['neutral'\] never occur in training, which knows \['negative', 'positive'\]"
    ):
        check_examples(TaskKind.LABEL_WORDS, training, test)


@pytest.mark.parametrize(("counts", "purpose"), [((0, 3), "train on"), ((3, 0), "evaluate on")])
def test_nothing_to_train_or_evaluate_on(counts: tuple[int, int], purpose: str) -> None:
    training, test = (tiny_seq2seq.examples(3)[:count] for count in counts)
    with pytest.raises(ValueError, match=f"sentences holds no examples to {purpose}"):
        check_examples(TaskKind.GENERATION, training, test)


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trainable parameters: attach an adapter"):
        run_on(tiny_seq2seq.base().requires_grad_(False), tmp_path / "run")


def test_an_output_that_cannot_be_a_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file: name another"):
        check_output(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ia3.runs.run.os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="is read-only: name another"):
        check_output(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("batch_size", 0), ("max_length", -1)],
)
def test_settings_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is {value}: expected a positive number"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize("name", ["warmup_steps", "weight_decay"])
def test_settings_that_may_be_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is -1: expected 0 or a positive number"):
        TrainSettings(**{name: -1})


def test_progress_shows_speed_and_loss(tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=True, file=(tmp_path / "screen").open("w"))
    training = tiny_seq2seq.examples(24)
    run = train(
        tiny_seq2seq.adapted(), training, training[:3], tmp_path / "run", TrainSettings(epochs=1), console=console
    )
    shown = console.export_text()
    assert "3/3" in shown
    assert "/s" in shown
    assert f"loss {run.losses[-1]:.3f}" in shown


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=0.05, epochs=2, batch_size=8, dropout=False, group_by_length=False, seed=3)
    rows = [
        replace(row, label=row.label.replace("positive", "very very positive")) for row in tiny_seq2seq.examples(22)
    ]
    labels = ("negative", "neutral", "very very positive")
    data = Examples(tuple(rows), labels, "labels of different lengths", 0, 0)

    def losses_of(name: str, settings: TrainSettings) -> list[float]:
        learner = Words(tiny_seq2seq.adapted(), TOKENIZER, replace(TASK, labels=labels), settings)
        return fit(learner, data, data, tmp_path / name).losses

    whole = losses_of("whole", settings)
    parts = losses_of("parts", replace(settings, batch_size=2, gradient_accumulation=4))
    assert len(whole) == 6
    assert parts == pytest.approx(whole, rel=1e-5)


def test_large_gradients_are_clipped(tmp_path: Path) -> None:
    norms = []

    class Recording(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
            super().step()

    settings = TrainSettings(epochs=1, dropout=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.AdamW", Recording)
        run_on(tiny_seq2seq.adapted(), tmp_path / "free", settings, 24, 3)
        free, norms = norms, []
        limit = sorted(free)[1]
        run_on(tiny_seq2seq.adapted(), tmp_path / "clipped", replace(settings, max_gradient_norm=limit), 24, 3)
    assert max(free) > limit
    assert norms[0] == pytest.approx(min(free[0], limit), rel=1e-4)
    assert max(norms) <= limit * (1 + 1e-5)


def test_it_stops_where_it_gets_no_better_and_keeps_the_best(tmp_path: Path) -> None:
    settings = replace(FAST, epochs=20, patience=2, learning_rate=0.8)
    run = run_on(tiny_seq2seq.adapted(head=True), tmp_path / "run", settings)
    assert run.progress.stopped_early
    ranks = [(each.accuracy, -each.loss) for each in run.evaluations]
    assert run.progress.best == max(range(1, len(ranks)), key=lambda index: ranks[index])
    assert len(run.evaluations) - 1 - run.progress.best == 2
    for folder, evaluation in ((run.best_dir, run.best), (run.adapter_dir, run.final)):
        loaded = PeftModel.from_pretrained(tiny_seq2seq.base(), folder)
        rows = tokenise(tiny_seq2seq.examples(12, 60), TOKENIZER, max_length=128)
        found = Words(loaded, TOKENIZER, TASK, settings).measure(rows, lambda rows: None)
        assert found.loss == pytest.approx(evaluation.loss, rel=1e-5)
        assert load_task(folder) == TASK


@pytest.mark.parametrize("by", ["loss", "accuracy", "macro_f1"])
def test_what_makes_an_evaluation_the_best(tmp_path: Path, by: Any) -> None:
    settings = replace(FAST, best_by=by, evaluate_every=3, learning_rate=0.3)
    run = run_on(tiny_seq2seq.adapted(head=True), tmp_path / "run", settings)
    later = run.evaluations[1:]
    assert [each.step for each in later] == [*range(3, 49, 3)]
    value = {"loss": lambda e: (-e.loss,)}.get(by, lambda e: (getattr(e, by), -e.loss))
    assert run.best is max(later, key=value)


def test_steps_instead_of_epochs(tmp_path: Path) -> None:
    run = run_on(tiny_seq2seq.adapted(), tmp_path / "run", replace(FAST, steps=23, epochs=1), 12, 3)
    assert [each.step for each in run.evaluations] == [*range(0, 23, 2), 23]


def test_tensorboard_is_told(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_on(tiny_seq2seq.adapted(), tmp_path / "run", replace(FAST, epochs=2, trackers=("tensorboard",)), 24, 3)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    told = EventAccumulator(str(events))
    told.Reload()
    assert [event.step for event in told.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in told.Scalars("train/loss")] == pytest.approx(run.losses)
    assert [event.value for event in told.Scalars("held_out/accuracy")] == pytest.approx(
        [each.accuracy for each in run.evaluations]
    )


def test_a_tracker_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['abacus'\] are not installed.*there are \['tensorboard'\]"):
        run_on(tiny_seq2seq.adapted(), tmp_path / "run", replace(FAST, trackers=("abacus", "tensorboard")))
    assert not (tmp_path / "run").exists()


def test_tfews_losses_and_ranking(tmp_path: Path) -> None:
    settings = replace(FAST, objective="t-few", optimizer="adafactor", answer_by="rank", epochs=2)
    model = tiny_seq2seq.adapted(head=True)
    learner = Words(model, TOKENIZER, TASK, settings)
    rows = learner.tokenise(tiny_seq2seq.examples(8))
    batch = learner.collate(rows)
    choices = pad_choices([TOKENIZER(text_target=label)["input_ids"] for label in TASK.labels]).expand(8, -1, -1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    correct = torch.tensor([TASK.labels.index(row.label) for row in rows])
    model.eval()
    expected = tfew_losses(choice_logits(model, choices, **inputs), choices, correct)
    torch.testing.assert_close(learner.loss(batch), expected.total)
    assert learner.targets(batch) == 8

    run = run_on(model, tmp_path / "run", settings)
    ranked = rank(model, TOKENIZER, run.shown, TASK.labels)
    assert run.final.predictions == [each.label for each in ranked]
    written = Words(model, TOKENIZER, TASK, FAST).measure(
        learner.tokenise(tiny_seq2seq.examples(12, 60)), lambda n: None
    )
    assert run.final.loss == pytest.approx(written.loss, rel=1e-5)


def test_free_text_is_learned_too(tmp_path: Path) -> None:
    task = replace(TASK, kind=TaskKind.GENERATION, labels=())
    learner = Words(tiny_seq2seq.adapted(head=True), TOKENIZER, task, FAST)
    training, test = tiny_seq2seq.examples(60), tiny_seq2seq.examples(12, 60)
    run = fit(learner, training, test, tmp_path / "run")
    assert run.final.accuracy == 1.0
    assert run.final.macro_f1 is None
    assert run.majority is None
    assert run.best is min(run.evaluations[1:], key=lambda each: each.loss)
    assert run.final.perplexity == pytest.approx(math.exp(run.final.loss))


def test_the_last_evaluation_stops_nothing_early(tmp_path: Path) -> None:
    settings = replace(FAST, steps=4, evaluate_every=2, patience=1, learning_rate=1e-9)
    run = run_on(tiny_seq2seq.adapted(), tmp_path / "run", settings)
    assert len(run.losses) == 4
    assert not run.progress.stopped_early


def test_losses_of_a_half_precision_model_are_summed_in_fp32(tmp_path: Path) -> None:
    model = tiny_seq2seq.adapted().to(torch.bfloat16).eval()
    learner = Words(model, TOKENIZER, TASK, FAST)
    rows = learner.tokenise(tiny_seq2seq.examples(8))
    batch = learner.collate(rows)
    expected = torch.nn.functional.cross_entropy(
        model(**batch).logits.double().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    )
    loss = learner.loss(batch)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    batches_of_one = replace(FAST, evaluation_batch_size=8)
    measured = Words(model, TOKENIZER, TASK, batches_of_one).measure(rows, lambda rows: None)
    assert measured.loss == pytest.approx(float(expected), rel=1e-3)


def test_the_fast_step_has_the_ordinary_ones_losses(tmp_path: Path, monkeypatch: Any) -> None:
    settings = TrainSettings(epochs=2, dropout=False, weight_decay=0.1, max_gradient_norm=1.0, warmup_steps=2)
    data = tiny_seq2seq.examples(40)

    def trained(name: str) -> tuple[str, list[float]]:
        learner = Words(tiny_seq2seq.adapted(), TOKENIZER, TASK, settings)
        training = Training(RunPlan(learner, data, data))
        return training.describe_path(), training.run(tmp_path / name, QUIET).losses

    path, losses = trained("fast")
    assert path == "The fast step: no padding."
    monkeypatch.setattr("ia3.training.loop.compile_step", lambda *_, **__: None)
    path, expected = trained("ordinary")
    assert path.startswith("The ordinary step")
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("answer_by", ["generation", "rank"])
def test_evaluations_by_hand_are_the_forwards(tmp_path: Path, monkeypatch: Any, answer_by: Any) -> None:
    """What a GPU records for evaluations, called here."""
    settings = TrainSettings(learning_rate=0.05, epochs=2, answer_by=answer_by, evaluation_batch_size=5)
    data = tiny_seq2seq.examples(32)

    def trained(name: str) -> Run:
        learner = Words(tiny_seq2seq.adapted(), TOKENIZER, TASK, settings)
        return fit(learner, data, data, tmp_path / name)

    plain = trained("plain")
    calls = []
    score = ChoiceScores.__call__
    monkeypatch.setattr(ChoiceScores, "__call__", lambda *a, **b: calls.append(1) or score(*a, **b))
    monkeypatch.setattr("ia3.inference.rank._why_not", lambda model: None)
    by_hand = trained("by hand")
    assert len(calls) == 3 * 7 + 2  # batches with and without padding are compared once each
    assert by_hand.losses == pytest.approx(plain.losses, rel=1e-4)
    for one, other in zip(by_hand.evaluations, plain.evaluations, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.predictions == other.predictions


def test_the_time_of_a_long_training_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(name: str) -> str:
        console = Console(record=True, width=200, file=(tmp_path / "screen").open("w"))
        settings = TrainSettings(steps=20, evaluate_every=8)
        train(
            tiny_seq2seq.adapted(),
            tiny_seq2seq.examples(24),
            tiny_seq2seq.examples(3),
            tmp_path / name,
            settings,
            console=console,
        )
        return console.export_text()

    assert "on this machine" not in said("short")
    monkeypatch.setattr("ia3.training.loop._LONG", 0.0)
    assert re.search(r"About 0 minutes on this machine: [\d.e-]+ s a step, 20 steps, 3 evaluations of ", said("long"))


@pytest.mark.parametrize(
    ("seconds", "words"), [(61, "1 minute"), (720, "12 minutes"), (5400, "90 minutes"), (9000, "2.5 hours")]
)
def test_a_time_is_told_in_words(seconds: float, words: str) -> None:
    assert _in_words(seconds) == words


def test_the_estimate_leaves_evaluations_and_the_first_step_out_of_a_steps_time() -> None:
    data = tiny_seq2seq.examples(24)
    plan = RunPlan(
        Words(tiny_seq2seq.adapted(), TOKENIZER, TASK, TrainSettings(steps=900, evaluate_every=300)), data, data
    )
    with progress_bars(Console(record=True, width=200)) as bars:
        estimate = TimeEstimate(bars, [plan])
        plan.progress.evaluations.append(compute_metrics(0, 1.0, ["a"], ["a"], (), seconds=20.0))
        for step in range(7):
            plan.progress.steps.append({"step": step + 1})
            plan.progress.seconds += 0.8 if step else 50.0
            estimate.look()
        text = bars.console.export_text()
    assert text.count("on this machine") == 1
    assert "About 13 minutes on this machine: 0.8 s a step, 900 steps, 3 evaluations of 20 s." in text


def test_timed_steps_leave_the_progress_alone() -> None:
    data = tiny_seq2seq.examples(24)
    plan = RunPlan(Words(tiny_seq2seq.adapted(), TOKENIZER, TASK, TrainSettings(epochs=3)), data, data)
    assert Training(plan).time_steps(5) > 0
    assert plan.progress.step == 0
