from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from ia3.cli import main
from ia3.cli.runs import print_runs
from ia3.runs.comparison import RunRecord, group_repeats, read_runs
from ia3.runs.recipe import make_recipe
from ia3.runs.run import ENVIRONMENT_NAME, METRICS_NAME, RECIPE_NAME, RESULT_NAME, Evaluation, write_json
from ia3.tasks.metrics import wilson_interval

LONG = "{text}\nIs this review of the film positive or negative? Answer with one word: "


def write_run(folder: Path, correct: int, *, finished: bool = True, **recipe: Any) -> None:
    """A run that evaluated 200 texts before its first step and after 40."""
    content = {"model": "google/flan-t5-small", "data": "data/reviews.csv", "task": "label-words", **recipe}
    made = make_recipe(content)
    folder.mkdir(parents=True)
    (folder / RECIPE_NAME).write_text(yaml.safe_dump(made.content()))
    write_json(folder / ENVIRONMENT_NAME, {})
    evaluations = [
        Evaluation(0, 3.0, 20, 200, 0.1, 1.0, []).summary(),
        Evaluation(40, 0.5, correct, 200, 0.75, 1.0, []).summary(),
    ]
    if finished:
        result = {
            "accuracy_interval_95": list(wilson_interval(correct, 200)),
            "best": evaluations[1],
            "evaluations": evaluations,
            "steps": 40,
            "stopped_early": False,
            "train_seconds": 61.4,
        }
        write_json(folder / RESULT_NAME, result)
    else:
        lines = [{"evaluation": each, "step": each["step"]} for each in evaluations]
        lines.append({"learning_rate": 0.1, "loss": 1.0, "step": 47})
        (folder / METRICS_NAME).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two groups of three repeated runs, and an unfinished one of a larger model."""
    for rate in (0.003, 0.008):
        for seed in range(3):
            write_run(
                tmp_path / f"rate-{rate}" / f"seed-{seed}",
                150 + 10 * seed + (rate > 0.005),
                seed=seed,
                learning_rate=rate,
            )
    write_run(tmp_path / "large", 190, finished=False, model="google/flan-t5-large", template=LONG)
    return tmp_path


def ask(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main.app, ["runs", *map(str, arguments)])


def printed(records: list[RunRecord], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_runs(console, records, group_repeats(records))
    return console.export_text()


def shown(folder: Path, width: int) -> str:
    return printed(read_runs([folder]), width)


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name)).split()


def test_the_table(folder: Path) -> None:
    text = shown(folder, 200)
    assert text.startswith(f"7 runs in {folder}, data reviews.csv, task label-words")
    assert [line.split()[0] for line in text.splitlines() if "flan-t5-" in line] == [
        *("rate-0.008/seed-2", "rate-0.003/seed-2", "rate-0.008/seed-1", "rate-0.003/seed-1"),
        *("rate-0.008/seed-0", "rate-0.003/seed-0", "large"),
    ]
    low, high = wilson_interval(170, 200)
    figures = [
        "85.0%",
        f"{100 * low:.1f}",
        "to",
        f"{100 * high:.1f}",
        "0.750",
        "0.500",
        "85.0%",
        "40",
        "61",
        "finished",
    ]
    assert row(text, "rate-0.003/seed-2") == [
        "rate-0.003/seed-2",
        "flan-t5-small",
        "0.003",
        "{text}",
        "2",
        *figures,
        "40",
    ]
    assert row(text, "large")[-8:] == ["–", "0.750", "0.500", "–", "47", "–", "unfinished", "40"]
    assert "also differ" not in text


def test_repeated_runs(folder: Path) -> None:
    text = shown(folder, 200)
    title = "Repeated runs: accuracy (finished runs; quartiles: numpy's linear)"
    table = text[text.index(title) :]
    # 75, 80 and 85 %: the quartiles lie halfway to the median.
    assert row(table, "0.003") == ["0.003", "3", "3", "seeds", "80.0%", "77.5%", "82.5%", "75.0%", "85.0%"]
    assert row(table, "0.008") == ["0.008", "3", "3", "seeds", "80.5%", "78.0%", "83.0%", "75.5%", "85.5%"]


def test_it_fits_the_terminal_and_says_what_does_not(folder: Path) -> None:
    records = read_runs([folder])
    for width in range(80, 161):
        text = printed(records, width)
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(map(len, lines)) <= width
        assert sum(line.startswith(("rate-", "large")) for line in lines) == 7  # no row takes two lines
        header = text.split("\n\n")[1].splitlines()[:2]
        hidden = " ".join(text.split()).partition("not shown: ")[2].partition(". A wider")[0].split(", ")
        for name in ("macro-F1", "seconds", "steps", "template", "seed", "learning_rate", "model"):
            assert any(name in line.split() for line in header) != (name in hidden), (width, name)


def test_many_differences_are_summarised(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 150)
    write_run(tmp_path / "b", 160, epochs=5, batch_size=4, learning_rate=0.1, weight_decay=0.1, warmup_steps=3, seed=1)
    text = shown(tmp_path, 160)
    assert "They also differ in weight_decay, seed." in text
    assert "epochs" in text


def test_values_that_begin_alike_are_shown_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 150, template=f"{LONG}good or bad?")
    write_run(tmp_path / "b", 160, template=f"{LONG}yes or no?")
    text = shown(tmp_path, 120)
    assert "yes or" in text
    assert "good" in text


def test_names_are_no_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "[red]run", 150)
    assert "[red]run" in shown(tmp_path, 120)


def test_the_command_leaves_a_picture(folder: Path) -> None:
    result = ask(folder)
    assert result.exit_code == 0, result.output
    assert f"picture: {folder / 'runs.png'}" in result.stdout.replace("\n", "")
    assert (folder / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_json(folder: Path) -> None:
    result = ask(folder / "rate-0.003", folder / "large", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert Path(content["picture"]) == folder / "rate-0.003" / "runs.png"
    assert Path(content["picture"]).is_file()
    assert [run["accuracy"] for run in content["runs"]] == [0.85, 0.8, 0.75, 0.95]
    assert [run["state"] for run in content["runs"]] == ["finished"] * 3 + ["unfinished"]
    (group,) = content["repeats"]
    assert (group["count"], group["varied"]) == (3, {"seed": 3})
    assert group["accuracy"]["median"] == pytest.approx(0.8)
    assert group["accuracy"]["quartiles"] == "numpy, linear"


def test_the_default_is_the_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "only", 150)
    monkeypatch.chdir(tmp_path)
    result = ask()
    assert result.exit_code == 0, result.output
    assert "1 run in runs, model flan-t5-small" in result.stdout
    assert (tmp_path / "runs" / "runs.png").is_file()


def test_runs_without_an_evaluation_have_no_picture(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 150, finished=False)
    (tmp_path / "run" / METRICS_NAME).unlink()
    result = ask(tmp_path)
    assert result.exit_code == 0, result.output
    assert "No run has an evaluation yet: no picture." in result.stdout
    assert not (tmp_path / "runs.png").exists()


def _cut(folder: Path) -> None:
    path = folder / "rate-0.003" / "seed-1" / RESULT_NAME
    path.write_bytes(path.read_bytes()[:50])


def _empty(folder: Path) -> None:
    for path in folder.rglob(RECIPE_NAME):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"), [(_cut, "result.json is not valid JSON"), (_empty, "There are no runs in")]
)
def test_what_can_not_be_read_is_an_error(folder: Path, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(folder)
    result = ask(folder)
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.replace("│", " ").split())
