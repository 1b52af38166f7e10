from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import call, message, succeed
from safetensors.torch import load_file, save_file

import tiny_seq2seq
from ia3.runs.adapters import _in_order

PREFIX = "base_model.model."


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An adapter whose vectors are known, its base nowhere."""
    model = tiny_seq2seq.adapted(head=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.fill_(1.5 if "encoder.block.0" in name else 1)
    model.peft_config["default"].base_model_name_or_path = "nowhere/base"
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(adapter: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of an adapter's file; None removes one."""
    path = adapter / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def test_every_site_with_its_distance(made: Path) -> None:
    content = json.loads(succeed("inspect", made, "--json").stdout)
    sites = {site["path"]: site for site in content["sites"]}
    assert len(sites) == 16
    assert sites["encoder.block.0.layer.0.SelfAttention.k"] == {
        "path": "encoder.block.0.layer.0.SelfAttention.k",
        "side": "output",
        "shape": [32, 1],
        "mean_distance_from_one": 0.5,
        "max_distance_from_one": 0.5,
    }
    wo = sites["decoder.block.1.layer.2.DenseReluDense.wo"]
    assert (wo["side"], wo["shape"], wo["max_distance_from_one"]) == ("input", [1, 64], 0.0)
    assert content["base_model"] == "nowhere/base"
    assert content["labels"] is None
    assert content["modules_trained_in_full"] == {"lm_head.weight": [17, 32]}


def test_the_table_by_layer(made: Path) -> None:
    lines = [line.split() for line in succeed("inspect", made).stdout.splitlines()]
    encoder = lines.index(["Encoder:", "mean", "|l", "−", "1|"])
    decoder = lines.index(["Decoder:", "mean", "|l", "−", "1|"])
    assert lines[encoder + 1 : encoder + 4] == [
        ["block", "k", "v", "ff"],
        ["0", "0.500", "0.500", "0.500"],
        ["1", "0.000", "0.000", "0.000"],
    ]
    assert lines[decoder + 1] == ["block", "k", "v", "cross", "k", "cross", "v", "ff"]
    assert ["trained", "in", "full", "lm_head.weight", "(544", "numbers)"] in lines


def test_the_task_is_told(adapter: Path) -> None:
    shown = succeed("inspect", adapter).stdout
    assert "reads       {text}" in shown
    assert "labels      negative, neutral, positive" in shown


def test_blocks_without_a_vector_are_blank(made: Path) -> None:
    rewrite(made, {f"{PREFIX}encoder.block.1.layer.0.SelfAttention.k.ia3_l": None})
    lines = [line.split() for line in succeed("inspect", made).stdout.splitlines()]
    assert ["1", "0.000", "0.000"] in lines


def test_order_of_blocks() -> None:
    paths = ["decoder.block.0.k", "encoder.block.10.k", "encoder.block.2.k", "encoder.block.2.layer"]
    assert sorted(paths, key=_in_order) == [paths[2], paths[3], paths[1], paths[0]]


def test_numbers_that_are_not_finite(made: Path) -> None:
    rewrite(made, {f"{PREFIX}encoder.block.1.layer.0.SelfAttention.k.ia3_l": torch.full((32, 1), float("nan"))})
    result = call("inspect", made)
    assert result.exit_code == 2
    assert "1 vectors of" in message(result)
    assert "hold NaN or infinity" in message(result)


def test_a_file_without_vectors(made: Path) -> None:
    save_file({"weight": torch.ones(2)}, made / "adapter_model.safetensors")
    result = call("inspect", made)
    assert result.exit_code == 2
    assert "holds no vectors of (IA)³" in message(result)
