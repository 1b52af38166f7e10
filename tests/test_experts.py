"""Experts in one module: one vector each, where the gate's product goes into the second matrix, in every way."""

from __future__ import annotations

import copy
import importlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.integrations import moe

from ia3 import AdapterTable, IA3Config, PeftModel, compile_step, find_sites, get_peft_model
from ia3.experts import find_experts
from ia3.fast.generate import Decoder, unsupported_reason
from ia3.rows import Rows, acting
from ia3.runs.adapters import combine_adapters, read_adapter, vector_maps
from ia3.training.learners.instructions import separating_mask

WAYS = ("eager", "batched_mm", "grouped_mm")
EXPERTS, WIDTH, HIDDEN, TOKENS, CHOSEN = 4, 16, 24, 10, 2

# The fields by which the classes' configurations name the same four numbers.
_FIELDS = dict.fromkeys(
    ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts"], EXPERTS
) | dict.fromkeys(["intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"], WIDTH)
_FIELDS |= {"hidden_size": HIDDEN, "moe_hidden_size": HIDDEN, "moe_latent_size": None, "zero_expert_num": 2}
_FIELDS |= {"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_limit": 0.4, "swiglu_alpha": 1.702}
_FIELDS |= {"post_norm_eps": 1e-6}


def _experts(way: str, family: str, name: str, dtype: torch.dtype = torch.double) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(
        SimpleNamespace(**_FIELDS, _experts_implementation=way)
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.to(dtype)


def _swiglu(product):
    gate, up = product.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _clamped(product):
    gate, up = product.chunk(2, dim=-1)
    return functional.silu(gate.clamp(max=0.4)) * up.clamp(-0.4, 0.4)


def _of_gpt_oss(gate, up):
    gate, up = gate.clamp(max=0.4), up.clamp(-0.4, 0.4)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


# name: (class, gate, whether its own loop computes in fp32)
ROUTED = {
    "mixtral": ("MixtralExperts", _swiglu),
    "qwen2_moe": ("Qwen2MoeExperts", _swiglu),
    "qwen3_moe": ("Qwen3MoeExperts", _swiglu),
    "deepseek_v3": ("DeepseekV3Experts", _swiglu),
    "deepseek_v4": ("DeepseekV4Experts", _clamped),
    "glm5_next": ("Glm5NextTextExperts", _clamped),
    "aria": ("AriaExperts", _swiglu),
    "gpt_oss": ("GptOssExperts", lambda product: _of_gpt_oss(product[..., ::2], product[..., 1::2])),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", lambda product: _of_gpt_oss(*product.chunk(2, dim=-1))),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", lambda product: _of_gpt_oss(*product.chunk(2, dim=-1))),
    "nemotron_h": ("NemotronHExperts", lambda product: functional.relu(product) ** 2),
    "muse_spark": ("MuseSparkExperts", _swiglu),
    "beam": ("BeamExperts", _swiglu),
}
TRANSPOSED = {"aria", "gpt_oss", "openai_privacy_filter"}


class Block(nn.Module):
    """An experts module where a model has it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args, **kwargs):
        return self.experts(*args, **kwargs)


@pytest.fixture
def doubles(monkeypatch):
    """torch's grouped products take no float64; transformers' own do."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)


def _routed(dtype: torch.dtype = torch.double):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.double)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.double)
    weights, chosen = scores.topk(CHOSEN)
    return x.to(dtype), chosen, weights.to(dtype)


def _formula(family, experts, vectors, x, chosen, weights):
    """Σ_k w_k · down_e(l_e ∘ gate(up_e x)), token by token; `vectors` is `[experts, width]` or one such a token."""
    first = experts._parameters.get("gate_up_proj", experts._parameters.get("up_proj"))
    second, gate = experts._parameters["down_proj"], ROUTED[family][1]
    rows = []
    for token in range(len(x)):
        row = 0
        own = vectors[token] if vectors.dim() == 3 else vectors
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            up, down = first[expert], second[expert]
            up, down = (up.T, down.T) if family in TRANSPOSED else (up, down)
            product = up @ x[token]
            if "gate_up_proj_bias" in experts._parameters:
                product = product + experts._parameters["gate_up_proj_bias"][expert]
            out = down @ (own[expert] * gate(product))
            if "down_proj_bias" in experts._parameters:
                out = out + experts._parameters["down_proj_bias"][expert]
            if hasattr(experts, "post_expert_norm"):
                out = experts.post_expert_norm(out)
            row = row + weight * out
        rows.append(row)
    return torch.stack(rows)


def _adapted(block, name="default", **config):
    model = get_peft_model(block, IA3Config(target_modules=["experts"], **config), adapter_name=name)
    _draw(model)
    return model


def _draw(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))


# The formula


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ROUTED)
def test_loss_and_gradient_are_the_formulas(family, way, doubles):
    experts = _experts(way, family, ROUTED[family][0])
    model = _adapted(Block(experts))
    vector = experts.ia3_l.default
    assert vector.shape == (EXPERTS, WIDTH)
    x, chosen, weights = _routed()
    x.requires_grad_()
    other = x.detach().clone().requires_grad_()
    leaf = vector.detach().clone().requires_grad_()

    (output := model(x, chosen, weights)).square().sum().backward()
    (expected := _formula(family, experts, leaf, other, chosen, weights)).square().sum().backward()

    # One class's own loop, and a norm and a gate that cast, are in fp32 whatever the model is.
    close = {"rtol": 2e-4, "atol": 1e-5} if family in ("openai_privacy_filter", "muse_spark", "beam") else {}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(vector.grad, leaf.grad, **close)
    torch.testing.assert_close(x.grad, other.grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ROUTED)
def test_ones_change_no_bit(family, way, dtype):
    experts = _experts(way, family, ROUTED[family][0], dtype)
    before = experts(*_routed(dtype))
    model = get_peft_model(Block(experts), IA3Config(target_modules=["experts"]))
    output = model(*_routed(dtype))
    assert output.requires_grad
    assert output.dtype == dtype
    assert torch.equal(output, before)


@pytest.mark.parametrize("family", ROUTED)
def test_merging_is_exact_and_goes_back_to_the_bit(family, doubles):
    experts = _experts("grouped_mm", family, ROUTED[family][0])
    original = experts.down_proj.detach().clone()
    model = _adapted(Block(experts))
    with torch.no_grad():
        acting = model(*_routed())
        model.merge_adapter()
        vector = experts.ia3_l.default
        scale = vector[:, :, None] if family in TRANSPOSED else vector[:, None, :]
        assert torch.equal(experts.down_proj, original * scale)
        torch.testing.assert_close(model(*_routed()), acting)
        model.unmerge_adapter()
    assert torch.equal(experts.down_proj, original)
    model.merge_and_unload()
    assert torch.equal(experts.down_proj, original * scale)
    assert type(experts).__mro__[1] is nn.Module
    assert not hasattr(experts, "_ia3_experts")


def test_a_way_that_never_calls_the_gate_is_an_error(monkeypatch):
    experts = _experts("batched_mm", "mixtral", "MixtralExperts")
    model = _adapted(Block(experts))
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", lambda module, x, chosen, weights: x)
    with pytest.raises(RuntimeError, match="doesn't call its gate"):
        model(*_routed())


@pytest.mark.parametrize(
    "reads", [lambda m: m.down_proj.permute(1, 2, 0), lambda m: torch.einsum("...->", m.down_proj)]
)
def test_a_way_that_does_something_else_with_the_matrices_is_an_error(monkeypatch, reads):
    experts = _experts("own", "mixtral", "MixtralExperts")
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "own", lambda module, *args: reads(module))
    reads(experts)
    with pytest.raises(TypeError, match="set_experts_implementation"):
        _adapted(Block(experts))(*_routed())


class _Garbage(torch.autograd.Function):
    """What a grouped product leaves where it computes nothing: behind the last expert's rows, in either direction."""

    @staticmethod
    def forward(ctx, rows, start, is_output):
        ctx.start, ctx.is_output = start, is_output
        return _spoil(rows, start) if is_output else rows.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.is_output else _spoil(grad, ctx.start), None, None


def _spoil(rows, start):
    rows = rows.clone()
    rows[start:] = torch.nan
    return rows


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_pairs_that_belong_to_no_expert_here_reach_no_vector(way, doubles, monkeypatch):
    grouped_mm = moe._grouped_mm

    def spoiling(rows, weight, offs):
        end = int(offs[-1])
        return _Garbage.apply(grouped_mm(_Garbage.apply(rows, end, False), weight, offs), end, True)

    monkeypatch.setattr(moe, "_grouped_mm", spoiling)
    experts = _experts(way, "mixtral", "MixtralExperts")
    experts._is_expert_parallel = True
    vector = _adapted(Block(experts)).experts.ia3_l.default
    x, chosen, weights = _routed()
    away = chosen == 3
    weights = weights.masked_fill(away, 0)

    experts(x, chosen.masked_fill(away, EXPERTS), weights).square().sum().backward()

    leaf = vector.detach().clone().requires_grad_()
    _formula("mixtral", experts, leaf, x, chosen, weights).square().sum().backward()
    assert (vector.grad[3] == 0).all()
    torch.testing.assert_close(vector.grad, leaf.grad)


# Modules outside of transformers' interface


def _llama4(way="eager"):
    experts = _experts(way, "llama4", "Llama4TextExperts")
    x = torch.randn(EXPERTS * 6, HIDDEN, dtype=torch.double, generator=torch.Generator().manual_seed(4))

    def formula(vectors):
        gate, up = torch.einsum("eth,ehi->eti", x.view(EXPERTS, 6, HIDDEN), experts.gate_up_proj).chunk(2, dim=-1)
        product = vectors[:, None] * up * functional.silu(gate)
        return torch.einsum("eti,eih->eth", product, experts._parameters["down_proj"]).reshape(-1, HIDDEN)

    return experts, (x,), {}, formula


def _longcat_flash(way="eager"):
    experts = _experts(way, "longcat_flash", "LongcatFlashExperts")
    x, chosen, weights = _routed()
    chosen = chosen.clone()
    chosen[0, 0] = EXPERTS + 1  # an expert that is the identity

    def formula(vectors):
        out = torch.zeros_like(x)
        for token, pair in enumerate(chosen.tolist()):
            for place, expert in enumerate(pair):
                held = x[token]
                if expert < EXPERTS:
                    held = vectors[expert] * _swiglu(experts.gate_up_proj[expert] @ held)
                    held = experts._parameters["down_proj"][expert] @ held
                out[token] = out[token] + weights[token, place] * held
        return out

    return experts, (x, chosen, weights), {}, formula


def _step3p7(way="eager"):
    experts = _experts(way, "step3p7", "Step3p7Experts")
    experts.limit = 0.4
    x, chosen, weights = _routed()

    def formula(vectors):
        out = []
        for token, pair in enumerate(chosen.tolist()):
            gates = [(experts.gate_up_proj[expert] @ x[token]).chunk(2) for expert in pair]
            parts = [functional.silu(gate).clamp(max=0.4) * up.clamp(-0.4, 0.4) for gate, up in gates]
            second = experts._parameters["down_proj"]
            pairs = enumerate(zip(pair, parts, strict=True))
            out.append(sum(weights[token, k] * (second[e] @ (vectors[e] * part)) for k, (e, part) in pairs))
        return torch.stack(out)

    return experts, (x, chosen, weights), {}, formula


def _inkling_shared(way="eager"):
    experts = _experts(way, "inkling", "InklingSharedExperts")
    x, shares = torch.randn(2, 5, HIDDEN, dtype=torch.double), torch.rand(2, 5, EXPERTS, dtype=torch.double)

    def formula(vectors):
        out = 0
        for expert in range(EXPERTS):
            gate, up = x @ experts.gate_proj[expert].T, x @ experts.up_proj[expert].T
            product = vectors[expert] * functional.silu(gate) * up
            out = out + shares[..., expert, None] * (product @ experts._parameters["down_proj"][expert].T)
        return out

    return experts, (x, shares), {}, formula


def _jetmoe(way="eager"):
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    experts = JetMoeParallelExperts(EXPERTS, WIDTH, HIDDEN).double()
    nn.init.normal_(experts.weight)
    x, sizes = torch.randn(TOKENS, WIDTH, dtype=torch.double), [3, 0, 5, 2]

    def formula(vectors):
        number = torch.tensor([expert for expert, size in enumerate(sizes) for _ in range(size)])
        return torch.einsum("ti,toi->to", x * vectors[number], experts._parameters["weight"][number])

    return experts, (x, sizes), {}, formula


OTHERS = [_llama4, _longcat_flash, _step3p7, _inkling_shared, _jetmoe]


@pytest.mark.parametrize("make", OTHERS)
def test_other_modules_of_experts(make):
    experts, args, kwargs, formula = make()
    before = experts(*args, **kwargs)
    model = get_peft_model(Block(experts), IA3Config(target_modules=["experts"], feedforward_modules=["experts"]))
    torch.testing.assert_close(model(*args, **kwargs), before)
    _draw(model)
    vector = experts.ia3_l.default
    leaf = vector.detach().clone().requires_grad_()

    (output := model(*args, **kwargs)).square().sum().backward()
    (expected := formula(leaf)).square().sum().backward()

    close = {"rtol": 1e-5, "atol": 1e-4} if make is _inkling_shared else {}  # it adds in fp32
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(vector.grad, leaf.grad, **(close and {"rtol": 1e-4, "atol": 1e-3}))
    with torch.no_grad():
        model.merge_adapter()
        torch.testing.assert_close(model(*args, **kwargs), output, **close)


def test_one_linear_layer_of_experts_has_a_vector_only_where_it_is_said_to_be_at_the_input():
    with pytest.raises(ValueError, match="feedforward_modules"):
        get_peft_model(Block(_jetmoe()[0]), IA3Config(target_modules=["experts"]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.to(torch.float8_e4m3fn), False)), "dequantised"),
        (lambda e: (setattr(e, "_is_expert_parallel", True), setattr(e, "num_experts", 2)), "split over processes"),
    ],
)
def test_experts_that_cant_carry_vectors_are_refused_with_the_reason(change, match):
    experts = _experts("eager", "mixtral", "MixtralExperts")
    change(experts)
    with pytest.raises(ValueError, match=match):
        get_peft_model(Block(experts), IA3Config(target_modules=["experts"]))
    assert not hasattr(experts, "ia3_l")


def test_a_module_of_matrices_that_are_two_dimensional_is_refused():
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

    config = SimpleNamespace(hidden_size=HIDDEN, ffn_hidden_size=WIDTH, moe_num_experts=EXPERTS, ffn_act_fn={})
    with pytest.raises(ValueError, match="DbrxExpertGLU, which can't carry a vector"):
        get_peft_model(Block(DbrxExpertGLU(config)), IA3Config(target_modules=["experts"]))


# Whole models

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def _mixtral(**more):
    return MixtralForCausalLM(MixtralConfig(**_SIZES, intermediate_size=24, num_local_experts=4, **more))


def _deepseek():
    config = DeepseekV3Config(
        **{**_SIZES, "head_dim": 4},
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


def _gpt_oss():
    config = GptOssConfig(
        **_SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    return GptOssForCausalLM(config)


def _llama4_model():
    config = Llama4TextConfig(
        **_SIZES, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=4, interleave_moe_layer_step=2
    )
    return Llama4ForCausalLM(config)


def _nemotron():
    config = NemotronHConfig(
        **{key: value for key, value in _SIZES.items() if key != "num_hidden_layers"},
        layers_block_type=["attention", "moe", "moe"],
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    return NemotronHForCausalLM(config)


MODELS = {
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4_model,
    "nemotron_h": _nemotron,
}


def _model(family, way="grouped_mm"):
    torch.manual_seed(0)
    made = MODELS[family]().eval()
    if family != "llama4_text":
        made.set_experts_implementation(way)
    return made


def _config(family="mixtral"):
    targets = {"deepseek_v3": ["kv_b_proj", "down_proj"], "llama4_text": ["k_proj", "v_proj", "experts", "down_proj"]}
    names = targets.get(family, ["k_proj", "v_proj", "experts"])
    return IA3Config(
        task_type="CAUSAL_LM", target_modules=names, feedforward_modules=sorted({*names} & {"experts", "down_proj"})
    )


def _ids(rows=3, length=6):
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(5))


def _sites(model, **config):
    return {site.path: (site.side, site.shape) for site in find_sites(model, IA3Config(**config)).layout.sites}


# Names


def test_the_name_of_the_second_matrices_means_dense_shared_and_routed_experts():
    model = _model("deepseek_v3")
    sites = _sites(model, target_modules=["down_proj"])
    assert sites == {
        "model.layers.0.mlp.down_proj": ("input", (1, 40)),
        "model.layers.1.mlp.experts": ("input", (4, 24)),
        "model.layers.1.mlp.shared_experts.down_proj": ("input", (1, 24)),
    }
    for names in (
        r".*down_proj",
        {"mlp.down_proj", "shared_experts.down_proj", "experts.down_proj"},
        ["down_proj", "experts"],
    ):
        assert _sites(model, target_modules=names, feedforward_modules=names) == sites
    assert len(_sites(model, target_modules=["down_proj"], exclude_modules=["experts.down_proj"])) == 2
    assert list(_sites(model, target_modules=["down_proj"], layers_to_transform=[1])) == list(sites)[1:]
    assert list(_sites(model, target_modules=["down_proj"], layers_to_transform=[0])) == list(sites)[:1]


def test_a_file_names_the_modules_and_peft_files_mean_what_peft_means(tmp_path):
    model = get_peft_model(_model("deepseek_v3"), IA3Config(target_modules=["down_proj"]))
    assert model.peft_config["default"].target_modules == {"down_proj", "experts"}
    assert model.peft_config["default"].feedforward_modules == {"down_proj", "experts"}
    # In PEFT `down_proj` is no parameter's name.
    loaded = find_sites(_model("deepseek_v3"), IA3Config(target_modules=["down_proj"]), loading=True)
    assert [site.path for site in loaded.layout.sites if site.path.endswith("experts")] == []
    only = get_peft_model(_model("mixtral"), IA3Config(target_modules=["down_proj", "k_proj"]))
    assert only.peft_config["default"].target_modules == {"experts", "k_proj"}


@pytest.mark.parametrize(("family", "name"), [("mixtral", "gate_up_proj"), ("nemotron_h", "up_proj")])
def test_naming_the_first_matrices_says_what_to_name(family, name):
    with pytest.raises(ValueError, match=r"Name down_proj or 'experts'"):
        find_sites(_model(family), IA3Config(target_modules=[name]))


def test_the_first_matrices_of_excluded_experts_may_have_a_layers_name():
    model = _model("nemotron_h")
    sites = _sites(model, target_modules=["up_proj", "q_proj"], exclude_modules=["experts"], feedforward_modules=[])
    assert {path.rpartition(".")[2] for path in sites} == {"up_proj", "q_proj"}
    assert "experts" not in {path.split(".")[-2] for path in sites}


def test_experts_left_out_of_feedforward_modules_are_an_error():
    with pytest.raises(ValueError, match="feedforward_modules, too"):
        find_sites(_model("mixtral"), IA3Config(target_modules=["k_proj", "experts"], feedforward_modules=[]))


def test_all_linear_says_that_it_leaves_experts_out(caplog):
    sites = find_sites(_model("mixtral"), IA3Config(target_modules="all-linear")).layout.sites
    assert not [site for site in sites if "experts" in site.path]
    assert "experts" in caplog.text


# Life of an adapter


@pytest.mark.parametrize("family", MODELS)
def test_save_and_load_into_a_fresh_base(family, tmp_path):
    model = get_peft_model(_model(family), _config(family))
    _draw(model)
    expected = model(_ids()).logits
    model.save_pretrained(tmp_path)
    base = _model(family)
    assert not torch.allclose(base(_ids()).logits, expected, atol=1e-4)

    loaded = PeftModel.from_pretrained(base, tmp_path)

    assert torch.equal(loaded(_ids()).logits, expected)
    saved = read_adapter(tmp_path)
    stacked = {site.key: site for site in saved.vectors if site.path.endswith("experts")}
    assert stacked
    assert all(site.side == "input" and site.shape == (4, 24) for site in stacked.values())
    assert all("experts" in map_.columns for map_ in vector_maps(saved.vectors))
    assert "experts" in repr(loaded)
    loaded.print_trainable_parameters()
    loaded.get_model_status()


@pytest.mark.parametrize("family", MODELS)
def test_every_vector_has_a_gradient_and_a_merged_model_answers_alike(family):
    model = get_peft_model(_model(family, "grouped_mm"), _config(family))
    _draw(model)
    model.train()
    model(_ids(8, 12), labels=_ids(8, 12)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".ia3_l." in name), name
    model.eval()
    expected = model(_ids()).logits
    with model.disable_adapter():
        assert torch.equal(model(_ids()).logits, _model(family)(_ids()).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(_ids()).logits, expected, atol=1e-5, rtol=1e-4)
    assert list(merged.state_dict()) == list(_model(family).state_dict())


def test_adapters_multiply_are_switched_combined_and_deleted(tmp_path):
    model = get_peft_model(_model("mixtral"), _config(), adapter_name="a")
    model.add_adapter("b", _config())
    _draw(model)
    experts = model.model.layers[0].mlp.experts
    answers = {}
    for names in ("a", "b", ["a", "b"]):
        model.set_adapter(names)
        answers[str(names)] = model(_ids()).logits
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "ia3_l"):
                module.ia3_l.a.mul_(module.ia3_l.b)
    model.set_adapter("a")
    torch.testing.assert_close(model(_ids()).logits, answers["['a', 'b']"])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mean", combination_type="mean")
    torch.testing.assert_close(experts.ia3_l["mean"], (experts.ia3_l.a + experts.ia3_l.b) / 2)
    model.set_adapter("b")
    assert torch.equal(model(_ids()).logits, answers["b"])
    model.save_pretrained(tmp_path)
    combine_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "both", combination_type="product")
    PeftModel.from_pretrained(_model("mixtral"), tmp_path / "both")
    for name in ("a", "b", "mean"):
        model.delete_adapter(name)
    assert not hasattr(experts, "ia3_l")
    assert type(experts).__name__ == "MixtralExperts"
    assert type(experts).__mro__[1] is nn.Module


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", MODELS)
def test_a_batch_that_mixes_adapters_gives_each_example_its_own(family, way):
    model = get_peft_model(_model(family, way), _config(family), adapter_name="a")
    model.add_adapter("b", _config(family))
    _draw(model)
    names = ["b", "__base__", "a", "b"]
    ids = _ids(4)
    alone = []
    for name, row in zip(names, ids, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(row[None]).logits)
        else:
            model.set_adapter(name)
            alone.append(model(row[None]).logits)
    torch.testing.assert_close(model(ids, adapter_names=names).logits, torch.cat(alone), atol=1e-4, rtol=1e-4)
    if family == "mixtral":  # an attention of the others takes another mask
        positions = torch.arange(6).repeat(1, 4)
        mask = separating_mask(positions, torch.float32)
        tokens = [[name for name in names for _ in range(6)]]
        row = model(ids.view(1, -1), attention_mask=mask, position_ids=positions, adapter_names=tokens).logits
        torch.testing.assert_close(row.view(4, 6, -1), torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_mixed_batches_train_and_generate(way):
    model = get_peft_model(_model("mixtral", way), _config(), adapter_name="a")
    model.add_adapter("b", _config())
    _draw(model)
    ids = _ids(2)
    together = model.generate(ids, adapter_names=["a", "b"], max_new_tokens=4, do_sample=False, num_beams=2)
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        alone = model.generate(ids[row : row + 1], max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(together[row : row + 1], alone)
    model.set_adapter(["a", "b"])
    model.train()
    loss = model(ids, labels=ids, adapter_names=["a", "b"]).loss
    loss.backward()
    experts = model.model.layers[1].mlp.experts.ia3_l
    grads = [experts.a.grad.clone(), experts.b.grad.clone()]
    model.zero_grad()
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        (model(ids[row : row + 1], labels=ids[row : row + 1]).loss / 2).backward()
    torch.testing.assert_close([experts.a.grad, experts.b.grad], grads, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_recorded_generation_mixes_and_steps_aside_for_a_loop(way):
    model = get_peft_model(_model("mixtral", way), _config(), adapter_name="a")
    model.add_adapter("b", _config())
    _draw(model)
    model.eval()
    generate = Decoder(model, max_new_tokens=4)
    ids, names = _ids(3), ["b", "__base__", "a"]
    expected = model.generate(ids, adapter_names=names, max_new_tokens=4, do_sample=False)
    for _ in range(2):
        assert torch.equal(generate(ids, torch.ones_like(ids), adapter_names=names), expected)
    assert unsupported_reason(model, max_new_tokens=4) is None
    model.set_experts_implementation("eager")
    assert "one after the other" in unsupported_reason(model, max_new_tokens=4)


def test_rows_whose_names_say_nothing_are_not_taken_for_alike():
    model = _adapted(Block(_experts("eager", "mixtral", "MixtralExperts")))
    vectors = 0.5 + torch.rand(5, EXPERTS, WIDTH, dtype=torch.double)
    rows = Rows(("__base__",) * 5, {model.experts.ia3_l: {"input": vectors.view(5, -1)}})
    x, chosen, weights = _routed()
    with acting(rows):
        output = model.experts(x, chosen, weights)
    own = vectors.repeat_interleave(2, dim=0)
    torch.testing.assert_close(output, _formula("mixtral", model.experts, own, x, chosen, weights))


def test_experts_that_are_modules_of_a_list_are_refused_in_a_mixed_batch():
    config = SwitchTransformersConfig(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    get_peft_model(model, IA3Config(target_modules=["wo"], feedforward_modules=["wo"]), adapter_name="a")
    with pytest.raises(ValueError, match=r"mlp.experts gives each of its experts some of the batch's tokens"):
        model(_ids(2), decoder_input_ids=_ids(2), adapter_names=["a", "__base__"])


def test_tokens_that_go_another_way_are_refused_in_a_mixed_batch():
    model = get_peft_model(_model("mixtral"), _config(), adapter_name="a")
    block = model.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda x: torch.cat([forward(x[:, :2].contiguous()), forward(x[:, 2:].contiguous())], dim=1)
    with pytest.raises(ValueError, match="another way"):
        model(_ids(), adapter_names=["a", "a", "__base__"])


def test_a_table_of_adapters_serves_experts(tmp_path):
    model = get_peft_model(_model("mixtral"), _config(), adapter_name="a")
    model.add_adapter("b", _config())
    _draw(model)
    model.save_pretrained(tmp_path)
    names = ["b", "__base__", "a"]
    expected = model(_ids(), adapter_names=names).logits
    base = _model("mixtral")
    table = AdapterTable(base)
    table.register("a", tmp_path / "a")
    table.register("b", tmp_path / "b")
    torch.testing.assert_close(base(_ids(), adapter_names=names).logits, expected)
    table.close()
    assert type(base.model.layers[0].mlp.experts).__mro__[1] is nn.Module


# Around it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(way, reentrant):
    grads = []
    for checkpoints in (False, True):
        model = get_peft_model(_model("mixtral", way), _config())
        _draw(model)
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(_ids(), labels=_ids()).loss.backward()
        grads.append([p.grad for n, p in model.named_parameters() if ".ia3_l." in n])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_a_compiled_model_acts_alike_and_switches_without_another_graph(way, dtype):
    model = get_peft_model(_model("mixtral", way).to(dtype), _config(), adapter_name="a")
    model.add_adapter("b", _config())
    _draw(model)
    block = model.model.layers[0]
    x = torch.randn(1, 6, 16).to(dtype)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block.mlp, backend=counting, fullgraph=True)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), block.mlp(x))
    assert len(graphs) == 1
    compiled(x).float().square().sum().backward()
    assert block.mlp.experts.ia3_l.a.grad.any()


def test_a_module_compiled_alone_takes_one_graph():
    model = get_peft_model(_model("mixtral"), _config())
    _draw(model)
    expected = model(_ids()).logits
    graphs = []
    torch._dynamo.reset()
    model.model.layers[0].mlp.experts.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    for _ in range(4):
        assert torch.equal(model(_ids()).logits, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_experts_act_and_are_given_back(way, tmp_path):
    model = get_peft_model(_model("mixtral", way), _config())
    _draw(model)
    expected = model(_ids()).logits
    model.save_pretrained(tmp_path)
    base = _model("mixtral", way)
    plain = base(_ids()).logits
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(_ids()).logits, expected)
    torch.testing.assert_close(loaded.unload()(_ids()).logits, plain)


def test_a_forward_that_was_replaced_before_is_an_error():
    experts = _experts("eager", "mixtral", "MixtralExperts")
    forward = experts.forward
    experts.forward = lambda *args: forward(*args)
    model = _adapted(Block(experts))
    with pytest.raises(RuntimeError, match="was replaced"):
        model(*_routed())
    rows = Rows(("a", "b"), {experts.ia3_l: {"input": torch.ones(2, EXPERTS * WIDTH)}})
    with pytest.raises(RuntimeError, match="was replaced"), model.disable_adapter(), acting(rows):
        model(*_routed())


def test_threads_hear_their_own_vectors():
    models = []
    for seed in (2, 3):
        models.append(get_peft_model(_model("mixtral", "eager"), _config()))
        _draw(models[-1], seed)
    expected = [model(_ids()).logits for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            answers = list(pool.map(lambda model: model(_ids()).logits, models))
            assert all(map(torch.equal, answers, expected))


def test_a_copy_and_a_pickle_act_alike():
    model = get_peft_model(_model("mixtral"), _config())
    _draw(model)
    expected = model(_ids()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(_ids()).logits, expected)
        assert other.unload() is other
    assert torch.equal(model(_ids()).logits, expected)


def test_experts_that_a_tool_replaces_keep_their_vectors(caplog):
    model = get_peft_model(_model("mixtral"), _config())
    _draw(model)
    expected = model(_ids()).logits
    former = model.model.layers[0].mlp.experts
    fresh = _model("mixtral").model.layers[0].mlp.experts
    model.model.layers[0].mlp.experts = fresh
    assert torch.equal(model(_ids()).logits, expected)
    assert fresh.ia3_l.default.shape == (4, 24)
    assert type(former).__mro__[1] is nn.Module
    model.model.layers[0].mlp.experts = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match="other channels"):
        model(_ids())


def test_experts_trained_in_full_beside_vectors_of_another_adapter():
    model = get_peft_model(_model("mixtral"), _config(), adapter_name="a")
    full = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["experts"]
    )
    model.add_adapter("full", full)
    _draw(model)
    expected = model(_ids()).logits
    model.set_adapter("full")
    model.train()
    model(_ids(), labels=_ids()).loss.backward()
    assert model.model.layers[0].mlp.experts.modules_to_save.full.down_proj.grad.any()
    model.eval()
    model.set_adapter("a")
    assert torch.equal(model(_ids()).logits, expected)
    model.delete_adapter("a")
    experts = model.model.layers[0].mlp.experts
    assert hasattr(experts, "modules_to_save")
    assert not hasattr(experts, "ia3_l")
    model.delete_adapter("full")
    assert type(experts).__mro__[1] is nn.Module


def test_a_step_over_experts_is_the_ordinary_one_and_says_why():
    model = get_peft_model(_model("mixtral"), _config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step = compile_step(model, optimizer)
    losses = [float(step({"input_ids": _ids(), "labels": _ids()})) for _ in range(3)]
    assert step.path == "eager"
    assert step.reason
    assert losses[-1] < losses[0]


def test_found_experts_are_what_their_matrices_say():
    held = {name: find_experts(_experts("eager", name, ROUTED[name][0])) for name in ROUTED}
    assert all((e.count, e.width, e.hidden) == (EXPERTS, WIDTH, HIDDEN) for e in held.values())
    assert {name for name, e in held.items() if e.transposed} == TRANSPOSED
    assert find_experts(_llama4()[0]).transposed
    assert find_experts(nn.Linear(3, 3)) is None
