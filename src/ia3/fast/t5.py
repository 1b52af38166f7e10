"""T5 and mT5 by hand: the loss of a batch over frozen weights that were laid out anew.

The formulas are the model's own (Raffel et al. 2020), in an order that hardware likes: queries, keys and values are
one product, so are both halves of a gate, and so are the keys and values of all cross-attentions over the encoder's
output. There are no rotary positions, so that the key's vector may multiply the query, and the value's vector what
attention returns:

    q · (l ∘ k) = (l ∘ q) · k        softmax(…) (v diag(l)) = (softmax(…) v) diag(l)

Both are exact, and cheaper wherever the queries are the shorter side, as in a decoder that writes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ia3.fast.guard import unsupported_attribute as unlike
from ia3.fast.guard import unsupported_modules as unheard
from ia3.fast.guard import unsupported_site as other_site
from ia3.fast.operations import (
    MOST_KEYS,
    Chance,
    Vector,
    add_norm,
    attention,
    cross_attention,
    dropout,
    gated,
    has_kernels,
    of_layer,
    self_attention,
    spread,
    token_losses,
)
from ia3.fast.packing import IGNORED, Packed, Spans
from ia3.fast.products import Frozen, Product, product_of
from ia3.sites import Layout, Site
from ia3.storage import lay_out


def why_not(model: Any, sites: Sequence[Site]) -> str | None:
    """Why this model's loss can't be computed here; None where it can.

    Args:
        model: any model.
        sites: the active adapter's.
    """
    if not any(base.__name__ in CLASSES for base in type(model).__mro__):
        return f"it is written for T5 and mT5, and this is a {type(model).__name__}"
    expected = _expected_sites(model)
    other = other_site(sites, expected)
    if other is not None:
        return other
    twice = _adapted_twice(sites)
    if twice is not None:
        return twice
    config = model.config
    formula = {
        "dropout": config.dropout_rate,
        "variance_epsilon": config.layer_norm_epsilon,
        "n_heads": config.num_heads,
        "key_value_proj_dim": config.d_kv,
        "scaling": 1.0,
    }
    reason = unlike(model, formula, config.dense_act_fn)
    if reason is not None:
        return reason
    biased = (path for path, module in model.named_modules() if getattr(module, "bias", None) is not None)
    if (path := next(biased, None)) is not None:
        return f"{path} has a bias"
    if model.dtype is torch.float16:
        return "its weights are float16, in which its own forward clamps what overflows"
    return unheard(model, CLASSES)


# A CPU meets every length, and each bias takes heads × length².
_MOST_LENGTHS = 16
CLASSES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")


def _adapted_twice(sites: Sequence[Site]) -> str | None:
    """Whether one intermediate has two vectors, of which one would be forgotten."""
    taken = {(site.path, site.side) for site in sites}
    for path, side in taken:
        linear = f"{path.removesuffix('.wo')}.wi_1"
        if side == "input" and (linear, "output") in taken:
            return f"both the output of {linear} and the input of {path} are adapted"
    return None


def _expected_sites(model: Any) -> set[tuple[str, str]]:
    """Where a vector may be, as (path, side)."""
    expected: set[tuple[str, str]] = set()
    for path, _ in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if name in ("SelfAttention", "EncDecAttention"):
            expected |= {(f"{path}.{part}", "output") for part in ("k", "v")}
        elif name == "DenseReluDense":
            expected.add((f"{path}.wo", "input"))
            # The activation stands between `wi` and the product, so only a gate's linear half commutes.
            if model.config.is_gated_act:
                expected.add((f"{path}.wi_1", "output"))
    return expected


@dataclass(frozen=True)
class _Attention:
    """One attention's frozen weights, and the places of its vectors in the adapter's split."""

    norm: Tensor
    project: Product  # self: to 3 · inner; cross: the query's
    out: Product
    k: int | None
    v: int | None


@dataclass(frozen=True)
class _FeedForward:
    norm: Tensor
    inner: Product  # gated: to 2 · d_ff
    out: Product
    ff: int | None


@dataclass(frozen=True)
class _Block:
    attention: _Attention
    cross: _Attention | None
    feed_forward: _FeedForward


class T5Loss:
    """The losses of a batch as a function of the batch and a table of vectors.

    Args:
        model: T5 or mT5 for which `why_not` has nothing to say.
        layout: the active adapter's.
        recompute: keep the residual stream alone for the backward, and compute what is inside a layer again.
        frozen: what the layers' frozen weights are multiplied in; the head's stay as they are.

    Raises:
        ValueError: widths that the products can't take.
    """

    def __init__(self, model: Any, layout: Layout, *, recompute: bool = False, frozen: Frozen | None = None) -> None:
        self.model, self.config, self.layout, self.recompute = model, model.config, layout, recompute
        self.frozen: Frozen | None = frozen
        self.copied: list[Tensor] = []
        self.gated, self.rate = model.config.is_gated_act, model.config.dropout_rate
        self.act: Any = model.encoder.block[0].layer[-1].DenseReluDense.act
        self.positions: dict[tuple[nn.Module, int], Tensor] = {}
        self.place = {(site.path, site.side): index for index, site in enumerate(layout.sites)}
        self.encoder = [self._block(f"encoder.block.{i}", block) for i, block in enumerate(model.encoder.block)]
        self.decoder = [self._block(f"decoder.block.{i}", block) for i, block in enumerate(model.decoder.block)]
        cross = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(len(self.decoder))]
        self.cross_kv = self._join([f"{path}.{part}" for path in cross for part in ("k", "v")])

    def __call__(self, packed: Packed, table: Tensor) -> Tensor:
        """The mean loss of each group's label tokens, `[groups]`, 0 for a group without any.

        Args:
            packed: the batch, the examples of one group after those of another, equally many.
            table: a row of vectors a group, `[groups, D]`.

        Raises:
            ValueError: the examples can't be divided into the table's groups; or on a GPU an input too long for
                dropout that is computed again.
        """
        labels, source = packed.labels, packed.spans(len(table))
        run = _Run(self, self._split(table), labels.device)
        if self.recompute and run.kernels and run.p and packed.longest > MOST_KEYS:
            raise ValueError(
                f"An input has {packed.longest} tokens, and with dropout recompute is for at most {MOST_KEYS}: cut the "
                "inputs there, train without dropout, or without recompute."
            )
        target = Spans.even(len(labels), labels.shape[1], source.groups, labels.device)
        read = self._read(run, packed, source)
        logits = self._write(run, self.model._shift_right(labels).flatten(), target, target, read, source)
        losses = token_losses(logits, labels, by_kernels=run.kernels).view(len(table), -1)
        return losses.sum(1) / (labels != IGNORED).view(len(table), -1).sum(1).clamp(min=1)

    def log_probabilities(self, packed: Packed, choices: Tensor, table: Tensor) -> Tensor:
        """The log-probability of each token of each choice after each input, `[examples, choices, length]`.

        The encoder runs once an example, and its keys and values serve all choices, whose tokens are more queries.

        Args:
            packed: the inputs; its labels only say how many examples there are.
            choices: `[choices, length]`, -100 after a choice's end.
            table: as in the loss.
        """
        count, length = choices.shape
        source = packed.spans(len(table))
        run = _Run(self, self._split(table), choices.device)
        alone = Spans.even(source.examples * count, length, source.groups, choices.device)
        together = Spans.even(source.examples, count * length, source.groups, choices.device)
        read = self._read(run, packed, source)
        labels = choices.repeat(source.examples, 1)
        logits = self._write(run, self.model._shift_right(labels).flatten(), alone, together, read, source)
        return -token_losses(logits, labels, by_kernels=run.kernels).view(source.examples, count, length)

    def read(self, packed: Packed, vectors: Sequence[Tensor], groups: int, into: Tensor) -> None:
        """Compute the keys and values of all cross-attentions.

        Args:
            packed: the inputs; its labels only say how many examples there are.
            vectors: one a site, `[1, groups, width]`.
            groups: the examples are divided into so many equal groups in their order.
            into: where they go, `[at least rows, layers · 2 · inner]`.
        """
        source = packed.spans(groups)
        into[: source.rows].copy_(self._read(_Run(self, vectors, into.device), packed, source))

    def write_one(
        self,
        token: Tensor,
        position: Tensor,
        kv: Tensor,
        source: Spans,
        written: Sequence[Tensor],
        vectors: Sequence[Tensor],
    ) -> Tensor:
        """The logits of the next token of each example, `[examples, words]`.

        Args:
            token: the last of each, `[examples]`.
            position: how many there are before it, `[1]`.
            kv: from `read`.
            source: its rows.
            written: a layer's keys and values so far, `[examples, most, 2 · inner]`; this token's are put there.
            vectors: as in `read`.
        """
        run, stack = _Run(self, vectors, token.device), self.model.decoder
        examples, most = written[0].shape[:2]
        one, before = (Spans.even(examples, length, source.groups, token.device) for length in (1, most))
        bias = self._positions(stack, most).index_select(2, position)
        x, h = stack.embed_tokens(token), None
        for index, (block, cache) in enumerate(zip(self.decoder, written, strict=True)):
            a, c = block.attention, block.cross
            assert c is not None
            x, normed = run.add_norm(x, h, a.norm)
            q, own = a.project(normed).tensor_split([cache.shape[-1] // 2], -1)
            k, v = cache.index_copy_(1, position, own[:, None]).flatten(0, 1).chunk(2, -1)
            h = a.out(run.attention(q, one, k, v, before, bias, a))
            x, normed = run.add_norm(x, h, c.norm)
            q = c.project(normed)
            h = c.out(run.attention(q, one, *of_layer(kv, index, q.shape[-1]), source, None, c))
            x, h = run.feed(x, h, block.feed_forward, one)
        _, x = run.add_norm(x, h, stack.final_layer_norm.weight)
        return self._logits(x)

    @property
    def has_kernels(self) -> bool:
        return has_kernels(self.model.shared.weight, self.config.dense_act_fn)

    def _split(self, table: Tensor) -> tuple[Tensor, ...]:
        return self.layout.split(spread(table, by_kernels=self.has_kernels))

    def _read(self, run: _Run, packed: Packed, source: Spans) -> Tensor:
        """The keys and values of all cross-attentions, `[rows, layers · 2 · inner]`."""
        stack = self.model.encoder
        x, h = dropout(stack.embed_tokens(packed.tokens), run.p), None
        bias = self._positions(stack, packed.longest)
        for block in self.encoder:
            x, h = run.part(run.attend, x, h, block.attention, bias, source)
            x, h = run.part(run.feed, x, h, block.feed_forward, source)
        _, x = run.add_norm(x, h, stack.final_layer_norm.weight)
        return self.cross_kv(dropout(x, run.p))

    def _write(self, run: _Run, ids: Tensor, alone: Spans, together: Spans, kv: Tensor, source: Spans) -> Tensor:
        """The logits of the decoder's rows, `[rows, words]`.

        Args:
            run: this forward.
            ids: `[rows]`.
            alone: the rows that see each other.
            together: the rows that see the same input.
            kv: from `_read`.
            source: its rows.
        """
        stack = self.model.decoder
        x, h = dropout(stack.embed_tokens(ids), run.p), None
        bias = self._positions(stack, alone.longest)
        shared: dict[str, Tensor] = {}
        for index, block in enumerate(self.decoder):
            assert block.cross is not None
            x, h = run.part(run.attend, x, h, block.attention, bias, alone)
            x, h = run.part(run.attend_across, x, h, block.cross, together, kv, source, index, shared)
            x, h = run.part(run.feed, x, h, block.feed_forward, together)
        _, x = run.add_norm(x, h, stack.final_layer_norm.weight)
        return self._logits(dropout(x, run.p))

    def _logits(self, x: Tensor) -> Tensor:
        scale = self.config.d_model**-0.5 if getattr(self.config, "scale_decoder_outputs", False) else 1.0
        return functional.linear(x * scale, self.model.lm_head.weight)

    def _positions(self, stack: Any, length: int) -> Tensor:
        """The relative positions' bias `[1, heads, length, length]`, which the first block holds for all.

        It is frozen, so it is computed once a length; a decoder's hides what comes later.
        """
        attention = stack.block[0].layer[0].SelfAttention
        if (stack, length) not in self.positions:
            bias = attention.compute_bias(length, length).to(self.model.shared.weight.dtype)
            if stack is self.model.decoder:
                bias = bias + torch.full_like(bias, torch.finfo(bias.dtype).min).triu(1)
            if not bias.is_cuda and len(self.positions) >= _MOST_LENGTHS:  # a graph reads those on a GPU
                self.positions.clear()
            self.positions[stack, length] = bias.contiguous()
        return self.positions[stack, length]

    def _block(self, path: str, block: Any) -> _Block:
        attention, last = block.layer[0].SelfAttention, len(block.layer) - 1
        self_path, ff_path = f"{path}.layer.0.SelfAttention", f"{path}.layer.{last}.DenseReluDense"
        feed = block.layer[last].DenseReluDense
        qkv = self._join([f"{self_path}.{part}" for part in ("q", "k", "v")])
        cross = None
        if last == 2:
            other = block.layer[1].EncDecAttention
            places = self._k_and_v(f"{path}.layer.1.EncDecAttention")
            q, o = self._product(other.q.weight), self._product(other.o.weight)
            cross = _Attention(block.layer[1].layer_norm.weight, q, o, *places)
        inner = self._join([f"{ff_path}.wi_0", f"{ff_path}.wi_1"]) if self.gated else self._product(feed.wi.weight)
        ff = self.place.get((f"{ff_path}.wo", "input"), self.place.get((f"{ff_path}.wi_1", "output")))
        return _Block(
            _Attention(
                block.layer[0].layer_norm.weight, qkv, self._product(attention.o.weight), *self._k_and_v(self_path)
            ),
            cross,
            _FeedForward(block.layer[last].layer_norm.weight, inner, self._product(feed.wo.weight), ff),
        )

    def _join(self, paths: list[str]) -> Product:
        (together,) = lay_out(self.model, [paths])
        return self._product(together, *(self.model.get_parameter(f"{path}.weight") for path in paths))

    def _product(self, weight: Tensor, *parts: Tensor) -> Product:
        """The product with a weight; the parameters that it is made of, where it is not one itself."""
        if self.frozen is not None:
            self.copied.extend(parts or (weight,))
        return product_of(weight, frozen=self.frozen)

    @property
    def baked(self) -> list[Tensor]:
        """The weights that are read once and not in each forward: a change of theirs is not heard."""
        stacks = (self.model.encoder, self.model.decoder)
        biases = [stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight for stack in stacks]
        return [*biases, *self.copied]

    def _k_and_v(self, path: str) -> tuple[int | None, int | None]:
        return self.place.get((f"{path}.k", "output")), self.place.get((f"{path}.v", "output"))


class _Run:
    """One forward: the vectors split by site, and the dropouts' seeds, drawn in order."""

    def __init__(self, loss: T5Loss, slices: Sequence[Tensor], device: torch.device) -> None:
        config = loss.config
        self.slices, self.kernels = slices, loss.has_kernels
        self.recompute = loss.recompute and torch.is_grad_enabled()
        self.p = loss.rate if loss.model.training else 0.0
        self.eps, self.heads, self.gated, self.act = config.layer_norm_epsilon, config.num_heads, loss.gated, loss.act
        self.act_name = config.dense_act_fn
        count = 4 * len(loss.encoder) + 6 * len(loss.decoder) + 2
        self.chance = Chance(device, count, by_kernels=self.kernels)

    def at(self, place: int | None) -> Vector:
        return None if place is None else self.slices[place]

    def part(self, layer: Callable[..., tuple[Tensor, Tensor]], *arguments: Any) -> tuple[Tensor, Tensor]:
        """A layer's part, whose inside is kept for the backward or computed again."""
        found: tuple[Tensor, Tensor] = self.chance.again(layer, *arguments) if self.recompute else layer(*arguments)
        return found

    def add_norm(self, x: Tensor, h: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, h, weight, self.eps, self.p, self.chance.next())

    def attention(
        self, q: Tensor, of_q: Spans, k: Tensor, v: Tensor, of_k: Spans, bias: Tensor | None, layer: _Attention
    ) -> Tensor:
        l_k, l_v = self.at(layer.k), self.at(layer.v)
        return attention(q, of_q, k, v, of_k, bias, l_k, l_v, self.heads, self.chance.next())

    def attend(
        self, x: Tensor, h: Tensor | None, layer: _Attention, bias: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the layer before, and what this layer makes of it."""
        x, normed = self.add_norm(x, h, layer.norm)
        qkv = layer.project(normed)
        k, v = self.at(layer.k), self.at(layer.v)
        attended = self_attention(qkv, bias, spans, k, v, self.heads, self.p, self.chance.next())
        return x, layer.out(attended)

    def attend_across(
        self, x: Tensor, h: Tensor, layer: _Attention, target: Spans, kv: Tensor, source: Spans, index: int,
        shared: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, normed = self.add_norm(x, h, layer.norm)
        q = layer.project(normed)
        k, v = self.at(layer.k), self.at(layer.v)
        attended = cross_attention(q, target, kv, source, index, shared, k, v, self.heads, self.p, self.chance.next())
        return x, layer.out(attended)

    def feed(self, x: Tensor, h: Tensor, layer: _FeedForward, spans: Spans) -> tuple[Tensor, Tensor]:
        x, normed = self.add_norm(x, h, layer.norm)
        inner = layer.inner(normed)
        found = gated(inner, self.at(layer.ff), spans, self.act_name, self.act, self.gated, self.p, self.chance.next())
        return x, layer.out(found)
