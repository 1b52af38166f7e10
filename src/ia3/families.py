"""What structure can't tell about a model family: which modules make keys, values and the intermediate.

The defaults follow the paper (Liu et al. 2022, section 3.3, equation 5 and what follows it): one vector on the
keys, one on the values, one on the feed-forward's intermediate activation. The intermediate is either the input
of the second feed-forward matrix (`feedforward`) or, where PEFT has it so, the output of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Intervals = tuple[tuple[int, int], ...]
"""Half-open channel ranges `(start, stop)` of a fused projection."""


@dataclass(frozen=True)
class Family:
    """The default sites of one model type.

    Args:
        targets: names of the modules that carry a vector.
        feedforward: those whose vector multiplies the input.
        exclude: longer names that a target's name would also match, where the model has them.
        fused: for a projection that makes queries too, the function from (model configuration, width) to
            the key and value channels; None where all its channels are keys and values.
        differs: how the default differs from PEFT's, in a few words; empty where it doesn't.
    """

    targets: tuple[str, ...]
    feedforward: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    fused: dict[str, Callable[[Any, int], Intervals | None]] = field(default_factory=dict)
    differs: str = ""


def _last_two_thirds(config: Any, width: int) -> Intervals | None:
    """GPT-2's `c_attn`: `[q | k | v]`; in cross-attention the same name makes `[k | v]` alone."""
    third = config.hidden_size
    return ((third, 3 * third),) if width == 3 * third else None


def _two_thirds_of_each_head(config: Any, width: int) -> Intervals:
    """GPT-NeoX and BLOOM: `[q | k | v]` head by head."""
    heads = config.num_attention_heads
    size = width // (3 * heads)
    return tuple(((3 * head + 1) * size, (3 * head + 3) * size) for head in range(heads))


def _keys_and_values(config: Any, width: int) -> Intervals:
    """Phi-3: `[q | k | v]`, with fewer heads of keys and values."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return ((width * heads // (heads + 2 * kv_heads), width),)


def _falcon(config: Any, width: int) -> Intervals:
    """Falcon's three layouts: groups of `[q… | k | v]`, one such group, or `[q | k | v]` head by head."""
    if config.new_decoder_architecture:
        groups, per_group = config.num_kv_heads, config.num_attention_heads // config.num_kv_heads + 2
    elif config.multi_query:
        groups, per_group = 1, config.num_attention_heads + 2
    else:
        return _two_thirds_of_each_head(config, width)
    size = width // (groups * per_group)
    return tuple((((group + 1) * per_group - 2) * size, (group + 1) * per_group * size) for group in range(groups))


_SCALES_Q_FOR_K = "PEFT's default scales q in place of k"
_SCALES_FUSED_Q = "PEFT's default scales q too"
_SCALES_ATTENTION_OUTPUT = "PEFT's default also scales the input of the attention's output projection"

_DECODER = Family(("k_proj", "v_proj", "down_proj"), ("down_proj",))
_DECODER_WITHOUT_Q = Family(("k_proj", "v_proj", "down_proj"), ("down_proj",), differs=_SCALES_Q_FOR_K)
_ENCODER = Family(
    ("key", "value", "output.dense"),
    ("output.dense",),
    exclude=("attention.output.dense", "crossattention.output.dense"),
    differs=_SCALES_ATTENTION_OUTPUT,
)

FAMILIES: dict[str, Family] = {
    "t5": Family(("k", "v", "wo"), ("wo",)),
    # The output of the linear half of the gate; the product with the other half commutes with the vector.
    "mt5": Family(("k", "v", "wi_1"), ()),
    "umt5": Family(("k", "v", "wo"), ("wo",)),
    "bart": Family(("k_proj", "v_proj", "fc2"), ("fc2",), differs=_SCALES_Q_FOR_K),
    **dict.fromkeys(
        ("mbart", "plbart", "pegasus", "marian", "blenderbot"), Family(("k_proj", "v_proj", "fc2"), ("fc2",))
    ),
    "gpt2": Family(
        ("c_attn", "mlp.c_proj"),
        ("mlp.c_proj",),
        fused={"c_attn": _last_two_thirds},
        differs=_SCALES_FUSED_Q,
    ),
    "llama": _DECODER,
    "mistral": _DECODER,
    "gptj": Family(("k_proj", "v_proj", "fc_out"), ("fc_out",), differs=_SCALES_Q_FOR_K),
    "gpt_neo": Family(("k_proj", "v_proj", "mlp.c_proj"), ("mlp.c_proj",), differs=_SCALES_Q_FOR_K),
    "qwen2": _DECODER_WITHOUT_Q,
    "qwen3": _DECODER_WITHOUT_Q,
    "gemma": _DECODER_WITHOUT_Q,
    "gemma2": _DECODER_WITHOUT_Q,
    "gemma3_text": _DECODER_WITHOUT_Q,
    **dict.fromkeys(("olmo2", "ministral", "seed_oss"), _DECODER),
    "starcoder2": Family(("k_proj", "v_proj", "mlp.c_proj"), ("mlp.c_proj",)),
    "phi3": Family(("qkv_proj", "down_proj"), ("down_proj",), fused={"qkv_proj": _keys_and_values}),
    "phi": Family(("k_proj", "v_proj", "fc2"), ("fc2",), differs=_SCALES_Q_FOR_K),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    **dict.fromkeys(("xlm-roberta", "camembert", "electra"), replace(_ENCODER, differs="")),
    "distilbert": Family(("k_lin", "v_lin", "lin2"), ("lin2",)),
    "deberta-v2": Family(
        ("key_proj", "value_proj", "output.dense"),
        ("output.dense",),
        exclude=("attention.output.dense",),
        differs=_SCALES_ATTENTION_OUTPUT,
    ),
    "opt": Family(("k_proj", "v_proj", "fc2"), ("fc2",), differs="PEFT's default scales q in place of v"),
    "gpt_neox": Family(
        ("query_key_value", "dense_4h_to_h"),
        ("dense_4h_to_h",),
        fused={"query_key_value": _two_thirds_of_each_head},
        differs=_SCALES_FUSED_Q,
    ),
    "bloom": Family(
        ("query_key_value", "mlp.dense_4h_to_h"),
        ("mlp.dense_4h_to_h",),
        fused={"query_key_value": _two_thirds_of_each_head},
        differs=_SCALES_FUSED_Q,
    ),
    "falcon": Family(
        ("query_key_value", "dense_4h_to_h"),
        ("dense_4h_to_h",),
        fused={"query_key_value": _falcon},
        differs=_SCALES_FUSED_Q,
    ),
}

# Names that mean the second feed-forward matrix wherever they occur, for models outside the table.
FEEDFORWARD_NAMES: frozenset[str] = frozenset(name for family in FAMILIES.values() for name in family.feedforward)

TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = {kind: list(family.targets) for kind, family in FAMILIES.items()}
"""PEFT's names for the default targets by model type; here they follow the paper, and some families exclude more."""
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    kind: list(family.feedforward) for kind, family in FAMILIES.items()
}
"""Those of the default targets whose input is multiplied."""
