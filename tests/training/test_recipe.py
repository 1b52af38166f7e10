from __future__ import annotations

import io
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.main import get_command

import tiny_seq2seq
from ia3.checkpoint import load_peft_weights
from ia3.cli.main import app
from ia3.training.loop import TrainSettings
from ia3.training.recipe import Interrupted, Recipe, make_recipe, read_recipe, train
from ia3.training.task import Template, load_task


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_seq2seq.save_base(tmp_path_factory.mktemp("models") / "tiny-base"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    file: Any = console.file
    return file.getvalue()


def test_the_python_twin_leaves_an_adapter_with_its_task(base: str, tmp_path: Path) -> None:
    data = tiny_seq2seq.write_csv(tmp_path / "sentences.csv")
    run = train(base, data, output=tmp_path / "run", epochs=1, max_length=32, template="very {text}", console=quiet())
    assert run.settings == TrainSettings(epochs=1, max_length=32)
    assert all(text.startswith("very ") for text in run.texts)
    task = load_task(run.adapter_dir)
    assert task is not None
    assert (task.template, task.labels, task.base_model) == (Template("very {text}"), tiny_seq2seq.LABELS, base)
    assert (task.max_length, task.max_new_tokens) == (32, 2)
    assert (tmp_path / "run" / "report.png").is_file()


def test_examples_in_memory(base: str, tmp_path: Path) -> None:
    console = quiet()
    run = train(
        base,
        tiny_seq2seq.examples(30),
        test_data=tiny_seq2seq.examples(6),
        template="very {text}",
        output=tmp_path / "run",
        epochs=1,
        limit=9,
        max_length=3,
        target_modules=["k", "wo"],
        feedforward_modules=["wo"],
        console=console,
    )
    assert (run.train_examples, run.final.total) == (9, 6)
    assert run.texts == [f"very {text}" for text in tiny_seq2seq.examples(6).texts]
    assert "held-out texts also occur in training" in printed(console)
    assert "texts are longer than 3 tokens and are cut" in printed(console)
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k", "wo"]
    with pytest.raises(ValueError, match=r"reads the columns \['a', 'b'\], and examples in memory have one"):
        train(base, tiny_seq2seq.examples(30), template="{a} {b}", console=quiet())


def test_the_task_holds_the_labels_that_training_shows(base: str, tmp_path: Path) -> None:
    rows = tuple(
        replace(row, label=row.label.replace("positive", "very positive")) for row in tiny_seq2seq.examples(30)
    )
    labels = ("very positive", "unheard of", "neutral", "negative")
    data = replace(tiny_seq2seq.examples(30), rows=rows, labels=labels)
    task = load_task(train(base, data, output=tmp_path / "run", epochs=1, console=quiet()).adapter_dir)
    assert task is not None
    assert task.labels == ("very positive", "neutral", "negative")
    assert task.max_new_tokens == 3


def test_without_an_output_the_folder_is_new(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(base, tiny_seq2seq.examples(12), epochs=1, console=quiet())
    assert run.output_dir.parent == Path("runs")
    assert run.output_dir.name.startswith("sentences-")


def test_every_setting_is_a_key_and_has_its_default() -> None:
    recipe = make_recipe({"model": "m", "data": "d"})
    assert recipe == Recipe(model="m", data="d", settings=TrainSettings())
    for field in fields(TrainSettings):
        value = getattr(recipe.settings, field.name)
        assert make_recipe({"model": "m", "data": "d", field.name: value}) == recipe


def test_values_as_yaml_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d\nlearning_rate: 3e-3\ndropout: no\noutput: here\ntarget_modules: [k, v]\n")
    recipe = make_recipe(read_recipe(path), path)
    assert recipe.settings == TrainSettings(learning_rate=3e-3, dropout=False)
    assert (recipe.output, recipe.target_modules) == (Path("here"), ["k", "v"])


def test_all_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"test_size is 'x': .*; epochs is 'y': input should be a valid integer"):
        make_recipe({"model": "m", "data": "d", "test_size": "x", "epochs": "y"})


def test_a_missing_key() -> None:
    with pytest.raises(ValueError, match="there is no data: name it in the recipe"):
        make_recipe({"model": "m"})


def test_an_unknown_keyword(base: str) -> None:
    with pytest.raises(ValueError, match=r"A recipe has no key 'learning_rat'\. Did you mean 'learning_rate'\?"):
        train(base, "d", learning_rat=1)


def test_the_help_shows_the_true_defaults() -> None:
    defaults = {field.name: field.default for field in fields(Recipe)} | asdict(TrainSettings())
    command: Any = get_command(app)
    names = {"lr": "learning_rate"}
    shown = {
        names.get(option.name, option.name): option.show_default
        for option in command.commands["train"].params
        if isinstance(option.show_default, str)
    }
    assert len(shown) >= 9
    for name, text in shown.items():
        value = defaults[name]
        assert text == ({True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)), name


def test_an_interrupted_training_keeps_what_was_learned(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = torch.optim.AdamW.step

    def stop_at_third(*arguments: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step(*arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop_at_third)
    output = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"the adapter as it was is in .*interrupted"):
        train(base, tiny_seq2seq.examples(40), output=output, console=quiet())
    assert not (output / "adapter").exists()
    vectors = load_peft_weights(output / "interrupted")
    assert any((vector != 1).any() for vector in vectors.values())
    task = load_task(output / "interrupted")
    assert task is not None
    assert task.labels == tiny_seq2seq.LABELS
