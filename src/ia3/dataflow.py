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
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

Intervals = tuple[tuple[int, int], ...]
Channels = dict[str, Intervals]
"""Output channels as half-open ranges, by the path of the module (or bare parameter) that makes them."""


@dataclass(frozen=True)
class AttentionFlow:
    """One softmax attention, by the module that ran it.

    Args:
        path: of the innermost module around it.
        keys, values, queries: what makes them.
        beside: makes a part of the keys' or values' channels beside the projection that makes the rest.
    """

    path: str
    keys: Channels
    values: Channels
    queries: Channels
    beside: Channels = field(default_factory=dict)


@dataclass(frozen=True)
class FeedForwardFlow:
    """One feed-forward: its second matrix, the first ones, and which of these stay outside of the non-linearity."""

    path: str
    first: tuple[str, ...]
    linear: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """What one forward said.

    Args:
        attentions: the distinct ones, in the order in which they ran.
        feedforwards: likewise.
        skipped: why an attention can't be told, by the path of the module around it.
        ran: the paths of the projections that ran.
        widths: their output channels.
    """

    attentions: tuple[AttentionFlow, ...]
    feedforwards: tuple[FeedForwardFlow, ...]
    skipped: dict[str, str]
    ran: frozenset[str]
    widths: dict[str, int]

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
        recorder = _Recorder(model)
        recorder.watch(hooks)
        with recorder:
            model(**batch)
        return recorder.told()


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


# Recording


@dataclass
class _Cut:
    """One call of a projection: its output as a leaf of the graph, and what went in."""

    path: str
    leaf: torch.Tensor
    entered: torch.Tensor
    dim: int

    @property
    def width(self) -> int:
        return self.leaf.shape[self.dim]


@dataclass
class _Attended:
    path: str
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


_SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
_MATMUL |= {torch.mm, torch.Tensor.mm}
_ADDED = {torch.baddbmm, torch.Tensor.baddbmm, torch.addmm, torch.Tensor.addmm}
_CONVOLUTION = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


class _Recorder(TorchFunctionMode):
    """Watches one forward: cuts what projections make, keeps products, softmaxes and attentions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cuts: list[_Cut] = []
        self.products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.softmaxes: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        self.attended: list[_Attended] = []
        self.skipped: dict[str, str] = {}
        self.running: list[str] = []
        self.inside = 0  # projections that are running: their own products are not cut once more
        # What was computed of parameters alone, by identity: the tensor (kept, so that its identity stays its own)
        # and the parameter's path.
        self.weights: dict[int, tuple[torch.Tensor, str]] = {}
        for path, parameter in model.named_parameters():
            self.weights[id(parameter)] = (parameter, path)

    # The modules

    def watch(self, hooks: ExitStack) -> None:
        for path, module in self.model.named_modules():
            before = module.register_forward_pre_hook(self._entering(path, module))
            after = module.register_forward_hook(self._leaving(path, module), with_kwargs=True, always_call=False)
            hooks.callback(before.remove)
            hooks.callback(after.remove)

    def _entering(self, path: str, module: nn.Module) -> Callable[..., None]:
        projects = _projects(module)

        def enter(*_: Any) -> None:
            self.running.append(path)
            self.inside += projects

        return enter

    def _leaving(self, path: str, module: nn.Module) -> Callable[..., Any]:
        projects = _projects(module)

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            while self.running and self.running.pop() != path:
                pass
            self.inside -= projects
            entered = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if not projects or entered is None or not isinstance(output, torch.Tensor):
                return None
            return self._cut(path, output, entered, _channel_dim(module, output))

        return leave

    def _cut(self, path: str, output: torch.Tensor, entered: torch.Tensor, dim: int) -> torch.Tensor:
        if not output.is_floating_point():
            return output
        leaf = output.detach().requires_grad_()
        self.cuts.append(_Cut(path, leaf, entered, dim))
        return leaf.clone()  # no leaf, so that what follows may be computed in place

    # The functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        output = func(*args, **kwargs)
        if not isinstance(output, torch.Tensor):
            self._derive(output, args, kwargs)
            return output
        if func is F.scaled_dot_product_attention:
            queries, keys, values = (_argument(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
            self.attended.append(_Attended(self._around(), queries, keys, values))
        elif func in _SOFTMAX:
            self.softmaxes.append((_argument(args, kwargs, 0, "input"), output, self._around()))
        elif func is F.linear or func in _CONVOLUTION:
            return self._projected(output, args[0], [args[1] if len(args) > 1 else kwargs.get("weight")], func)
        elif func is torch.einsum:
            operands = [item for item in args[1:] if isinstance(item, torch.Tensor)]
            operands = operands or [item for item in args[1] if isinstance(item, torch.Tensor)]
            if len(operands) == 2:
                return self._multiplied(output, *self._as_written(args[0], operands))
        elif func in _MATMUL:
            return self._multiplied(output, args[0], args[1] if len(args) > 1 else next(iter(kwargs.values())))
        elif func in _ADDED and len(args) > 2:
            return self._multiplied(output, args[1], args[2])
        self._derive(output, args, kwargs)
        return output

    def _around(self) -> str:
        return self.running[-1] if self.running else ""

    def _owner(self, tensor: Any) -> str | None:
        """The path of the parameter that a tensor is, or was computed of alone."""
        if not isinstance(tensor, torch.Tensor):
            return None
        known = self.weights.get(id(tensor))
        return known[1] if known is not None and known[0] is tensor else None

    def _derive(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used = [x for x in _tensors((args, kwargs)) if x.is_floating_point()]
        owners = [self._owner(x) for x in used]
        if used and all(owners) and not any(self._is_cut(x) for x in used):
            for made in _tensors(output):
                self.weights[id(made)] = (made, owners[0] or "")

    def _is_cut(self, tensor: torch.Tensor) -> bool:
        return tensor.requires_grad

    def _as_written(self, equation: Any, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """An einsum's operands, last the one that brings the last axis of what it makes."""
        if not isinstance(equation, str) or "->" not in equation:
            return operands
        left, right = equation.replace(" ", "").split("->")
        first, second = left.split(",")
        if right and right[-1] in first and right[-1] not in second:
            return operands[::-1]
        return operands

    def _multiplied(self, output: torch.Tensor, left: Any, right: Any) -> torch.Tensor:
        for weight, entered in ((right, left), (left, right)):
            if self._owner(weight) is not None:
                return self._projected(output, entered, [weight], torch.matmul)
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and output.requires_grad:
            self.products.append((output, left, right))
        return output

    def _projected(self, output: torch.Tensor, entered: Any, weights: list[Any], func: Any) -> torch.Tensor:
        """What a bare parameter made of an activation is cut as a projection of the parameter's name."""
        owner = next((path for weight in weights if (path := self._owner(weight)) is not None), None)
        if self._owner(entered) is not None and owner is not None:
            self._derive(output, (entered, *weights), {})
            return output
        if self.inside or owner is None or not isinstance(entered, torch.Tensor):
            return output
        if func in _CONVOLUTION and _is_depthwise_weight(weights[0]):
            return output
        return self._cut(owner, output, entered, 1 if func in _CONVOLUTION else -1)

    def _multi_head(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weight = args[5] if len(args) > 5 else kwargs.get("in_proj_weight")
        owner = self._owner(weight) or self._owner(kwargs.get("q_proj_weight")) or "its parameters"
        self.skipped[self._around()] = (
            f"nn.MultiheadAttention at {self._around()}: {owner} makes its queries, keys and values inside of a "
            "function, where no module's output can be multiplied"
        )
        output = func(*args, **kwargs)
        made, rest = output[0], output[1:]
        return (self._cut(f"{self._around()}.out_proj", made, args[0] if args else kwargs["query"], -1), *rest)

    # The graph

    def told(self) -> Flow:
        leaves = {id(cut.leaf): cut for cut in self.cuts}
        attentions = list(self._attentions(leaves))
        return Flow(
            tuple(_distinct(attentions)),
            tuple(_distinct(self._feedforwards(leaves, [a.path for a in attentions] + list(self.skipped)))),
            self.skipped,
            frozenset(cut.path for cut in self.cuts),
            {cut.path: cut.width for cut in self.cuts},
        )

    def _attentions(self, leaves: dict[int, _Cut]) -> Iterator[AttentionFlow]:
        for attended in [*self.attended, *self._eager()]:
            keys, by_the_way = _main(_feeders(attended.keys, leaves), attended.keys)
            values, beside = _main(_feeders(attended.values, leaves), attended.values)
            queries = _feeders(attended.queries, leaves)
            if keys and values:
                yield AttentionFlow(attended.path, keys, values, queries, {**by_the_way, **beside})
            else:
                missing = " and ".join(n for n, found in (("keys", keys), ("values", values)) if not found)
                self.skipped.setdefault(attended.path, f"no projection makes the {missing} of {attended.path}")

    def _eager(self) -> Iterator[_Attended]:
        """Attentions of a product, a softmax and another product."""
        products = {output.grad_fn: (left, right) for output, left, right in self.products if output.grad_fn}
        softmax_of = {output.grad_fn: (entered, path) for entered, output, path in self.softmaxes if output.grad_fn}
        seen: set[Any] = set()
        for output, left, right in self.products:
            for weights, values in ((left, right), (right, left)):
                reached = next(iter(_reached(weights, softmax_of.keys(), products.keys())), None)
                if reached is None:
                    continue
                entered, path = softmax_of[reached]
                scores = [products[node] for node in _reached(entered, products.keys(), softmax_of.keys())]
                scores = [(q, k) for q, k in scores if q.grad_fn is not None and k.grad_fn is not None]
                if scores and (reached, id(output)) not in seen:
                    seen.add((reached, id(output)))
                    first = min(scores, key=lambda pair: self._when(pair))
                    yield _Attended(path, *first, values)

    def _when(self, pair: tuple[torch.Tensor, torch.Tensor]) -> int:
        """Content before positions: the first product is of queries and keys."""
        return next(i for i, (_, left, right) in enumerate(self.products) if left is pair[0] and right is pair[1])

    def _feedforwards(self, leaves: dict[int, _Cut], attentions: list[str]) -> Iterator[FeedForwardFlow]:
        for cut in self.cuts:
            sources = _pointwise_sources(cut.entered, leaves)
            if sources is None:
                continue
            first = [leaves[leaf] for leaf in sources]
            if not _is_feedforward(cut, first, _product_of_two(sources, first, cut)):
                continue
            if not any(_same_block(cut.path, attention) for attention in attentions):
                continue
            if not all(_block(part.path) == _block(cut.path) or _same_block(part.path, cut.path) for part in first):
                continue
            linear = tuple(leaves[leaf].path for leaf, bent in sources.items() if not bent)
            yield FeedForwardFlow(cut.path, tuple(part.path for part in first), linear)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _is_depthwise_weight(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() > 2 and weight.shape[1] == 1 and weight.shape[0] > 1


def _projects(module: nn.Module) -> bool:
    """Whether a module mixes channels by a matrix of its own; a depthwise convolution scales each by itself."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or any(True for _ in module.children()):
        return False
    if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
        return hasattr(module, "in_features") and hasattr(module, "out_features")
    return not (isinstance(module, nn.modules.conv._ConvNd) and _is_depthwise_weight(weight))


def _channel_dim(module: nn.Module, output: torch.Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return output.dim() - 1 - len(module.kernel_size)
    return output.dim() - 1


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


def _feeders(tensor: torch.Tensor, leaves: dict[int, _Cut]) -> Channels:
    """The channels of projections that a tensor depends on, by gradient."""
    if tensor.grad_fn is None:
        return {}
    reached = {id(node.variable): node.variable for node in _walk(tensor) if hasattr(node, "variable")}
    cuts = [leaves[key] for key in reached if key in leaves]
    if not cuts:
        return {}
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    gradients = torch.autograd.grad(
        tensor, [cut.leaf for cut in cuts], direction, retain_graph=True, allow_unused=True
    )
    found: list[Channels] = []
    for cut, gradient in zip(cuts, gradients, strict=True):
        if gradient is None:
            continue
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


def _main(feeders: Channels, tensor: torch.Tensor) -> tuple[Channels, Channels]:
    """What makes most of the channels, and what makes a part of them beside (MLA's shared rotary part)."""
    most = max((_count(intervals) for intervals in feeders.values()), default=0)
    main = {path: intervals for path, intervals in feeders.items() if _count(intervals) == most}
    return main, {path: intervals for path, intervals in feeders.items() if path not in main}


# Feed-forwards

_BENDS = re.compile(
    r"(Gelu|Relu|LeakyRelu|Silu|Tanh|Sigmoid|LogSigmoid\w*|Hardswish|Hardsigmoid|Hardtanh|Elu|Selu|Celu|Mish|Softplus|"
    r"Erf|Glu|PreluKernel|Prelu|Threshold|Relu6|Sin|Where|ClampMin|Maximum|Softsign|Rrelu\w*)Backward\d*"
)
_NORMALISES = re.compile(
    r"(NativeLayerNorm|FusedRmsNorm|RmsNorm|Mean|Rsqrt|LinalgVectorNorm|Norm|NativeGroupNorm|NativeBatchNorm|"
    r"CudnnBatchNorm|Var|Std)\w*Backward\d*"
)
_MIXES = re.compile(
    r"(Mm|Bmm|Addmm|Baddbmm|Linear|Cumsum|Cumprod|Softmax|LogSoftmax|ScaledDot\w+|Fft\w+|Sum|AvgPool\w*|MaxPool\w*|"
    r"Adaptive\w*|Upsample\w*|LinalgInvEx|Prod|Triu|Tril|Max|Min|Amax|Einsum)\w*Backward\d*"
)


def _pointwise_sources(tensor: torch.Tensor, leaves: dict[int, _Cut]) -> dict[int, bool] | None:
    """The cuts that a tensor comes from point by point, and whether through a non-linearity; None if not so."""
    if tensor.grad_fn is None:
        return None
    straight: dict[int, bool] = {}
    bent_anywhere, normalised = False, _is_normalised(tensor)
    waiting, seen = [(tensor.grad_fn, False)], set()
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


def _product_of_two(sources: dict[int, bool], first: list[_Cut], cut: _Cut) -> bool:
    """Whether the intermediate is a gate's product: of two projections, or of the halves of one."""
    if len(first) == 2:
        return True
    return first[0].width == 2 * cut.entered.shape[_entered_dim(cut)]


def _entered_dim(cut: _Cut) -> int:
    return cut.dim if cut.dim < 0 or cut.entered.dim() == cut.leaf.dim() else cut.entered.dim() - 1


def _is_feedforward(cut: _Cut, first: list[_Cut], gated: bool) -> bool:
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
        return bool(parent) and path.startswith(f"{parent}.")
    return False
