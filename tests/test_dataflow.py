"""What one forward of a tiny twin says of a model, against what its modelling file says, read by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from ia3 import IA3Config, find_sites
from ia3.dataflow import Flow, compare, observe
from ia3.sites import Site
from ia3.twin import NoTwinError, tiny_twin

FALCON_40B = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2, "hidden_size": 128}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon in groups": ("falcon", FALCON_40B),
    "falcon of one group": ("falcon", {}),
    "phi3": ("phi3", {"num_key_value_heads": 8}),
}


@cache
def twin(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    kind, fields = TYPES.get(name, (name, {}))
    return tiny_twin(CONFIG_MAPPING[kind](**fields))


@cache
def flow(name: str) -> Flow:
    return observe(*twin(name))


def _alike(paths: Any) -> list[str]:
    """Paths with their layers' numbers left out, each once."""
    return sorted({re.sub(r"\b\d+\b", "*", path) for path in paths})


# Read in the modelling files: what makes keys, what makes values, and what the intermediate enters.
LLAMA = ("model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj", "model.layers.*.mlp.down_proj")
BY_HAND = {
    "llama": LLAMA,
    "qwen3": LLAMA,  # with a norm of keys behind the projection
    "mixtral": (*LLAMA[:2], "model.layers.*.mlp.experts.down_proj"),  # experts as one parameter
    "gpt2": ("transformer.h.*.attn.c_attn", "transformer.h.*.attn.c_attn", "transformer.h.*.mlp.c_proj"),
    "bloom": (
        *["transformer.h.*.self_attention.query_key_value"] * 2,  # its scores are added to a bias in one call
        "transformer.h.*.mlp.dense_4h_to_h",
    ),
    "gpt_neox": (*["gpt_neox.layers.*.attention.query_key_value"] * 2, "gpt_neox.layers.*.mlp.dense_4h_to_h"),
    "falcon in groups": (
        *["transformer.h.*.self_attention.query_key_value"] * 2,
        "transformer.h.*.mlp.dense_4h_to_h",
    ),
    "phi3": (*["model.layers.*.self_attn.qkv_proj"] * 2, "model.layers.*.mlp.down_proj"),
    "bert": (
        "bert.encoder.layer.*.attention.self.key",
        "bert.encoder.layer.*.attention.self.value",
        "bert.encoder.layer.*.output.dense",
    ),
    "deberta-v2": (  # positions make scores of their own, by the same projections
        "deberta.encoder.layer.*.attention.self.key_proj",
        "deberta.encoder.layer.*.attention.self.value_proj",
        "deberta.encoder.layer.*.output.dense",
    ),
    "xlm": (  # attentions and feed-forwards in lists beside each other
        "transformer.attentions.*.k_lin",
        "transformer.attentions.*.v_lin",
        "transformer.ffns.*.lin2",
    ),
    "albert": (  # one block for every layer
        "albert.encoder.albert_layer_groups.*.albert_layers.*.attention.key",
        "albert.encoder.albert_layer_groups.*.albert_layers.*.attention.value",
        "albert.encoder.albert_layer_groups.*.albert_layers.*.ffn_output",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_makes_keys_values_and_the_intermediate(name: str) -> None:
    keys, values, second = BY_HAND[name]
    found = flow(name)
    assert (_alike(found.keys), _alike(found.values), _alike(found.feedforward)) == ([keys], [values], [second])
    assert not found.skipped


def test_every_layer_is_told() -> None:
    assert [attention.path for attention in flow("llama").attentions] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]


def test_both_attentions_of_a_decoder() -> None:
    found = flow("t5")
    assert _alike(found.keys) == [
        "decoder.block.*.layer.*.EncDecAttention.k",
        "decoder.block.*.layer.*.SelfAttention.k",
        "encoder.block.*.layer.*.SelfAttention.k",
    ]
    assert len(found.attentions) == 6
    assert len(found.feedforwards) == 4


def _mask(intervals: Any, width: int) -> torch.Tensor:
    mask = torch.zeros(width, dtype=torch.bool)
    for start, stop in intervals:
        mask[start:stop] = True
    return mask


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt_neox", "phi3", "falcon in groups", "falcon of one group"])
def test_channels_of_fused_projections(name: str) -> None:
    """Each layout as the modelling files split it."""
    found, config = flow(name), twin(name)[0].config
    path = next(iter(found.keys))
    width, heads = found.widths[path], config.num_attention_heads
    size = config.hidden_size // heads
    order = torch.arange(width)
    if name == "gpt2":
        part = order // config.hidden_size
    elif name in ("bloom", "gpt_neox"):
        part = order // size % 3
    elif name == "phi3":
        kv = config.num_key_value_heads
        assert kv < heads
        part = torch.tensor([0] * heads * size + [1] * kv * size + [2] * kv * size)
    else:
        groups = config.num_kv_heads if name == "falcon in groups" else 1
        each = heads // groups
        assert width == groups * (each + 2) * size
        part = torch.tensor(([0] * each + [1, 2]) * groups).repeat_interleave(size)
    for place, made in enumerate((found.queries, found.keys, found.values)):
        assert torch.equal(_mask(made[path], width), part == place)


def test_compressed_keys_and_values() -> None:
    """MLA's `kv_b_proj` makes both; the rotary part that all heads share is beside."""
    found, config = flow("deepseek_v3"), twin("deepseek_v3")[0].config
    each = config.qk_nope_head_dim + config.v_head_dim
    for attention in found.attentions:
        up = f"{attention.path}.kv_b_proj"
        first = torch.arange(found.widths[up]) % each < config.qk_nope_head_dim
        assert [*attention.keys] == [up]
        assert [*attention.values] == [up]
        assert torch.equal(_mask(attention.keys[up], found.widths[up]), first)
        assert torch.equal(_mask(attention.values[up], found.widths[up]), ~first)
        assert [*attention.beside] == [f"{attention.path}.kv_a_proj_with_mqa"]
    assert {found.path.rpartition("mlp.")[2] for found in found.feedforwards} == {
        "down_proj",
        "experts.down_proj",
        "shared_experts.down_proj",
    }


def test_a_gate_and_its_linear_half() -> None:
    assert {found.linear[0].rpartition(".")[2] for found in flow("mt5").feedforwards} == {"wi_1"}
    assert {found.linear[0].rpartition(".")[2] for found in flow("llama").feedforwards} == {"up_proj"}
    # One matrix and a non-linearity: a vector before it isn't one behind it, also where x·Φ(x) is written out.
    assert {found.linear for name in ("bert", "gpt2", "bloom") for found in flow(name).feedforwards} == {()}


def test_towers() -> None:
    """Of a picture and of text; only the second is the text configuration's."""
    found = flow("llava")
    assert {attention.path.split(".")[1]: attention.text for attention in found.attentions} == {
        "vision_tower": False,
        "language_model": True,
    }
    assert compare(found, [site for site in _all(found) if ".language_model." in site.path]) == []
    half = [
        site for site in _all(found) if ".language_model." in site.path or "vision_tower.encoder.layers.0" in site.path
    ]
    assert any("vision_tower.encoder.layers.1.self_attn lack a vector" in sentence for sentence in compare(found, half))


class _TorchsOwn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2, batch_first=True)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layers[0](states, states, states)[0]


def test_attention_inside_of_a_function() -> None:
    """Where no module's output is the keys, that is said."""
    found = observe(_TorchsOwn().eval(), {"states": torch.randn(2, 3, 8)})
    assert found.keys == {"layers.0.in_proj_weight": ((8, 16),)}
    assert found.values == {"layers.0.in_proj_weight": ((16, 24),)}
    assert found.bare == {"layers.0.in_proj_weight"}
    said = compare(found, [Site("layers.0.out_proj", "input", (1, 8))])
    assert said == [
        "The keys of layers.0 are made by layers.0.in_proj_weight, a parameter that a function uses.",
        "The values of layers.0 are made by layers.0.in_proj_weight, a parameter that a function uses.",
        "The input of layers.0.out_proj is multiplied, and is no feed-forward's intermediate.",
    ]


def test_keys_of_a_bare_parameter() -> None:
    found = flow("xlnet")
    assert _alike(found.keys) == ["transformer.layer.*.rel_attn.k"]
    assert {*found.keys, *found.values} <= found.bare
    said = compare(found, [Site(path, "input", (1, 1)) for path in found.feedforward])
    assert any("transformer.layer.1.rel_attn.k, a parameter that a function uses" in sentence for sentence in said)


class _Block(torch.nn.Module):
    """Attention, and what looks like a feed-forward without being one, of a residual 8 wide."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.one, self.two = torch.nn.Linear(8, inner), torch.nn.Linear(inner, out)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        queries, keys, values = self.qkv(states).chunk(3, -1)
        attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
        return self.two(torch.relu(self.one(attended)))


class _Stack(torch.nn.Module):
    """Blocks over an embedding that is used without its module."""

    def __init__(self, *blocks: torch.nn.Module) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(5, 8))
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        states = torch.nn.functional.embedding(tokens, self.table)
        return [block(states) for block in self.blocks]


def test_a_bottleneck_and_a_head_are_no_feed_forward() -> None:
    stack = _Stack(_Block(32, 8), _Block(4, 8), _Block(32, 6))
    found = observe(stack, {"tokens": torch.tensor([[1, 2, 3]])})
    assert [*found.keys] == ["blocks.0.qkv", "blocks.1.qkv", "blocks.2.qkv"]
    assert [*found.feedforward] == ["blocks.0.two"]


def test_no_softmax_no_attention() -> None:
    assert flow("mamba").attentions == ()
    assert flow("mamba").feedforwards == ()


# Sites beside the flow


def _all(found: Flow) -> list[Site]:
    """A site for all that a flow shows."""
    made = {**found.keys}
    for path, intervals in found.values.items():
        made[path] = tuple(sorted({*made.get(path, ()), *intervals}))
    outputs = [Site(path, "output", (found.widths[path], 1), intervals) for path, intervals in made.items()]
    return [*outputs, *(Site(path, "input", (1, 1)) for path in found.feedforward)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "deepseek_v3", "xlm"])
def test_sites_that_are_all_right(name: str) -> None:
    assert compare(flow(name), _all(flow(name))) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mt5", "bert", "bloom", "gpt_neox", "falcon of one group"])
def test_the_defaults_that_exist(name: str) -> None:
    assert compare(flow(name), find_sites(twin(name)[0], IA3Config()).layout.sites) == []


@pytest.mark.parametrize("left_out", ["k_proj", "v_proj", "down_proj"])
def test_one_vector_that_is_left_out_in_one_block(left_out: str) -> None:
    path = f"model.layers.1.{'mlp' if left_out == 'down_proj' else 'self_attn'}.{left_out}"
    (said,) = compare(flow("llama"), [site for site in _all(flow("llama")) if site.path != path])
    assert path in said
    assert "lack" in said


def test_queries_that_are_scaled() -> None:
    path = "model.layers.0.self_attn.q_proj"
    width = flow("llama").widths[path]
    (said,) = compare(flow("llama"), [*_all(flow("llama")), Site(path, "output", (width, 1))])
    assert said == f"{path} scales queries: channels 0–{width - 1}."


def test_queries_of_a_fused_projection() -> None:
    whole = [site.whole if site.side == "output" else site for site in _all(flow("gpt2"))]
    said = compare(flow("gpt2"), whole)
    assert len(said) == 2
    assert all("scales queries: channels 0–47" in sentence for sentence in said)


def test_a_part_of_the_keys() -> None:
    sites = [
        replace(site, intervals=((0, 5),)) if site.path == "model.layers.0.self_attn.k_proj" else site
        for site in _all(flow("llama"))
    ]
    (said,) = compare(flow("llama"), sites)
    assert "The keys of model.layers.0.self_attn have a vector in part" in said


def test_the_attentions_output_and_the_first_matrix() -> None:
    o_proj, gate = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj"
    more = [Site(o_proj, "input", (1, 1)), Site(gate, "output", (flow("llama").widths[gate], 1))]
    said = compare(flow("llama"), [*_all(flow("llama")), *more])
    assert said == [
        f"{gate} scales what is no key, value or intermediate: channels 0–{flow('llama').widths[gate] - 1}.",
        f"The input of {o_proj} is multiplied, and is no feed-forward's intermediate.",
    ]


def test_the_linear_half_is_worth_the_second_matrix_and_both_are_two() -> None:
    found = flow("mt5")
    halves = [Site(f.linear[0], "output", (found.widths[f.linear[0]], 1)) for f in found.feedforwards]
    without = [site for site in _all(found) if site.side == "output"]
    assert compare(found, [*without, *halves]) == []
    said = compare(found, [*_all(found), *halves])
    assert len(said) == len(found.feedforwards)
    assert all("has 2 vectors" in sentence for sentence in said)


def test_experts_without_a_vector() -> None:
    sites = [site for site in _all(flow("mixtral")) if "experts" not in site.path]
    said = compare(flow("mixtral"), sites)
    assert said == [
        f"The feed-forward's intermediate lacks a vector: it enters model.layers.{layer}.mlp.experts.down_proj."
        for layer in (0, 1)
    ]


# The twins


def test_a_configuration_and_the_generator_stay_as_they_are() -> None:
    config = AutoConfig.for_model("llama")
    before, state = config.to_dict(), torch.get_rng_state()
    tiny_twin(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_twin_is_tiny_and_its_widths_tell_apart() -> None:
    config = twin("llama")[0].config
    assert sum(parameter.numel() for parameter in twin("llama")[0].parameters()) < 200_000
    assert config.num_hidden_layers == 2
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.intermediate_size % config.hidden_size


def test_every_kind_of_layer_is_in_a_twin() -> None:
    whole = CONFIG_MAPPING["gemma3"]()
    small = twin("gemma3")[0].config.text_config
    assert set(small.layer_types) == set(whole.text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(small.layer_types) == small.num_hidden_layers == 2
    assert small.num_hidden_layers < whole.text_config.num_hidden_layers


def test_the_class_that_a_configuration_names() -> None:
    config = AutoConfig.for_model("bert")
    config.architectures = ["BertForSequenceClassification"]
    assert type(tiny_twin(config)[0]).__name__ == "BertForSequenceClassification"


def test_what_can_not_be_built_says_why() -> None:
    config = AutoConfig.for_model("llama")
    config.hidden_act = "no such function"
    with pytest.raises(NoTwinError, match=r"No tiny llama runs\. LlamaForCausalLM: KeyError: .*no such function"):
        tiny_twin(config)


def test_weights_and_gradients_are_left_as_they_were() -> None:
    model, batch = tiny_twin(AutoConfig.for_model("gpt2"))
    frozen = model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    observe(model, batch)
    assert not frozen.requires_grad
    assert model.lm_head.weight.requires_grad
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
