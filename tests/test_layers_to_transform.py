"""Layers chosen by number: PEFT's own rule, and files that PEFT's IA3 reads, which has no such field."""

import json

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists

from ia3 import IA3Config, NoMatchingPeftModuleError, PeftConfig, PeftModel, find_sites, get_peft_model
from ia3.config import CONFIG_NAME

T5 = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}


def _paths(model, **fields):
    return [site.path for site in find_sites(model, IA3Config(**fields)).layout.sites]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("t5", T5 | {"layers_to_transform": [1]}),
        ("t5", T5 | {"layers_to_transform": 0}),
        ("t5", T5 | {"layers_to_transform": [0, 1], "layers_pattern": ["decoder.block"]}),
        ("t5", {"target_modules": ["k"], "layers_to_transform": [1], "layers_pattern": "layer"}),
        ("llama", {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]}),
        ("bert", {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": ["x", "layer"]}),
    ],
)
def test_the_layers_are_those_of_pefts_rule(tiny, family, fields):
    model = tiny(family)
    # PEFT's rule as its other methods have it.
    config = peft.LoraConfig(**{key: value for key, value in fields.items() if key != "feedforward_modules"})
    expected = [path for path, _ in model.named_modules() if check_target_module_exists(config, path)]
    fields = {"feedforward_modules": []} | fields
    assert expected
    assert _paths(model, **fields) == expected


def test_a_name_in_the_list_of_layers_itself_counts():
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3)))
    assert _paths(model, target_modules=["0"], feedforward_modules=[], layers_to_transform=[2]) == ["2.0"]
    lists = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"k": torch.nn.Linear(2, 2)})])})
    assert _paths(lists, target_modules=["k"], feedforward_modules=[], layers_to_transform=[0]) == ["layers.0.k"]


def test_defaults_and_all_linear_take_layers_too(tiny):
    assert {path.split(".")[2] for path in _paths(tiny("llama"), layers_to_transform=[1])} == {"1"}
    chosen = _paths(tiny("llama"), target_modules="all-linear", feedforward_modules=[], layers_to_transform=[0])
    assert len(chosen) == 7
    assert {path.split(".")[2] for path in chosen} == {"0"}
    assert not any("attention.output" in path for path in _paths(tiny("bert"), layers_to_transform=[0]))


def test_the_file_loads_in_peft_without_the_fields(tiny, randomise, output, tmp_path):
    model = randomise(get_peft_model(tiny("t5"), IA3Config(**T5, layers_to_transform=[1])))
    model.save_pretrained(tmp_path)
    assert not any(key.startswith("layers_") for key in json.loads((tmp_path / CONFIG_NAME).read_text()))
    theirs = peft.PeftModel.from_pretrained(tiny("t5"), str(tmp_path))
    assert torch.equal(output(theirs), output(model))
    assert torch.equal(output(PeftModel.from_pretrained(tiny("t5"), tmp_path)), output(model))


def test_a_configuration_alone_is_written_in_pefts_terms(tiny, tmp_path):
    IA3Config(**T5, layers_to_transform=1).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.layers_to_transform is None
    assert (
        find_sites(tiny("t5"), config).layout == find_sites(tiny("t5"), IA3Config(**T5, layers_to_transform=1)).layout
    )


def test_a_file_with_the_fields_is_heard(tiny, tmp_path):
    IA3Config(layers_to_transform=[0]).save_pretrained(tmp_path)  # the family's default: nothing to put them into yet
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["layers_to_transform"] == [0]
    assert {path.split(".")[2] for path in _paths(tiny("llama"), layers_to_transform=[0])} == {
        site.path.split(".")[2] for site in find_sites(tiny("llama"), PeftConfig.from_pretrained(tmp_path)).layout.sites
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [0, 9]}, r"layer 9 of T5ForCond.* has none of the target_modules.*encoder\.block\.0"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"layer 0 of blocks"),
        ({"layers_to_transform": [0], "target_modules": ["k", "vv"], "feedforward_modules": []}, "'vv' matches no"),
    ],
)
def test_a_layer_that_is_not_there_is_an_error(tiny, fields, message):
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        find_sites(tiny("t5"), IA3Config(**T5 | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_pattern": ["block"]}, "pass that too"),
        ({"layers_to_transform": []}, "is empty"),
        ({"layers_to_transform": [0], "target_modules": ".*k"}, "regular expression"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IA3Config(**fields)
