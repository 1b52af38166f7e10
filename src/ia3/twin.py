"""A tiny model with random weights of any transformers configuration, and a batch that its forward takes.

It shows how a model of this configuration is wired, in seconds and without its weights: widths, depths, experts and
vocabularies shrink by rules over fields by name and kind, in every sub-configuration alike, so that what was equal or a
multiple stays so. What the rules get wrong shows when the model is built or run, and then less is shrunk.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from ia3.twin_batch import batches

_DEPTHS = re.compile(
    r"((num|n)_)?((encoder|decoder|hidden|backbone|text|vision|audio|speech|prenet|postnet|perception|temporal|stack|"
    r"acoustic|semantic|codec|generator|mixed|rec|cross|self|relational|extra|t|l|r|x|attention|transformer)_)*"
    r"(layers?|depth|blocks)|resampler_depth|num_.*_layers|.*_num_(hidden_)?layers|.*_depth|max_window_layers|"
    r"num_nextn_predict_layers"
)
_DEPTH_LISTS = re.compile(r"depths|num_blocks|stage_num_blocks|layer_depths|blocks_per_stage|num_conv_layers")
_WIDTHS = re.compile(
    r".*hidden_size.*|.*intermediate.*size.*|.*d_model|.*embed_dim.*|n_embd|n_inner|.*_?ffn_dim.*|.*ff_dim|d_ff|"
    r".*hidden_dim.*|.*hidden_channels|mlp_dim|.*projection_(dim|size)|.*proj_(dim|size)|embedding_(size|dim)|dim|"
    r"dim_feedforward|ffn_hidden_size|.*feedforward.*(dim|size)|.*ffw_dim|hidden_sizes|lru_width|d_inner|"
    r".*expand_dim|.*d_ssm|.*attention_dim|output_channels|fusion_hidden_size|neck_hidden_sizes|.*_lora_rank|emb_dim|"
    r"(encoder|decoder|text|vision|audio|query|key|value|qk|attention|attn)_(size|width|channels)|width|"
    r""
    r"attention_head_size_sum|.*classifier_proj_size|qk_channels|v_channels|d_latents|conv_dim|upsample_groups|output_dim|d_embed"
)
_HEADS = re.compile(r"((num|n)_)?(\w+_)?(attention_)?heads?|n_head|num_attention_heads|\w*num_heads")
_KV_HEADS = re.compile(r".*(num_|n_)(key_value|kv)_heads|num_kv_heads|multi_query_group_num|.*num_key_value_heads.*")
_HEAD_DIMS = re.compile(
    r".*head_dim|head_size|mamba_d_head|d_kv|v_head_dim|qk_(rope|nope)_head_dim|qk_head_dim|attention_head_size|d_head|"
    r"query_pre_attn_scalar|kv_channels|attention_key_size"
)
_PATTERNS = re.compile(
    r".*(_interval|_period|_frequency|_freq|_sparse_step|_pattern|layer_types_period|_every_n(_layers)?|_layer_step)"
)
_LAYERS_BY_INDEX = re.compile(
    r".*(_indexes|_indices|_index(es)?_list|_layers|_layer_ids|out_indices|_layer_idx|_layer_indices)"
)
_VOCABULARIES = re.compile(r"(?!type_).*vocab_size.*|num_embeddings|vocabulary_size")
_TOKENS = re.compile(r".*token.*(id|index|ids)|.*_(id|idx)|.*_token")
_MAX_PARAMETERS = 250_000_000


@dataclass(frozen=True)
class Shrinking:
    """How much of a configuration shrinks.

    Args:
        widths: hidden sizes, intermediate sizes and heads.
        grouped: keys and values get half the heads of queries where the configuration has a field for it.
        vocabulary: vocabularies and token numbers.
        head_widths: how wide a head is, and not how many there are.
    """

    widths: bool = True
    grouped: bool = True
    vocabulary: bool = True
    head_widths: bool = True


_LEVELS = (
    Shrinking(),
    Shrinking(grouped=False),
    Shrinking(head_widths=False),
    Shrinking(widths=False),
    Shrinking(widths=False, vocabulary=False),
)


class NoTwinError(ValueError):
    """No tiny model of a configuration could be built and run; the message says what each attempt met."""


def tiny_twin(config: PretrainedConfig, *, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of a configuration's kind, on the CPU in fp32 and evaluating, and inputs of its forward.

    Args:
        config: any transformers configuration; it stays as it is.
        seed: of the weights and the inputs; torch's generator is left as it was.

    Raises:
        NoTwinError: no attempt at shrinking gave a model that runs.
    """
    reasons: dict[str, None] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for kind in model_classes(config):
            for level in _LEVELS:
                try:
                    model = _build(kind, shrink(config, level))
                    return model, _first_that_runs(model)
                except Exception as error:  # models of anybody's fail in any way, and the next one is tried
                    reasons[f"{kind.__name__}: {type(error).__name__}: {_line(error)}"] = None
    raise NoTwinError(
        f"No tiny {config.model_type} runs. " + " | ".join(reasons or ["transformers has no model of it"])
    )


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300]


def _build(kind: type, config: PretrainedConfig) -> nn.Module:
    make: Callable[..., nn.Module] = kind
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make(deepcopy(config)).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"it would have {size:,} parameters")
    model = make(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # What starts constant (zero gates, norms of one) would hide what passes through it.
            if parameter.is_floating_point() and (parameter.numel() == 1 or parameter.std() < 1e-4):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.nan_to_num_(0.1, 0.1, 0.1)
    return model


def _first_that_runs(model: nn.Module) -> dict[str, Any]:
    reasons: list[Exception] = []
    for batch in batches(model):
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except Exception as error:  # models of anybody's fail in any way, and the next inputs are tried
            reasons.append(error)
    raise reasons[0] if reasons else ValueError("no input of its forward is known")


# What is tried first where the configuration names no class: the class that people adapt, then the bare model.
_MAPPINGS = (
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "",
    "OBJECT_DETECTION",
    "PRETRAINING",
)


def model_classes(config: PretrainedConfig) -> Iterator[type]:
    """The classes a configuration may be a model of, likeliest first, each once."""
    from transformers.models.auto import modeling_auto

    seen: set[type] = set()
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    mappings = [getattr(modeling_auto, f"MODEL_{'FOR_' if kind and kind != 'PRETRAINING' else ''}{kind}"
                        f"{'_' if kind else ''}MAPPING", {}) for kind in _MAPPINGS]  # fmt: skip
    for found in [*named, *(_mapped(mapping, config) for mapping in mappings), *_in_its_module(config)]:
        if isinstance(found, type) and issubclass(found, nn.Module) and found not in seen:
            seen.add(found)
            yield found


def _mapped(mapping: Any, config: PretrainedConfig) -> Any:
    try:
        found = mapping.get(type(config), None)
    except Exception:  # a class that needs a package which is not installed
        return None
    return found[0] if isinstance(found, tuple | list) else found


def _in_its_module(config: PretrainedConfig) -> list[type]:
    """Classes of the modelling file beside the configuration's, the largest first."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        __import__(name)
    except ImportError:
        return []
    kinds = [kind for kind in vars(sys.modules[name]).values() if isinstance(kind, type)]
    return [
        kind
        for kind in kinds
        if issubclass(kind, transformers.PreTrainedModel)
        and kind.__module__ == name
        and getattr(kind, "config_class", None) is type(config)
        and not kind.__name__.endswith("PreTrainedModel")
    ]


def shrink(config: PretrainedConfig, how: Shrinking) -> PretrainedConfig:
    """A copy of a configuration that makes a tiny model of the same kind."""
    config = deepcopy(config)
    parts = list(_parts(config))
    divisor = _divisor(parts, how) if how.widths else 1
    tokens = _small_vocabulary(parts) if how.vocabulary else {}
    windowed = any(vars(part).keys() & {"depths", "window_size"} for part in parts)
    for part in parts:
        _shrink_depth(part)
        _shrink_counts(part)
        if not windowed:
            _shrink_pictures(part)
        if how.widths:
            _shrink_widths(part, divisor, how)
        if how.vocabulary:
            _shrink_vocabulary(part, tokens)
        for name in ("dtype", "torch_dtype"):
            if vars(part).get(name) is not None:
                setattr(part, name, None)
        if vars(part).get("use_cache") is True:
            _set(part, "use_cache", False)
    return config


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _numbers(part: PretrainedConfig) -> Iterator[tuple[str, int]]:
    for name, value in list(vars(part).items()):
        if isinstance(value, int) and not isinstance(value, bool):
            yield name.removeprefix("_"), value


def _lists(part: PretrainedConfig) -> Iterator[tuple[str, list[Any] | tuple[Any, ...]]]:
    for name, value in list(vars(part).items()):
        if isinstance(value, list | tuple) and value:
            yield name, value


def _set(part: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(part, name if name in vars(part) else f"_{name}", value)
    except Exception:  # a property or a validated field that must stay
        return


# Depth


def _shrink_depth(part: PretrainedConfig) -> None:
    depths = {name: value for name, value in _numbers(part) if _DEPTHS.fullmatch(name) and value > 2}
    lists = {name: value for name, value in _lists(part) if all(isinstance(item, int) for item in value)}
    by_index = {
        name: value
        for name, value in lists.items()
        if _LAYERS_BY_INDEX.fullmatch(name) and all(item >= 0 for item in value) and list(value) == sorted(set(value))
    }
    for name, old in depths.items():
        per_layer = {key: value for key, value in _lists(part) if len(value) == old and key not in by_index}
        mine = {key: value for key, value in by_index.items() if max(value) <= old}
        cycle = max(
            (len(value) for key, value in _lists(part) if key.endswith("block_types") and len(value) < old), default=0
        )
        kept = _layers_to_keep(old, per_layer, mine, cycle)
        for key, value in per_layer.items():
            _set(part, key, type(value)(value[layer] for layer in kept))
        for key, value in mine.items():
            _set(part, key, type(value)(_new_place(kept, item, old) for item in value))
        _set(part, name, len(kept))
        _shrink_stages(part, old, len(kept))
    for name, value in lists.items():
        if _DEPTH_LISTS.fullmatch(name):
            _set(part, name, type(value)(min(item, 2) for item in value))
    for name, number in _numbers(part):
        if _PATTERNS.fullmatch(name) and number > 2:
            _set(part, name, 2)
        if name.endswith("_layer_offset") and number > 1:
            _set(part, name, 1)
        if re.fullmatch(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", name) and number > 1:
            _set(part, name, 1)
        if re.fullmatch(r"num_kv_shared_layers|num_nextn_predict_layers|mtp_num_hidden_layers", name):
            _set(part, name, 0)
        if name in ("moe_layer_end_index",):
            _set(part, name, -1)


def _shrink_stages(part: PretrainedConfig, old: int, new: int) -> None:
    """A backbone names its stem and its layers, and gives some of them by name and by number."""
    stages, given = vars(part).get("stage_names"), vars(part).get("_out_indices")
    if isinstance(stages, list) and len(stages) == old + 1 and given:
        vars(part)["stage_names"] = stages[: new + 1]
        places = sorted({min(place, new) for place in given})
        vars(part).update(_out_indices=places, _out_features=[stages[place] for place in places])


def _layers_to_keep(old: int, per_layer: dict[str, Any], by_index: dict[str, Any], cycle: int) -> list[int]:
    """Two layers, and one of each kind: what lists with an entry a layer tell apart, what others point at or repeat."""
    kinds: dict[str, int] = {}
    for layer in range(old):
        kinds.setdefault(repr([value[layer] for value in per_layer.values()]), layer)
    kept = set(list(kinds.values())[:8]) | {layer for value in by_index.values() for layer in value if layer < old}
    for layer in range(old):
        if len(kept) >= max(2, cycle):
            break
        kept.add(layer)
    return sorted(kept)


def _new_place(kept: list[int], layer: int, old: int) -> int:
    return len(kept) if layer >= old else kept.index(layer)


# Counts of experts, queries and the like


def _shrink_counts(part: PretrainedConfig) -> None:
    for name, value in _numbers(part):
        if re.fullmatch(r".*experts?|.*num_experts|.*moe_num_experts|n_routed_experts", name) and value > 4:
            _set(part, name, 4)
        elif re.fullmatch(r".*(experts_per_tok(en)?|top_?k|moe_k)|(mamba_)?n_groups", name) and value > 2:
            _set(part, name, 2)
        elif re.fullmatch(r"n_group|topk_group|num_expert_groups?", name) and value > 1:
            _set(part, name, 1)


def _shrink_pictures(part: PretrainedConfig) -> None:
    image, patch = vars(part).get("image_size"), vars(part).get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and image > 20 * patch and image % patch == 0:
        _set(part, "image_size", 16 * patch)


# Widths


def _is_width(name: str) -> bool:
    return bool(_WIDTHS.fullmatch(name)) and not _HEAD_DIMS.fullmatch(name)


def _divisor(parts: list[PretrainedConfig], how: Shrinking) -> int:
    """The power of two that brings the smallest hidden size to at least 32, and no count of heads below one."""
    hidden = re.compile(r"hidden_size|d_model|embed_dim|n_embd|dim|hidden_sizes|encoder_embed_dim|qkv_dim")
    sizes = [value for part in parts for name, value in _numbers(part) if hidden.fullmatch(name) and value >= 32]
    sizes += [min(value) for part in parts for name, value in _lists(part)
              if hidden.fullmatch(name) and all(isinstance(item, int) for item in value)]  # fmt: skip
    divisor = 1
    heads = [] if how.head_widths else [value for part in parts for name, value in _numbers(part) if _is_heads(name)]
    while sizes and min(sizes) // (2 * divisor) >= 32 and not any(n % (2 * divisor) for n in (min(sizes), *heads)):
        divisor *= 2
    return divisor


def _is_heads(name: str) -> bool:
    return bool(_HEADS.fullmatch(name)) and not _KV_HEADS.fullmatch(name) and not _HEAD_DIMS.fullmatch(name)


def _shrink_widths(part: PretrainedConfig, divisor: int, how: Shrinking) -> None:
    before = dict(_numbers(part))
    for name, value in before.items():
        if _is_width(name) and value >= 32:
            _set(part, name, _divided(value, divisor))
    for name, values in _lists(part):
        if _is_width(name) and all(isinstance(item, int) for item in values):
            _set(part, name, type(values)(_divided(item, divisor) if item >= 32 else item for item in values))
    _shrink_heads(part, before, divisor, how)


def _divided(value: int, divisor: int) -> int:
    if value % divisor and value % 8:  # of no proportion that must be kept
        return -(-value // (8 * divisor)) * 8
    while divisor > 1 and value % divisor:
        divisor //= 2
    small = value // divisor
    while divisor > 1 and (small < 8 or small % 8):  # grouped products want rows of whole 16 bytes
        small, divisor = small * 2, divisor // 2
    return max(small, min(value, 8))


def _shrink_heads(part: PretrainedConfig, before: dict[str, int], divisor: int, how: Shrinking) -> None:
    head_dims = {name: value for name, value in before.items() if _HEAD_DIMS.fullmatch(name) and value >= 8}
    widths = [value for name, value in before.items() if _is_width(name) and value >= 32]
    widths += [width * factor for name, factor in before.items() if name.endswith("expand") for width in widths]
    counts = {name: heads for name, heads in before.items() if _is_heads(name) and heads > 1}
    small = {name: _fewer(heads, widths, divisor, how) for name, heads in counts.items()}
    narrow = {
        name: max(width // 8, 4) if width >= 16 and width % 8 == 0 else width for name, width in head_dims.items()
    }
    for count, heads in counts.items():  # where all heads together are as wide as the model, so they stay
        for name, width in head_dims.items():
            alike = name.startswith("mamba") == count.startswith("mamba") and name != "query_pre_attn_scalar"
            if alike and heads * width in widths and len(head_dims.keys() - {"query_pre_attn_scalar"}) <= 2:
                narrow[name] = max(_divided(heads * width, divisor) // small[count], 1)
    if how.head_widths:
        for name, width in narrow.items():
            _set(part, name, width)
    for name, heads in small.items():
        _set(part, name, heads)
    _shrink_kv_heads(part, before, how.grouped)
    _fill_heads(part)
    main = next((name for name in ("head_dim", "qk_head_dim", "d_kv") if name in head_dims), None)
    numbers = dict(_numbers(part))
    old, new = (before[main], numbers[main]) if main else (_head(before), _head(numbers))
    _shrink_rotation(part, old / max(new, 1))


def _fewer(heads: int, widths: list[int], divisor: int, how: Shrinking) -> int:
    if not how.head_widths:
        return max(heads // divisor, 1)
    return _few_heads(heads, [_divided(width, divisor) for width in widths if width % heads == 0])


def _fill_heads(part: PretrainedConfig) -> None:
    """Some models read what their own default leaves out."""
    numbers = dict(_numbers(part))
    missing = {name for name, value in vars(part).items() if value is None}
    if "head_dim" in missing and _head(numbers):
        _set(part, "head_dim", numbers.get("qk_rope_head_dim", _head(numbers)))
    if "num_key_value_heads" in missing and "num_attention_heads" in numbers:
        _set(part, "num_key_value_heads", numbers["num_attention_heads"])


def _head(numbers: dict[str, int]) -> int:
    """A head's width where no field says it; 0 where neither the model's is known."""
    width = next((numbers[name] for name in ("hidden_size", "d_model", "n_embd", "embed_dim") if name in numbers), 0)
    return width // max(
        next((numbers[n] for n in ("num_attention_heads", "num_heads", "n_head") if n in numbers), 1), 1
    )


def _shrink_rotation(part: PretrainedConfig, ratio: float) -> None:
    """Sections of a head's rotation (`mrope_section`) add up to half a head; `rotary_dim` is a part of one."""
    rotated = vars(part).get("rotary_dim")
    if isinstance(rotated, int) and ratio > 1:
        _set(part, "rotary_dim", max(int(rotated / ratio) // 2 * 2, 2))
    for name, value in list(vars(part).items()):
        if isinstance(value, dict):
            for key, sections in value.items():
                if "section" in str(key) and isinstance(sections, list | tuple):
                    value[key] = _sections(list(sections), ratio)
        elif "section" in name and isinstance(value, list | tuple):
            _set(part, name, _sections(list(value), ratio))


def _sections(sections: list[int], ratio: float) -> list[int]:
    total = int(sum(sections) / ratio)
    small = [max(int(section / ratio), 1) for section in sections]
    small[-1] += total - sum(small)
    return small


def _few_heads(heads: int, widths: list[int]) -> int:
    for few in (4, 2, 3, 6):
        if heads % few == 0 and all(width % few == 0 and width // few >= 8 for width in widths):
            return few
    return next((n for n in range(heads, 0, -1) if all(width % n == 0 for width in widths)), 1)


def _shrink_kv_heads(part: PretrainedConfig, before: dict[str, int], grouped: bool) -> None:
    for name, kv_heads in before.items():
        if not _KV_HEADS.fullmatch(name):
            continue
        of = re.sub(r"(key_value|kv)_heads", "attention_heads", name)
        old = before.get(of, before.get("num_attention_heads", kv_heads))
        new = vars(part).get(of, vars(part).get("num_attention_heads"))
        if not isinstance(new, int) or kv_heads == 1:
            continue
        small = new // 2 if kv_heads < old or grouped else new
        _set(part, name, max(small, 1))


# Vocabularies


_VOCABULARY = 512


def _small_vocabulary(parts: list[PretrainedConfig]) -> dict[int, int]:
    """For every token number that a small vocabulary lacks another one; what differed differs."""
    numbers = {
        value
        for part in parts
        for name, value in _numbers(part)
        if _TOKENS.fullmatch(name) and value >= _VOCABULARY - 100
    }
    return {value: _VOCABULARY - 1 - place for place, value in enumerate(sorted(numbers, reverse=True)[:90])}


def _shrink_vocabulary(part: PretrainedConfig, tokens: dict[int, int]) -> None:
    if vars(part).get("vocab_size", 0) is None:
        _set(part, "vocab_size", _VOCABULARY)
    for name, value in _numbers(part):
        if _VOCABULARIES.fullmatch(name) and value > _VOCABULARY:
            _set(part, name, _VOCABULARY)
        elif _TOKENS.fullmatch(name) and value in tokens:
            _set(part, name, tokens[value])
