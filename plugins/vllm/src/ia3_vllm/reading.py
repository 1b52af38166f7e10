"""From an adapter's vectors, by transformers' names of modules, to what each of the engine's layers multiplies by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ia3.sites import Site
from ia3_vllm.slices import Shard, joined

# Fused projections whose channels a checkpoint has in the engine's order. Where the engine sorts them when it loads
# weights (head by head in GPT-NeoX, group by group in InternLM2), a vector would have to be sorted too.
_IN_ORDER = {"phi3"}


class Served(NamedTuple):
    """What a layer can multiply: its output's parts, one a projection, and its input; () and None where it can't."""

    output: tuple[Shard, ...]
    input: Shard | None = None


class Scales(NamedTuple):
    """What this rank multiplies a layer's input and output by, `[width]` in fp32; None for nothing."""

    input: Tensor | None = None
    output: Tensor | None = None


def base_of(config: Any, name: str, trust_remote_code: bool = False) -> nn.Module:
    """transformers' model for a configuration, without memory, to check adapters against.

    Raises:
        ValueError: it has no causal language model for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            base: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(f"(IA)³ adapters are served on transformers' causal language models: {error}") from error
    base.__dict__["name_or_path"] = name
    return base


def scales_of(
    vectors: Mapping[Site, Tensor],
    served: Mapping[str, Served],
    packed: Mapping[str, Sequence[str]],
    *,
    model_type: str,
    rename: Callable[[str], str | None] = lambda path: path,
    elsewhere: Callable[[str], bool] = lambda path: False,
) -> dict[str, Scales]:
    """Place an adapter's vectors on the engine's layers.

    Args:
        vectors: a vector `[site.width]` for each site.
        served: the engine's layers by path.
        packed: the projections that the engine has in one layer, by the layer's last name.
        model_type: of transformers' configuration.
        rename: from a path in transformers' model to one in the engine's.
        elsewhere: whether a path in the engine's model is another rank's, of a pipeline.

    Returns:
        What each layer multiplies by, for the layers that the adapter has vectors at.

    Raises:
        ValueError: a site that isn't served; it says which and why.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor | None]] = {}
    refused: dict[str, str] = {}
    for site, vector in vectors.items():
        path = rename(site.path) or site.path
        if elsewhere(path):
            continue
        name, part = _layer_of(path, served, packed)
        layer = served.get(name, Served(()))
        shards = layer.output
        if name not in served:
            refused[site.path] = "vLLM has no layer here that takes adapters, or --lora-target-modules leaves it out"
        elif site.side == "input" and layer.input is not None and part is None:
            inputs[name] = layer.input.of(vector)
        elif site.side == "input":
            refused[site.path] = "its input isn't its own, in vLLM other projections or ranks read it too"
        elif not shards:
            refused[site.path] = "its bias is added after its output"
        elif part is not None and len(shards) == len(packed[name.rpartition(".")[2]]):
            outputs.setdefault(name, [None] * len(shards))[part] = vector
        elif part is None and (len(shards) == 1 or model_type in _IN_ORDER):
            outputs[name] = list(torch.split(vector, [shard.total for shard in shards]))
        else:
            refused[site.path] = f"in which order vLLM has a {model_type}'s fused channels isn't known"
    if refused:
        shown = "; ".join(f"{path}: {why}" for path, why in list(refused.items())[:3])
        raise ValueError(f"{len(refused)} of this adapter's {len(vectors)} vectors can't be served ({shown}).")
    whole = {name: joined(parts, served[name].output) for name, parts in outputs.items()}
    return {name: Scales(inputs.get(name), whole.get(name)) for name in {**inputs, **whole}}


def _layer_of(path: str, served: Mapping[str, Served], packed: Mapping[str, Sequence[str]]) -> tuple[str, int | None]:
    """The layer that makes a module's output, and which part of it; None for all of it."""
    parent, _, leaf = path.rpartition(".")
    for name, parts in packed.items():
        if path not in served and leaf in parts:
            return ".".join(filter(None, (parent, name))), list(parts).index(leaf)
    return path, None
