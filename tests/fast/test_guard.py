"""Whatever could make a fused loss another than the model's own forward is noticed, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_t5 import adapted, batch_of
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

from builders import models_own
from ia3 import IA3Config, get_peft_model
from ia3.fast.guard import Guard

Change = Callable[[Any, Any], object]
DENSE = "encoder.block.0.layer.1.DenseReluDense"
ATTENTION = "decoder.block.0.layer.0.SelfAttention"


def with_data(path: str) -> Change:
    def change(model: Any, patch: Any) -> None:
        parameter = model.get_parameter(path)
        parameter.data = parameter.data.clone()

    return change


def assigned(path: str) -> Change:
    def change(model: Any, patch: Any) -> None:
        value = nn.Parameter(model.get_parameter(path).data, requires_grad=False)  # in the same place
        model.get_submodule(path.rsplit(".", 1)[0]).weight = value

    return change


def attribute(path: str, name: str, value: Any) -> Change:
    return lambda model, patch: setattr(model.get_submodule(path), name, value)


def subclassed(path: str) -> Change:
    def change(model: Any, patch: Any) -> None:
        module = model.get_submodule(path)
        module.__class__ = type(type(module).__name__, (type(module),), {})

    return change


def another_adapter(model: Any, patch: Any) -> None:
    model.add_adapter("more", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("more")


def same_name_again(model: Any, patch: Any) -> None:
    another_adapter(model, patch)
    model.delete_adapter("default")
    model.add_adapter("default", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("default")


def list_in_the_configuration(model: Any, patch: Any) -> None:
    model.config.task_specific_params["more"] = 1


def removed_hooks(model: Any, patch: Any) -> None:
    for module in model.modules():
        module._forward_hooks = OrderedDict()


def hooks_in_a_new_dictionary(model: Any, patch: Any) -> None:
    module = model.get_submodule(DENSE)
    module._forward_hooks = OrderedDict()
    module.register_forward_hook(lambda *_: None)


def swapped_hook(model: Any, patch: Any) -> None:
    hooks = model.get_submodule(f"{ATTENTION}.k")._forward_hooks
    hooks[next(iter(hooks))] = lambda *_: None


@torch.no_grad()
def grown_bias(model: Any, patch: Any) -> None:
    model.get_parameter(f"{ATTENTION}.relative_attention_bias.weight").add_(1)


CHANGES: dict[str, Change] = {
    "a weight's data": with_data("encoder.block.1.layer.0.SelfAttention.q.weight"),
    "a norm's data": with_data("decoder.final_layer_norm.weight"),
    "a weight in the same place": assigned("encoder.block.0.layer.0.SelfAttention.o.weight"),
    "a folded tensor in place": grown_bias,
    "a bias": lambda model, patch: model.get_submodule(f"{ATTENTION}.q").register_parameter(
        "bias", nn.Parameter(torch.zeros(16))
    ),
    "a buffer": lambda model, patch: model.get_submodule(DENSE).register_buffer("scale", torch.ones(())),
    "a module": lambda model, patch: model.get_submodule(DENSE).add_module("more", nn.Identity()),
    "another module": attribute(DENSE, "act", nn.SiLU()),
    "a module less": lambda model, patch: delattr(model.get_submodule(DENSE), "dropout"),
    "a class": subclassed(f"{DENSE}.wi_0"),
    "the model's class": subclassed(""),
    "a forward": attribute(DENSE, "forward", lambda x: x),
    "the model's forward": attribute("", "forward", lambda **_: None),
    "a method": attribute(ATTENTION, "compute_bias", lambda *_: None),
    "the model's loss": attribute("", "loss_function", lambda *_: None),
    "a class's forward": lambda model, patch: patch.setattr(modeling_t5.T5LayerNorm, "forward", lambda self, x: x),
    "a class's method": lambda model, patch: patch.setattr(modeling_t5.T5Attention, "compute_bias", lambda *_: None),
    "a class's call": lambda model, patch: patch.setattr(
        modeling_t5.T5LayerNorm, "__call__", lambda *_: None, raising=False
    ),
    "a function beside the classes": lambda model, patch: patch.setattr(modeling_t5, "create_causal_mask", None),
    "a function of torch": lambda model, patch: patch.setattr(functional, "linear", lambda *_: None),
    "the attention": lambda model, patch: patch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *_: None
    ),
    "another attention": lambda model, patch: model.set_attn_implementation("eager"),
    "a hook": lambda model, patch: model.get_submodule(DENSE).register_forward_hook(lambda *_: None),
    "a hook before": lambda model, patch: model.get_submodule(DENSE).register_forward_pre_hook(lambda *_: None),
    "a hook of backward": lambda model, patch: model.get_submodule(DENSE).register_full_backward_hook(lambda *_: None),
    "the model's hook": lambda model, patch: model.register_forward_hook(lambda *_: None),
    "hooks that are gone": removed_hooks,
    "hooks in another dictionary": hooks_in_a_new_dictionary,
    "a hook in the place of another": swapped_hook,
    "the configuration": lambda model, patch: setattr(model.config, "dropout_rate", 0.5),
    "the decoder's configuration": lambda model, patch: setattr(model.decoder.config, "num_heads", 2),
    "a list in the configuration": list_in_the_configuration,
    "a rate of dropout": attribute(f"{DENSE}.dropout", "p", 0.5),
    "a rate of an attention's dropout": attribute(ATTENTION, "dropout", 0.5),
    "an epsilon": attribute("decoder.final_layer_norm", "variance_epsilon", 0.1),
    "causality": attribute(ATTENTION, "is_causal", "unheard of"),
    "the number of heads": attribute(ATTENTION, "n_heads", 2),
    "checkpointing": lambda model, patch: model.gradient_checkpointing_enable(),
    "a frozen weight that is trained": lambda model, patch: model.lm_head.weight.requires_grad_(True),
    "a vector that isn't": lambda model, patch: next(p for p in model.parameters() if p.requires_grad).requires_grad_(
        False
    ),
    "another adapter": another_adapter,
    "an adapter of the same name": same_name_again,
    "none": lambda model, patch: model.unload(),
    "merged": lambda model, patch: model.merge_adapter(),
    "another precision": lambda model, patch: model.float(),
}


def guarded(tiny: Any, randomise: Any) -> tuple[Any, Guard]:
    model = adapted(tiny, randomise, "t5 gated").train()
    model.config.task_specific_params = {"some": 1}
    folded = model.get_parameter(f"{ATTENTION}.relative_attention_bias.weight")
    return model, Guard(model, [folded])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(tiny, randomise, monkeypatch, change) -> None:
    model, guard = guarded(tiny, randomise)
    assert guard.is_valid()
    change(model, monkeypatch)
    found = [guard.is_valid(), guard.is_valid()]
    monkeypatch.undo()
    assert found == [False, False]


@pytest.mark.parametrize("change", [modeling_llama.rotate_half, modeling_llama.eager_attention_forward])
def test_functions_of_rotary_models(tiny, monkeypatch, change) -> None:
    model = get_peft_model(tiny("llama"), IA3Config(task_type="CAUSAL_LM"))
    guard = Guard(model)
    monkeypatch.setattr(modeling_llama, change.__name__, lambda *_: None)
    assert not guard.is_valid()
    monkeypatch.undo()
    assert guard.is_valid()
    model.model.layers[1].self_attn.is_causal = False
    assert not guard.is_valid()


def disabled(model: Any) -> None:
    with model.disable_adapter():
        pass


def moved_in_place(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" not in name:
                parameter.mul_(2)


UNCHANGED: dict[str, Callable[[Any], object]] = {
    "weights in place": moved_in_place,
    "modes": lambda model: model.eval(),
    "a forward": lambda model: models_own(model, **batch_of()),
    "a call": lambda model: model(**batch_of()).loss.backward(),
    "generation": lambda model: model.eval().generate(batch_of()["input_ids"], max_new_tokens=2),
    "an attribute of one's own": lambda model: setattr(model.encoder, "note", 1),
    "a hook that went again": lambda model: model.encoder.register_forward_hook(lambda *_: None).remove(),
    "adapters that are active again": disabled,
    "gradients": lambda model: model.zero_grad(),
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_what_changes_no_number_is_no_change(tiny, randomise, change) -> None:
    model, _ = guarded(tiny, randomise)
    model(**batch_of())  # which lays weights out anew
    guard = Guard(model)
    change(model)
    assert guard.is_valid()


def test_parts_in_another_mode(tiny, randomise) -> None:
    model, guard = guarded(tiny, randomise)
    assert guard.in_one_mode
    model.get_submodule(f"{DENSE}.dropout").eval()
    assert not guard.in_one_mode
    model.eval()
    assert guard.in_one_mode
    model.get_submodule(ATTENTION).train()
    assert not guard.in_one_mode


def test_a_number_in_the_place_of_an_equal_one(tiny, randomise) -> None:
    """Tensors of one number can be compared as if they were numbers."""
    model, _ = guarded(tiny, randomise)
    model.encoder.register_buffer("scale", torch.ones(1))
    guard = Guard(model)
    assert guard.is_valid()
    model.encoder.scale = torch.ones(1)
    assert not guard.is_valid()


def test_the_model_is_not_kept_alive(tiny, randomise) -> None:
    model, guard = guarded(tiny, randomise)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert not guard.is_valid()
