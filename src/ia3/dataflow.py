"""What one forward of a model says of its attentions and feed-forwards, by data flow and without any name.

Every projection's output is cut from the graph. What then reaches a softmax attention's keys, values or queries has a
gradient in the projections that made it, channel by channel; and what enters a projection through a pointwise
non-linearity, from projections of one and the same input that is as wide as its output, is a feed-forward's
intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ia3.recording import Attended, Cut, Recorder
from ia3.sites import Site
from ia3.structure import Intervals

Channels = dict[str, Intervals]
"""Output channels as half-open ranges, by the path of the module (or bare parameter) that makes them."""


@dataclass(frozen=True)
class AttentionFlow:
    """One softmax attention, by the module that ran it.

    Args:
        path: of the innermost module around it.
        keys, values, queries: what makes them.
        beside: makes a part of the keys' or values' channels beside the projection that makes the rest.
        text: it is in the part of the model that the text configuration describes.
    """

    path: str
    keys: Channels
    values: Channels
    queries: Channels
    beside: Channels = field(default_factory=dict)
    text: bool = True


@dataclass(frozen=True)
class FeedForwardFlow:
    """One feed-forward: its second matrix, the first ones, and which of these stay outside of the non-linearity."""

    path: str
    first: tuple[str, ...]
    linear: tuple[str, ...]
    text: bool = True


@dataclass(frozen=True)
class Flow:
    """What one forward said.

    Args:
        attentions: the distinct ones, in the order in which they ran.
        feedforwards: likewise.
        skipped: why an attention can't be told, by the path of the module around it.
        ran: the paths of the projections that ran.
        widths: their output channels.
        bare: those of them that are parameters used by functions, which no module's output shows.
    """

    attentions: tuple[AttentionFlow, ...]
    feedforwards: tuple[FeedForwardFlow, ...]
    skipped: dict[str, str]
    ran: frozenset[str]
    widths: dict[str, int]
    bare: frozenset[str] = frozenset()

    @property
    def keys(self) -> Channels:
        return _merged(attention.keys for attention in self.attentions)

    @property
    def values(self) -> Channels:
        return _merged(attention.values for attention in self.attentions)

    @property
    def queries(self) -> Channels:
        return _merged(attention.queries for attention in self.attentions)

    @property
    def feedforward(self) -> dict[str, FeedForwardFlow]:
        return {found.path: found for found in self.feedforwards}


def observe(model: nn.Module, batch: Mapping[str, Any]) -> Flow:
    """Run one forward and tell its flow; the model's weights and its mode stay as they are.

    Args:
        model: a model on the CPU, best a `tiny_twin`.
        batch: inputs of its forward.

    Raises:
        Exception: what the model's forward raises.
    """
    with _experts_one_by_one(model), _frozen(model), ExitStack() as hooks, torch.enable_grad():
        recorder = Recorder(model)
        recorder.watch(hooks)
        with recorder:
            model(**batch)
        return _told(recorder, _text_part(model))


def _text_part(model: nn.Module) -> Callable[[str], bool]:
    """Whether a path is in what the text configuration describes: all is, where nothing in particular is."""
    configs = {path: type(module.config) for path, module in model.named_modules() if hasattr(module, "config")}
    try:
        config: Any = model.config
        text = type(config.get_text_config())
    except (AttributeError, ValueError):  # no configuration, or several that may be the text's
        return lambda path: True
    if all(kind is not text for path, kind in configs.items() if path):
        return lambda path: True

    def inside(path: str) -> bool:
        while path and path not in configs:
            path = path.rpartition(".")[0]
        return configs.get(path) is text

    return inside


@contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """transformers' batched ways copy experts' weights before they multiply; one by one they are views."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    name = "_experts_implementation_internal"
    before = [(config, getattr(config, name)) for config in configs if hasattr(config, name)]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needs in before:
            parameter.requires_grad_(needs)


# Sites beside the flow


def compare(flow: Flow, sites: Iterable[Site]) -> list[str]:
    """What differs between sites and the flow, a sentence each; nothing where every key, value and intermediate has
    exactly one vector and nothing else has any.

    A tower beside the text's whose attentions have no site at all is left alone and no difference.

    Args:
        flow: of the model, or of its tiny twin, in which the sites were found.
        sites: as `find_sites` found them.
    """
    outputs: Channels = {}
    inputs: set[str] = set()
    for site in sites:
        if site.side == "input":
            inputs.add(site.path)
        else:
            outputs[site.path] = site.intervals or ((0, site.width),)
    touched = {_tower(path) for path in (*outputs, *inputs)}
    meant = _meant(flow, touched, set(outputs))
    attentions = [attention for attention in flow.attentions if meant(attention)]
    feedforwards = [found for found in flow.feedforwards if meant(found)]
    spent: set[str] = set()  # vectors that stand for an intermediate
    said = [
        *(s for attention in attentions for s in _lacking(attention, outputs, flow)),
        *(s for found in feedforwards for s in _lacking_intermediate(found, flow, inputs, outputs, spent)),
        *(f"{reason[0].upper()}{reason[1:]}." for path, reason in flow.skipped.items() if _block(path)),
        *_too_much(flow, outputs, inputs, spent),
    ]
    return list(dict.fromkeys(said))


def _tower(path: str) -> str:
    """What a path's first numbered list is in, or all but its last name."""
    found = _NUMBER.search(path)
    return path[: found.start()] if found else path.rpartition(".")[0]


def _meant(flow: Flow, touched: set[str], outputs: set[str]) -> Callable[[AttentionFlow | FeedForwardFlow], bool]:
    """What must have vectors: the text's blocks, other towers that have any, and what is in no block if it has one."""
    blocks = any(_block(attention.path) for attention in flow.attentions)

    def is_meant(found: AttentionFlow | FeedForwardFlow) -> bool:
        if blocks and not _block(found.path):
            return isinstance(found, AttentionFlow) and bool({*found.keys, *found.values} & outputs)
        return found.text or _tower(found.path) in touched

    return is_meant


def _lacking(attention: AttentionFlow, outputs: Channels, flow: Flow) -> Iterator[str]:
    for kind, made in (("keys", attention.keys), ("values", attention.values)):
        # Where several projections are added, one vector behind each of them is one on their sum.
        for path, intervals in made.items():
            missing = _as_set(intervals) - _as_set(outputs.get(path, ()))
            if path in flow.bare and path not in outputs:
                if path.rpartition(".")[0] not in outputs:
                    yield f"The {kind} of {attention.path} are made by {path}, a parameter that a function uses."
            elif missing == _as_set(intervals):
                yield f"The {kind} of {attention.path} lack a vector: {path} makes them."
            elif missing:
                yield f"The {kind} of {attention.path} have a vector in part: {path} lacks {_spell(missing)}."


def _lacking_intermediate(
    found: FeedForwardFlow, flow: Flow, inputs: set[str], outputs: Channels, spent: set[str]
) -> Iterator[str]:
    """One vector: at the second matrix's input, on its experts, or behind the half that no non-linearity bends."""
    if found.path in flow.bare:  # experts: whatever is a site there is the experts' own
        places = {found.path, found.path.rpartition(".")[0]} & (inputs | set(outputs))
    else:
        places = ({found.path} & inputs) | (set(found.linear) & set(outputs))
    spent |= places
    if not places:
        yield f"The feed-forward's intermediate lacks a vector: it enters {found.path}."
    elif len(places) > 1:
        yield f"The feed-forward's intermediate has {len(places)} vectors: {', '.join(sorted(places))}."


def _too_much(flow: Flow, outputs: Channels, inputs: set[str], spent: set[str]) -> Iterator[str]:
    keys, values, queries = flow.keys, flow.values, flow.queries
    for path, intervals in outputs.items():
        if path in spent or path not in flow.ran:
            continue
        meant = _as_set(keys.get(path, ())) | _as_set(values.get(path, ()))
        scaled = _as_set(intervals) - meant
        of_queries = scaled & _as_set(queries.get(path, ()))
        both = _as_set(intervals) & meant & _as_set(queries.get(path, ()))
        if of_queries:
            yield f"{path} scales queries: {_spell(of_queries)}."
        if both:
            yield f"{path} scales queries with the keys or values that the same channels make: {_spell(both)}."
        if scaled - of_queries:
            rest = scaled - of_queries
            yield f"{path} scales what is no key, value or intermediate: {_spell(rest)}."
    for path in sorted(inputs - spent):
        if path in flow.ran and path not in flow.feedforward:
            yield f"The input of {path} is multiplied, and is no feed-forward's intermediate."


def _spell(channels: set[int]) -> str:
    intervals = _of_set(channels)
    shown = ", ".join(f"{start}–{stop - 1}" for start, stop in intervals[:4])
    return f"channels {shown}{', …' if len(intervals) > 4 else ''}"


# The graph


def _told(seen: Recorder, is_text: Callable[[str], bool]) -> Flow:
    leaves = {id(cut.leaf): cut for cut in seen.cuts}
    skipped: dict[str, str] = {}
    attentions = [*_attentions(seen, leaves, skipped), *(AttentionFlow(*told) for told in seen.within)]
    for attention in attentions:  # another call of it said more
        skipped.pop(attention.path, None)
    feedforwards = _feedforwards(seen, leaves, [a.path for a in attentions] + list(skipped))
    parameters = {path for _, path in seen.weights.values()}
    projections = [cut for cut in seen.cuts if cut.projects]
    widths = {cut.path: cut.width for cut in projections} | seen.within_widths
    return Flow(
        tuple(_distinct(replace(found, text=is_text(found.path)) for found in attentions)),
        tuple(_distinct(replace(found, text=is_text(found.path)) for found in feedforwards)),
        skipped,
        frozenset(widths),
        widths,
        frozenset(path for path in widths if path in parameters),
    )


def _attentions(seen: Recorder, leaves: dict[int, Cut], skipped: dict[str, str]) -> Iterator[AttentionFlow]:
    for attended in [*seen.attended, *_eager(seen)]:
        keys, by_the_way = _main(_feeders(attended.keys, leaves))
        values, beside = _main(_feeders(attended.values, leaves))
        queries = _feeders(attended.queries, leaves)
        if keys and values:
            yield AttentionFlow(attended.path, keys, values, queries, {**by_the_way, **beside})
        else:
            missing = " and ".join(n for n, found in (("keys", keys), ("values", values)) if not found)
            skipped.setdefault(attended.path, f"no projection makes the {missing} of {attended.path}")


def _eager(seen: Recorder) -> Iterator[Attended]:
    """Attentions of a product, a softmax and another product."""
    products = {output.grad_fn: (left, right) for output, left, right in seen.products if output.grad_fn}
    softmax_of = {output.grad_fn: (entered, path) for entered, output, path in seen.softmaxes if output.grad_fn}
    told: set[Any] = set()
    for output, left, right in seen.products:
        for weights, values in ((left, right), (right, left)):
            reached = next(iter(_reached(weights, softmax_of.keys(), products.keys())), None)
            if reached is None:
                continue
            entered, path = softmax_of[reached]
            scores = [products[node] for node in _reached(entered, products.keys(), softmax_of.keys())]
            scores = [(q, k) for q, k in scores if q.grad_fn is not None and k.grad_fn is not None]
            if scores and (reached, id(output)) not in told:
                told.add((reached, id(output)))
                first = min(scores, key=lambda pair: _when(seen, pair))
                yield Attended(path, *first, values)


def _when(seen: Recorder, pair: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Content before positions: the first product is of queries and keys."""
    return next(i for i, (_, left, right) in enumerate(seen.products) if left is pair[0] and right is pair[1])


def _feedforwards(seen: Recorder, leaves: dict[int, Cut], attentions: list[str]) -> Iterator[FeedForwardFlow]:
    for cut in seen.cuts:
        if not cut.projects or not cut.entered.is_floating_point():
            continue
        sources = _pointwise_sources(cut.entered, leaves)
        if sources is None:
            continue
        first = [leaves[leaf] for leaf in sources]
        if not all(part.projects for part in first):
            continue
        if not _is_feedforward(cut, first, _product_of_two(sources, first, cut)):
            continue
        if not any(_same_block(cut.path, attention) for attention in attentions):
            continue
        if not all(_block(part.path) == _block(cut.path) or _same_block(part.path, cut.path) for part in first):
            continue
        # A convolution ends a block's feed-forward where the block attends, and is a stage of its own elsewhere.
        if cut.dim % cut.leaf.dim() != cut.leaf.dim() - 1 and _block(cut.path) not in map(_block, attentions):
            continue
        linear = tuple(leaves[leaf].path for leaf, bent in sources.items() if not bent)
        yield FeedForwardFlow(cut.path, tuple(part.path for part in first), linear)


def _distinct(found: Iterable[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in found:
        if item not in kept:
            kept.append(item)
    return kept


# Which channels make something


def _walk(tensor: torch.Tensor) -> Iterator[Any]:
    """The nodes of the graph behind a tensor, up to the cuts."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(follower for follower, _ in node.next_functions)


def _reached(tensor: torch.Tensor, wanted: Any, stops: Any) -> list[Any]:
    """The nearest of some nodes behind a tensor, not looking past them or past others."""
    found, waiting, seen = [], [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.append(node)
        elif node not in stops:
            waiting.extend(follower for follower, _ in node.next_functions)
    return found


def _feeders(tensor: torch.Tensor, leaves: dict[int, Cut]) -> Channels:
    """The channels of projections that a tensor depends on, by gradient."""
    if tensor.grad_fn is None:
        return {}
    reached = {id(node.variable): node.variable for node in _walk(tensor) if hasattr(node, "variable")}
    cuts = [leaves[key] for key in reached if key in leaves and leaves[key].projects]
    if not cuts:
        return {}
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    gradients = torch.autograd.grad(tensor, [cut.leaf for cut in cuts], direction, retain_graph=True)
    found: list[Channels] = []
    for cut, gradient in zip(cuts, gradients, strict=True):
        used = gradient.movedim(cut.dim, -1).reshape(-1, cut.width).ne(0).any(0)
        if used.any():
            found.append({cut.path: _intervals(used)})
    return _merged(found)


def _intervals(mask: torch.Tensor) -> Intervals:
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, stops = edges.eq(1).nonzero().flatten().tolist(), edges.eq(-1).nonzero().flatten().tolist()
    return tuple(zip(starts, stops, strict=True))


def _count(intervals: Intervals) -> int:
    return sum(stop - start for start, stop in intervals)


def _as_set(intervals: Intervals) -> set[int]:
    return {channel for start, stop in intervals for channel in range(start, stop)}


def _of_set(channels: set[int]) -> Intervals:
    intervals: list[tuple[int, int]] = []
    for channel in sorted(channels):
        if intervals and intervals[-1][1] == channel:
            intervals[-1] = (intervals[-1][0], channel + 1)
        else:
            intervals.append((channel, channel + 1))
    return tuple(intervals)


def _merged(parts: Iterable[Channels]) -> Channels:
    merged: dict[str, set[int]] = {}
    for part in parts:
        for path, intervals in part.items():
            merged.setdefault(path, set()).update(_as_set(intervals))
    return {path: _of_set(channels) for path, channels in merged.items()}


def _main(feeders: Channels) -> tuple[Channels, Channels]:
    """What makes most of the channels, and what makes a part of them beside (MLA's shared rotary part)."""
    most = max((_count(intervals) for intervals in feeders.values()), default=0)
    main = {path: intervals for path, intervals in feeders.items() if _count(intervals) == most}
    return main, {path: intervals for path, intervals in feeders.items() if path not in main}


# Feed-forwards

_BENDS = re.compile(
    r"\w*(gelu|relu|silu|tanh|sigmoid|hardswish|elu|mish|softplus|erf|glu|threshold|sin|where|clampmin|maximum|softsign)"
    r"\w*backward\d*",
    re.IGNORECASE,
)
_NORMALISES = re.compile(
    r"(NativeLayerNorm|FusedRmsNorm|RmsNorm|Mean|Rsqrt|LinalgVectorNorm|Norm|NativeGroupNorm|NativeBatchNorm|"
    r"CudnnBatchNorm|Var|Std)\w*Backward\d*"
)
_MIXES = re.compile(
    r"(Mm|Bmm|Addmm|Baddbmm|Linear|Cumsum|Cumprod|Softmax|LogSoftmax|ScaledDot\w+|Fft\w+|Sum|AvgPool\w*|MaxPool\w*|"
    r"Adaptive\w*|Upsample\w*|LinalgInvEx|Prod|Triu|Tril|Max|Min|Amax|Amin|Einsum)Backward\d*"
)


def _pointwise_sources(tensor: torch.Tensor, leaves: dict[int, Cut]) -> dict[int, bool] | None:
    """The cuts that a tensor comes from point by point, and whether through a non-linearity; None if not so."""
    if tensor.grad_fn is None:
        return None
    straight: dict[int, bool] = {}
    bent_anywhere, normalised = False, _is_normalised(tensor)
    waiting: list[tuple[Any, bool]] = [(tensor.grad_fn, False)]
    seen: set[tuple[Any, bool]] = set()
    while waiting:
        node, bent = waiting.pop()
        if node is None or (node, bent) in seen:
            continue
        seen.add((node, bent))
        name = node.name()
        if _MIXES.fullmatch(name):
            return None
        if hasattr(node, "variable"):
            if id(node.variable) in leaves:
                key = id(node.variable)
                straight[key] = straight.get(key, True) and not bent
                if len(straight) > 2:
                    return None
            continue
        bends = bool(_BENDS.fullmatch(name)) or (name.startswith("PowBackward") and not normalised)
        bent_anywhere |= bends
        waiting.extend((follower, bent or bends) for follower, _ in node.next_functions)
    if not straight or not bent_anywhere:
        return None
    return {key: not plain for key, plain in straight.items()}


def _is_normalised(tensor: torch.Tensor) -> bool:
    return any(_NORMALISES.fullmatch(node.name()) for node in _walk(tensor))


def _product_of_two(sources: dict[int, bool], first: list[Cut], cut: Cut) -> bool:
    """Whether the intermediate is a gate's product: of two projections, or of the halves of one."""
    if len(first) == 2:
        return True
    return first[0].width == 2 * cut.entered.shape[_entered_dim(cut)]


def _entered_dim(cut: Cut) -> int:
    return cut.dim if cut.dim < 0 or cut.entered.dim() == cut.leaf.dim() else cut.entered.dim() - 1


def _is_feedforward(cut: Cut, first: list[Cut], gated: bool) -> bool:
    """From one input of the residual's width back to that width; it widens only behind a gate."""
    width = cut.entered.shape[_entered_dim(cut)]
    entered = [part.entered for part in first]
    if len(first) == 2 and not _one_input(*entered):
        return False
    residual = entered[0].shape[_entered_dim(first[0])]
    if residual != cut.width:
        return False
    depthwise = any(node.name().startswith("ConvolutionBackward") for node in _walk(cut.entered))
    if depthwise and width <= cut.width:
        return False
    if any(part.width not in (width, 2 * width) for part in first):
        return False
    return gated or width >= cut.width


def _one_input(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (left.shape == right.shape and left.data_ptr() == right.data_ptr())


_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def _block(path: str) -> str:
    """The path up to its last number: a block is a numbered module. Empty where there is none."""
    ends = [match.end() for match in _NUMBER.finditer(path)]
    return path[: ends[-1]] if ends else ""


def _same_block(path: str, attention: str) -> bool:
    """Whether both are in one numbered module, in one numbered list, or in lists that stand beside each other."""
    for match in _NUMBER.finditer(path):
        container = path[: match.start()]
        parent = container.rpartition(".")[0]
        inside = attention.removeprefix(f"{parent}." if parent else "")
        beside = (not parent or attention.startswith(f"{parent}.")) and re.match(r"[^.]+\.\d+(\.|$)", inside)
        if attention.startswith(f"{container}.") or beside:
            return True
    if not _NUMBER.search(path):
        parent = attention.rpartition(".")[0]
        around = (parent, parent.rpartition(".")[0])  # an attention may stand in a module of its own there
        return any(one and path.startswith(f"{one}.") for one in around)
    return False
