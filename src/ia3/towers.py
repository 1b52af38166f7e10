"""The parts of a model that a default may be for: models in it, and an encoder-decoder's halves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ia3.layers import is_inside


def tower_names(model: nn.Module) -> dict[str, list[str]]:
    """The sub-models with a configuration of their own: names as in the model's configuration, to their paths."""
    named = {id(part): name.removesuffix("_config") for name, part in _parts_of(model)}
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        name = named.get(id(_config(module)))
        if path and name is not None:
            found.setdefault(name, []).append(path)
    return {
        name: [path for path in paths if not any(path != around and is_inside(path, around) for around in paths)]
        for name, paths in found.items()
    }


def _parts_of(model: Any) -> Iterator[tuple[str, Any]]:
    """The sub-configurations of a configuration, nested ones too."""
    parts = [("", _config(model))]
    while parts:
        _, config = parts.pop()
        for name in getattr(type(config), "sub_configs", None) or vars(config or object).get("sub_configs", ()):
            part = getattr(config, name, None)
            if hasattr(part, "model_type"):
                yield name, part
                parts.append((name, part))


def _halves(model: nn.Module) -> dict[str, list[str]]:
    """Of an encoder-decoder, which may have one configuration for both, the paths of `encoder` and `decoder`."""
    if not getattr(_config(model), "is_encoder_decoder", False):
        return {}
    paths = [path for path, _ in model.named_modules()]
    holders = [path.removesuffix("decoder") for path in paths if re.fullmatch(r"(.*\.)?decoder", path)]
    whole = next((holder for holder in holders if f"{holder}encoder" in paths), None)
    return {} if whole is None else {name: [whole + name] for name in ("encoder", "decoder")}


def chosen_towers(model: nn.Module, towers: Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a module's path is in the chosen towers.

    Args:
        model: any model.
        towers: names as `tower_names` has them, `encoder` or `decoder`, or `("all",)`; the language model's where left
            out.

    Raises:
        ValueError: no such tower.
    """
    if towers is not None and "all" in towers:
        return lambda path: True
    named = tower_names(model)
    if towers is not None:
        named = _halves(model) | named
        unknown = sorted({*towers} - {*named})
        if unknown:
            halves = " It has no encoder beside a decoder." if "decoder" in unknown else ""
            raise ValueError(f"towers: {unknown} are none of this model's, {sorted(named)} or 'all'.{halves}")
        chosen = [path for name in towers for path in named[name]]
        return lambda path: any(is_inside(path, root) for root in chosen)
    config: Any = _config(model)
    texts = _text_configs(config)
    roots = [path for path, module in model.named_modules() if path and any(_config(module) is one for one in texts)]
    if roots and not any(one is config for one in texts):
        return lambda path: any(is_inside(path, root) for root in roots)
    others = [path for paths in named.values() for path in paths if path not in roots]
    if not others or not hasattr(config, "vocab_size"):
        return lambda path: True
    return lambda path: not any(is_inside(path, other) for other in others)


def _config(module: Any) -> Any:
    """The configuration of a model or a model in it; parts of one may hold it too, but have no prefix."""
    return getattr(module, "config", None) if hasattr(module, "base_model_prefix") else None


def _text_configs(config: Any) -> list[Any]:
    """That of the language model; of an encoder and a decoder with one each, both that know a vocabulary."""
    if not hasattr(config, "get_text_config"):
        return []
    found = [config.get_text_config()]
    if getattr(config, "is_encoder_decoder", False) and found[0] is not config:
        encoder = getattr(config, "encoder", None) or config.get_text_config(encoder=True)
        found += [encoder] if hasattr(encoder, "vocab_size") and encoder is not config else []
    return found
