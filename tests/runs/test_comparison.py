from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml
from matplotlib.colors import to_rgb

from ia3.runs.comparison import (
    RunRecord,
    differences,
    group_repeats,
    name_runs,
    quartiles_of,
    read_runs,
)
from ia3.runs.picture import draw_runs
from ia3.runs.recipe import make_recipe
from ia3.runs.run import (
    ENVIRONMENT_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    RESULT_NAME,
    Evaluation,
    Run,
    TrainerState,
    write_json,
)
from ia3.tasks.metrics import wilson_interval
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template

STEPS = 20


def begin(folder: Path, **recipe: Any) -> Any:
    """What `ia3 train` leaves before the first step."""
    content = {"model": "models/t5", "data": "reviews.csv", "task": "label-words", "output": str(folder), **recipe}
    made = make_recipe(content)
    folder.mkdir(parents=True)
    (folder / RECIPE_NAME).write_text(yaml.safe_dump(made.content(), sort_keys=True))
    write_json(folder / ENVIRONMENT_NAME, {"seed": made.settings.seed})
    return made


def log(folder: Path, progress: TrainerState) -> None:
    lines = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in progress.lines("the likeliest label"))
    (folder / METRICS_NAME).write_text(lines)


def progress_of(*correct: int, losses: tuple[float, ...] | None = None, labels: bool = True) -> TrainerState:
    """Evaluations of 50 texts, each 20 steps after the one before."""
    steps = [{"learning_rate": 0.1, "loss": 1.0, "step": step + 1} for step in range(STEPS * (len(correct) - 1))]
    losses = losses or tuple(2 - each / 50 for each in correct)
    evaluations = [
        Evaluation(STEPS * index, loss, right, 50, right / 100 if labels else None, 1.0, [])
        for index, (right, loss) in enumerate(zip(correct, losses, strict=True))
    ]
    best = max(range(1, len(correct)), key=lambda index: correct[index], default=None)
    return TrainerState(steps, evaluations, best, seconds=12.5)


def finish(folder: Path, *correct: int, losses: tuple[float, ...] | None = None, **recipe: Any) -> Path:
    """A finished run's folder, by the writers of `ia3 train`."""
    made = begin(folder, **recipe)
    kind = made.task
    progress = progress_of(*correct, losses=losses, labels=kind.has_labels)
    log(folder, progress)
    labels = ("bad", "good") if kind.has_labels else ()
    task = Task(kind=kind, template=made.wording, labels=labels, max_length=8, max_new_tokens=2)
    run = Run(folder, made.settings, task, ["text"], ["bad"], progress, 100, 448, 77_000)
    write_json(folder / RESULT_NAME, run.summary() | {"predictions": []})
    return folder


def names(records: list[RunRecord]) -> list[str]:
    return name_runs(records)[1]


def test_a_finished_run(tmp_path: Path) -> None:
    finish(tmp_path / "run", 5, 45, 40, learning_rate=0.01)
    (record,) = read_runs([tmp_path])
    assert (record.state, record.finished, record.steps, record.seconds) == ("finished", True, 40, 12.5)
    assert record.recipe["learning_rate"] == 0.01
    assert "output" not in record.recipe
    assert record.kind is TaskKind.LABEL_WORDS
    assert [each["accuracy"] for each in record.evaluations] == [0.1, 0.9, 0.8]
    assert record.last == {"accuracy": 0.8, "loss": 1.2, "macro_f1": 0.4, "seconds": 1.0, "step": 40}
    assert record.best_accuracy == 0.9
    assert record.summary()["method"] == record.method == "the likeliest label"
    assert record.interval == wilson_interval(40, 50)
    assert record.summary()["accuracy_interval_95"] == list(wilson_interval(40, 50))


def test_a_run_under_way_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    progress = progress_of(5, 30)
    progress.steps.append({"learning_rate": 0.1, "loss": 1.0, "step": 21})
    log(tmp_path / "run", progress)
    with (tmp_path / "run" / METRICS_NAME).open("a") as file:
        file.write('{"learning_rate": 0.1, "lo')
    (record,) = read_runs([tmp_path])
    assert (record.state, record.finished, record.steps) == ("unfinished", False, 21)
    assert (record.last["step"], record.last["accuracy"]) == (20, 0.6)
    assert (record.interval, record.best_accuracy, record.seconds) == (None, None, None)


def test_a_run_before_its_first_evaluation(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (record,) = read_runs([tmp_path])
    assert (record.steps, record.evaluations, record.last) == (0, [], {})
    assert record.summary()["accuracy"] is None
    with pytest.raises(ValueError, match="None of the runs has an evaluation yet"):
        draw_runs([record], tmp_path / "runs.png")


def test_runs_are_found_once_below_every_folder(tmp_path: Path) -> None:
    finish(tmp_path / "a" / "x", 0, 30)
    finish(tmp_path / "b", 0, 40)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / RECIPE_NAME).write_text("epochs: 3\n")  # somebody's own recipe, no run
    records = read_runs([tmp_path, tmp_path / "a" / ".." / "a", tmp_path / "a" / "x"])
    assert name_runs(records) == (tmp_path, ["b", "a/x"])


def test_the_best_comes_first(tmp_path: Path) -> None:
    finish(tmp_path / "good", 0, 40)
    finish(tmp_path / "equal-with-a-lower-loss", 0, 40, losses=(2.0, 0.5))
    finish(tmp_path / "bad", 0, 10, losses=(2.0, 0.1))
    finish(tmp_path / "text-1", 0, 9, losses=(2.0, 0.9), task="generation")
    finish(tmp_path / "text-2", 0, 1, losses=(2.0, 0.8), task="generation")
    begin(tmp_path / "begun")
    begin(tmp_path / "going")
    log(tmp_path / "going", progress_of(0, 50))
    expected = ["equal-with-a-lower-loss", "good", "bad", "text-2", "text-1", "going", "begun"]
    assert names(read_runs([tmp_path])) == expected


def test_what_differs(tmp_path: Path) -> None:
    finish(tmp_path / "a", 0, 40, seed=1, model="models/t5-large", warmup_steps=3)
    finish(tmp_path / "b", 0, 30, seed=2, template="Review: {text}")
    finish(tmp_path / "c", 0, 20, seed=2, patience=4)
    found = differences(read_runs([tmp_path]))
    assert list(found) == ["model", "patience", "warmup_steps", "template", "seed"]
    assert found["patience"] == [None, None, 4]
    assert found["template"] == ["{text}", "Review: {text}", "{text}"]


def test_what_tells_recipes_apart_comes_first(tmp_path: Path) -> None:
    finish(tmp_path / "a", 0, 40, objective="t-few", learning_rate=0.003, dropout=False)
    finish(tmp_path / "b", 0, 30, target_modules="all-linear", answer_by="rank", seed=2)
    found = [*differences(read_runs([tmp_path]))]
    assert found == ["learning_rate", "target_modules", "objective", "answer_by", "dropout", "seed"]


def test_repeats_differ_in_template_and_seed_alone(tmp_path: Path) -> None:
    for seed, right in enumerate((30, 45, 35, 40)):
        finish(tmp_path / f"slow-{seed}", 0, right, seed=seed, learning_rate=0.001)
    finish(tmp_path / "fast-text", 0, 46, template="Review: {text}")
    finish(tmp_path / "fast-column", 0, 48, text_column="body")
    finish(tmp_path / "alone", 0, 50, epochs=9)
    begin(tmp_path / "going", learning_rate=0.001, seed=9)
    log(tmp_path / "going", progress_of(0, 1))
    fast, slow = group_repeats(read_runs([tmp_path]))
    assert names(fast.records) == ["fast-column", "fast-text"]
    assert fast.varied == {"template": 2}
    assert names(slow.records) == ["slow-1", "slow-3", "slow-2", "slow-0"]
    assert slow.varied == {"seed": 4}
    assert slow.accuracy.median == pytest.approx(0.75)
    assert slow.loss.median == pytest.approx(1.25)


@pytest.mark.parametrize("values", [[0.5], [0.2, 0.8], [0.9, 0.1, 0.4], [3.0, 1.0, 2.0, 10.0], [1.0, 2, 3, 4, 8, 7, 6]])
def test_spread_against_the_standard_library(values: list[float]) -> None:
    found = quartiles_of(values)
    quartiles = statistics.quantiles(values * (2 if len(values) == 1 else 1), n=4, method="inclusive")
    assert [found.lower, found.median, found.upper] == pytest.approx(quartiles, abs=1e-12)
    assert (found.lowest, found.highest) == (min(values), max(values))
    assert found.summary()["quartiles"] == "numpy, linear"


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_no_spread_without_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one, and finite"):
        quartiles_of(values)


DAMAGED = {
    "half a result": (RESULT_NAME, '{"accuracy": 0.', r"result\.json is not valid JSON: .*Copy or write it again"),
    "a list": (RESULT_NAME, "[]", r"result\.json holds a list, not a JSON object"),
    "a result without evaluations": (
        RESULT_NAME,
        '{"accuracy_interval_95": [0, 1], "best": {"step": 1, "loss": 1}, "evaluations": []}',
        r"evaluations is \[\]: List should have at least 1 item",
    ),
    "another result": (
        RESULT_NAME,
        "{}",
        r"of another version of ia3 .*accuracy_interval_95 is not there.*train again",
    ),
    "a broken step": (METRICS_NAME, '{"step": 1}\n{"step\n{"step": 3}\n', r"metrics\.jsonl, line 2 is not valid JSON"),
    "a step without number": (METRICS_NAME, '{"loss": 1}\n', r"metrics\.jsonl, line 1 is damaged, .*step is not there"),
    "an evaluation of text": (
        METRICS_NAME,
        '{"evaluation": 3, "step": 1}\n',
        r"metrics\.jsonl, line 1 is damaged, .*evaluation is 3",
    ),
    "no recipe": (RECIPE_NAME, "epochs: [", r"recipe\.yaml is not YAML"),
    "half a recipe": (RECIPE_NAME, "model: t5\ndata: x.csv\n", r"recipe\.yaml has no task.*Put it back"),
    "an unknown task": (RECIPE_NAME, "model: t5\ndata: x.csv\ntask: chess\n", r"task is 'chess', expected one of"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, case: str) -> None:
    name, text, expected = DAMAGED[case]
    begin(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_runs([tmp_path])


def test_folders_without_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing: name the folder of your runs"):
        read_runs([tmp_path / "nothing"])
    finish(tmp_path / "full" / "run", 0, 30)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no runs in .*empty, nor below"):
        read_runs([tmp_path / "full", tmp_path / "empty"])


def share_of(path: Path, colour: str) -> float:
    """How much of a picture has that colour."""
    pixels = matplotlib.image.imread(path)[:, :, :3]
    return float((abs(pixels - to_rgb(colour)).max(axis=-1) < 0.02).mean())


@pytest.mark.parametrize("count", [1, 2, 10, 25])
def test_the_picture(tmp_path: Path, count: int) -> None:
    for number in range(count):
        losses = (3.0, 0.1 + 0.01 * number) if number % 2 else (1.0, 0.8)
        finish(tmp_path / f"run-{number}-{'long-' * number}", 1, 20 + number, losses=losses, seed=number)
    path = draw_runs(read_runs([tmp_path]), tmp_path / "runs.png")
    blue, orange, green = (share_of(path, colour) for colour in ("#0072B2", "#D55E00", "#009E73"))
    assert blue > 0.0005  # the best
    assert (orange > 0.0005) == (count > 1)  # the second, or the median
    assert (green > 0.0005) == (count == 10)  # of many, no others have a colour


def test_the_picture_of_unlike_tasks_and_an_unfinished_run(tmp_path: Path) -> None:
    finish(tmp_path / "labels", 0, 30)
    finish(tmp_path / "text", 0, 0, losses=(2.0, 0.0), task="generation")
    begin(tmp_path / "begun")
    begin(tmp_path / "going")
    log(tmp_path / "going", progress_of(3))
    assert draw_runs(read_runs([tmp_path]), tmp_path / "runs.png").stat().st_size > 10_000


def test_a_template_and_a_column_are_told_apart(tmp_path: Path) -> None:
    finish(tmp_path / "a", 0, 30, text_column="body")
    (record,) = read_runs([tmp_path])
    assert record.recipe["template"] == Template.of_column("body").pattern
