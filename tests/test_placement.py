"""What tools do to a model's modules after an adapter was attached, and vectors that nothing reads."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from ia3 import IA3Config, PeftModel, get_peft_model, inject_adapter_in_model


class OtherLinear(nn.Linear):
    """What a quantising tool puts in the place of a linear layer: another class, the same weight, no children."""

    @classmethod
    def of(cls, old: nn.Linear) -> OtherLinear:
        new = cls(old.in_features, old.out_features, bias=old.bias is not None)
        new.weight, new.bias = old.weight, old.bias
        return new


def by_setattr(model):
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, OtherLinear.of(module))


def by_the_dictionary(model):
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Linear:
                module._modules[name] = OtherLinear.of(child)


def by_set_submodule(model):
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, OtherLinear.of(module))


def by_copying_blocks(model):
    model.model.layers = nn.ModuleList([copy.deepcopy(layer) for layer in model.model.layers])


def by_checkpoint_wrappers_of_layers(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))


def by_checkpoint_wrappers_of_blocks(model):
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")


TOOLS = (
    by_setattr,
    by_the_dictionary,
    by_set_submodule,
    by_copying_blocks,
    by_checkpoint_wrappers_of_layers,
    by_checkpoint_wrappers_of_blocks,
)


@pytest.fixture
def adapted(tiny, randomise):
    return lambda name="llama", **config: randomise(get_peft_model(tiny(name), IA3Config(**config))).eval()


def count_vectors(model) -> int:
    return sum(".ia3_l." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("tool", TOOLS)
def test_vectors_come_along_when_a_tool_replaces_modules(adapted, output, tool, tmp_path):
    model = adapted()
    expected, vectors = output(model), count_vectors(model)
    tool(model)
    assert torch.equal(output(model), expected)
    assert count_vectors(model) == vectors
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == vectors


@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_replaced_can_be_saved_merged_and_unloaded_before_any_forward(adapted, output, tool, tmp_path, tiny):
    model, other = adapted(), adapted()
    expected = output(model)
    tool(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(PeftModel.from_pretrained(tiny("llama"), tmp_path)), expected)
    torch.testing.assert_close(output(model.merge_and_unload()), output(other.merge_and_unload()))
    assert count_vectors(model) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("tool", TOOLS)
def test_vectors_train_on_after_their_modules_were_replaced(adapted, feed, tool):
    model = adapted()
    tool(model)
    model.train()
    batch = feed(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if ".ia3_l." in name]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantisation_carries_hooks_without_vectors(adapted, output):
    model = adapted()
    expected = output(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(RuntimeError, match="hooks alone: call the whole model"):
        quantised.model(input_ids=torch.tensor([[1, 2]]))
    found = output(quantised)
    with quantised.disable_adapter():
        base = output(quantised)
    assert (found - expected).abs().max() < 0.5 * (base - expected).abs().max()
    assert count_vectors(quantised) == count_vectors(model)
    assert torch.equal(output(model), expected)


def test_a_compiled_forward_finds_replaced_modules_too(adapted, output):
    model = adapted()
    expected = output(model)
    by_setattr(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(input_ids=torch.tensor([[1, 2]]))
    assert count_vectors(model) > 0
    assert torch.equal(output(model), expected)


def test_an_injected_adapter_is_found_again_and_leaves_no_trace(tiny, randomise, output):
    model = inject_adapter_in_model(IA3Config(), tiny("llama"))
    randomise(model)
    expected = output(model)
    by_setattr(model)
    assert torch.equal(output(model), expected)


def test_modules_trained_in_full_come_along(tiny, output, tmp_path):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS")).eval()
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.add_(1)
    expected = output(model)
    by_setattr(model)  # the trained copy, too, is a linear layer
    assert torch.equal(output(model), expected)
    assert type(model.classifier.modules_to_save["default"]) is nn.Linear
    by_setattr(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], model.classifier.modules_to_save["default"].weight)


def test_mixed_batches_after_modules_were_replaced(adapted, feed):
    model = adapted()
    model.add_adapter("b", IA3Config())
    batch = feed(model)
    with torch.no_grad():
        expected = model(**batch, adapter_names=["default", "b"]).logits
        by_setattr(model)
        found = model(**batch, adapter_names=["default", "b"]).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (
            lambda model: model.set_submodule("model.layers.1.self_attn.k_proj", nn.Linear(16, 16)),
            r"1 modules .*k_proj: a Linear with other channels",
        ),
        (
            lambda model: model.set_submodule("model.layers.1.self_attn", nn.Identity()),
            r"2 modules .*k_proj: it is gone",
        ),
        (
            lambda model: setattr(model.model, "layers", model.model.layers[:1]),
            r"3 modules .*layers\.1\.self_attn\.k_proj: it is gone",
        ),
    ],
)
def test_a_vector_whose_module_is_gone_is_an_error_and_still_saved(adapted, output, damage, why, tmp_path):
    model = adapted()
    expected = {name: p.detach().clone() for name, p in model.named_parameters() if ".ia3_l." in name}
    damage(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{why}.*save_pretrained"):
            output(model)
    with pytest.raises(RuntimeError, match=why):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"{key.removeprefix('base_model.model.')}.default" for key in saved} == set(expected)
    for name, vector in expected.items():
        assert torch.equal(saved[f"base_model.model.{name.removesuffix('.default')}"], vector)


def test_putting_the_module_back_mends_it(adapted, output):
    model = adapted()
    expected, path = output(model), "model.layers.1.self_attn.k_proj"
    old = model.get_submodule(path)
    model.set_submodule(path, nn.Identity())
    with pytest.raises(RuntimeError, match="Identity"):
        output(model)
    model.set_submodule(path, old)
    assert torch.equal(output(model), expected)


def test_copies_and_pickles_find_their_own_modules(adapted, output):
    model = adapted()
    expected = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        by_setattr(other)
        assert torch.equal(output(other), expected)
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    assert torch.equal(output(model), expected)


def test_the_record_keeps_no_model_alive(adapted, output):
    model = adapted()
    output(model)
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


# Vectors that nothing reads


def bloom(**config):
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4, **config))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))


UNREAD = [
    (lambda: bloom(slow_but_exact=True, pretraining_tp=2), {}, "dense_4h_to_h", "BloomMLP"),
    (mamba, {"target_modules": ["dt_proj"], "feedforward_modules": []}, "dt_proj", "MambaMixer"),
    (mamba, {"target_modules": ["conv1d"], "feedforward_modules": []}, "conv1d", "MambaMixer"),
]
IDS = torch.tensor([[5, 6, 7, 1]])


@pytest.mark.parametrize(("make", "config", "name", "around"), UNREAD)
def test_a_vector_that_nothing_reads_is_an_error_in_training(make, config, name, around):
    model = get_peft_model(make(), IA3Config(**config)).train()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{name}\), although the {around} around"):
            model(input_ids=IDS, labels=IDS)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(("make", "config", "name", "around"), UNREAD)
def test_a_vector_that_nothing_reads_is_said_in_evaluation(make, config, name, around, caplog):
    model = get_peft_model(make(), IA3Config(**config)).eval()
    for _ in range(2):
        model(input_ids=IDS)
    assert caplog.text.count(f"{name}), although the {around} around") == 1


def test_a_vector_that_is_read_is_heard_once(adapted, feed, caplog):
    model = adapted("bloom").train()
    batch = feed(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for _ in range(2):
        model(**batch, labels=batch["input_ids"])
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model._ia3.heard == {("default", True)}
    assert "not called" not in caplog.text


class Experts(nn.Module):
    """One of several layers is chosen, and a tower runs where it has inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.tower = nn.Sequential(nn.Linear(4, 4))

    def forward(self, inputs, tower=None):
        hidden = self.experts[1](inputs)
        return hidden if tower is None else hidden + self.tower(tower)


def test_a_choice_of_experts_and_a_tower_without_inputs_are_no_errors(caplog):
    config = IA3Config(target_modules="all-linear", feedforward_modules=[])
    model = get_peft_model(Experts(), config).train()
    model(torch.ones(2, 4))
    assert "1 adapted modules were not called in the first training step (such as tower.0)" in caplog.text
    model(torch.ones(2, 4))
    assert caplog.text.count("not called") == 1


def test_a_module_trained_in_full_that_nothing_calls_is_said(tiny, feed, caplog):
    model = get_peft_model(tiny("bart"), IA3Config(modules_to_save=["shared"])).train()
    batch = feed(model)
    model(**batch)
    assert "model.shared), although the BartModel around" in caplog.text


def test_a_training_step_that_ctrl_c_left_is_not_heard(adapted, feed):
    """torch calls no hook after it, so the next forward must not take its place."""
    model = adapted("bloom").train()
    batch = feed(model)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    model.eval()(**batch)
    assert model._ia3.heard == {("default", False)}


def test_a_forward_that_fails_is_listened_to_again(adapted, feed):
    model = adapted("bloom").train()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    assert model._ia3.listener is None
    assert model._ia3.heard == set()
    batch = feed(model)
    model(**batch, labels=batch["input_ids"])
    assert model._ia3.heard == {("default", True)}
