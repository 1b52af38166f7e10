"""Layer and model status, against PEFT's."""

import warnings

import peft
import pytest
import torch

from ia3 import IA3Config, get_layer_status, get_model_status, get_peft_model

SETTINGS = {
    "target_modules": ["key", "value", "output.dense"],
    "feedforward_modules": ["output.dense"],
    "exclude_modules": ["attention.output.dense"],
    "task_type": "SEQ_CLS",
}


@pytest.fixture
def pair(tiny):
    ours = get_peft_model(tiny("bert"), IA3Config(**SETTINGS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny("bert"), peft.IA3Config(**SETTINGS))
    for model, config in ((ours, IA3Config), (theirs, peft.IA3Config)):
        model.add_adapter("other", config(**SETTINGS))
    return ours, theirs


def compare(ours, theirs):
    mine, peers = ours.get_model_status(), theirs.get_model_status()
    for field in (
        "base_model_type",
        "adapter_model_type",
        "peft_types",
        "trainable_params",
        "total_params",
        "num_adapter_layers",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "available_adapters",
        "devices",
        "quantization_backend",
    ):
        assert getattr(mine, field) == getattr(peers, field), field


def layers(model):
    return {
        status.name.removeprefix("model."): (
            status.module_type,
            status.active_adapters,
            status.available_adapters,
            status.requires_grad,
            status.enabled,
            status.devices,
        )
        for status in model.get_layer_status()
    }


def test_as_peft_says(pair):
    ours, theirs = pair
    compare(ours, theirs)
    assert layers(ours) == layers(theirs)
    for model in pair:
        model.set_adapter("other")
    compare(ours, theirs)
    assert layers(ours) == layers(theirs)


def test_disabled(pair):
    ours, theirs = pair
    with ours.disable_adapter(), theirs.disable_adapter():
        assert ours.get_model_status().enabled is False
        assert theirs.get_model_status().enabled is False
        for model in pair:
            assert {status.enabled for status in model.get_layer_status()} == {False}
    assert ours.get_model_status().enabled is True


def test_merged(tiny):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert all(status.merged_adapters == ["default"] for status in model.get_layer_status())
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []


def test_irregular_gradients(tiny):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.encoder.block[0].layer[0].SelfAttention.k.ia3_l.default.requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_a_bare_model_is_refused(tiny):
    for function in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="carries no adapter"):
            function(tiny("t5"))


def test_parameters_of_four_bits_count_twice():
    from ia3.status import count_parameters

    class Params4bit(torch.nn.Parameter):
        pass

    module = torch.nn.Module()
    module.packed = Params4bit(torch.zeros(5, dtype=torch.uint8), requires_grad=False)
    module.plain = torch.nn.Parameter(torch.zeros(3))
    assert count_parameters(module) == (3, 13)
