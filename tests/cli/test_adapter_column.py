"""Rows answered by adapters of their own: each as its adapter alone answers it, in whatever company."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import call, message, succeed
from safetensors.torch import load_file, save_file

import ia3.table
import tiny_classifier
import tiny_seq2seq

TEXTS = [row.text for row in tiny_seq2seq.examples(16)]
# What each customer's task says otherwise than the one that was trained.
CUSTOMERS: dict[str, dict[str, Any]] = {
    "acme": {},
    "böhm & söhne": {"labels": ["positive", "negative"]},
    "delta/north": {"template": "the share {text}", "max_length": 8},
    "writes": {"answer_by": "generation"},
    "default": {},
}


@pytest.fixture(scope="module")
def fleet(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter a customer, each with vectors and a task of its own; one lies in a run's folder."""
    folder = tmp_path_factory.mktemp("fleet")
    for seed, (name, task) in enumerate(CUSTOMERS.items()):
        own = shutil.copytree(adapter, folder / name / ("adapter" if name == "acme" else ""))
        vectors = load_file(own / "adapter_model.safetensors")
        torch.manual_seed(seed)
        drawn = {key: vector * torch.empty_like(vector).uniform_(0.2, 3) for key, vector in vectors.items()}
        save_file(drawn, own / "adapter_model.safetensors", metadata={"format": "pt"})
        saved = json.loads((own / "ia3_task.json").read_text())
        (own / "ia3_task.json").write_text(json.dumps(saved | task))
    return folder


def rows_of(names: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["customer", "text"], *zip(names, TEXTS, strict=False)])
    return path


def test_each_row_is_answered_as_by_its_adapter_alone(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []
    gather = ia3.table.AdapterTable.gather
    monkeypatch.setattr(ia3.table.AdapterTable, "gather", lambda *each: gathered.append({*each[1]}) or gather(*each))
    names = [list(CUSTOMERS)[place % len(CUSTOMERS)] for place in range(len(TEXTS))]
    data = rows_of(names, tmp_path)
    flags = ("--file", data, "--adapter-column", "customer")
    found = json.loads(succeed("predict", fleet, *flags, "--json").stdout)["predictions"]
    assert [each["adapter"] for each in found] == names
    assert max(map(len, gathered)) >= 2  # some that answer alike share a batch
    alone = {name: json.loads(_alone(fleet, name, data).stdout)["predictions"] for name in CUSTOMERS}
    for place, (name, each) in enumerate(zip(names, found, strict=True)):
        expected = alone[name][place]
        assert (each["label"], each["text"]) == (expected["label"], expected["text"])
        assert each.get("probabilities") == pytest.approx(expected.get("probabilities"), abs=1e-5)
    assert len({each["label"] for each in found}) > 1
    some = [each["probability"] for each in found if "probability" in each]
    assert len(set(some)) > len(some) / 2  # the vectors act


def _alone(fleet: Path, name: str, data: Path) -> Any:
    return succeed("predict", fleet / name / ("adapter" if name == "acme" else ""), "--file", data, "--json")


def test_the_output_has_a_column_for_each_label_of_any_adapter(fleet: Path, tmp_path: Path) -> None:
    names = ["böhm & söhne", "writes", "acme", "acme"]
    output = tmp_path / "out.csv"
    flags = ("--file", rows_of(names, tmp_path), "--adapter-column", "customer")
    assert "4 predictions are in" in succeed("predict", fleet, *flags, "--output", output).stdout
    with output.open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["customer"] for row in written] == names
    assert [row["probability_neutral"] == "" for row in written] == [True, True, False, False]
    assert all(float(row["probability_positive"]) <= 1 for row in written if row["customer"] != "writes")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["acme", "acne"], "line 3 and in 1 of 2 rows. Did you mean 'acme' for 'acne'?"),
        (["acme", "../acme"], "holds no adapter '../acme'"),
        (["acme", ""], "line 3 names no adapter in 'customer', as 1 of 2 rows"),
    ],
)
def test_a_name_that_is_none_is_refused_before_any_work(
    fleet: Path, tmp_path: Path, names: list[str], said: str
) -> None:
    refused = call("predict", fleet, "--file", rows_of(names, tmp_path), "--adapter-column", "customer")
    assert refused.exit_code == 2
    assert said in message(refused)


def test_flags_that_do_not_fit(fleet: Path, tmp_path: Path, adapter: Path) -> None:
    data = rows_of(["acme"], tmp_path)
    assert "names a column of a --file" in message(call("predict", fleet, "--adapter-column", "customer", "a text"))
    assert "no column 'client'" in message(call("predict", fleet, "--file", data, "--adapter-column", "client"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no adapters" in message(call("predict", empty, "--file", data, "--adapter-column", "customer"))


def test_adapters_with_heads_of_their_own_answer_their_rows(tiny: Callable[..., Any], tmp_path: Path) -> None:
    base = tmp_path / "encoder"
    tiny("bert", initializer_range=0.3).save_pretrained(base)
    tiny_classifier.tokenizer().save_pretrained(base)
    for seed, labels in enumerate((tiny_classifier.LABELS, ("bad", "good"))):
        rows = [f"{row.text},{labels[place % len(labels)]}" for place, row in enumerate(tiny_classifier.labelled(12))]
        (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        how = ("--epochs", 2, "--lr", 0.05, "--seed", seed, "--output", tmp_path / "runs" / f"c{seed}")
        succeed("train", "--model", base, "--data", tmp_path / "data.csv", *how)
    data = tmp_path / "rows.jsonl"
    texts = tiny_classifier.TEXTS
    data.write_text(
        "".join(json.dumps({"text": text, "by": f"c{place % 2}"}) + "\n" for place, text in enumerate(texts))
    )
    flags = ("--file", data, "--adapter-column", "by", "--json")
    found = json.loads(succeed("predict", tmp_path / "runs", *flags).stdout)["predictions"]
    for name in ("c0", "c1"):
        alone = succeed("predict", tmp_path / "runs" / name / "adapter", "--file", data, "--json").stdout
        for each, expected in zip(found, json.loads(alone)["predictions"], strict=True):
            if each["adapter"] == name:
                assert each["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
