from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import ia3
import tiny_seq2seq
from ia3.cli import main as command
from ia3.cli.predict import predict
from ia3.training.data import bundled_tweets


def call(*arguments: str | Path, text: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(command.app, [str(each) for each in arguments], input=text)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.save_base(tmp_path_factory.mktemp("models") / "tiny-base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.write_csv(tmp_path_factory.mktemp("data") / "sentences.csv")


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = call("train", "--model", base, "--data", data, "--output", folder, "--epochs", 1, "--test-size", 0.2)
    assert result.exit_code == 0, result.output
    return folder


def test_help_is_quick_and_loads_no_torch() -> None:
    script = Path(sys.executable).with_name("ia3")
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 0.5
    assert all(name in result.stdout for name in ("train", "predict", "quickstart"))
    subprocess.run([sys.executable, "-c", "import sys, ia3.cli.main; sys.exit('torch' in sys.modules)"], check=True)


def test_version() -> None:
    assert call("--version").stdout == f"ia3 {ia3.__version__}\n"


def test_train_leaves_a_whole_run(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"adapter", "losses.jsonl", "metrics.json", "report.png"}
    content = json.loads((trained / "metrics.json").read_text())
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


def test_predict_arguments(trained: Path) -> None:
    result = call("predict", trained / "adapter", "the share falls", "the share [of] a company rises")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["the share falls", "the share [of] a company rises"]


def test_predict_standard_input_as_json(trained: Path) -> None:
    result = call("predict", trained / "adapter", "--json", text="the share falls\n\n  a company rises\n")
    content = json.loads(result.stdout)
    assert [each["text"] for each in content["predictions"]] == ["the share falls", "a company rises"]
    assert all(isinstance(each["label"], str) for each in content["predictions"])
    assert "1 blank lines are left out" in result.stderr


def test_predict_agrees_with_the_evaluation(trained: Path) -> None:
    held_out = json.loads((trained / "metrics.json").read_text())["predictions"]
    result = call("predict", trained / "adapter", "--max-new-tokens", 3, *(each["text"] for each in held_out))
    words = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert words == [each["prediction"] for each in held_out]


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


# Calls that cannot work, with {base}, {data} and {folder}, and a part of what each must say.
WRONG = {
    "no data file": ("train --model {base} --data nothing.csv", "There is no file nothing.csv"),
    "empty file": ("train --model {base} --data {folder}/empty.csv", "empty.csv"),
    "no such column": ("train --model {base} --data {data} --label-column tone", "tone"),
    "test size": ("train --model {base} --data {data} --test-size 2", "expected a fraction between 0 and 1"),
    "learning rate": ("train --model {base} --data {data} --lr 0", "learning_rate is 0.0"),
    "limit": ("train --model {base} --data {data} --limit 0", "--limit is 0"),
    "diverging": ("train --model {base} --data {data} --lr 3e37 --output {folder}/run", "Lower the learning rate"),
    "output is a file": ("train --model {base} --data {data} --output {folder}/empty.csv", "is a file"),
    "no such model": ("train --model nosuch/model --data {data}", "base model 'nosuch/model' cannot be read"),
    "bundled model": ("train --model bundled:gpt5 --data {data}", "No bundled model 'bundled:gpt5'"),
    "no adapter": ("predict {folder} sentence", "No adapter_config.json"),
    "no text": ("predict {folder}", "Standard input holds no text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_screen_and_exit_code_2(
    name: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").touch()
    arguments, message = WRONG[name]
    result = call(*arguments.format(base=base, data=data, folder=tmp_path).split(), text="")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) < 24
    assert [path.name for path in tmp_path.iterdir()] == ["empty.csv"]


def test_debug_shows_where_an_error_comes_from(base: Path) -> None:
    result = call("--debug", "train", "--model", base, "--data", "nothing.csv")
    assert isinstance(result.exception, FileNotFoundError)


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


def test_nothing_to_label_on_a_terminal(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(ValueError, match="There is nothing to label: give sentences"):
        predict(str(trained / "adapter"), None)
