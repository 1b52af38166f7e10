from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_seq2seq
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.runs.adapters import combine_adapters, read_adapter


def saved(folder: Path, base: nn.Module, **config: Any) -> Path:
    """An adapter whose vectors are 1.5."""
    model = get_peft_model(base, IA3Config(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.fill_(1.5)
    model.peft_config["default"].base_model_name_or_path = "some/base"
    model.save_pretrained(folder)
    return folder


def test_a_combination_is_read_as_it_was_made(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", tiny_seq2seq.base())
    other = saved(tmp_path / "other", tiny_seq2seq.base(), target_modules=["v"], feedforward_modules=[])
    made = combine_adapters([one, other], tmp_path / "both", [1.0, 3.0])
    found = read_adapter(tmp_path / "both")
    assert made.task is None
    assert found.vectors.keys() == read_adapter(one).vectors.keys()
    for site, vector in found.vectors.items():
        assert torch.equal(vector, made.vectors[site])
        expected = 1.5 if site.path.endswith(".v") else 1.125
        torch.testing.assert_close(vector, torch.full(site.shape, expected))


def test_a_vector_inside_a_module_that_another_trains_in_full(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", tiny_seq2seq.base(), target_modules=["k"], modules_to_save=["DenseReluDense"])
    inside = saved(tmp_path / "inside", tiny_seq2seq.base(), target_modules=["wo"], feedforward_modules=["wo"])
    with pytest.raises(ValueError, match=r"wo'.*trained in full by '.*whole'"):
        combine_adapters([whole, inside], tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("inputs", [[], ["0"]])
def test_a_convolution_keeps_its_side(tmp_path: Path, inputs: list[str]) -> None:
    """Its vector has the same shape at either side."""
    base = nn.Sequential(nn.Conv2d(2, 3, 1))
    one = saved(tmp_path / "one", base, target_modules=["0"], feedforward_modules=inputs)
    combine_adapters([one], tmp_path / "not", [-1.0], "task_arithmetic")
    model = PeftModel.from_pretrained(nn.Sequential(nn.Conv2d(2, 3, 1)), tmp_path / "not")
    assert torch.equal(model[0].ia3_l["default"].flatten(), torch.full((2 if inputs else 3,), 0.5))


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", tiny_seq2seq.base())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file: name another"):
        combine_adapters([one], tmp_path / "file" / "both")
