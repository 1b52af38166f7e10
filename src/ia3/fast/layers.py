"""A model's layers as its description names them: frozen fused weights, and where their vectors are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ia3.architectures import Architecture, Attention, FeedForward, Stack, names_in
from ia3.fast.linear import FrozenLinear, Precision, frozen_linear
from ia3.fast.ops.norm import Norm
from ia3.sites import Layout, Site
from ia3.storage import fuse_weights


@dataclass(frozen=True)
class VectorPart:
    """A site's vector, or of a fused projection's the part for queries, keys or values.

    Args:
        place: the site's in the layout.
        part: how that part is taken; None for the whole.
    """

    place: int
    part: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class SelfLayer:
    """An attention of each token to its example's: frozen weights and where its vectors are."""

    norm: Norm | None
    out_norm: Norm | None
    project: FrozenLinear  # to queries, keys and values
    out: FrozenLinear
    q: VectorPart | None
    k: VectorPart | None
    v: VectorPart | None
    o: VectorPart | None  # of what attention adds
    heads: int
    kv_heads: int
    scale: float
    causal: bool
    by_head: bool  # the projection's channels are [q | k | v] of each head
    relative: nn.Module | None  # makes the bias of positions
    kind: str | None  # of several kinds of angles
    qk_norm: tuple[Norm, Norm] | None
    window: int | None
    softcap: float | None
    residual: float  # dropout's rate

    @property
    def dim(self) -> int:
        """The channels of one head."""
        return len(self.project.weight) // (self.heads + 2 * self.kv_heads)

    @property
    def widths(self) -> tuple[int, int, int]:
        """The channels of all queries, keys and values."""
        return self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim


@dataclass(frozen=True)
class CrossLayer:
    """A decoder's attention over the encoder's output."""

    norm: Norm | None
    out_norm: Norm | None
    project: FrozenLinear  # to queries
    out: FrozenLinear
    q: VectorPart | None
    k: VectorPart | None
    v: VectorPart | None
    o: VectorPart | None
    heads: int
    scale: float
    index: int
    residual: float


@dataclass(frozen=True)
class FeedLayer:
    """A feed-forward."""

    norm: Norm | None
    out_norm: Norm | None
    up: FrozenLinear  # gated: to both halves, the gate first
    out: FrozenLinear
    ups: tuple[VectorPart | None, ...]  # of what stands before the activation, one a half
    vector: VectorPart | None  # l_ff
    o: VectorPart | None  # of what is added
    gated: bool
    residual: float


@dataclass(frozen=True)
class ParallelLayer:
    """An attention and a feed-forward with the same input, and one residual sum; each drops for itself."""

    norm: Norm | None
    attention: SelfLayer
    feed_forward: FeedLayer
    residual: float = 0.0


Layer = SelfLayer | CrossLayer | FeedLayer | ParallelLayer


@dataclass(frozen=True)
class Blocks:
    """A stack's layers, each with the norm before it and the rate at which what is added there is dropped."""

    layers: tuple[Layer, ...]
    norms: tuple[Norm | None, ...]
    rates: tuple[float, ...]


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by its name in transformers."""
    from transformers.activations import ACT2FN

    if name == "gelu_new":  # which transformers writes out in eight operations
        return partial(functional.gelu, approximate="tanh")
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


class Weights:
    """The frozen weights of a model's blocks, joined where their inputs are equal.

    Args:
        model: one of the family, whose weights are fused.
        architecture: its description.
        layout: the adapter's.
        frozen: what the blocks' weights are multiplied in.

    Attributes:
        folded: weights that were copied, so that a change in place would go unnoticed.
        stacks: one a stack of the description.
        cross_kv: to the keys and values of all attentions across.
    """

    def __init__(self, model: Any, architecture: Architecture, layout: Layout, frozen: Precision | None) -> None:
        self.model, self.architecture, self.frozen = model, architecture, frozen
        self.config = model.config
        self.activation: str = getattr(model.config, architecture.activation)
        self.function = activation_function(self.activation)
        self.folded: list[Tensor] = []
        self.sites = layout.sites
        self.place = {(site.path, site.side): index for index, site in enumerate(layout.sites)}
        self.stacks = [self._blocks(stack) for stack in architecture.stacks]
        across = [
            f"{path}.{part}"
            for stack in architecture.stacks
            if stack.cross is not None
            for path in block_paths(model, stack)
            for part in (stack.cross.k, stack.cross.v)
        ]
        self.cross_kv = self._join(across) if across else None

    def rate(self, name: str | None) -> float:
        """Of a dropout by its name in the configuration."""
        return float(getattr(self.config, name) or 0.0) if name is not None else 0.0

    def norm(self, path: str) -> Norm:
        """The norm at a path, its weight with the family's offset."""
        module: Any = self.model.get_submodule(path)
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        weight, offset = module.weight, self.architecture.norm_offset
        if offset:
            self.folded.append(weight)
            weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) + offset
        return Norm(weight, getattr(module, "bias", None), eps, centred=isinstance(module, nn.LayerNorm))

    def _blocks(self, stack: Stack) -> Blocks:
        layers = [
            layer for i, path in enumerate(block_paths(self.model, stack)) for layer in self._block(stack, path, i)
        ]
        if stack.repeats is not None:
            layers = layers * getattr(self.config, stack.repeats)
        own, last = [layer.norm for layer in layers], None if stack.norm is None else self.norm(stack.norm)
        norms = [None, *own] if self.architecture.post_norm else [*own, last]
        return Blocks(tuple(layers), tuple(norms), (0.0, *(layer.residual for layer in layers)))

    def _block(self, stack: Stack, path: str, index: int) -> Iterator[Layer]:
        attention, feed_forward = self._attention(stack, path, index), self._feed_forward(stack.feed_forward, path)
        if self.architecture.parallel:
            yield ParallelLayer(attention.norm, attention, feed_forward)
            return
        yield attention
        if stack.cross is not None:
            yield self._cross(stack.cross, path, index)
        yield feed_forward

    def _attention(self, stack: Stack, path: str, index: int) -> SelfLayer:
        names, config, dropouts = stack.attention, self.config, self.architecture.dropouts
        module: Any = self.model.get_submodule(f"{path}.{names.module}")
        heads, kv_heads, dim = head_shapes(self.model, self.architecture, stack, path)
        if names.fused is None:
            project = self._join([f"{path}.{part}" for part in (names.q, names.k, names.v)])
            q, k, v = (self._whole(f"{path}.{part}") for part in (names.q, names.k, names.v))
        else:
            project = self._join([f"{path}.{names.q}"])
            q, k, v = self._parts(f"{path}.{names.q}", names, heads, kv_heads, dim)
        own = dropouts.attention_residual
        softcap = getattr(module, "attn_logit_softcapping", None)
        return SelfLayer(
            norm=self._norm_of(path, names.norm),
            out_norm=self._norm_of(path, names.out_norm),
            project=project,
            out=self._join([f"{path}.{names.out}"]),
            q=q,
            k=k,
            v=v,
            o=self._whole(f"{path}.{names.out}"),
            heads=heads,
            kv_heads=kv_heads,
            scale=self._scale(module, dim),
            causal=stack.causal,
            by_head=names.fused == "heads",
            relative=self._relative(module, stack),
            kind=getattr(module, "layer_type", None),
            qk_norm=None if names.qk_norm is None else tuple(self.norm(f"{path}.{name}") for name in names.qk_norm),  # type: ignore[arg-type]
            window=_window(config, index),
            softcap=None if config._attn_implementation == "sdpa" else softcap,  # which PyTorch's attention has not
            residual=self.rate(dropouts.residual if own == "residual" else own),
        )

    def _cross(self, names: Attention, path: str, index: int) -> CrossLayer:
        module: Any = self.model.get_submodule(f"{path}.{names.module}")
        project, heads = self._join([f"{path}.{names.q}"]), self.heads
        return CrossLayer(
            norm=self._norm_of(path, names.norm),
            out_norm=self._norm_of(path, names.out_norm),
            project=project,
            out=self._join([f"{path}.{names.out}"]),
            q=self._whole(f"{path}.{names.q}"),
            k=self._whole(f"{path}.{names.k}"),
            v=self._whole(f"{path}.{names.v}"),
            o=self._whole(f"{path}.{names.out}"),
            heads=heads,
            scale=self._scale(module, len(project.weight) // heads),
            index=index,
            residual=self.rate(self.architecture.dropouts.residual),
        )

    def _feed_forward(self, names: FeedForward, path: str) -> FeedLayer:
        down, ups = f"{path}.{names.down}", [self._whole(f"{path}.{name}") for name in names.up]
        place = self.place.get((down, "input"))
        vector = None if place is None else VectorPart(place)
        if vector is None and len(ups) == 2:  # a gate's linear half commutes with the gate
            *ups, vector = *ups[:-1], None, ups[-1]
        return FeedLayer(
            norm=self._norm_of(path, names.norm),
            out_norm=self._norm_of(path, names.out_norm),
            up=self._join([f"{path}.{name}" for name in names.up]),
            out=self._join([down]),
            ups=tuple(ups),
            vector=vector,
            o=self._whole(down),
            gated=names.gated,
            residual=self.rate(self.architecture.dropouts.residual),
        )

    def _norm_of(self, path: str, name: str | None) -> Norm | None:
        return None if name is None else self.norm(f"{path}.{name}")

    @property
    def heads(self) -> int:
        """Of the queries."""
        return int(getattr(self.config, self.architecture.heads))

    def _scale(self, module: Any, dim: int) -> float:
        given = self.architecture.scale
        return float(getattr(module, "scaling", dim**-0.5)) if given is None else given

    def _relative(self, module: Any, stack: Stack) -> Any:
        """The attention that makes the bias of positions, the first block's where it is not each its own."""
        name = self.architecture.relative
        if name is None or module.has_relative_attention_bias:
            return None if name is None else module
        return self.model.get_submodule(f"{block_paths(self.model, stack)[0]}.{name}")

    def _whole(self, path: str) -> VectorPart | None:
        place = self.place.get((path, "output"))
        return None if place is None else VectorPart(place)

    def _parts(self, path: str, names: Attention, heads: int, kv_heads: int, dim: int) -> tuple[VectorPart | None, ...]:
        """What a vector of a fused projection has for queries, keys and values, of which the first may have none."""
        place = self.place.get((path, "output"))
        if place is None:
            return None, None, None
        own = (heads, kv_heads, kv_heads) if self.sites[place].intervals is None else (kv_heads, kv_heads)

        def part(which: int) -> Callable[[Tensor], Tensor]:
            if names.fused == "heads":
                return lambda x: x.reshape(*x.shape[:2], heads, len(own), dim)[..., which, :].flatten(-2)
            start, width = sum(own[:which]) * dim, own[which] * dim
            return lambda x: x[..., start : start + width]

        parts = [VectorPart(place, part(which)) for which in range(len(own))]
        return (*[None] * (3 - len(own)), *parts)

    def _join(self, paths: Sequence[str]) -> FrozenLinear:
        """The product with the weights of layers that have the same input."""
        modules: list[Any] = [self.model.get_submodule(path) for path in paths]
        if self.frozen is not None:
            self.folded.extend(module.weight for module in modules)
        if len(modules) == 1:
            (module,) = modules
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()  # a Conv1D's is [in, out]
            return frozen_linear(weight, module.bias, frozen=self.frozen)
        (together,) = fuse_weights(self.model, [list(paths)])
        biases = [module.bias for module in modules]
        if all(bias is None for bias in biases):
            return frozen_linear(together, frozen=self.frozen)
        self.folded.extend(bias for bias in biases if bias is not None)
        parts = [
            module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias.detach()
            for module in modules
        ]
        return frozen_linear(together, torch.cat(parts), frozen=self.frozen)


def block_paths(model: Any, stack: Stack) -> list[str]:
    """The paths of a stack's blocks."""
    return [f"{stack.blocks}.{name}" for name, _ in model.get_submodule(stack.blocks).named_children()]


def head_shapes(model: Any, architecture: Architecture, stack: Stack, path: str) -> tuple[int, int, int]:
    """Heads of the queries, of the keys, and their width."""
    heads, names = int(getattr(model.config, architecture.heads)), stack.attention
    if names.fused is None:
        q, k = (len(model.get_parameter(f"{path}.{part}.weight")) for part in (names.q, names.k))
        return heads, k * heads // q, q // heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    module: Any = model.get_submodule(f"{path}.{names.q}")
    width = len(module.weight) if isinstance(module, nn.Linear) else module.weight.shape[1]
    return heads, kv_heads, width // (heads + 2 * kv_heads)


def _window(config: Any, index: int) -> int | None:
    """How far before a token of a layer it sees; None without a window."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index % len(kinds)] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def expected_sites(model: Any, architecture: Architecture) -> dict[tuple[str, str], Any]:
    """Where a vector may be, as (path, side), with the channels that it may have if not all."""
    expected: dict[tuple[str, str], Any] = {}
    for stack in architecture.stacks:
        own, across, feed = stack.attention, stack.cross, stack.feed_forward
        names = [own.q, own.out, *feed.up, feed.down]
        names += [] if across is None else [across.q, across.k, across.v, across.out]
        for path in block_paths(model, stack):
            expected |= {(f"{path}.{name}", "output"): None for name in names}
            expected |= {(f"{path}.{name}", "output"): own.channels for name in (own.k, own.v)}
            expected[f"{path}.{feed.down}", "input"] = None
    return expected


def missing_part(model: Any, architecture: Architecture) -> str | None:
    """Why a model isn't built as its description says; None where it is."""
    for stack in architecture.stacks:
        if not stack.feed_forward.down:
            return f"the blocks in its {stack.blocks} are built otherwise than its description says"
        for path in block_paths(model, stack):
            for part in (stack.attention, stack.cross, stack.feed_forward):
                for name in [] if part is None else names_in(part):
                    if not _has(model, f"{path}.{name}"):
                        return f"it has no {path}.{name}, which its description expects"
                    module = model.get_submodule(f"{path}.{name}")
                    holds = getattr(part, "module", None) != name
                    if holds and not isinstance(getattr(module, "weight", None), nn.Parameter):
                        return f"{path}.{name} is a {type(module).__name__}, which has no weight as a parameter"
    return None


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def unexpected_site(model: Any, architecture: Architecture, sites: Sequence[Site]) -> str | None:
    """Why the block can't have these vectors; None where it can."""
    expected = expected_sites(model, architecture)
    for site in sites:
        place = (site.path, site.side)
        if place not in expected or site.intervals not in (None, expected[place]):
            return f"the {site.side} of {site.path} is adapted, where the block has no vector"
    return None
