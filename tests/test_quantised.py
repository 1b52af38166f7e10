"""Bases whose linear layers are held in few bits: what acts, trains and merges there as on a plain base."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from builders import CAUSAL, randomise
from ia3 import (
    IA3Config,
    PeftModel,
    compile_step,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from ia3 import merging as merging_module
from ia3.fast.graphed import unsupported_reason
from ia3.quantised import first_quantised, fold, held_by, layer_without_backward
from quantising import DYNAMIC, KINDS, Packed, Scaled, expect, quantised

OUTPUTS = {**CAUSAL, "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
IDS = torch.arange(3, 27).view(3, 8)

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=64, attention_bias=True, **shape, **special)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:  # larger than transformers draws them, so that the layers matter
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval()


def base(kind: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    expect(KINDS[kind].package)
    return quantised(llama(dtype), KINDS[kind].quantise)


def adapt(model: nn.Module, *more: str, **config: object) -> nn.Module:
    model = get_peft_model(model, IA3Config(**(config or CAUSAL)))
    for name in more:
        model.add_adapter(name, IA3Config(**(config or CAUSAL)))
    randomise(model, spread=0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module, **more: object) -> torch.Tensor:
    return model(input_ids=IDS, **more).logits


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every number that a quantised layer computes with."""
    held = {path: held_by(module) for path, module in model.named_modules()}
    found = {f"{path} {name}": part for path, each in held.items() if each for name, part in each.parts().items()}
    assert found
    return {
        name: (part.view(torch.uint8) if part.element_size() == 1 else part).clone() for name, part in found.items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm())


def plain(model: nn.Module) -> nn.Module:
    """The base with linear layers that hold the same values as numbers."""
    made = llama()
    for path, module in model.named_modules():
        held = held_by(module)
        if held is not None:
            made.get_submodule(path).weight.data = held.values().clone()
    return made


# Acting and training


@kinds
@dtypes
def test_an_activation_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """A vector in fp32 times a half-precision activation would be fp32 from there on."""
    model = adapt(base(kind, dtype))
    seen = {}
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda module, args, output, path=path: seen.update({path: output.dtype}))
    assert logits(model).dtype is dtype
    assert {*seen.values()} == {dtype}
    assert {vector.dtype for name, vector in model.named_parameters() if ".ia3_l." in name} == {torch.float32}


@kinds
def test_a_vector_that_does_not_act(kind: str) -> None:
    model = base(kind)
    before = logits(model)
    wanted = logits(adapt(plain(model)))
    model = adapt(model)
    assert distance(logits(model), wanted) < 0.03
    assert distance(logits(model), before) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@kinds
def test_a_gradient_that_is_not_the_plain_layers(kind: str) -> None:
    model = base(kind)
    expected, found = adapt(plain(model)).train(), adapt(model).train()
    for each in (expected, found):
        each(input_ids=IDS, labels=IDS).loss.backward()
    wanted = dict(expected.named_parameters())
    vectors = [(name, vector) for name, vector in found.named_parameters() if vector.requires_grad]
    assert len(vectors) == 6
    for name, vector in vectors:
        assert distance(vector.grad, wanted[name].grad) < 0.1, name


@kinds
def test_preparing_a_base_that_then_does_not_train(kind: str) -> None:
    model = base(kind)
    before = bits(model)
    model = adapt(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)).train()
    assert same(bits(model), before)
    step = compile_step(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02))
    losses = [float(step({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS})) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_layers_without_a_backward_train_in_silence(kind: str) -> None:
    """Their outputs require a gradient, and none comes to what lies before them."""
    expect("torchao")
    model = adapt(quantised(llama(), DYNAMIC[kind])).train()
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.self_attn\.q_proj holds its weight as .* passes no gradient on"
    ):
        model(input_ids=IDS, labels=IDS)
    assert logits(model.eval()).isfinite().all()
    assert logits(model.train()).isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_dynamic_layers_train_in_silence() -> None:
    model = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(model.model.layers[0].mlp.up_proj).__module__
    model = adapt(model).train()
    with pytest.raises(RuntimeError, match=r"q_proj holds its weight as a Linear and passes no gradient on"):
        model(input_ids=IDS, labels=IDS)
    assert logits(model).isfinite().all()
    assert "no weight as a parameter" in unsupported_reason(model)
    with pytest.raises(ValueError, match="is quantised"):
        model.merge_adapter()


class _Stubborn(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class _Refusing(Scaled):
    class _Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            return Scaled.forward(layer, x)

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._Product.apply(x, self)


@pytest.mark.parametrize("layer", [_Stubborn, _Refusing])
def test_a_layer_of_anybody_without_a_backward(layer: type[Scaled]) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj = layer(model.model.layers[1].mlp.up_proj)
    assert layer_without_backward(model) == ("model.layers.1.mlp.up_proj", f"a {layer.__name__}")
    model = adapt(model).train()
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj holds its weight as"):
        model(input_ids=IDS, labels=IDS)


def test_a_model_that_trains_nothing_is_not_asked_for_a_backward() -> None:
    model = adapt(quantised(llama(), _Stubborn)).train()
    model.set_adapter("default", inference_mode=True)
    assert model(input_ids=IDS).logits.isfinite().all()


@kinds
def test_rows_of_several_adapters(kind: str) -> None:
    model = adapt(base(kind), "other")
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    names = ["other", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        assert distance(mixed[row], alone[name][row]) < 1e-5, name


@kinds
def test_a_round_trip(kind: str, tmp_path) -> None:
    model = adapt(base(kind))
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    elsewhere = PeftModel.from_pretrained(llama(), tmp_path)
    vectors = {name: vector for name, vector in model.named_parameters() if ".ia3_l." in name}
    assert len(vectors) == 6
    assert all(torch.equal(elsewhere.get_parameter(name), vector) for name, vector in vectors.items())


def test_a_quantised_module_trained_in_full() -> None:
    model = llama()
    model.lm_head = Scaled(model.lm_head)
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head can't be trained in full, .*llm_int8_skip_modules"):
        get_peft_model(model, IA3Config(**CAUSAL, modules_to_save=["lm_head"]))
    assert not isinstance(model, PeftModel)


# Paths that read plain weights


@kinds
def test_a_fused_step_over_integers(kind: str) -> None:
    model = adapt(base(kind)).train()
    assert "layers.0.self_attn.q_proj" in unsupported_reason(model)
    step = compile_step(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    assert step.path == "eager"
    assert "products are of plain weights" in step.reason


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_a_fused_step_over_a_layer_without_a_weight(name: str) -> None:
    class Computed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.layer = layer.in_features, layer.out_features, [layer]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer[0](x)

    model = llama()
    for path, layer in list(model.named_modules()):
        if path.endswith(name):
            model.set_submodule(path, Computed(layer))
    model = adapt(model).train()
    assert "a Computed, which has no weight as a parameter" in unsupported_reason(model)
    model(input_ids=IDS, labels=IDS).loss.backward()


# Merging


@kinds
@dtypes
def test_output_vectors_change_integers(kind: str, dtype: torch.dtype, caplog) -> None:
    model = adapt(base(kind, dtype), **OUTPUTS)
    before, wanted = bits(model), logits(model)
    with caplog.at_level(logging.WARNING, "ia3"):
        model.merge_adapter()
    scales = {name for name, part in bits(model).items() if not torch.equal(part, before[name])}
    assert scales
    if KINDS[kind].keeps_integers:
        assert all(before[name].is_floating_point() for name in scales)
        assert "anew" not in caplog.text
    assert all("k_proj" in name or "v_proj" in name for name in scales)
    assert distance(logits(model), wanted) < limit(kind, dtype)
    model.unmerge_adapter()
    assert same(bits(model), before)
    assert torch.equal(logits(model), wanted)


def limit(kind: str, dtype: torch.dtype = torch.float32) -> float:
    """By how much the logits may differ once vectors at outputs are merged."""
    if not KINDS[kind].keeps_integers:
        return KINDS[kind].rounding
    return 3e-2 if dtype is torch.bfloat16 else 1e-5


@kinds
@dtypes
def test_input_vectors_are_rounded_without_a_word(kind: str, dtype: torch.dtype, caplog) -> None:
    model = adapt(
        base(kind, dtype), **{**CAUSAL, "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    )
    before, wanted = bits(model), logits(model)
    with caplog.at_level(logging.WARNING, "ia3"):
        model.merge_adapter()
    assert "rounded 2 quantised weights anew" in caplog.text
    assert "mlp.down_proj differ most" in caplog.text
    assert 0 < distance(logits(model), wanted) < KINDS[kind].rounding
    changed = {name for name, part in bits(model).items() if not torch.equal(part, before[name])}
    assert changed
    assert all("down_proj" in name for name in changed)
    model.unmerge_adapter()
    assert same(bits(model), before)
    assert torch.equal(logits(model), wanted)


@kinds
def test_merging_one_after_the_other(kind: str) -> None:
    """The second starts from what was there before the first."""
    model = adapt(base(kind), "other")
    before = bits(model)
    model.merge_adapter(["default", "other"])
    together = bits(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter(["other"])
    assert same(bits(model), together)
    with model.disable_adapter():
        assert same(bits(model), before)
    assert same(bits(model), together)
    model.unmerge_adapter()
    assert same(bits(model), before)


@kinds
def test_a_merge_that_is_interrupted(kind: str, monkeypatch) -> None:
    model = adapt(base(kind))
    before, wanted = bits(model), logits(model)
    mark, calls = merging_module._mark, []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        mark(*args)

    monkeypatch.setattr(merging_module, "_mark", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter()
    assert same(bits(model), before)
    assert torch.equal(logits(model), wanted)


@kinds
def test_zeros_do_not_come_back(kind: str) -> None:
    model = adapt(base(kind), **OUTPUTS)
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if ".ia3_l." in name:
                vector[::3] = 0.0
                vector[1::3] *= -1
    before, wanted = bits(model), logits(model)
    model.merge_adapter()
    assert distance(logits(model), wanted) < limit(kind)
    model.unmerge_adapter()
    assert same(bits(model), before)


@kinds
def test_a_merged_base_that_still_carries_something(kind: str) -> None:
    model = adapt(base(kind), **OUTPUTS)
    wanted = logits(model)
    model = model.merge_and_unload()
    assert type(model) is LlamaForCausalLM
    assert not [name for name, _ in model.named_modules() if "ia3" in name]
    assert distance(logits(model), wanted) < limit(kind)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_dynamic_layers_merge(kind: str) -> None:
    expect("torchao")
    model = adapt(quantised(llama(), DYNAMIC[kind]))
    before, wanted = bits(model), logits(model)
    model.merge_adapter()
    assert distance(logits(model), wanted) < 0.15
    changed = {name for name, part in bits(model).items() if not torch.equal(part, before[name])}
    assert not [name for name in changed if "self_attn" in name and not before[name].is_floating_point()]
    model.unmerge_adapter()
    assert same(bits(model), before)


def test_scales_that_hold_groups_first() -> None:
    model = adapt(quantised(llama(), Packed), **OUTPUTS)
    before, wanted = bits(model), logits(model)
    model.merge_adapter()
    changed = {name.split()[-1] for name, part in bits(model).items() if not torch.equal(part, before[name])}
    assert changed == {"scales", "bias"}
    assert distance(logits(model), wanted) < 1e-5


def test_a_format_that_nobody_can_round() -> None:
    """It is refused before the first weight changes, those of layers that could be merged among them."""
    model = adapt(quantised(llama(), Packed))
    before = bits(model)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj holds its weight as a Packed, .*each input channel"
    ):
        model.merge_adapter()
    assert same(bits(model), before)
    assert "merged" not in repr(model)


def test_a_square_of_scales_that_stand_for_inputs() -> None:
    """As many scales as outputs, and yet each stands for an input: the layer's answer tells."""

    class Columns(Scaled):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer)
            self.weight_scale = self.weight_scale.reshape(1, -1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x * self.weight_scale, self.weight.to(x.dtype))

    torch.manual_seed(0)
    layer = Columns(nn.Linear(16, 16, bias=False))
    folded = fold(held_by(layer), "layer", {"output": torch.linspace(0.9, 1.1, 16)}, {})
    assert folded.rounded_anew


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(value: float) -> None:
    model = adapt(quantised(llama(), Scaled), **OUTPUTS)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.ia3_l.default[0] = value
    before = bits(model)
    with pytest.raises(ValueError, match=r"v_proj: weight_scale non-finite|v_proj holds its weight as a Scaled"):
        model.merge_adapter()
    assert same(bits(model), before)


def test_integers_on_the_meta_device() -> None:
    model = adapt(quantised(llama(), Scaled).to("meta"), **OUTPUTS)
    with pytest.raises(ValueError, match="offloaded or on the meta device"):
        model.merge_adapter()


# bitsandbytes as transformers loads it


def _loaded(folder, **how: object) -> LlamaForCausalLM:
    expect("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(folder)
    config = BitsAndBytesConfig(**how)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config).eval()


BITS = pytest.mark.parametrize(
    "how",
    [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}],
    ids=["int8", "nf4"],
)


@BITS
def test_a_merged_model_that_is_saved(how: dict[str, object], tmp_path) -> None:
    model = adapt(_loaded(tmp_path / "base", **how), **OUTPUTS)
    wanted = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert first_quantised(again) is not None
    assert distance(logits(again), wanted) < 1e-5


@BITS
def test_layers_that_are_computed_again(how: dict[str, object], tmp_path) -> None:
    """What `prepare_model_for_kbit_training` does: checkpointing, with which the gradients are the same."""
    model = adapt(_loaded(tmp_path, **how)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: vector.grad for name, vector in model.named_parameters() if vector.grad is not None}
    other = adapt(prepare_model_for_kbit_training(_loaded(tmp_path, **how))).train()
    assert other.is_gradient_checkpointing
    other(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: vector.grad for name, vector in other.named_parameters() if vector.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(distance(found[name], wanted[name]) < 1e-5 for name in wanted)


def test_a_weight_that_was_packed_for_a_kernel_of_the_cpu() -> None:
    """On a CPU with products in bf16 bitsandbytes packs 4-bit weights in the first forward without gradients."""
    expect("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = adapt(quantised(llama(), KINDS["nf4"].quantise), **OUTPUTS)
    before = bits(model)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )
            module.support_avx512bf16_for_cpu = True
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    packed = {name: part for name, part in bits(model).items() if "absmax" not in name}
    assert same(packed, {name: part for name, part in before.items() if "absmax" not in name})
    assert all(vector.grad.norm() > 0 for name, vector in model.named_parameters() if vector.requires_grad)


def test_a_package_that_is_there_is_not_needed() -> None:
    """None of them is imported for a plain base."""
    import subprocess
    import sys

    packages = [name for name in ("bitsandbytes", "torchao", "hqq") if importlib.util.find_spec(name)]
    code = f"import sys; import ia3.quantised, ia3.merging; assert not {{*{packages}}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)
