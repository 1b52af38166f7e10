"""What structure shows of a model: blocks, their keys and values, their second matrices, and what it can't tell."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlavaConfig

from ia3 import IA3Config, find_sites
from ia3.structure import find_blocks, made_by
from ia3.towers import tower_names

WIDE, NARROW = 24, 8


class Block(nn.Module):
    """A block out of named layers: `q=(8, 8)` makes a linear layer, dots make modules."""

    def __init__(self, **layers: tuple[int, int]) -> None:
        super().__init__()
        for path, (inputs, outputs) in layers.items():
            *around, name = path.split("__")
            module: nn.Module = self
            for part in around:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.add_module(name, nn.Linear(inputs, outputs))


def model_of(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(blocks)
    return model


QKV = {f"attn__{name}_proj": (8, 8) for name in "qkvo"}
FEED = {"mlp__up": (8, 24), "mlp__down": (24, 8)}


def paths(block: Any) -> tuple[list[str], list[str]]:
    short = lambda path: path.removeprefix(f"{block.path}.")  # noqa: E731 (one expression, used twice below)
    return [short(made.path) for made in block.keys_values], [short(path) for path in block.second_matrices]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({**QKV, **FEED}, (["attn.k_proj", "attn.v_proj"], ["mlp.down"])),
        # Without modules of their own; a width equal to the residual's; the gate's other half behind the second matrix.
        (
            {"query": (8, 8), "key": (8, 8), "value": (8, 8), "out": (8, 8), "fc1": (8, 24), "fc2": (24, 8)},
            (["key", "value"], ["fc2"]),
        ),
        ({**QKV, "mlp__fc1": (8, 8), "mlp__fc2": (8, 8)}, (["attn.k_proj", "attn.v_proj"], ["mlp.fc2"])),
        (
            {**QKV, "mlp__gate": (8, 24), "mlp__down": (24, 8), "mlp__up": (8, 24)},
            (["attn.k_proj", "attn.v_proj"], ["mlp.down"]),
        ),
        ({**QKV, "mlp__both": (8, 48), "mlp__down": (24, 8)}, (["attn.k_proj", "attn.v_proj"], ["mlp.down"])),
        # In modules of one layer each, beside an attention's output in one, too.
        (
            {
                **{f"attention__self__{name}": (8, 8) for name in ("query", "key", "value")},
                "attention__output__dense": (8, 8),
                "intermediate__dense": (8, 24),
                "output__dense": (24, 8),
            },
            (["attention.self.key", "attention.self.value"], ["output.dense"]),
        ),
        # In wrappers; compressed keys and values; relative positions beside the keys.
        (
            {**{f"attn__{name}_proj__linear": (8, 8) for name in "qkvo"}, **FEED},
            (["attn.k_proj.linear", "attn.v_proj.linear"], ["mlp.down"]),
        ),
        (
            {"attn__q_proj": (8, 8), "attn__kv_a_proj": (8, 4), "attn__kv_b_proj": (4, 16), "attn__o": (8, 8), **FEED},
            (["attn.kv_b_proj"], ["mlp.down"]),
        ),
        ({**QKV, "attn__relative_k_proj": (8, 8), **FEED}, (["attn.k_proj", "attn.v_proj"], ["mlp.down"])),
        # A bottleneck beside the feed-forward, an adapter, a convolution's module.
        (
            {**QKV, "per_layer_gate": (8, 4), "per_layer_out": (4, 8), **FEED},
            (["attn.k_proj", "attn.v_proj"], ["mlp.down"]),
        ),
        (
            {**QKV, **FEED, "adapter__down": (8, 8), "adapter__up": (8, 8), "conv__up": (8, 16), "conv__out": (16, 8)},
            (["attn.k_proj", "attn.v_proj"], ["mlp.down"]),
        ),
        # Bottlenecks in two modules, which are no feed-forward across them.
        (
            {**QKV, "n1__a": (8, 2), "n1__b": (2, 8), "n2__a": (8, 2), "n2__b": (2, 8), **FEED},
            (["attn.k_proj", "attn.v_proj"], ["mlp.down"]),
        ),
        # Two feed-forwards, as a conformer's.
        (
            {"ff1__up": (8, 24), "ff1__down": (24, 8), **QKV, "ff2__up": (8, 24), "ff2__down": (24, 8)},
            (["attn.k_proj", "attn.v_proj"], ["ff1.down", "ff2.down"]),
        ),
    ],
)
def test_blocks_by_their_structure(layers, expected):
    found = find_blocks(model_of(Block(**layers), Block(**layers)))
    assert [block.path for block in found] == ["layers.0", "layers.1"]
    assert [paths(block) for block in found] == [expected] * 2
    assert not any(block.lacks for block in found)


def test_narrow_experts_are_feed_forwards_and_what_leads_to_them_is_none():
    block = Block(**QKV, moe__experts__0__up=(8, 4), moe__experts__0__down=(4, 8), moe__gate=(8, 2))
    assert paths(find_blocks(model_of(block))[0])[1] == ["moe.experts.0.down"]


def test_blocks_without_attention_among_those_with_one():
    found = find_blocks(model_of(Block(**QKV, **FEED), Block(**FEED)))
    assert [paths(block) for block in found] == [(["attn.k_proj", "attn.v_proj"], ["mlp.down"]), ([], ["mlp.down"])]


def test_the_feed_forward_of_a_block_that_mixes_tokens_otherwise():
    class MambaDecoderLayer(Block):
        """Named after its mixer, as Jamba's."""

    mamba = MambaDecoderLayer(mamba__in_proj=(8, 16), mamba__out_proj=(16, 8), **FEED)
    found = find_blocks(model_of(Block(**QKV, **FEED), mamba))
    assert [paths(block)[1] for block in found] == [["mlp.down"], ["mlp.down"]]


def test_a_head_and_a_projector_are_no_blocks():
    model = model_of(Block(**QKV, **FEED))
    model.head = Block(dense=(8, 24), out=(24, 8))
    assert [block.path for block in find_blocks(model)] == ["layers.0"]


def test_what_a_name_says_it_makes():
    said = {
        "k_proj": "k",
        "linear_v": "v",
        "query": "q",
        "Wqkv": "qkv",
        "query_key_value": "qkv",
        "to_kv": "kv",
        "fc1": "",
    }
    assert {name: made_by(name) for name in said} == said


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"attn__qkv": (8, 24), "attn__o": (8, 8), **FEED}, r"how layers\.0\.attn\.qkv divides its channels"),
        ({"attn__qk": (8, 16), "attn__v_proj": (8, 8), **FEED}, r"attn\.qk makes queries and keys in one"),
        ({**QKV, "mlp__one": (8, 24), "mlp__two": (13, 8)}, r"no second matrix.*mlp\.one.*mlp\.two"),
        (
            {**QKV, "attn__inner__k": (8, 8), "attn__inner__v": (8, 8), **FEED},
            r"mixed with those of layers\.0\.attn\.inner",
        ),
    ],
)
def test_what_can_not_be_told_is_said_with_names_of_the_model(layers, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        find_sites(model_of(Block(**layers)), IA3Config())
    assert "Name the layers to adapt yourself: IA3Config(target_modules=" in str(error.value)
    assert "ia3 targets" in str(error.value)


def test_attention_whose_projections_are_no_modules_is_refused():
    block = Block(**FEED)
    block.attn = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="reads its in_proj_weight"):
        find_sites(model_of(block), IA3Config())


def test_a_model_without_attention_is_told_what_is_meant():
    with pytest.raises(ValueError, match="multiplies an attention's keys and values"):
        find_sites(model_of(Block(**FEED)), IA3Config())


def test_the_note_tells_what_pefts_default_does_otherwise(tiny):
    notes = {name: find_sites(tiny(name), IA3Config()).note for name in ("gpt2", "qwen2", "bert", "llama", "t5")}
    assert notes == {
        "gpt2": "PEFT's default scales the queries of c_attn too",
        "qwen2": "PEFT's default scales q_proj in place of k_proj",
        "bert": "PEFT's default also scales attention.output.dense",
        "llama": "",
        "t5": "",
    }


# Towers


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}


@pytest.fixture
def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config={"model_type": "clip_vision_model", "patch_size": 4, **VISION},
        image_token_index=31,
    )
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config)


def towers_of(model: nn.Module, **fields: Any) -> set[str]:
    return {site.path.partition(".layers.")[0] for site in find_sites(model, IA3Config(**fields)).layout.sites}


def test_the_language_model_is_adapted_and_other_towers_by_name(llava):
    text, vision = "model.language_model", "model.vision_tower.encoder"
    assert {*tower_names(llava)} == {"text", "vision"}
    assert towers_of(llava) == {text}
    assert {path.removesuffix(".vision_model") for path in towers_of(llava, towers="vision")} == {vision}
    assert len(towers_of(llava, towers="all")) == 2
    with pytest.raises(ValueError, match=r"towers: \['sound'\] are none of this model's, \['text', 'vision'\]"):
        find_sites(llava, IA3Config(towers=["sound"]))
    with pytest.raises(ValueError, match="leave out target_modules, or towers"):
        IA3Config(towers=["vision"], target_modules=["k_proj"])


def test_what_is_saved_matches_the_tower_alone(llava):
    found = find_sites(llava, IA3Config())
    again = find_sites(llava, IA3Config(target_modules=found.config.target_modules))
    assert [site.path for site in again.layout.sites] == [site.path for site in found.layout.sites]
    assert [site.side for site in again.layout.sites] == [site.side for site in found.layout.sites]
    assert found.config.towers is None
    assert "towers" not in found.config.to_dict()


def test_two_towers_without_a_language_model_of_its_own():
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**VISION, "patch_size": 4}))
    assert {path.partition(".")[0] for path in towers_of(model)} == {"text_model"}
    assert {path.partition(".")[0] for path in towers_of(model, towers="all")} == {"text_model", "vision_model"}


def test_default_layers_of_one_tower_alone(llava):
    sites = find_sites(llava, IA3Config(layers_to_transform=[1])).layout.sites
    assert {re.search(r"layers\.(\d+)", site.path).group(1) for site in sites} == {"1"}  # type: ignore[union-attr]
    assert all("language_model" in site.path for site in sites)


@pytest.mark.parametrize("kind", ["qwen3_moe", "modernbert", "whisper", "vit", "wav2vec2", "albert", "mpt", "cohere2"])
def test_types_that_no_table_names(kind):
    """None of these is written down anywhere; the census looks at all."""
    assert differences(kind) == []


def test_a_fused_projection_whose_name_says_nothing():
    assert differences("deberta") == []


def differences(kind: str) -> list[str]:
    """Between the sites that are found in a tiny twin and what its forward shows."""
    from ia3.dataflow import compare, observe
    from ia3.twin import tiny_twin

    model, batch = tiny_twin(transformers.CONFIG_MAPPING[kind]())
    return compare(observe(model, batch), find_sites(model, IA3Config()).layout.sites)
