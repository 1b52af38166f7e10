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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ia3.sites import Site
from ia3.storage import lay_out

Vector = Tensor | None

# Below this many queries a fused attention kernel costs more than the plain products.
_FEW_QUERIES = 16


def why_not(model: Any, sites: Sequence[Site]) -> str | None:
    """Why this model's loss can't be computed here; None where it can.

    Args:
        model: any model.
        sites: the active adapter's.
    """
    if not any(base.__name__ in _CLASSES for base in type(model).__mro__):
        return f"it is written for T5 and mT5, and this is a {type(model).__name__}"
    expected = _expected_sites(model)
    other = next((site for site in sites if (site.path, site.side) not in expected or site.intervals), None)
    if other is not None:
        return f"the {other.side} of {other.path} is adapted, where it expects keys, values and feed-forward alone"
    for path, module in model.named_modules():
        reason = _bypassed(path, module, model.config.dropout_rate)
        if reason is not None:
            return reason
    return None


_CLASSES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")
_OWN_HOOKS = ("scale_input", "scale_output", "_take_adapter_names", "_forget_adapter_names")


def _bypassed(path: str, module: nn.Module, rate: float) -> str | None:
    """What would go unheard if this module were not called."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    strange = [hook for hook in hooks if getattr(hook, "__name__", "") not in _OWN_HOOKS]
    if strange:
        return f"{path or 'the model'} carries another's hook"
    if "forward" in module.__dict__:
        return f"the forward of {path or 'the model'} was replaced"
    if getattr(module, "gradient_checkpointing", False):
        return f"{path or 'the model'} checkpoints its gradients"
    if isinstance(module, nn.Dropout) and module.p != rate:
        return f"{path} drops {module.p:g}, and the configuration says {rate:g}"
    if not isinstance(module, nn.Linear):
        return None
    kind = type(module.weight).__name__
    if kind != "Parameter":
        return f"the weight of {path} is a {kind}"
    if module.weight.requires_grad or getattr(module, "bias", None) is not None:
        return f"{path} is trained, or has a bias"
    return None


def _expected_sites(model: Any) -> dict[tuple[str, str], str]:
    """Where a vector may be: (path, side) to the part of its block that it multiplies."""
    inner = "wi_1" if model.config.is_gated_act else "wi"
    expected: dict[tuple[str, str], str] = {}
    for path, _ in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        if name in ("SelfAttention", "EncDecAttention"):
            expected |= {(f"{path}.{part}", "output"): part for part in ("k", "v")}
        elif name == "DenseReluDense":
            expected[f"{path}.wo", "input"] = "ff"
            # The activation stands between `wi` and the product, so only a gate's linear half commutes.
            if inner == "wi_1":
                expected[f"{path}.wi_1", "output"] = "ff"
    return expected


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """T5's layer norm: no mean, no shift; the variance in fp32."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def self_attention(
    x: Tensor,
    bias: Tensor,
    norm: Tensor,
    qkv: Tensor,
    out: Tensor,
    l_k: Vector,
    l_v: Vector,
    heads: int,
    p: float,
    eps: float,
) -> Tensor:
    """One layer with its residual: `[batch, length, width]`, bias `[batch or 1, heads, length, length]`."""
    q, k, v = functional.linear(rms_norm(x, norm, eps), qkv).chunk(3, -1)
    attended = _scaled(_attend(_scaled(q, l_k), k, v, bias, heads, p), l_v)
    return x + _dropout(functional.linear(attended, out), p)


def cross_attention(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    norm: Tensor,
    query: Tensor,
    out: Tensor,
    l_k: Vector,
    l_v: Vector,
    heads: int,
    p: float,
    eps: float,
) -> Tensor:
    """One layer with its residual over the encoder's keys and values `[batch, source, inner]`."""
    q = _scaled(functional.linear(rms_norm(x, norm, eps), query), l_k)
    attended = _scaled(_attend(q, k, v, bias, heads, p), l_v)
    return x + _dropout(functional.linear(attended, out), p)


def feed_forward(
    x: Tensor,
    norm: Tensor,
    inner: Tensor,
    out: Tensor,
    l_ff: Vector,
    act: Callable[[Tensor], Tensor],
    gated: bool,
    p: float,
    eps: float,
) -> Tensor:
    """One layer with its residual."""
    h = functional.linear(rms_norm(x, norm, eps), inner)
    if gated:
        gate, linear = h.chunk(2, -1)
        h = act(gate) * linear
    else:
        h = act(h)
    return x + _dropout(functional.linear(_dropout(_scaled(h, l_ff), p), out), p)


def head_loss(
    x: Tensor, norm: Tensor, weight: Tensor, labels: Tensor, scale: float, p: float, eps: float, count: Tensor
) -> Tensor:
    """The mean cross-entropy of the labels that are not -100, `count` of them."""
    x = _dropout(rms_norm(x, norm, eps), p) * scale
    logits = functional.linear(x, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
    return functional.cross_entropy(wide, labels.reshape(-1), reduction="sum") / count


def _scaled(x: Tensor, vector: Vector) -> Tensor:
    return x if vector is None else x * vector


def _dropout(x: Tensor, p: float) -> Tensor:
    return functional.dropout(x, p) if p else x


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int, p: float) -> Tensor:
    """Unscaled attention with an additive bias: `[batch, queries, inner]`."""
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    if q.shape[2] < _FEW_QUERIES:
        scores = (q @ k.transpose(-1, -2) + bias).to(torch.promote_types(q.dtype, torch.float32))
        attended = _dropout(scores.softmax(-1).to(q.dtype), p) @ v
    else:
        attended = functional.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=1.0)
    return attended.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class _Attention:
    """One attention's frozen weights, and the places of its vectors in the adapter's split."""

    norm: Tensor
    project: Tensor  # self: [3 · inner, width]; cross: the query's [inner, width]
    out: Tensor
    k: int | None
    v: int | None


@dataclass(frozen=True)
class _FeedForward:
    norm: Tensor
    inner: Tensor  # gated: [2 · d_ff, width]
    out: Tensor
    ff: int | None


@dataclass(frozen=True)
class _Block:
    attention: _Attention
    cross: _Attention | None
    feed_forward: _FeedForward


class T5Loss:
    """The loss of a batch as a function of the batch and the adapter's slices.

    Args:
        model: T5 or mT5 for which `why_not` has nothing to say.
        sites: the active adapter's, in its layout's order.
        compiled: compile the blocks one by one.
    """

    def __init__(self, model: Any, sites: Sequence[Site], *, compiled: bool) -> None:
        self.model, self.config = model, model.config
        self.gated = model.config.is_gated_act
        self.act = model.encoder.block[0].layer[-1].DenseReluDense.act
        self.joined: list[tuple[nn.Module, Tensor]] = []
        self.place = {(site.path, site.side): index for index, site in enumerate(sites)}
        self.encoder = [self._block(f"encoder.block.{i}", block) for i, block in enumerate(model.encoder.block)]
        self.decoder = [self._block(f"decoder.block.{i}", block) for i, block in enumerate(model.decoder.block)]
        cross = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(len(self.decoder))]
        self.cross_kv = self._join([f"{path}.{part}" for path in cross for part in ("k", "v")])
        compile_part: Any = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else lambda part: part
        self.self_attention, self.cross_attention = compile_part(self_attention), compile_part(cross_attention)
        self.feed_forward, self.head_loss = compile_part(feed_forward), compile_part(head_loss)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, slices: Sequence[Tensor]) -> Tensor:
        """The mean loss of the label tokens.

        Args:
            input_ids: `[batch, source]`.
            attention_mask: `[batch, source]`; a row of zeros is no example.
            labels: `[batch, target]`, -100 where nothing is learned.
            slices: one flat vector a site, of the model's dtype.
        """
        config, model = self.config, self.model
        p = config.dropout_rate if model.training else 0.0
        eps, heads = config.layer_norm_epsilon, config.num_heads

        def at(place: int | None) -> Vector:
            return None if place is None else slices[place]

        x = _dropout(model.shared(input_ids), p)
        padding = torch.zeros(attention_mask.shape, dtype=x.dtype, device=x.device)
        padding = padding.masked_fill(attention_mask == 0, torch.finfo(x.dtype).min)[:, None, None, :]
        bias = (self._positions(model.encoder, input_ids.shape[1]).to(x.dtype) + padding).contiguous()
        for block in self.encoder:
            a, f = block.attention, block.feed_forward
            x = self.self_attention(x, bias, a.norm, a.project, a.out, at(a.k), at(a.v), heads, p, eps)
            x = self.feed_forward(x, f.norm, f.inner, f.out, at(f.ff), self.act, self.gated, p, eps)
        x = _dropout(rms_norm(x, model.encoder.final_layer_norm.weight, eps), p)

        kv = functional.linear(x, self.cross_kv).chunk(2 * len(self.decoder), -1)
        y = _dropout(model.shared(model._shift_right(labels)), p)
        length = labels.shape[1]
        causal = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        bias = self._positions(model.decoder, length).to(x.dtype) + causal
        for index, block in enumerate(self.decoder):
            a, c, f = block.attention, block.cross, block.feed_forward
            assert c is not None
            k, v = kv[2 * index], kv[2 * index + 1]
            y = self.self_attention(y, bias, a.norm, a.project, a.out, at(a.k), at(a.v), heads, p, eps)
            y = self.cross_attention(y, k, v, padding, c.norm, c.project, c.out, at(c.k), at(c.v), heads, p, eps)
            y = self.feed_forward(y, f.norm, f.inner, f.out, at(f.ff), self.act, self.gated, p, eps)
        scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
        count = (labels != -100).sum()
        norm, weight = model.decoder.final_layer_norm.weight, model.lm_head.weight
        loss: Tensor = self.head_loss(y, norm, weight, labels, scale, p, eps, count)
        return loss

    def _positions(self, stack: Any, length: int) -> Tensor:
        """The relative positions' bias `[1, heads, length, length]`, which the first block holds for all."""
        bias: Tensor = stack.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return bias

    def _block(self, path: str, block: Any) -> _Block:
        attention, last = block.layer[0].SelfAttention, len(block.layer) - 1
        self_path, ff_path = f"{path}.layer.0.SelfAttention", f"{path}.layer.{last}.DenseReluDense"
        feed = block.layer[last].DenseReluDense
        qkv = self._join([f"{self_path}.{part}" for part in ("q", "k", "v")])
        cross = None
        if last == 2:
            other = block.layer[1].EncDecAttention
            places = self._k_and_v(f"{path}.layer.1.EncDecAttention")
            cross = _Attention(block.layer[1].layer_norm.weight, other.q.weight, other.o.weight, *places)
        inner = self._join([f"{ff_path}.wi_0", f"{ff_path}.wi_1"]) if self.gated else feed.wi.weight
        ff = self.place.get((f"{ff_path}.wo", "input"), self.place.get((f"{ff_path}.wi_1", "output")))
        return _Block(
            _Attention(block.layer[0].layer_norm.weight, qkv, attention.o.weight, *self._k_and_v(self_path)),
            cross,
            _FeedForward(block.layer[last].layer_norm.weight, inner, feed.wo.weight, ff),
        )

    def _join(self, paths: list[str]) -> Tensor:
        (together,) = lay_out(self.model, [paths])
        self.joined.append((self.model.get_submodule(paths[0]), together))
        return together

    def is_valid(self) -> bool:
        """Whether the model's weights are still those that were laid out."""
        return all(first.weight.data_ptr() == together.data_ptr() for first, together in self.joined)  # type: ignore[operator]

    def _k_and_v(self, path: str) -> tuple[int | None, int | None]:
        return self.place.get((f"{path}.k", "output")), self.place.get((f"{path}.v", "output"))
