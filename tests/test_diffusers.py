"""diffusers' UNets with adapters: vectors at convolutions too, files, and their own adapter methods."""

from __future__ import annotations

import peft
import pytest
import torch

from builders import randomise
from ia3 import IA3Config, PeftModel, get_peft_model

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

INPUTS = (
    torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
    torch.tensor([1, 2]),
    torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4)),
)


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def config():
    return IA3Config(target_modules=["to_k", "to_v", "conv1"], feedforward_modules=[])


def adapted():
    model = get_peft_model(unet(), config())
    randomise(model)
    return model


def output(model):
    with torch.no_grad():
        return model(*INPUTS).sample


def test_files_go_both_ways(tmp_path):
    model = adapted()
    assert not torch.allclose(output(model), output(unet()), atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(unet(), tmp_path)), output(model))
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(unet(), tmp_path)), output(model))


def test_every_vector_trains_through_gradient_checkpointing():
    model = adapted().train()
    model.enable_gradient_checkpointing()
    model(*INPUTS).sample.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_merging_and_unloading():
    model, expected = adapted(), output(adapted())
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected)
    model.unmerge_adapter()
    assert torch.equal(output(model.unload()), output(unet()))
    assert type(model) is diffusers.UNet2DConditionModel


def test_a_configuration_of_ours_given_to_the_models_own_method():
    model = unet()
    with pytest.raises(ValueError, match="should be an instance of PeftConfig"):
        model.add_adapter(config())
    assert torch.equal(output(get_peft_model(model, config())), output(unet()))  # it left nothing in the way


@pytest.mark.parametrize("name", [name for name in dir(diffusers.loaders.PeftAdapterMixin) if name[0] != "_"])
def test_each_adapter_method_is_ours_or_says_what_is(name, tmp_path):
    model = adapted()
    before = output(model)
    ours = {"active_adapters", "add_adapter", "disable_adapters", "enable_adapters", "set_adapter"}
    if name in ours:
        assert name in vars(PeftModel)
        return
    with pytest.raises(NotImplementedError, match=f"{name} works on PEFT's layers, .*: call "):
        getattr(model, name)()
    assert torch.equal(output(model), before)
    assert list(model.peft_config) == ["default"]
    assert getattr(model.unload(), name).__name__ == name  # the model's own again
