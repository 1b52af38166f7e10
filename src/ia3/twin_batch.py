"""Inputs that a model's forward takes, by its signature and its configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_TEXT = 12
_EXAMPLES = 2


def batches(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Candidates, the richest first: text with what else the forward takes, each way of shaping it, then text alone."""
    config = model.config
    names = [n for n in inspect.signature(model.forward).parameters if n not in ("self", "kwargs", "args")]
    text = {**_needed(config, _required(model)), **_text(config, names)}
    shaped = list(_shaped(model, config, names))
    for other in shaped:
        yield {**text, **other}
        yield from _with_placeholders(model, text, other)
    for other in shaped:
        if text and "input_ids" not in _required(model):
            yield {**other, **({k: v for k, v in text.items() if k.startswith("decoder")})}
            yield other
    if text:
        yield text
        yield {k: v for k, v in text.items() if k in ("input_ids",)}
        yield {**text, "attention_mask": torch.ones(_EXAMPLES, _TEXT, dtype=torch.long)}


def _required(model: nn.Module) -> set[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PretrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _field(config: Any, *names: str, inside: str = "", default: Any = None) -> Any:
    """The first of these fields in a configuration, in its part of this name first."""
    parts = list(_parts(config))
    preferred = [getattr(config, part) for part in dir(config) if inside and re.search(inside, part)
                 and hasattr(getattr(config, part, None), "to_dict")]  # fmt: skip
    for part in [*preferred, *parts]:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _tokens(config: Any, length: int = _TEXT) -> torch.Tensor:
    """Token numbers that no field of the configuration names, `[examples, length]`."""
    vocabulary = _field(config, "vocab_size", "vocabulary_size", inside="text", default=100)
    vocabulary = vocabulary if isinstance(vocabulary, int) else min(vocabulary)
    special = {
        value
        for part in _parts(config)
        for name, value in vars(part).items()
        if isinstance(value, int) and re.search(r"token|_id$|_idx$", name)
    }
    ordinary = [token for token in range(min(vocabulary, 100)) if token not in special] or [0]
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (_EXAMPLES, length))]


def _text(config: Any, names: list[str]) -> dict[str, Any]:
    text: dict[str, Any] = {}
    if "input_ids" in names:
        text["input_ids"] = _tokens(config)
        books = getattr(config, "num_codebooks", None)
        if isinstance(books, int) and "decoder_input_ids" not in names:
            text["input_ids"] = _tokens(config).repeat(books, 1)
    if "decoder_input_ids" in names:
        text["decoder_input_ids"] = _tokens(config, 8)
    if "bbox" in names:
        text["bbox"] = torch.tensor([1, 2, 30, 40]).expand(_EXAMPLES, _TEXT, 4).contiguous()
    return text


def _needed(config: Any, required: set[str]) -> dict[str, Any]:
    """What a part of a model takes from the part before it."""
    width = _field(config, "hidden_size", "d_model", "embed_dim", "dim", "n_embd", default=32)
    width = width if isinstance(width, int) else width[0]
    states = torch.randn(_EXAMPLES, _TEXT, width)
    needed: dict[str, Any] = {}
    for name in required:
        if name in (
            "inputs_embeds",
            "hidden_states",
            "query_embeds",
            "input_embeds",
            "context",
            "encoder_hidden_states",
        ):
            needed[name] = states
        elif name == "qformer_input_ids":
            needed[name] = _tokens(config)
        elif name == "attention_mask":
            needed[name] = torch.ones(_EXAMPLES, _TEXT, dtype=torch.long)
    return needed


def _shaped(model: nn.Module, config: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    for pictures in _pictures(config, names):
        for sounds in _sounds(config, names):
            yield {**pictures, **sounds}


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = (value.get("height", 224), value.get("width", 224))
    if isinstance(value, list | tuple):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _pictures(config: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    takes = (
        "pixel_values",
        "pixel_values_videos",
        "flattened_patches",
        *(("hidden_states",) if "grid_thw" in names else ()),
    )
    name = next((name for name in takes if name in names), None)
    if name is None:
        yield {}
        return
    channels = _field(config, "num_channels", "in_channels", "in_chans", inside="vision|image|encoder", default=3)
    channels = channels if isinstance(channels, int) else 3
    patch = _pair(_field(config, "patch_size", inside="vision|image|encoder", default=16))[0]
    if "image_grid_thw" in names or "grid_thw" in names:
        temporal = _field(config, "temporal_patch_size", inside="vision", default=1)
        merge = _field(config, "spatial_merge_size", "merge_size", inside="vision", default=2)
        grid = torch.tensor([[1, 2 * merge, 2 * merge]]).expand(_EXAMPLES, 3).contiguous()
        grid_name = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
        for width in (channels * temporal * patch * patch, channels * patch * patch):
            yield {name: torch.randn(_EXAMPLES * 4 * merge * merge, width), grid_name: grid}
            yield {name: torch.randn(_EXAMPLES * 4 * merge * merge, channels, patch, patch), grid_name: grid}
    size = _field(config, "image_size", "img_size", "input_size", inside="vision|image|encoder")
    sizes = [_pair(size)] if size is not None and _is_size(size) else []
    frames = _field(config, "num_frames", "frames_per_clip", "frames", default=2)
    frames = frames if isinstance(frames, int) else 2
    for height, width in dict.fromkeys([*sizes, (4 * patch, 4 * patch), (64, 64), (224, 224)]):
        flat = torch.randn(_EXAMPLES, channels, height, width)
        yield {name: flat}
        extra: dict[str, Any] = {}
        if "image_sizes" in names:
            extra["image_sizes"] = torch.tensor([[height, width]] * _EXAMPLES)
            yield {name: flat, **extra}
        if "spatial_shapes" in names:
            yield {
                name: torch.randn(_EXAMPLES, 16, channels * patch * patch),
                "spatial_shapes": torch.tensor([[4, 4]] * _EXAMPLES),
                "pixel_attention_mask": torch.ones(_EXAMPLES, 16, dtype=torch.long),
            }
        yield {name: flat[:, None].expand(-1, frames, -1, -1, -1).contiguous(), **extra}


def _is_size(size: Any) -> bool:
    values = size.values() if isinstance(size, dict) else size if isinstance(size, list | tuple) else [size]
    return all(isinstance(value, int) for value in values)


def _sounds(config: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    found = [name for name in ("input_features", "input_values", "audio_values") if name in names]
    if not found:
        yield {}
        return
    name = found[0]
    bins = _field(
        config, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim",
        inside="audio|speech|encoder", default=80,
    )  # fmt: skip
    positions = _field(config, "max_source_positions", inside="audio|speech|encoder", default=1500)
    length = _field(config, "max_length", inside="audio|speech", default=1024)
    waves = [torch.randn(_EXAMPLES, 4000), torch.randn(_EXAMPLES, 1, 4000), torch.randn(_EXAMPLES, 16000)]
    spectra = [
        torch.randn(_EXAMPLES, bins, 2 * positions),
        torch.randn(_EXAMPLES, length if isinstance(length, int) else 1024, bins),
        torch.randn(_EXAMPLES, 64, bins),
        torch.randn(_EXAMPLES, bins, 64),
        torch.randn(_EXAMPLES, 1, 64, bins),
    ]
    for values in [*waves, *spectra] if name == "input_values" else [*spectra, *waves]:
        yield {name: values}
        for mask in ("input_features_mask", "attention_mask", "feature_attention_mask"):
            if mask in names:
                for frames in {values.shape[-1], values.shape[1]}:
                    yield {name: values, mask: torch.ones(_EXAMPLES, frames, dtype=torch.long)}


def _with_placeholders(model: nn.Module, text: dict[str, Any], other: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Text with as many places for a picture or a sound as there are features of it."""
    if not text or not other:
        return
    for kind, field in (("image", "pixel_values"), ("audio", "input_features")):
        token = _field(model.config, f"{kind}_token_id", f"{kind}_token_index", inside="text|thinker")
        features = getattr(model, f"get_{kind}_features", None)
        features = features or getattr(getattr(model, "model", None), f"get_{kind}_features", None)
        if field not in other or token is None or features is None:
            continue
        takes = inspect.signature(features).parameters
        try:
            with torch.no_grad():
                made = features(**{key: value for key, value in other.items() if key in takes})
        except Exception:  # inputs that a model doesn't take are tried on it, and it says no in any way
            continue
        count = _rows_of(made)
        if count:
            each = count // _EXAMPLES
            places = torch.full((_EXAMPLES, each), int(token))
            ids = torch.cat([text["input_ids"][:, :4], places, text["input_ids"][:, 4:]], 1)
            yield {**text, **other, "input_ids": ids}
            yield {**text, **other, "input_ids": ids, "mm_token_type_ids": (ids == token).long()}


def _rows_of(made: Any) -> int:
    """How many features there are in all: tensors, lists of them, or an output with a pooler's."""
    if hasattr(made, "pooler_output") and made.pooler_output is not None:
        made = made.pooler_output
    elif hasattr(made, "last_hidden_state"):
        made = made.last_hidden_state
    if isinstance(made, torch.Tensor):
        return made.numel() // made.shape[-1]
    if isinstance(made, list | tuple):
        return sum(_rows_of(item) for item in made)
    return 0
