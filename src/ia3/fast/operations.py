"""What a block with vectors is made of, each in plain PyTorch, and on a GPU by a kernel of `kernels.py`.

A vector is `[stripes, groups, width]`, equal along the stripes: a batch's examples are divided into equal groups in
their order, each with a vector of its own. How the gradient is shared among the stripes is not said; their sum is the
vector's gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ia3.fast.packing import IGNORED, Spans

Vector = Tensor | None

# Of more keys than this, a kernel could not hold their gradients; PyTorch attends then.
MOST_KEYS = 256
# Below this many queries a fused attention kernel costs more than the plain products.
_FEW_QUERIES = 16
# All groups' gradients are summed in about so many parts.
_STRIPES = 16


def has_kernels(x: Tensor, act: str) -> bool:
    """Whether a model's computation goes by kernels: on a GPU and in a dtype and with an activation that they know.

    Args:
        x: one of the model's weights.
        act: the activation's name in transformers.
    """
    if not has_triton(x.device) or x.dtype == torch.float64 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return act in _kernels().ACTIVATIONS


def has_triton(device: torch.device) -> bool:
    """Whether a device is one that Triton's kernels here are written for."""
    on_gpu = device.type == "cuda" and torch.version.hip is None
    return on_gpu and importlib.util.find_spec("triton") is not None


def _kernels() -> Any:
    from ia3.fast import kernels

    return kernels


def compile_kernels(computation: Callable[[], object], device: torch.device) -> None:
    """Compile the kernels of a computation that can be run again before it runs in earnest.

    Args:
        computation: run once, with results that mean nothing; not at all on a device without kernels.
        device: the model's.
    """
    if has_triton(device):
        _kernels().compile_together(computation, device)


def spread(table: Tensor, *, by_kernels: bool) -> Tensor:
    """A table `[groups, D]` as `[stripes, groups, D]`; its backward is the sum over the stripes.

    Args:
        table: a row of vectors a group.
        by_kernels: see `has_kernels`; one stripe is enough without.
    """
    groups = len(table)
    stripes = max(1, _STRIPES // groups) if by_kernels else 1
    return table.expand(stripes, *table.shape)


class Chance:
    """The seeds of a step's dropouts by kernels, drawn from the device's own generator.

    Args:
        device: the model's.
        count: how many dropouts a step has.
        by_kernels: without kernels PyTorch's dropout draws for itself.
    """

    def __init__(self, device: torch.device, count: int, *, by_kernels: bool) -> None:
        self.seeds = torch.randint(0, 2**62, (count,), device=device).unbind() if by_kernels else None
        self.place = 0

    def next(self) -> Tensor | None:
        """A seed for one dropout; None where PyTorch draws."""
        self.place += 1
        return None if self.seeds is None else self.seeds[self.place - 1]

    def again(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part now, keep nothing of its inside, and run it again with the same seeds in the backward."""
        start = self.place

        def run(*arguments: Any) -> Any:
            self.place = start
            return part(*arguments)

        by_kernels = self.seeds is not None
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=not by_kernels)


LARGEST_FP8 = 448.0


def round_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row in fp8 (e4m3), scaled so that its largest number is the largest of fp8, and the scales `[rows, 1]`.

    Args:
        x: `[rows, width]`.
        factors: one a column, `[width, 1]`, which multiply x before.
    """
    if x.is_cuda and x.dtype != torch.float64:
        return _kernels().round_rows(x, factors)  # type: ignore[no-any-return]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if factors is not None:
        wide = wide * factors.t()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST_FP8
    return (wide / scales).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scales


def split_in_three(x: Tensor, *, falling: bool = False, stacked: bool = False) -> Tensor:
    """Three tensors of bf16 whose sum is x in fp32, each the rounding of what those before leave.

    Args:
        x: `[rows, width]` in fp32, on a GPU.
        falling: the smallest part first.
        stacked: below each other, `[3 · rows, width]`, not side by side, `[rows, 3 · width]`.
    """
    return _kernels().split_in_three(x, falling, stacked)  # type: ignore[no-any-return]


def add_norm(
    x: Tensor, h: Tensor | None, weight: Tensor, eps: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The residual stream x plus what a layer made of it, and its root-mean-square norm for the next layer.

    Args:
        x: `[rows, width]`.
        h: the same shape, dropped by p before it is added; None where x is the first.
        weight: the norm's `[width]`.
        eps: added to the variance, which is taken in fp32 at least.
        p: dropout's.
        seed: from `Chance`.
    """
    if seed is not None:
        return _kernels().add_norm(x, h, weight, eps, p, seed)  # type: ignore[no-any-return]
    if h is not None:
        x = x + dropout(h, p)
    return x, rms_norm(x, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """T5's layer norm: no mean, no shift; the variance in fp32."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def gated(
    h: Tensor, vector: Vector, spans: Spans, act: str, activation: Callable[[Tensor], Tensor], is_gated: bool, p: float,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """The feed-forward intermediate `[rows, d_ff]`: activated, gated, multiplied, dropped.

    Args:
        h: `[rows, 2 · d_ff]`, the gate before the linear half; `[rows, d_ff]` without a gate.
        vector: l_ff.
        spans: the rows' examples and groups.
        act: the activation's name in transformers.
        activation: itself.
        is_gated: whether h has two halves.
        p: dropout's.
        seed: from `Chance`.
    """
    if seed is not None:
        return _kernels().gated(h, vector, spans, act, is_gated, p, seed)  # type: ignore[no-any-return]
    if is_gated:
        gate, linear = h.chunk(2, -1)
        h = activation(gate) * linear
    else:
        h = activation(h)
    return dropout(scaled(h, vector, spans), p)


def self_attention(
    qkv: Tensor, bias: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int, p: float, seed: Tensor | None
) -> Tensor:
    """Unscaled attention with relative positions, `[rows, inner]`.

    Args:
        qkv: `[rows, 3 · inner]`.
        bias: `[1, heads, longest, longest]`, added to the scores.
        spans: the rows' examples and groups.
        l_k: the keys' vector, which multiplies the queries.
        l_v: the values', which multiplies what attention returns.
        heads: of `inner`.
        p: dropout's, on the weights.
        seed: from `Chance`.
    """
    if seed is not None and spans.longest <= MOST_KEYS:
        return _kernels().self_attention(qkv, bias, spans, l_k, l_v, heads, p, seed)  # type: ignore[no-any-return]
    q, k, v = qkv.chunk(3, -1)
    return scaled(_attend(scaled(q, l_k, spans), spans, k, v, spans, bias, heads, p), l_v, spans)


def attention(
    q: Tensor, of_q: Spans, k: Tensor, v: Tensor, of_k: Spans, bias: Tensor | None, l_k: Vector, l_v: Vector,
    heads: int, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Unscaled attention of a decoder that writes, without a gradient and without dropout, `[query rows, inner]`.

    Args:
        q: `[query rows, inner]`.
        of_q: their examples and groups.
        k: `[key rows, inner]`.
        v: the same.
        of_k: their examples.
        bias: `[1, heads, longest query, longest key]`, added to the scores.
        l_k, l_v, heads, seed: as in `self_attention`.
    """
    if seed is not None and of_k.longest <= MOST_KEYS:
        return _kernels().attention(q, of_q, k, v, of_k, bias, l_k, l_v, heads, seed)  # type: ignore[no-any-return]
    return scaled(_attend(scaled(q, l_k, of_q), of_q, k, v, of_k, bias, heads, 0.0), l_v, of_q)


def cross_attention(
    q: Tensor, of_q: Spans, kv: Tensor, of_k: Spans, index: int, shared: dict[str, Tensor], l_k: Vector, l_v: Vector,
    heads: int, p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Unscaled attention over the encoder's output, `[target rows, inner]`.

    Args:
        q: `[target rows, inner]`.
        of_q: their examples and groups.
        kv: keys and values of all layers, `[source rows, layers · 2 · inner]`.
        of_k: their examples.
        index: the layer.
        shared: one dict a forward, empty at first, where the layers' kernels share kv's gradient; each layer's output
            must depend on that of the layer before.
        l_k, l_v, heads, p, seed: as in `self_attention`.
    """
    if seed is not None and of_k.longest <= MOST_KEYS:
        return _kernels().cross_attention(q, of_q, kv, of_k, index, shared, l_k, l_v, heads, p, seed)  # type: ignore[no-any-return]
    k, v = of_layer(kv, index, q.shape[-1])
    return scaled(_attend(scaled(q, l_k, of_q), of_q, k, v, of_k, None, heads, p), l_v, of_q)


def of_layer(kv: Tensor, index: int, inner: int) -> tuple[Tensor, Tensor]:
    """A layer's own keys and values of all layers', views `[rows, inner]`."""
    k, v = kv[:, 2 * index * inner : (2 * index + 2) * inner].chunk(2, -1)
    return k, v


def token_losses(logits: Tensor, labels: Tensor, *, by_kernels: bool) -> Tensor:
    """Cross-entropy of each token in fp32 at least, 0 where the label is -100, `[tokens]`.

    Args:
        logits: `[…, words]`; by kernels their memory is used for their gradient.
        labels: as many as there are rows of logits.
        by_kernels: see `has_kernels`.
    """
    if by_kernels:
        return _kernels().token_losses(logits, labels)  # type: ignore[no-any-return]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
    return functional.cross_entropy(wide, labels.reshape(-1), reduction="none", ignore_index=IGNORED)


def scaled(x: Tensor, vector: Vector, spans: Spans) -> Tensor:
    """The product of `[rows, width]` with each group's vector."""
    if vector is None:
        return x
    factors = vector[0].to(x.dtype)
    return x * (factors[0] if len(factors) == 1 else factors.index_select(0, spans.group_of_row))


def dropout(x: Tensor, p: float) -> Tensor:
    """PyTorch's, where there is anything to drop."""
    return functional.dropout(x, p) if p else x


def _attend(
    q: Tensor, of_q: Spans, k: Tensor, v: Tensor, of_k: Spans, bias: Tensor | None, heads: int, p: float
) -> Tensor:
    """Unscaled attention of each example's rows, `[rows, inner]`."""
    q, k, v = (_by_head(spans.pad(x), heads) for x, spans in ((q, of_q), (k, of_k), (v, of_k)))
    hidden = torch.zeros(of_k.mask.shape, dtype=q.dtype, device=q.device)
    hidden = hidden.masked_fill(~of_k.mask, torch.finfo(q.dtype).min)[:, None, None, :]
    bias = hidden if bias is None else (hidden + bias).contiguous()
    if q.shape[2] < _FEW_QUERIES:
        scores = (q @ k.transpose(-1, -2) + bias).to(torch.promote_types(q.dtype, torch.float32))
        attended = dropout(scores.softmax(-1).to(q.dtype), p) @ v
    else:
        attended = functional.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=1.0)
    return of_q.unpad(attended.transpose(1, 2).flatten(2))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[batch, length, inner]` to `[batch, heads, length, dim]`."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def rotary_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int, kv_heads: int, *,
    by_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values by heads, `[examples, heads, longest, dim]`: multiplied, then turned by their positions.

    The keys' vector must act before they are turned. The values' acts here too: with fewer heads of values than of
    queries that is cheaper than on what attention returns.

    Args:
        qkv: `[rows, (heads + 2 · kv_heads) · dim]`, the queries first.
        cos: of the angles, `[longest, dim / 2]`: channel i turns with channel i + dim / 2, as transformers has it.
        sin: alike.
        spans: the rows' examples and groups.
        l_k: the keys' vector.
        l_v: the values'.
        heads: of the queries.
        kv_heads: of the keys, and of the values.
        by_kernels: see `has_kernels`.

    Returns:
        What is finite and of no example's where an example has no row.
    """
    if by_kernels:
        return _kernels().rotary_heads(qkv, cos, sin, spans, l_k, l_v, heads, kv_heads)  # type: ignore[no-any-return]
    dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = (
        spans.pad(x).view(spans.examples, spans.longest, -1, dim).transpose(1, 2)
        for x in (q, scaled(k, l_k, spans), scaled(v, l_v, spans))
    )
    return _turned(q, cos, sin), _turned(k, cos, sin), v


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, p: float) -> Tensor:
    """Attention of each row to its example's rows up to itself, `[rows, heads · dim]`, the scores over √dim.

    Args:
        q: `[examples, heads, longest, dim]`, finite where an example has no row; so are k and v, of fewer heads.
        k: the keys.
        v: the values.
        spans: the rows' examples.
        p: dropout's, on the weights.
    """
    grouped = q.shape[1] != k.shape[1]
    by_groups = grouped and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)  # others know no groups
    if grouped and not by_groups:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    # What has no row stands behind all that has, so that causality hides it.
    attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=by_groups)
    found: Tensor = _Unpad.apply(attended.transpose(1, 2).flatten(2), spans)  # type: ignore[no-untyped-call]
    return found


class _Unpad(torch.autograd.Function):
    """`Spans.unpad`, whose backward gathers too, where autograd would add atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: Spans) -> Tensor:
        ctx.spans = spans
        return spans.unpad(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = ctx.spans.pad(grad)
        return padded if ctx.spans.uniform else padded.masked_fill(~ctx.spans.mask[..., None], 0), None


# Logits and their gradient are made in pieces of about so many numbers.
_LOGITS_AT_ONCE = 1 << 27


def head_losses(y: Tensor, weight: Tensor, places: Tensor, labels: Tensor, *, by_kernels: bool) -> Tensor:
    """Cross-entropy of labels behind a frozen head, `[labels]`, without all logits at a time.

    The loss of one label depends on one row, so that its gradient can be had with it: backward only multiplies
    (after Hsu et al. 2024, arXiv:2410.10989, section 3.2).

    Args:
        y: `[rows, width]`.
        weight: the head's, `[words, width]`.
        places: the row that predicts each label, `[labels]`.
        labels: `[labels]`, -100 for none.
        by_kernels: see `has_kernels`.
    """
    losses: Tensor = _HeadLosses.apply(y, weight, places, labels, by_kernels)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, places: Tensor, labels: Tensor, by_kernels: bool) -> Tensor:
        at_once = max(128, _LOGITS_AT_ONCE // len(weight) // 128 * 128)
        learns = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        for part, wanted in zip(torch.split(places, at_once), torch.split(labels, at_once), strict=True):
            rows = y.detach().index_select(0, part).requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                found = token_losses(functional.linear(rows, weight), wanted, by_kernels=by_kernels)
                slopes += torch.autograd.grad(found.sum(), rows) if learns else []
            losses.append(found.detach())
        ctx.shape = y.shape
        ctx.save_for_backward(places, *([torch.cat(slopes)] if learns else []))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        places, slopes = ctx.saved_tensors
        d_y = slopes.new_zeros(ctx.shape)
        return d_y.index_add_(0, places, (slopes * grad[:, None]).to(slopes.dtype)), None, None, None, None
