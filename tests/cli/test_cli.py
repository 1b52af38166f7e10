from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import DRAWING, call, message, processor_seconds, succeed

import ia3
import tiny_seq2seq
from ia3.cli import main as command
from ia3.cli.names import in_flags
from ia3.data.loading import bundled_tweets

HELP = "sys.argv = ['ia3', '--help']; from ia3.cli.main import main; main()"
# Before it ends it says which packages it loaded.
PACKAGES = """
import atexit, sys
there = {*sys.modules}
def say():
    print(*{name.partition(".")[0] for name in {*sys.modules} - there} - sys.stdlib_module_names, file=sys.stderr)
atexit.register(say)
"""


def test_help_is_quick() -> None:
    """Next to what draws it, in the processor's time: a busy or slow machine is so for both."""
    commands = (Path(sys.executable).with_name("ia3"), "--help"), (sys.executable, "-c", DRAWING)
    times = [[processor_seconds(*command) for command in commands] for _ in range(3)]
    shown, drawing = map(min, zip(*times, strict=True))
    assert shown < 2.5 * drawing


def test_help_loads_what_draws_it_alone() -> None:
    shown, drawing = (
        subprocess.run([sys.executable, "-c", PACKAGES + code], capture_output=True, text=True, check=True)
        for code in (HELP, DRAWING)
    )
    assert {*shown.stderr.split()} - {*drawing.stderr.split()} == {"ia3"}
    assert all(
        name in shown.stdout
        for name in ("train", "evaluate", "predict", "inspect", "targets", "merge", "push", "quickstart", "runs")
    )


def test_version() -> None:
    assert call("--version").stdout == f"ia3 {ia3.__version__}\n"


def test_train_leaves_a_whole_run(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        *("adapter", "best", "environment.json", "metrics.jsonl"),
        *("recipe.yaml", "report.md", "report.png", "result.json", "SHA256SUMS"),
    }
    content = json.loads((trained / "result.json").read_text())
    assert (content["train_examples"], content["test_examples"], content["steps"]) == (24, 6, 3)


def test_train_prints_a_table_and_says_what_is_odd(base: Path, data: Path, tmp_path: Path) -> None:
    result = call(
        *("train", "--model", base, "--data", data, "--test-data", data, "--output", tmp_path / "run"),
        *("--limit", 9, "--epochs", 1, "--max-length", 3),
    )
    assert result.exit_code == 0, result.output
    assert "of 30 held out (95 % interval" in result.stdout
    assert "9 examples" in result.stdout
    assert "30 rows (10 negative, 10 neutral, 10 positive)" in result.stderr
    assert "9 held-out texts also occur in training" in result.stderr
    assert "texts are longer than 3 tokens and are cut" in result.stderr


def test_train_json_is_one_object_and_the_default_output_is_new(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", "--model", base, "--data", data, "--epochs", 1, "--limit", 100, "--no-dropout", "--json")
    content = json.loads(result.stdout)
    assert content["settings"]["dropout"] is False
    assert content["train_examples"] == 27
    assert Path(content["adapter"]).parent.name.startswith("sentences-")
    assert Path(content["picture"]).is_file()


@pytest.fixture
def tiny_titler(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the quickstart run on the tiny base instead of the bundled model."""
    monkeypatch.setattr("ia3.bundled.TITLER", str(base))


@pytest.mark.usefixtures("tiny_titler")
def test_quickstart_ends_with_predictions_and_a_picture(tmp_path: Path) -> None:
    result = call("quickstart", "--output", tmp_path / "first", "--limit", 12)
    assert result.exit_code == 0, result.output
    assert "of 12 held out (95 % interval" in result.stdout
    assert "33.3%" in result.stdout
    assert "The adapter, loaded from disk, says:" in result.stdout
    assert "Shares jump 12%" in result.stdout
    assert (tmp_path / "first" / "report.png").is_file()


@pytest.mark.usefixtures("tiny_titler")
def test_quickstart_json(tmp_path: Path) -> None:
    content = json.loads(call("quickstart", "--output", tmp_path / "first", "--limit", 12, "--json").stdout)
    assert len(content["predictions"]) == 3
    assert content["majority_baseline"] == pytest.approx(1 / 3)
    assert content["settings"]["dropout"] is False
    assert content["test_examples"] == 12


def test_quickstart_labels_are_whole_tokens() -> None:
    assert {row.label for part in bundled_tweets() for row in part} == set(tiny_seq2seq.LABELS)


def test_debug_shows_where_an_error_comes_from(base: Path) -> None:
    result = call("--debug", "train", "--model", base, "--data", "nothing.csv")
    assert isinstance(result.exception, FileNotFoundError)


def test_the_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "ia3", "--version"], capture_output=True, text=True)
    assert result.stdout == f"ia3 {ia3.__version__}\n"


def test_messages_name_flags() -> None:
    said = "Leave `text_column` out, or `template='{a} {b}'`, `task='generation'`, `merge_labels=False`, `dropout=True`"
    flags = 'Leave --text-column out, or --template "{a} {b}", --task generation, --no-merge-labels, --dropout'
    assert in_flags(said) == flags
    known = in_flags(said, {"--task"})
    assert known == said.replace("`task='generation'`", "--task generation")


def test_the_guides_settings_by_name(base: Path, data: Path, tmp_path: Path) -> None:
    how = ("train", base, data, "--test-size", 0.5, "--steps", 1, "--json")
    by_flag = json.loads(succeed(*how, "--like-peft", "--output", tmp_path / "flag").stdout)["settings"]
    assert by_flag == json.loads(succeed(*how, "--recipe", "peft", "--output", tmp_path / "name").stdout)["settings"]
    names = ("learning_rate", "dropout", "batch_size", "warmup_steps", "steps")
    assert [by_flag[name] for name in names] == [8e-3, True, 8, 0, 1]


def test_lists_of_names(base: Path, data: Path, tmp_path: Path) -> None:
    how = ("train", base, data, "--steps", 1, "--output", tmp_path / "run")
    succeed(*how, "--target-modules", "k,v,wo", "--feedforward-modules", "wo", "--learning-rate", 1e-3)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["target_modules"], recipe["learning_rate"]) == (["k", "v", "wo"], 1e-3)
    assert {"dropout", "warmup_steps"} <= set(recipe)
    refused = call(*how[:-1], tmp_path / "none", "--trackers", "tensorboard,nothing")
    assert "nothing" in message(refused)


def test_the_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["ia3", "--version"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ia3 {ia3.__version__}\n"


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import ia3.cli.main"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == 'The command ia3 needs more than the library: pip install "ia3[train]"\n'


def test_control_c_ends_with_code_130_and_resume_goes_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def interrupted(*arguments: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments, **more)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        result = call("train", "--model", base, "--data", data, "--output", run)
    assert result.exit_code == 130
    assert f"Interrupted at step 1 of 12. Go on: ia3 train --resume {run}" in message(result)
    assert (run / "adapter" / "ia3_task.json").is_file()
    refused = call("train", "--resume", run, "--lr", 5, "--seed", 0)
    assert refused.exit_code == 2
    assert "these can't be given beside it: --learning-rate, --seed." in message(refused)
    assert json.loads(succeed("train", "--resume", run, "--json").stdout)["steps"] == 12


def test_several_seeds_and_templates(base: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs"
    how = ("train", "--model", base, "--data", data, "--epochs", 1)
    result = succeed(*how, "--seeds", "1,2", "--template", "{text}", "--template", "very {text}", "--output", run)
    assert "accuracy of 4 runs by the likeliest label: median" in result.stdout
    assert {path.name for path in run.iterdir()} == {f"template-{t}-seed-{s}" for t in (1, 2) for s in (1, 2)}
    content = json.loads(succeed(*how, "--seeds", "1,2,3", "--output", tmp_path / "seeds", "--json").stdout)
    accuracies = sorted(each["accuracy"] for each in content["runs"])
    assert content["accuracy"]["median"] == accuracies[1]
    assert call(*how, "--seeds", "one").exit_code == 2
    repeated = call(*how, "--seeds", "1,2,1")
    assert "--seeds holds 1 more than once" in message(repeated)
    assert call(*how, "--seeds", "1", "--seed", 2).exit_code == 2


def test_an_interrupted_series_goes_on(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ("train", "--model", base, "--data", data, "--epochs", 1, "--seeds", "1,2,3", "--output", tmp_path / "runs")
    step, steps = torch.optim.AdamW.step, []

    def interrupted(*arguments: Any, **more: Any) -> Any:
        steps.append(1)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        assert call(*how).exit_code == 130
    first = (tmp_path / "runs" / "seed-1" / "result.json").read_bytes()
    content = json.loads(succeed(*how, "--json").stdout)
    assert [each["settings"]["seed"] for each in content["runs"]] == [1, 2, 3]
    assert (tmp_path / "runs" / "seed-1" / "result.json").read_bytes() == first
    other = call(*how, "--batch-size", 4)
    assert "holds the run of another recipe" in message(other)


def test_a_series_goes_on_past_a_run_that_diverges(base: Path, data: Path, tmp_path: Path) -> None:
    how = (
        "train",
        "--model",
        base,
        "--data",
        data,
        "--epochs",
        1,
        "--lr",
        3e37,
        "--dropout",
        "--output",
        tmp_path / "runs",
    )
    result = call(*how, "--seeds", "1,2")
    assert result.exit_code == 2
    assert "None of the 2 runs came to an end" in message(result)


def test_a_recipe_and_flags_over_it(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {base}\ndata: {data}\nepochs: 5\nbatch_size: 4\noutput: {tmp_path / 'run'}\n")
    result = call("train", "--recipe", recipe, "--epochs", 1, "--json")
    settings = json.loads(result.stdout)["settings"]
    assert (settings["epochs"], settings["batch_size"]) == (1, 4)
    assert (tmp_path / "run" / "adapter" / "ia3_task.json").is_file()
