"""Whatever a file or a caller gives, what is said of it fits a screen and commands no terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_seq2seq
from ia3 import IA3Config, PeftConfig
from ia3.data.loading import load_examples
from ia3.data.records import read_records
from ia3.runs.adapters import combine_adapters, read_adapter
from ia3.runs.comparison import read_runs
from ia3.runs.grid import combinations
from ia3.runs.recipe import Recipe, make_recipe, read_recipe
from ia3.runs.settings import fields_of
from ia3.tasks.labels import quote_labels
from ia3.tasks.task import TaskKind, load_task
from ia3.tasks.template import Template

LONG = "\x1b[31m" + "x" * 1_000_000
MANY = [f"{number}" * 30 for number in range(10_000)]
VALUES = {"a text": LONG, "many": MANY, "texts": [LONG, LONG], "an object": {LONG: LONG}, "deep": [[[[[[LONG]]]]]]}


def say_little(call: Callable[[], Any]) -> None:
    """The call, if it fails, fails with a short message."""
    said = ""
    try:
        call()
    except (ValueError, TypeError, OSError) as error:
        said = str(error)
    assert len(said) < 2_000
    assert "\x1b" not in said


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("field", [*vars(IA3Config()), "unknown"])
def test_configurations(field: str, value: str) -> None:
    say_little(lambda: IA3Config(**{field: VALUES[value]}))
    say_little(lambda: PeftConfig.from_dict({"peft_type": "IA3", "target_modules": ["k"], field: VALUES[value]}))
    say_little(lambda: IA3Config(target_modules=["k"], feedforward_modules=MANY, **{"layers_to_transform": [1]}))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "field", ["type", "template", "labels", "max_length", "generation", "base_model", "answer_by", "precision", "other"]
)
def test_tasks(field: str, value: str, tmp_path: Path) -> None:
    content = {"type": "label-words", "template": "{text}", "labels": ["a", "b"], "max_length": 3}
    content |= {"generation": {"max_new_tokens": 2}, field: VALUES[value]}
    (tmp_path / "ia3_task.json").write_text(json.dumps(content))
    say_little(lambda: load_task(tmp_path))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("field", [*fields_of(Recipe), "recipe", "zebra", LONG])
def test_recipes(field: str, value: str) -> None:
    say_little(lambda: make_recipe({"model": "m", "data": "d", field: VALUES[value]}))


@pytest.mark.parametrize(
    "text", [LONG.strip("\x1b"), f"{LONG[1:90_000]}: 1", f"- {LONG[1:90_000]}", f"a: !<{'x' * 9_000}> 1"]
)
def test_recipe_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    say_little(lambda: read_recipe(tmp_path / "recipe.yaml"))
    say_little(lambda: make_recipe({"model": "m", "data": "d", "recipe": tmp_path / "recipe.yaml"}))


def test_sweeps() -> None:
    for over in ({LONG: [1]}, {"seed": LONG}, {"seed": []}, {"learning_rate": MANY, LONG: MANY[:1]}):
        say_little(lambda over=over: combinations(over))  # type: ignore[misc]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "recipe.yaml"])
def test_runs(name: str, value: str, tmp_path: Path) -> None:
    recipe = {"model": "m", "data": "d", "task": "label-words"}
    wrong = {"step": VALUES[value], "steps": VALUES[value], "best": VALUES[value], "evaluations": VALUES[value]}
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / name).write_text(
        json.dumps(recipe | {"task": VALUES[value]} if name == "recipe.yaml" else wrong) + "\n"
    )
    say_little(lambda: read_runs([tmp_path]))


@pytest.mark.parametrize("kind", TaskKind)
@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": LONG},
        {"text": LONG, "label": "a"},
        {"text": LONG, "label": ""},
        {"text": [LONG], "label": [LONG, LONG]},
        {"text": {LONG: LONG}, "label": "a"},
        {LONG: "a", "label": "b"},
        {LONG[1:900]: "a", "label": "b"},
        {name: 1 for name in MANY[:9_000]},
        {"messages": [{"role": LONG, "content": LONG}]},
        {"messages": [{LONG: LONG}]},
        {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
        {"messages": [{"role": "user", "content": "a", LONG: 1}]},
        {"tokens": [LONG, "a b"], "tags": ["a"]},
    ],
)
def test_tables(row: dict[str, Any], kind: TaskKind, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    say_little(lambda: load_examples(tmp_path / "a.jsonl", kind=kind))


def test_names_of_columns_and_files(tmp_path: Path) -> None:
    data = tiny_seq2seq.write_csv(tmp_path / "a.csv", 12)
    for name in (LONG, "x" * 200_000, "x" * 300):
        for how in ({"text_column": name}, {"label_column": name}, {"template": Template(f"{{{name[:900]}}}")}):
            say_little(lambda how=how: load_examples(data, **how))  # type: ignore[misc]
        for call in (read_records, read_adapter, read_recipe, load_task, lambda name: read_runs([name])):
            say_little(lambda call=call, name=name: call(name))  # type: ignore[misc]
        say_little(lambda name=name: combine_adapters([name, name], tmp_path / "out"))  # type: ignore[misc]
        say_little(lambda name=name: Template(name + "{"))  # type: ignore[misc]
    assert len(quote_labels([LONG] * 9)) < 1_000
