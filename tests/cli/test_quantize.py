"""`ia3 train --quantize`: the base is held in few bits in training and for answers, or the reason is told at once."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import call, message, succeed

from ia3.inference.labelling import Overrides, load_labeller
from ia3.inference.loading import Base
from ia3.quantised import first_quantised
from quantising import expect

KINDS = pytest.mark.parametrize(("kind", "format"), [("int8", "int8 of bitsandbytes"), ("nf4", "nf4 of bitsandbytes")])


@KINDS
def test_the_base_of_the_answers_is_another_than_that_of_the_training(
    kind: str, format: str, base: Path, data: Path, tmp_path: Path
) -> None:
    expect("bitsandbytes")
    given = ("--model", base, "--data", data, "--epochs", 1, "--test-size", 0.2, "--quantize", kind)
    said = succeed("train", *given, "--output", tmp_path / "run").stderr
    assert f"is {format}, and the products are of plain weights" in " ".join(said.split())
    assert "will be cast" not in said
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["quantize"] == kind
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["all_parameters"] >= sum(
        each.numel() for each in Base(str(base)).load(Base(str(base)).kind).parameters()
    )
    labeller = load_labeller(str(tmp_path / "run" / "adapter"), Overrides())
    assert labeller.task.quantize == kind
    found = first_quantised(labeller.model)
    assert found is not None
    assert found[1] == format
    wanted = [each["prediction"] for each in result["predictions"]]
    texts = [each["text"] for each in result["predictions"]]
    written = tmp_path / "texts.jsonl"
    written.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    succeed("predict", tmp_path / "run" / "adapter", "--file", written, "--output", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == wanted


def _without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == package else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_a_machine_without_the_package(
    base: Path, data: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without(monkeypatch, "bitsandbytes")
    refused = call("train", "--model", base, "--data", data, "--quantize", "nf4", "--output", tmp_path / "run")
    assert refused.exit_code == 2
    assert "pip install 'ia3[quantized]'" in message(refused)
    assert "--quantize" in message(refused)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    trained = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    task = trained / "ia3_task.json"
    task.write_text(json.dumps(json.loads(task.read_text()) | {"quantize": "nf4"}))
    refused = call("predict", trained, "the share falls")
    assert refused.exit_code == 2
    assert "pip install 'ia3[quantized]'" in message(refused)


def test_a_form_that_there_is_not(base: Path, data: Path) -> None:
    refused = message(call("train", "--model", base, "--data", data, "--quantize", "int4"))
    assert "--quantize is 'int4': input should be 'int8' or 'nf4'" in refused


def test_a_sweep_over_integers(base: Path, data: Path) -> None:
    assert "No such option: --quantize" in message(call("sweep", base, data, "--quantize", "nf4"))
    refused = call("sweep", base, data, "--over", "quantize=nf4,int8")
    assert "can't differ in quantize" in message(refused)


def test_a_head_over_integers(base: Path, data: Path) -> None:
    given = ("--model", base, "--data", data, "--task", "sequence-classification", "--quantize", "int8")
    assert "--quantize" in message(call("train", *given))
    assert "this task is sequence-classification" in message(call("train", *given))


def test_a_base_that_is_quantised_already(base: Path, data: Path, tmp_path: Path) -> None:
    held = Path(shutil.copytree(base, tmp_path / "held"))
    config = held / "config.json"
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | stored))
    refused = message(call("train", "--model", held, "--data", data, "--quantize", "nf4"))
    assert "is quantised already (gptq)" in refused
