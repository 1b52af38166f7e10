from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from running import call, message, succeed, unwrapped

from ia3.cli.evaluate import print_figures
from ia3.tasks.metrics import figures_of, wilson_interval

LABELS = ["negative", "neutral", "positive"]


def test_the_figures_are_those_of_the_predictions(adapter: Path, data: Path, tmp_path: Path) -> None:
    found = json.loads(succeed("evaluate", adapter, "--data", data, "--json").stdout)
    succeed("predict", adapter, "--file", data, "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert (found["correct"], found["examples"], found["accuracy"]) == (right, 30, right / 30)
    assert found["accuracy_interval_95"] == list(wilson_interval(right, 30))
    assert found["labels"] == LABELS
    assert found["majority_baseline"] == pytest.approx(1 / 3)
    for place, label in enumerate(LABELS):
        of_label = [row["prediction"] for row in rows if row["label"] == label]
        assert found["confusion"][place] == [of_label.count(each) for each in LABELS] + [0]


def test_generated_answers_may_be_no_label(adapter: Path, data: Path) -> None:
    found = json.loads(succeed("evaluate", adapter, "--data", data, "--answer-by", "generation", "--json").stdout)
    assert found["method"] == "written answers, exact match"
    assert sum(row[-1] for row in found["confusion"]) > 0
    assert "other" in succeed("evaluate", adapter, "--data", data, "--answer-by", "generation").stdout


def test_macro_f1_by_hand() -> None:
    references, predictions = ["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "x"]
    found = figures_of(references, predictions, ["a", "b", "c"])
    assert found["f1"] == {"a": pytest.approx(4 / 5), "b": pytest.approx(1 / 2)}
    assert found["macro_f1"] == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert found["confusion"] == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_figures({"method": "how", **figures_of(["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"]), "entity_f1": 0.5})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "1", "1", "0", "0.667"] in lines
    assert ["c", "0", "0", "0", "–"] in lines
    assert ["macro-F1", "0.667"] in lines
    assert ["majority", "class", "66.7%"] in lines
    assert ["entity", "f1", "0.500"] in lines


def test_a_confusion_of_many_labels_fits_the_console(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    labels = [f"label-{number}" for number in range(40)]
    print_figures({"method": "how", **figures_of(labels, labels, labels)})
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    header = next(line for line in lines if line.startswith("true")).split()
    shown = [word for word in header if word.startswith("label-")]
    assert shown == labels[: len(shown)]
    assert header[-1] == "F1"
    assert f"{40 - len(shown) - 12} more" in " ".join(" ".join(lines).split())


def test_an_adapter_without_a_task_takes_the_labels_of_the_data(adapter: Path, data: Path, tmp_path: Path) -> None:
    for path in adapter.iterdir():
        if path.name != "ia3_task.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with_task = json.loads(succeed("evaluate", adapter, "--data", data, "--json").stdout)
    without = json.loads(succeed("evaluate", tmp_path, "--data", data, "--json").stdout)
    assert without == {**with_task, "adapter": str(tmp_path)}
    written = ["--answer-by", "generation", "--json"]
    assert "accuracy_by_rank" in json.loads(succeed("evaluate", tmp_path, "--data", data, *written).stdout)


def test_other_columns_than_in_training(adapter: Path, data: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(data.read_text().replace("text,label", "review,tone"))
    named = ["--text-column", "review", "--label-column", "tone"]
    found = json.loads(succeed("evaluate", adapter, "--data", renamed, *named, "--json").stdout)
    same = json.loads(succeed("evaluate", adapter, "--data", data, "--json").stdout)
    assert found == {**same, "data": str(renamed)}


def test_the_adapter_is_said_to_read_a_column_that_data_lack(adapter: Path, data: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(data.read_text().replace("text,label", "review,tone"))
    said = unwrapped(message(call("evaluate", adapter, "--data", renamed)))
    assert "hasnocolumn'text'" in said
    assert "--text-column" in said
    assert f"{adapter}wastrainedwiththatcolumn." in said
    own = unwrapped(message(call("evaluate", adapter, "--data", renamed, "--text-column", "words")))
    assert "hasnocolumn'words'" in own
    assert "wastrained" not in own


def test_a_label_column_without_a_name_is_no_column(adapter: Path, data: Path) -> None:
    refused = call("evaluate", adapter, "--data", data, "--label-column", "")
    assert "has no column ''" in message(refused)


def test_the_adapter_is_named_with_the_labels_that_it_knows(adapter: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text(data.read_text().replace("negative", "awful"))
    said = unwrapped(message(call("evaluate", adapter, "--data", other)))
    assert f"hasthelabels['awful'],and{adapter}knows" in said


def test_labels_that_cannot_be_told_apart_are_said_with_the_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "copy")
    path = tmp_path / "copy" / "ia3_task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": ["unknown", "unheard"]}))
    said = unwrapped(message(call("predict", tmp_path / "copy", "the share rises")))
    assert f"{tmp_path / 'copy'}:Thelabels'unknown'and'unheard'arethesametothetokenizerof" in said
