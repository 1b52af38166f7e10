"""One block for every family: the layers that a description names, over frozen weights that were fused.

A layer is an attention, an attention across, a feed-forward, or two of them beside each other. L layers have L + 1
norms: before each and behind the last. That of a pre-norm block is its own, and the residual stream is what it norms;
in a post-norm block each layer has the norm of the layer before, and the residual stream is what it returns. All else
is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ia3.fast.feed import feed_forward
from ia3.fast.layers import Blocks, CrossLayer, FeedLayer, Layer, ParallelLayer, SelfLayer, VectorPart, Weights
from ia3.fast.ops.attention import causal_attention, cross_attention, self_attention
from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.dropout import DropoutSeeds, dropout
from ia3.fast.ops.norm import Norm, add_norm, add_norm_rounded
from ia3.fast.ops.rotary import rotary_heads
from ia3.fast.ops.scale import scale
from ia3.fast.positions import Positions
from ia3.fast.ragged import Ragged


@dataclass(frozen=True)
class Inputs:
    """What the layers of a stack see.

    Args:
        tokens: whose tokens see each other, and have the same vectors.
        readers: whose tokens see the same encoder's output; of one group where these have vectors of their own.
        kv: keys and values of all attentions across, `[source tokens, layers · 2 · inner]`.
        source: whose they are.
        shared: see `ops.attention.cross_attention`.
    """

    tokens: Ragged
    readers: Ragged
    kv: Tensor | None = None
    source: Ragged | None = None
    shared: dict[str, Any] = field(default_factory=dict)


class Run:
    """One forward: the vectors split by site, the rates of dropout and their seeds, drawn in order.

    Args:
        weights: the model's.
        positions: the model's.
        slices: one vector a site, `[partials, groups, width]`.
        backend: who computes it.
        recompute: keep of each layer the residual stream alone, and compute its inside again in the backward.
        drops: whether dropout drops anything in training. If not, the kernels are those of training in either mode,
            with seeds and a rate of 0.
    """

    def __init__(
        self, weights: Weights, positions: Positions, slices: Sequence[Tensor], backend: Backend, *, recompute: bool,
        drops: bool = True,
    ) -> None:  # fmt: skip
        self.weights, self.positions, self.slices, self.backend = weights, positions, slices, backend
        self.post_norm, model = weights.architecture.post_norm, weights.model
        self.recompute, self.training = recompute and torch.is_grad_enabled(), bool(model.training)
        self.drops, self.dropouts = self.training and drops, weights.architecture.dropouts
        self.attention, self.activation = self.rate(self.dropouts.attention), self.rate(self.dropouts.activation)
        layers = [layer for blocks in weights.stacks for layer in blocks.layers]
        rates = [weights.rate(self.dropouts.attention), weights.rate(self.dropouts.activation)]
        is_seeded = (self.training or not drops) and any([*rates, *(layer.residual for layer in layers)])
        # Each layer's sum and inside, of which a parallel one has two, and each stack's last norm.
        dropouts_of = [3 if isinstance(layer, ParallelLayer) else 2 for layer in layers]
        count = sum(dropouts_of) + len(weights.stacks) if is_seeded else 0
        self.seeds = DropoutSeeds(model.device, count, backend, drops=self.drops)

    def rate(self, name: str | None) -> float:
        """Of a dropout by its name in the configuration, 0 where nothing is dropped."""
        return self.weights.rate(name) if self.drops else 0.0

    def seed(self, rate: float) -> Tensor | None:
        """The next dropout's; None where it has no rate in training, either."""
        seed = self.seeds.next()
        return seed if rate else None

    def at(self, vector: VectorPart | None) -> Vector:
        if vector is None:
            return None
        whole = self.slices[vector.place]
        return whole if vector.part is None else vector.part(whole)

    def together(self, parts: Sequence[VectorPart | None], widths: Sequence[int]) -> Vector:
        """One vector of products that are one, ones where a part has none; None where none has."""
        found = [self.at(part) for part in parts]
        like = next((each for each in found if each is not None), None)
        if like is None:
            return None
        sizes = [(*like.shape[:2], width) for width in widths]
        filled = [like.new_ones(size) if each is None else each for each, size in zip(found, sizes, strict=True)]
        return torch.cat(filled, -1)

    def through(self, blocks: Blocks, x: Tensor, inputs: Inputs) -> Tensor:
        """The last norm of what a stack's layers make of the embeddings `[tokens, width]`."""
        h: Tensor | None = None
        step = self.seeds.recompute if self.recompute else _call
        for layer, norm, rate in zip(blocks.layers, blocks.norms[:-1], blocks.rates[:-1], strict=True):
            x, h = step(self._step, x, h, layer, norm, rate, inputs)
        return self.add_norm(x, h, blocks.norms[-1], blocks.rates[-1])[1]

    def _step(
        self, x: Tensor, h: Tensor | None, layer: Layer, norm: Norm | None, rate: float, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the layer before, and what this layer makes of it."""
        x, normed = self._add_norm_for(layer, x, h, norm, rate)
        if isinstance(layer, ParallelLayer):
            h = self._beside(layer, x, normed, inputs)
        elif isinstance(layer, SelfLayer):
            h = self.attend(layer, normed, inputs.tokens)
        elif isinstance(layer, CrossLayer):
            h = self._attend_across(layer, normed, inputs)
        else:
            h = self.feed(layer, normed, inputs.tokens)
        # All that tells a post-norm block from a pre-norm one.
        return normed if self.post_norm else x, h

    def _add_norm_for(
        self, layer: Layer, x: Tensor, h: Tensor | None, norm: Norm | None, rate: float
    ) -> tuple[Tensor, Any]:
        """`add_norm`; what only the layer's product in fp8 reads of it is rounded at once."""
        if norm is None or self.post_norm or self.backend != "triton" or isinstance(layer, ParallelLayer):
            return self.add_norm(x, h, norm, rate)
        product = layer.up if isinstance(layer, FeedLayer) else layer.project
        if not product.rounds(len(x)):
            return self.add_norm(x, h, norm, rate)
        return add_norm_rounded(x, h, norm, rate if self.drops else 0.0, self.seed(rate))

    def add_norm(self, x: Tensor, h: Tensor | None, norm: Norm | None, rate: float) -> tuple[Tensor, Tensor]:
        p, seed = rate if self.drops else 0.0, self.seed(rate)
        if norm is None:
            x = x if h is None else x + dropout(h, p)
            return x, x
        return add_norm(x, h, norm, p, seed, self.backend)

    def project(self, layer: SelfLayer, x: Tensor) -> Tensor:
        """`[tokens, (heads + 2 · kv_heads) · dim]`, the queries first."""
        qkv = layer.project(x)
        return qkv.view(len(qkv), layer.heads, 3, -1).transpose(1, 2).flatten(1) if layer.by_head else qkv

    def attend(self, layer: SelfLayer, x: Tensor, ragged: Ragged) -> Tensor:
        qkv, l_q, l_k, l_v = self.project(layer, x), self.at(layer.q), self.at(layer.k), self.at(layer.v)
        seed = self._attention_seed()
        if self.positions.rotary is None:
            bias = self.positions.bias(layer, ragged.max_seqlen)
            causal = layer.causal and bias is None  # a bias hides what comes later
            attended = self_attention(
                qkv, bias, ragged, _product(l_q, l_k), l_v, layer.heads, scale=layer.scale, causal=causal,
                p=self.attention, seed=seed, backend=self.backend,
            )  # fmt: skip
            return self.out(layer, attended, ragged)
        if l_q is not None:
            every = self.together((layer.q, layer.k, layer.v), layer.widths)
            qkv, l_k, l_v = scale(qkv, every, ragged, self.backend), None, None
        cos, sin = self.positions.angles(layer, ragged.max_seqlen)
        q, k, v = rotary_heads(
            qkv, cos, sin, ragged, l_k, l_v, layer.heads, layer.kv_heads, backend=self.backend, qk_norm=layer.qk_norm
        )
        attended = causal_attention(
            q, k, v, ragged, self.attention, scale=layer.scale, window=layer.window, softcap=layer.softcap
        )
        return self.out(layer, attended, ragged)

    def _attention_seed(self) -> Tensor | None:
        return self.seed(self.weights.rate(self.dropouts.attention))

    def _attend_across(self, layer: CrossLayer, x: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.kv is not None
        assert inputs.source is not None
        q, l_k, l_v = layer.project(x), _product(self.at(layer.q), self.at(layer.k)), self.at(layer.v)
        # Readers with vectors of their own: attention has none for a part of its queries.
        apart = inputs.readers.groups != inputs.tokens.groups
        attended = cross_attention(
            scaled(q, l_k, inputs.tokens) if apart else q, inputs.readers, inputs.kv, inputs.source, layer.index,
            inputs.shared, None if apart else l_k, None if apart else l_v, layer.heads, scale=layer.scale,
            p=self.attention, seed=self._attention_seed(), backend=self.backend,
        )  # fmt: skip
        return self.out(layer, scaled(attended, l_v, inputs.tokens) if apart else attended, inputs.tokens)

    def feed(self, layer: FeedLayer, x: Tensor, ragged: Ragged) -> Tensor:
        width = len(layer.up.weight) // len(layer.ups)
        fed = feed_forward(
            x, layer.up, layer.out, self.together(layer.ups, [width] * len(layer.ups)), self.at(layer.vector), ragged,
            self.weights.activation, self.weights.function, layer.gated, self.activation,
            self.seed(self.weights.rate(self.dropouts.activation)), self.backend,
        )  # fmt: skip
        return self._added(layer, fed, ragged)

    def _beside(self, layer: ParallelLayer, x: Tensor, normed: Tensor, inputs: Inputs) -> Tensor:
        attended = self.attend(layer.attention, normed, inputs.tokens)
        own = layer.feed_forward.norm
        fed = self.feed(layer.feed_forward, normed if own is None else self._norm(own, x), inputs.tokens)
        p = self.drops * layer.attention.residual
        return dropout(attended, p) + dropout(fed, self.drops * layer.feed_forward.residual)

    def out(self, layer: SelfLayer | CrossLayer, h: Tensor, ragged: Ragged) -> Tensor:
        """What an attention adds to the residual stream."""
        return self._added(layer, layer.out(h), ragged)

    def _added(self, layer: SelfLayer | CrossLayer | FeedLayer, h: Tensor, ragged: Ragged) -> Tensor:
        h = scale(h, self.at(layer.o), ragged, self.backend)
        return h if layer.out_norm is None else self._norm(layer.out_norm, h)

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        return add_norm(x, None, norm, 0.0, None, self.backend)[1]


def _product(one: Vector, other: Vector) -> Vector:
    """The vector of a product of two that each have theirs: of queries and keys."""
    return other if one is None else one if other is None else one * other


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
