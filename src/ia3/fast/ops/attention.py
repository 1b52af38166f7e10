"""Attention of examples without padding, with the vectors on the queries and on what it returns.

Without rotary positions the keys' vector may multiply the queries, and the values' what attention returns:

    q · (l ∘ k) = (l ∘ q) · k        softmax(…) (v diag(l)) = (softmax(…) v) diag(l)

Both are exact, and cheaper wherever the queries are the shorter side, as in a decoder that writes a label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.dropout import dropout
from ia3.fast.ragged import Ragged

# Of more keys than this, a kernel could not hold their gradients; PyTorch attends then.
MAX_KEYS = 256
# Below this many queries a fused attention kernel costs more than the plain products.
_FEW_QUERIES = 16


def self_attention(
    qkv: Tensor, bias: Tensor | None, ragged: Ragged, l_k: Vector, l_v: Vector, heads: int, *, scale: float,
    causal: bool, p: float, seed: Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention of each example's tokens to each other, `[tokens, inner]`.

    Args:
        qkv: `[tokens, 3 · inner]`.
        bias: `[1, heads, max_seqlen, max_seqlen]`, added to the scores; None for none.
        ragged: the tokens' examples and groups.
        l_k: the keys' vector.
        l_v: the values'.
        heads: of `inner`.
        scale: of the scores, before the bias.
        causal: each token sees those up to itself.
        p: dropout's, on the weights.
        seed: from `DropoutSeeds`.
        backend: who computes it.
    """
    if backend == "triton" and ragged.max_seqlen <= MAX_KEYS:
        from ia3.fast import kernels

        assert seed is not None
        assert bias is not None
        return kernels.self_attention(qkv, bias, ragged, l_k, l_v, heads, p, seed)
    q, k, v = qkv.chunk(3, -1)
    attended = _attend(scaled(q, l_k, ragged), ragged, k, v, ragged, bias, heads, scale, causal, p)
    return scaled(attended, l_v, ragged)


def attention(
    q: Tensor, of_q: Ragged, k: Tensor, v: Tensor, of_k: Ragged, bias: Tensor | None, l_k: Vector, l_v: Vector,
    heads: int, *, scale: float, backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention of a decoder that generates, without a gradient and without dropout, `[query tokens, inner]`.

    Args:
        q: `[query tokens, inner]`.
        of_q: their examples and groups.
        k: `[key tokens, inner]`.
        v: the same.
        of_k: their examples.
        bias: `[1, heads, longest query, longest key]`, added to the scores.
        l_k, l_v, heads, scale, backend: as in `self_attention`.
    """
    if backend == "triton" and of_k.max_seqlen <= MAX_KEYS:
        from ia3.fast import kernels

        return kernels.attention(q, of_q, k, v, of_k, bias, l_k, l_v, heads, of_q.cu_seqlens)
    return scaled(_attend(scaled(q, l_k, of_q), of_q, k, v, of_k, bias, heads, scale, False, 0.0), l_v, of_q)


def cross_attention(
    q: Tensor, of_q: Ragged, kv: Tensor, of_k: Ragged, index: int, shared: dict[str, Tensor], l_k: Vector, l_v: Vector,
    heads: int, *, scale: float, p: float, seed: Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention over the encoder's output, `[target tokens, inner]`.

    Args:
        q: `[target tokens, inner]`.
        of_q: their examples and groups.
        kv: keys and values of all layers, `[source tokens, layers · 2 · inner]`.
        of_k: their examples.
        index: the layer.
        shared: one dict a forward, empty at first, where the layers' kernels share kv's gradient; each layer's output
            must depend on that of the layer before.
        l_k, l_v, heads, scale, p, seed, backend: as in `self_attention`.
    """
    if backend == "triton" and of_k.max_seqlen <= MAX_KEYS:
        from ia3.fast import kernels

        assert seed is not None
        return kernels.cross_attention(q, of_q, kv, of_k, index, shared, l_k, l_v, heads, p, seed)
    k, v = of_layer(kv, index, q.shape[-1])
    return scaled(_attend(scaled(q, l_k, of_q), of_q, k, v, of_k, None, heads, scale, False, p), l_v, of_q)


def of_layer(kv: Tensor, index: int, inner: int) -> tuple[Tensor, Tensor]:
    """A layer's own keys and values of all layers', views `[tokens, inner]`."""
    k, v = kv[:, 2 * index * inner : (2 * index + 2) * inner].chunk(2, -1)
    return k, v


def _attend(
    q: Tensor, of_q: Ragged, k: Tensor, v: Tensor, of_k: Ragged, bias: Tensor | None, heads: int, scale: float,
    causal: bool, p: float,
) -> Tensor:  # fmt: skip
    """Each example's tokens, `[tokens, inner]`."""
    q, k, v = (_by_head(ragged.pad(x), heads) for x, ragged in ((q, of_q), (k, of_k), (v, of_k)))
    least = torch.finfo(q.dtype).min
    hidden = torch.zeros(of_k.mask.shape, dtype=q.dtype, device=q.device)
    hidden = hidden.masked_fill(~of_k.mask, least)[:, None, None, :]
    if causal:
        length = of_k.max_seqlen
        later = torch.full((length, length), least, dtype=q.dtype, device=q.device).triu(1)
        bias = later if bias is None else bias + later
    bias = hidden if bias is None else (hidden + bias).contiguous()
    if q.shape[2] < _FEW_QUERIES:
        scores = q @ k.transpose(-1, -2)
        scores = (scores if scale == 1.0 else scores * scale) + bias
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        attended = dropout(scores.softmax(-1).to(q.dtype), p) @ v
    else:
        attended = functional.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=scale)
    return of_q.unpad(attended.transpose(1, 2).flatten(2))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[batch, length, inner]` to `[batch, heads, length, dim]`."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, p: float, *, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each token to its example's tokens up to itself, `[tokens, heads · dim]`.

    Args:
        q: `[examples, heads, max_seqlen, dim]`, finite where an example has no token; so are k and v, of fewer heads.
        k: the keys.
        v: the values.
        ragged: the tokens' examples.
        p: dropout's, on the weights.
        scale: of the scores.
        window: no token sees one so far before it; None without a window.
        softcap: the scores' bound, softcap · tanh(scores / softcap); None without one.
    """
    grouped = q.shape[1] != k.shape[1]
    by_groups = grouped and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)  # others know no groups
    by_groups = by_groups and softcap is None
    if grouped and not by_groups:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    # What has no token stands behind all that has, so that causality hides it.
    if softcap is not None:
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        scores = scores.masked_fill(~_seen(ragged.max_seqlen, window, q.device), torch.finfo(q.dtype).min)
        attended = dropout(scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype), p) @ v
    else:
        mask = _seen(ragged.max_seqlen, window, q.device) if window and window < ragged.max_seqlen else None
        attended = functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=p, is_causal=mask is None, scale=scale, enable_gqa=by_groups
        )
    found: Tensor = _Unpad.apply(attended.transpose(1, 2).flatten(2), ragged)  # type: ignore[no-untyped-call]
    return found


def _seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys a query sees, `[length, length]`."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance
    return (distance >= 0) & (distance < (window or length))


class _Unpad(torch.autograd.Function):
    """`Ragged.unpad`, whose backward gathers too, where autograd would add atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ragged: Ragged) -> Tensor:
        ctx.ragged = ragged
        return ragged.unpad(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = ctx.ragged.pad(grad)
        return padded if ctx.ragged.uniform else padded.masked_fill(~ctx.ragged.mask[..., None], 0), None
