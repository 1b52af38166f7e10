from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import get_linear_schedule_with_warmup

import tiny_seq2seq
from ia3.inference.predict import predict
from ia3.model import PeftModel
from ia3.training.collate import collate, shuffled_batches, tokenise
from ia3.training.data import Example
from ia3.training.loop import Run, TrainSettings, evaluate, train

TOKENIZER = tiny_seq2seq.tokenizer()
QUIET = Console(quiet=True)
FAST = TrainSettings(learning_rate=0.1, epochs=6, dropout=False, evaluation_batch_size=5, seed=1)


def run_on(
    model: Any, folder: Path, settings: TrainSettings = FAST, train_count: int = 60, test_count: int = 12
) -> Run:
    training, test = tiny_seq2seq.examples(train_count), tiny_seq2seq.examples(test_count, train_count)
    return train(model, TOKENIZER, training, test, settings=settings, output_dir=folder, console=QUIET)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    model = tiny_seq2seq.adapted(head=True)
    return run_on(model, tmp_path_factory.mktemp("runs") / "one"), model


def test_it_learns(finished: tuple[Run, Any]) -> None:
    run, model = finished
    assert run.final.accuracy == 1.0
    assert run.final.predictions == run.truth
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
    lines = [json.loads(line) for line in (run.output_dir / "losses.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": loss} for step, loss in enumerate(run.losses, start=1)]
    content = json.loads((run.output_dir / "metrics.json").read_text())
    assert content["accuracy"] == 1.0
    assert content["settings"]["learning_rate"] == 0.1
    assert content["evaluations"][0] == {
        "step": 0,
        "loss": run.evaluations[0].loss,
        "accuracy": run.evaluations[0].accuracy,
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
    assert predict(loaded.eval(), TOKENIZER, run.texts) == run.final.predictions


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
            loss = model(**collate([rows[index] for index in indices], pad_token_id=0)).loss
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


def test_evaluation_is_what_each_example_gives_alone(finished: tuple[Run, Any]) -> None:
    _, model = finished
    rows = tokenise(
        [*tiny_seq2seq.examples(9, 100), Example("the share rises", "very very neutral")], TOKENIZER, max_length=128
    )
    together = evaluate(model, TOKENIZER, rows, FAST, step=7)

    total, tokens, words = 0.0, 0, []
    for row in rows:
        batch = collate([row], pad_token_id=0)
        with torch.inference_mode():
            logits = model(**batch).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="sum"))
            answer = model.generate(input_ids=batch["input_ids"], max_new_tokens=5, do_sample=False)
        tokens += len(row.label_ids)
        words.append(TOKENIZER.decode(answer[0], skip_special_tokens=True))
    assert together.loss == pytest.approx(total / tokens, rel=1e-5)
    assert together.predictions == words
    assert together.correct == 9
    assert (together.step, together.total) == (7, 10)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=3e37, epochs=1)
    with pytest.raises(FloatingPointError, match=r"at step \d.*nothing was saved. Lower the learning rate .*3e\+37"):
        run_on(tiny_seq2seq.adapted(), tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_broken_from_the_start_is_not_trained(tmp_path: Path) -> None:
    model = tiny_seq2seq.adapted()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"held-out loss is nan at step 0.*float32 or bfloat16"):
        run_on(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_label_that_training_never_shows_is_refused(tmp_path: Path) -> None:
    training, test = tiny_seq2seq.examples(30), tiny_seq2seq.examples(6)
    training = replace(training, rows=tuple(row for row in training if row.label != "neutral"))
    with pytest.raises(
        ValueError, match=r"\['neutral'\] never occur in training, which knows \['negative', 'positive'\]"
    ):
        train(tiny_seq2seq.adapted(), TOKENIZER, training, test, settings=FAST, output_dir=tmp_path / "run")


@pytest.mark.parametrize(("counts", "purpose"), [((0, 3), "train on"), ((3, 0), "evaluate on")])
def test_nothing_to_train_or_evaluate_on(tmp_path: Path, counts: tuple[int, int], purpose: str) -> None:
    training, test = (tiny_seq2seq.examples(3)[:count] for count in counts)
    with pytest.raises(ValueError, match=f"sentences holds no examples to {purpose}"):
        train(tiny_seq2seq.adapted(), TOKENIZER, training, test, settings=FAST, output_dir=tmp_path / "run")


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trainable parameters: attach an adapter"):
        run_on(tiny_seq2seq.base().requires_grad_(False), tmp_path / "run")


def test_an_output_that_cannot_be_a_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file: name another"):
        run_on(tiny_seq2seq.adapted(), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ia3.training.loop.os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="is read-only: name another"):
        run_on(tiny_seq2seq.adapted(), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("batch_size", 0), ("max_length", -1)],
)
def test_settings_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}: expected a positive number"):
        TrainSettings(**{name: value})


def test_progress_shows_speed_and_loss(tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=True, file=(tmp_path / "screen").open("w"))
    training = tiny_seq2seq.examples(24)
    settings = TrainSettings(epochs=1)
    run = train(
        tiny_seq2seq.adapted(),
        TOKENIZER,
        training,
        training[:3],
        settings=settings,
        output_dir=tmp_path / "run",
        console=console,
    )
    shown = console.export_text()
    assert "3/3" in shown
    assert "steps/s" in shown
    assert f"loss {run.losses[-1]:.3f}" in shown
