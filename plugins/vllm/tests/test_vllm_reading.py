"""An adapter's vectors go to the engine's layers whole, or the adapter is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, T5Config

from ia3 import IA3Config, find_sites, get_peft_model
from ia3.table import read_vectors
from ia3_vllm.reading import Served, base_of, scales_of
from ia3_vllm.slices import Shard, even, grouped_heads

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def layers(ranks=1, rank=0):
    """A Llama as the engine has it."""
    served = {}
    for layer in range(2):
        block = f"model.layers.{layer}"
        served[f"{block}.self_attn.qkv_proj"] = Served(grouped_heads(4, 2, 4, 4, ranks, rank))
        served[f"{block}.self_attn.o_proj"] = Served((Shard(16, 16),), even(16, ranks, rank))
        served[f"{block}.mlp.gate_up_proj"] = Served((even(24, ranks, rank),) * 2)
        served[f"{block}.mlp.down_proj"] = Served((Shard(16, 16),), even(24, ranks, rank))
    return served


@pytest.fixture
def saved(tmp_path):
    def save(**config):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), IA3Config(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ia3_l." in name:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(tmp_path)
        base = base_of(LlamaConfig(**SHAPE), "tiny")
        vectors = read_vectors(base, tmp_path)[1]
        return {site.path: vector for site, vector in vectors.items()}, vectors

    return save


def test_the_base_has_no_memory_and_the_name_it_is_served_as():
    base = base_of(LlamaConfig(**SHAPE), "served/base")
    assert all(parameter.is_meta for parameter in base.parameters())
    assert base.name_or_path == "served/base"


def test_a_base_that_is_no_causal_model_is_refused():
    with pytest.raises(ValueError, match="causal"):
        base_of(T5Config(), "t5")


@pytest.mark.parametrize("ranks", [1, 2])
def test_vectors_reach_their_part_of_each_layer(saved, ranks):
    plain, vectors = saved()
    for rank in range(ranks):
        scales = scales_of(vectors, layers(ranks, rank), PACKED, model_type="llama")
        assert len(scales) == 4
        for layer in range(2):
            block = f"model.layers.{layer}"
            keys, values = (plain[f"{block}.self_attn.{name}"].view(ranks, -1)[rank] for name in ("k_proj", "v_proj"))
            qkv = scales[f"{block}.self_attn.qkv_proj"]
            assert qkv.input is None
            assert torch.equal(qkv.output, torch.cat([torch.ones(16 // ranks), keys, values]))
            down = scales[f"{block}.mlp.down_proj"]
            assert down.output is None
            assert torch.equal(down.input, plain[f"{block}.mlp.down_proj"].view(ranks, -1)[rank])


def test_outputs_of_gate_and_of_a_row_parallel_layer_are_served(saved):
    plain, vectors = saved(target_modules=["up_proj", "o_proj"], feedforward_modules=[])
    scales = scales_of(vectors, layers(), PACKED, model_type="llama")
    gate_up = scales["model.layers.0.mlp.gate_up_proj"].output
    assert torch.equal(gate_up, torch.cat([torch.ones(24), plain["model.layers.0.mlp.up_proj"]]))
    assert torch.equal(scales["model.layers.1.self_attn.o_proj"].output, plain["model.layers.1.self_attn.o_proj"])


def test_a_fused_projection_is_cut_where_its_ranks_are(saved):
    torch.manual_seed(0)
    fused = {"model.layers.0.self_attn.qkv_proj": Served(grouped_heads(4, 2, 4, 4, 2, 1))}
    base = base_of(Phi3Config(**{**SHAPE, "pad_token_id": 0}), "phi")
    site = next(
        site for site in find_sites(base, IA3Config(target_modules=["qkv_proj"])).layout.sites if ".0." in site.path
    )
    vector = torch.randn(32)
    scales = scales_of({site: vector}, fused, {"qkv_proj": ["qkv_proj"]}, model_type="phi3")
    expected = torch.cat([vector[8:16], vector[20:24], vector[28:32]])
    assert torch.equal(scales[site.path].output, expected)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv_proj: in which order .* gpt_neox"):
        scales_of({site: vector}, fused, {}, model_type="gpt_neox")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"target_modules": ["k_proj", "lm_head"]}, r"^1 of .* 3 .*lm_head: vLLM has no layer"),
        ({"target_modules": ["k_proj"], "feedforward_modules": ["k_proj"]}, r"^2 of .*k_proj: its input isn't its own"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens: vLLM has no layer"),
    ],
)
def test_a_site_that_no_layer_serves_refuses_the_adapter_by_name(saved, config, why):
    _, vectors = saved(**{"feedforward_modules": [], **config})
    with pytest.raises(ValueError, match=why):
        scales_of(vectors, layers(), PACKED, model_type="llama")


def test_a_layer_left_out_at_start_and_one_whose_bias_is_late_are_refused(saved):
    _, vectors = saved()
    without = {name: layer for name, layer in layers().items() if "down_proj" not in name}
    with pytest.raises(ValueError, match=r"down_proj: .*--lora-target-modules"):
        scales_of(vectors, without, PACKED, model_type="llama")
    late = {name: layer._replace(output=()) for name, layer in layers().items()}
    with pytest.raises(ValueError, match="its bias is added after"):
        scales_of(vectors, late, PACKED, model_type="llama")


def test_a_layer_of_more_parts_than_projections_is_refused(saved):
    _, vectors = saved(target_modules=["v_proj"], feedforward_modules=[])
    pairs = {**PACKED, "qkv_proj": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"v_proj: in which order"):
        scales_of(vectors, layers(), pairs, model_type="llama")


def test_a_layer_of_another_width_is_refused(saved):
    _, vectors = saved()
    padded = {name: Served(layer.output, layer.input and Shard(32, 32)) for name, layer in layers().items()}
    with pytest.raises(ValueError, match="24 numbers is for 32 channels"):
        scales_of(vectors, padded, PACKED, model_type="llama")


def test_layers_of_other_pipeline_ranks_are_theirs_alone(saved):
    _, vectors = saved()
    own = {name: layer for name, layer in layers().items() if ".0." in name}
    scales = scales_of(vectors, own, PACKED, model_type="llama", elsewhere=lambda path: ".1." in path)
    assert set(scales) == {"model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"}


def test_renamed_modules_are_found(saved):
    _, vectors = saved()
    moved = {f"language_{name}": layer for name, layer in layers().items()}
    scales = scales_of(vectors, moved, PACKED, model_type="llama", rename=lambda path: f"language_{path}")
    assert len(scales) == 4


def test_a_module_without_a_parent_is_found():
    base = nn.Sequential()
    base.k_proj = nn.Linear(4, 8)
    site = find_sites(base, IA3Config(target_modules=["k_proj"], feedforward_modules=[])).layout.sites
    served = {"qkv_proj": Served((Shard(8, 8),) * 3)}
    scales = scales_of({site[0]: torch.full((8,), 2.0)}, served, PACKED, model_type="llama")
    assert torch.equal(scales["qkv_proj"].output, torch.cat([torch.ones(8), torch.full((8,), 2.0), torch.ones(8)]))
