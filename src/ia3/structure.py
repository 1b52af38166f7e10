"""A model's blocks, found by structure: what makes their keys and values, and what closes their feed-forwards.

The paper (Liu et al. 2022, section 3.3) puts a vector on the keys, on the values and on the intermediate activation of
every block. Names are evidence here and structure decides: an attention is a module with a key and a value
projection beside each other, or with one layer that makes both; a feed-forward's second matrix leads back to the width
that the first one started from. No forward is run; `ia3.dataflow` checks the result by one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ia3.experts import acts_in_front, find_experts
from ia3.layers import is_conv1d, is_inside, paths_around
from ia3.towers import chosen_towers

Intervals = tuple[tuple[int, int], ...]
"""Half-open channel ranges `(start, stop)` of a fused projection."""


class Projection(NamedTuple):
    """A layer that makes keys or values, and its channels that do; None for all."""

    path: str
    channels: Intervals | None = None


@dataclass(frozen=True)
class FoundAttention:
    """One attention.

    Args:
        path: the module that holds its projections.
        keys_values: what makes keys and values, in the order of the model's modules.
        query: what makes queries; empty where the same layer does.
        out: the layer behind them, its output's projection as a rule.
        lacks: why it can't be adapted; empty where it can.
    """

    path: str
    keys_values: tuple[Projection, ...]
    query: str = ""
    out: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class FoundFeedForward:
    """One feed-forward: the matrices before the activation, the gate's first, and the second; experts have one path."""

    up: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Args:
        path: the module around its parts.
        attentions: a decoder's to itself before that across.
        feed_forwards: in the order of the model's modules.
        lacks: what of it can't be adapted and why; empty where nothing is missing.
    """

    path: str
    attentions: tuple[FoundAttention, ...]
    feed_forwards: tuple[FoundFeedForward, ...]
    lacks: str = ""

    @property
    def keys_values(self) -> list[Projection]:
        """What makes keys and values."""
        return [projection for attention in self.attentions for projection in attention.keys_values]

    @property
    def second_matrices(self) -> list[str]:
        """What closes its feed-forwards: the paths of the layers whose input is the intermediate."""
        return [feed_forward.down for feed_forward in self.feed_forwards]


class _Layer(NamedTuple):
    path: str
    module: nn.Module
    inputs: int
    outputs: int
    kind: str


# A module's layers, what of queries, keys and values each says it makes, and the rest of its name.
_Group = list[tuple[_Layer, str, frozenset[str]]]


# Under these names adapters hold their vectors and copies, of which there may be thousands.
_ADAPTERS = ("ia3_l", "modules_to_save")
# What a projection's name says besides whether it makes queries, keys or values.
_FILLERS = frozenset(
    [
        "attn",
        "b",
        "c",
        "conv",
        "d",
        "dense",
        "fc",
        "head",
        "heads",
        "in",
        "layer",
        "lin",
        "linear",
        "proj",
        "project",
        "projection",
        "self",
        "to",
        "w",
    ]
)
_MEANINGS = {"key": "k", "keys": "k", "value": "v", "values": "v", "query": "q", "queries": "q", "att": "attn"}
# Mixers of tokens that are no softmax over keys: (IA)³ says nothing of them.
_NO_SOFTMAX = re.compile(
    r"Mamba|Delta(Net|Attention)|RecurrentBlock|RgLru|ShortConv|Lightning|(?<!Kimi)Linear(Self)?Attention$|Rwkv|xLSTM|Deformable|Indexer|Gated\w*Conv"
)
# Attentions whose fused projection has `[q | k | v]` of each head, and names of those that have it once.
_HEAD_BY_HEAD = ("Bloom", "Disentangled", "Falcon", "GPTNeoX", "Persimmon")
_PART_BY_PART = ("qkv", "qkv_proj", "c_attn", "Wqkv", "att_proj")
# Inside a block, what these modules end with is no feed-forward unless it stands in a module that says so.
_MIXES_TOKENS = re.compile(
    r"att|mamba|conv|delta|recurrent|temporal_block|per_layer|ple_|laurel|bottleneck|adapter|lora", re.IGNORECASE
)
_FEEDS_FORWARD = re.compile(r"mlp|ffn?\b|ff\d|feed|expert|moe", re.IGNORECASE)


def find_blocks(model: nn.Module, towers: Sequence[str] | None = None) -> list[Block]:
    """The blocks of a model, or of one of its towers.

    Args:
        model: any model; its tensors are not looked at.
        towers: names of sub-models, as `tower_names` has them, or `("all",)`; the language model's where left out.

    Returns:
        In the order of the model's modules; empty for a model without attention.

    Raises:
        ValueError: no such tower.
    """
    within = chosen_towers(model, towers)
    modules = {
        path: module
        for path, module in model.named_modules()
        if within(path) and not any(part in _ADAPTERS for part in path.split("."))
    }
    layers = list(_layers(modules))
    other = {path for path, module in modules.items() if _mixes_without_softmax(module)}
    attending = {path: module for path, module in modules.items() if path not in other}
    attentions = _apart([*_attentions(model, attending, layers), *_unreachable(modules)])
    if not attentions and towers is None:  # what a tower's configuration says is all that there is
        return find_blocks(model, ("all",))
    mixers = {path for path in other if not _is_item(path)}  # a block around one may have a feed-forward
    return _blocks(modules, [layer for layer in layers if mixers.isdisjoint(_above(layer.path))], attentions)


def layer_widths(module: Any) -> tuple[int | None, int] | None:
    """Input and output channels of a layer; None for the input of an embedding, or for other modules."""
    # The latter is the last projection of torch's MultiheadAttention, which reads its weight and never calls it.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, module.embedding_dim
    if is_conv1d(module):
        return module.weight.shape[0], module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    experts = find_experts(module)
    return None if experts is None else (experts.count * experts.width, experts.hidden)


# Paths


def _above(path: str) -> Iterator[str]:
    """The paths around a module's, the nearest first, the model's own last."""
    yield from paths_around(path)
    if path:
        yield ""


def _is_item(path: str) -> bool:
    """Whether a module is one of a list's."""
    return path.rpartition(".")[2].isdigit()


def _outermost_item(path: str) -> str:
    """The first list's item that a module is in; empty outside of lists."""
    items = [around for around in (path, *_above(path)) if _is_item(around)]
    return items[-1] if items else ""


def _innermost_item(path: str) -> str:
    return next((around for around in _above(path) if _is_item(around)), "")


# Layers


def _layers(modules: dict[str, nn.Module]) -> Iterator[_Layer]:
    for path, module in modules.items():
        experts, widths = find_experts(module), layer_widths(module)
        if experts is not None:
            kind = "experts" if acts_in_front(module) else "one matrix of experts"
            yield _Layer(path, module, experts.width, experts.hidden, kind)
        elif widths is not None and widths[0] is not None:
            kind = "convolution" if isinstance(module, _ConvNd) else "linear"
            yield _Layer(path, module, widths[0], widths[1], kind)


def _meaning(name: str) -> tuple[str, frozenset[str]]:
    """Which of `q`, `k` and `v` a layer's name says it makes, and its other words."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    if words in (["c", "attn"], ["att", "proj"]):
        return "qkv", frozenset()
    made, rest = set(), set()
    for word in words:
        word = _MEANINGS.get(word, word)
        letters = word.removeprefix("w") if len(word) > 1 else word
        if {*letters} <= {*"qkv"} and letters:
            made |= {*letters}
        elif word not in _FILLERS:
            rest.add(word)
    return "".join(letter for letter in "qkv" if letter in made), frozenset(rest)


def made_by(name: str) -> str:
    """Which of `q`, `k` and `v` a layer makes, by its name: `"k"` for `k_proj` or `linear_k`, `"qkv"` for all."""
    return _meaning(name)[0]


def _attentions(model: nn.Module, modules: dict[str, nn.Module], layers: Sequence[_Layer]) -> Iterator[FoundAttention]:
    groups: dict[str, _Group] = defaultdict(list)
    for layer in layers:
        around, _, name = layer.path.rpartition(".")
        made, rest = _meaning(name)
        outer, _, wrapper = around.rpartition(".")
        if not made and not rest and _meaning(wrapper)[0]:  # a layer in a wrapper of its own goes by the wrapper's name
            around, (made, rest) = outer, _meaning(wrapper)
        if layer.kind == "linear" or (layer.kind == "convolution" and not _is_depthwise(layer.module)):
            groups[around].append((layer, made, rest))
    for path, group in groups.items():
        if path in modules:
            if type(modules[path]).__name__.startswith("Disentangled"):  # DeBERTa's name says nothing
                group = [
                    (layer, made or ("qkv" if layer.path.endswith(".in_proj") else ""), r) for layer, made, r in group
                ]
            projections = _keys_and_values(model, modules[path], group)
            if isinstance(projections, str):
                yield FoundAttention(path, (), lacks=projections)
            elif projections:
                query = next((layer.path for layer, made, _ in group if made == "q"), "")
                yield FoundAttention(path, tuple(projections), query, _out(path, group, layers))


def _is_depthwise(module: Any) -> bool:
    """Whether a convolution works on each channel for itself, as those behind a projection do."""
    return bool(1 < module.groups == module.in_channels)


def _out(path: str, group: _Group, layers: Sequence[_Layer]) -> str:
    """The projection of an attention's output: beside the others, or the next layer in another module, as BERT's."""
    beside = [layer.path for layer, made, _ in group if not made and layer.path.startswith(f"{path}.")]
    if beside:
        return beside[-1]
    last = max(index for index, layer in enumerate(layers) if layer is group[-1][0])
    return layers[last + 1].path if last + 1 < len(layers) else ""


def _apart(attentions: Sequence[FoundAttention]) -> list[FoundAttention]:
    """Attentions, without those that hold another: its keys are mixed with theirs, and no layer makes them alone."""
    held = {around: each.path for each in attentions for around in _above(each.path)}
    mixed = "its keys and values are mixed with those of"
    return [
        replace(each, keys_values=(), lacks=f"{mixed} {held[each.path]}") if each.path in held else each
        for each in attentions
    ]


def _mixes_without_softmax(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return bool(_NO_SOFTMAX.search(type(module).__name__) or names & {"A_log", "dt_bias", "time_decay"})


def _keys_and_values(model: nn.Module, module: nn.Module, group: _Group) -> list[Projection] | str:
    """The key and value projections among a module's layers, or why these can't be told; empty for no attention."""
    of = {
        made: [(layer, rest) for layer, said, rest in group if said == made]
        for made in ("q", "k", "v", "kv", "qkv", "qk")
    }
    if of["qkv"] and of["q"]:  # GPT-2's attention across: the same name makes keys and values alone
        of["kv"], of["qkv"] = of["kv"] + of["qkv"], []
    found = []
    for layer, _ in of["qkv"]:
        channels = _fused_channels(model, module, layer, group)
        if channels is None:
            return f"how {layer.path} divides its channels into queries, keys and values is unknown"
        found.append(Projection(layer.path, channels))
    # Of compressed keys and values the last layer makes them, those before it what they are made of.
    found += [Projection(layer.path) for layer, _ in of["kv"][-1:]]
    if found:
        return found
    if of["qk"] and of["v"]:
        return f"{of['qk'][0][0].path} makes queries and keys in one"
    keys, values = of["k"], of["v"]
    alike = {rest for _, rest in keys} & {rest for _, rest in values}
    if alike:  # names that say more come in pairs, and what has no partner is something else
        keys, values = ([(layer, rest) for layer, rest in side if rest in alike] for side in (keys, values))
    absent = [name for name, child in {**vars(module), **module._modules}.items() if child is None]
    shared = any(_meaning(name)[0] == "v" for name in absent)  # values are the keys
    if not keys or not (values or shared):
        return []
    return [Projection(layer.path) for layer, said, _ in group if layer in [each for each, _ in keys + values]]


def _fused_channels(model: Any, module: Any, layer: _Layer, group: _Group) -> Intervals | None:
    """The key and value channels of a layer that makes queries, too; None where they can't be told.

    Usually they follow the queries, of which there are as many as the output's projection takes in. Which families
    divide them otherwise no width tells, nor whether code from elsewhere does.
    """
    width, kind = layer.outputs, type(module).__name__
    config: Any = getattr(module, "config", getattr(model, "config", None))
    if not type(module).__module__.startswith("transformers."):
        return None
    if kind.startswith("CodeGen"):  # [q | v | k] in each of four parts
        return _last_of_each(width, 4, 3, 2)
    if kind.startswith("Falcon") and config.new_decoder_architecture:
        return _last_of_each(width, config.num_kv_heads, config.num_attention_heads // config.num_kv_heads + 2, 2)
    if kind.startswith("Falcon") and config.multi_query:
        return _last_of_each(width, 1, config.num_attention_heads + 2, 2)
    if kind.startswith(_HEAD_BY_HEAD) or (kind.startswith("GPTBigCode") and not module.multi_query):
        return _last_of_each(width, config.num_attention_heads, 3, 2)
    if layer.path.rpartition(".")[2] not in _PART_BY_PART:
        return None
    ends = [other.inputs for other, made, _ in group if not made and other.inputs < width]
    queries = ends[-1] if ends and 3 * ends[-1] != width else width // 3
    return ((queries, width),)


def _last_of_each(width: int, groups: int, parts: int, last: int) -> Intervals:
    """Of channels in groups of equal parts, the last parts of each group."""
    size = width // (groups * parts)
    if groups == 1:
        return ((width - last * size, width),)
    return tuple((((group + 1) * parts - last) * size, (group + 1) * parts * size) for group in range(groups))


def _unreachable(modules: dict[str, nn.Module]) -> Iterator[FoundAttention]:
    """Attentions of blocks whose keys and values no module makes; one outside of lists pools what the blocks made."""
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and _outermost_item(path):
            yield FoundAttention(
                path, (), lacks="torch's MultiheadAttention reads its in_proj_weight, and no module makes its keys"
            )


# Feed-forwards


def _feed_forwards(
    layers: Sequence[_Layer], attentions: Sequence[FoundAttention]
) -> tuple[dict[str, FoundFeedForward], set[str]]:
    """Those that a layer ends which leads back from a width to which another of its scope led, to where that began.

    Returns:
        By the path of its second matrix; and the paths of those that count only in a block with an attention and
        nothing else: bottlenecks outside of experts, narrower than what they start from, and convolutions.
    """
    taken = {projection.path for attention in attentions for projection in attention.keys_values}
    taken |= {attention.query for attention in attentions}
    # What leads into latent channels around experts is no feed-forward of its own.
    around_experts = {layer.path.rpartition(".")[0] for layer in layers if layer.kind == "experts"}
    inside = {attention.path for attention in attentions if not _is_item(attention.path)}
    free = [
        layer
        for layer in layers
        if layer.path not in taken
        and inside.isdisjoint(_above(layer.path))
        and not _is_part_of_a_mixer(layer.path)
        and (layer.kind == "experts" or layer.path.rpartition(".")[0] not in around_experts)
    ]
    scopes: dict[str, list[tuple[int, _Layer]]] = defaultdict(list)
    for index, layer in enumerate(free):
        for around in _above(layer.path):
            scopes[around].append((index, layer))
            if _is_item(around):
                break
    found: dict[str, FoundFeedForward] = {}
    taken_first: set[str] = set()
    # Those that narrow first: a layer that widens may be the first matrix of one, defined behind it.
    for narrows in (True, False):
        for index, layer in enumerate(free):
            if (layer.inputs >= layer.outputs) is not narrows or layer.path in taken_first:
                continue
            up = [] if layer.kind == "experts" else _first_matrices(index, layer, scopes, taken_first)
            if layer.kind == "experts" or (up and (narrows or up[-1] not in found)):
                found[layer.path] = FoundFeedForward(tuple(up), layer.path)
                taken_first |= {*up[-1:]}
    beside = {
        layer.path
        for layer in free
        if layer.kind == "convolution"
        or (layer.inputs < layer.outputs and not re.search("expert|shared", layer.path.lower()))
    }
    return {path: each for path, each in found.items() if path not in taken_first}, beside


def _first_matrices(
    index: int, layer: _Layer, scopes: dict[str, list[tuple[int, _Layer]]], used: set[str]
) -> list[str]:
    """What leads to another layer's input, in the nearest scope that has it: one layer, or a gate's two in order."""
    for around in _above(layer.path):
        fitting = [
            (at, up)
            for at, up in scopes[around]
            if up.kind == layer.kind
            and up.path not in used
            and up.inputs == layer.outputs
            and up.outputs in (layer.inputs, 2 * layer.inputs)
            and all(_is_alone(each.path, around, scopes) for each in (up, layer))
        ]
        before = [up for at, up in fitting if at < index]
        if before:
            # A gate's other half may be defined behind the second matrix.
            behind = [up for at, up in fitting if at > index and layer.inputs > layer.outputs]
            holder = before[-1].path.rpartition(".")[0]
            halves = [up for up in before + behind if up.path.rpartition(".")[0] == holder][-2:]
            if layer.inputs == layer.outputs or {up.outputs for up in halves} != {layer.inputs}:
                halves = halves[-1:]
            return [up.path for up in halves]
        if _is_item(around):
            return []
    return []


def _is_alone(path: str, scope: str, scopes: dict[str, list[tuple[int, _Layer]]]) -> bool:
    """Whether a layer stands directly in a scope, or beside its like alone in its own module there, as BERT's do."""
    holder = path.rpartition(".")[0]
    beside = {(each.inputs, each.outputs) for _, each in scopes[holder] if each.path.rpartition(".")[0] == holder}
    return holder == scope or len(beside) == 1


def _is_part_of_a_mixer(path: str) -> bool:
    """Whether a layer stands in a module of its block that mixes tokens, and in no feed-forward in it."""
    item = _innermost_item(path)
    names = path[len(item) :].split(".")[:-1]
    mixers = [index for index, name in enumerate(names) if _MIXES_TOKENS.search(name)]
    return bool(mixers) and not any(_FEEDS_FORWARD.search(name) for name in names[mixers[0] :])


# Blocks


def _blocks(
    modules: dict[str, nn.Module], layers: Sequence[_Layer], attentions: Sequence[FoundAttention]
) -> list[Block]:
    if not attentions:
        return []
    feeds, lesser = _feed_forwards(layers, attentions)
    holding: dict[str, list[FoundFeedForward]] = defaultdict(list)
    for down, each in feeds.items():
        for holder in (down, *_above(down)):
            holding[holder].append(each)
    around = {attention.path: _block_around(attention.path, holding, modules) for attention in attentions}
    held: dict[str, list[FoundAttention]] = defaultdict(list)
    for attention in attentions:
        held[around[attention.path] or _outermost_item(attention.path) or attention.path].append(attention)
    fed = {path: list(holding[path]) for path in around.values() if path}
    claimed = {each.down for own in fed.values() for each in own}
    lists = {_outermost_item(attention.path).rpartition(".")[0] for attention in attentions} - {""}
    bare = {_outermost_item(path).rpartition(".")[0] for path, block in around.items() if block is None}
    near = {path.rpartition(".")[0] for path in bare if path}
    for down, each in feeds.items():
        item = _outermost_item(down)
        holder = item.rpartition(".")[0]
        # Blocks without attention among those with one, or lists of feed-forwards beside one of attentions.
        if down not in claimed and item not in ("", down) and (holder in lists or holder.rpartition(".")[0] in near):
            fed.setdefault(item, []).append(each)
    lists_fed = {_outermost_item(path).rpartition(".")[0] for path in feeds}
    found = []
    for path in [path for path in modules if path in held or path in fed]:
        own = [each for each in fed.get(path, ()) if each.down not in lesser]
        own = own or (fed.get(path, []) if held[path] else [])
        lacks = [f"{each.path}: {each.lacks}" for each in held[path] if each.lacks]
        if not own and path.rpartition(".")[0] not in lists_fed:
            lacks += _unexplained(path, layers, attentions)
        found.append(Block(path, tuple(held[path]), tuple(own), "; ".join(lacks)))
    return found


def _block_around(path: str, holding: Container[str], modules: dict[str, nn.Module]) -> str | None:
    """The smallest module around an attention that has a feed-forward, no further than its outermost list's item."""
    limit = _outermost_item(path)
    for around in (path, *_above(path)):
        if (limit and not is_inside(around, limit)) or not around:
            return None
        if around in holding and not isinstance(modules.get(around), nn.ModuleList):
            return around
    return None


def _unexplained(path: str, layers: Sequence[_Layer], attentions: Sequence[FoundAttention]) -> list[str]:
    """Why a list's item without a feed-forward may lack one: it has layers beside its attentions."""
    beside = [
        layer.path[len(path) + 1 :]
        for layer in layers
        if _is_item(path)
        and is_inside(layer.path, path)
        and not any(is_inside(layer.path, each.path) for each in attentions)
        and not _is_part_of_a_mixer(layer.path)
    ]
    return [f"no second matrix of a feed-forward is to be told among {beside[:6]}"] if len(beside) > 1 else []
