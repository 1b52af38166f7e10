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

from ia3.fast.ops.attention_kernels import (
    attention_backward,
    attention_backward_q,
    attention_forward,
)
from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.dropout import dropout
from ia3.fast.ops.launch import MAX_NUMBERS, cdiv, launch, next_power_of_2
from ia3.fast.ops.partials import empty_gradient, partials_and_stride
from ia3.fast.ragged import Ragged

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
        seed: from `DropoutSeeds`; needed by kernels that drop, which also take it with p = 0.
        backend: who computes it.
    """
    if backend == "triton" and qkv.numel() < MAX_NUMBERS:
        out: Tensor = _SelfAttention.apply(qkv, bias, ragged, l_k, l_v, heads, scale, causal, p, seed)
        return out
    q, k, v = qkv.chunk(3, -1)
    attended = _attend(scaled(q, l_k, ragged), ragged, k, v, ragged, bias, heads, scale, causal, p)
    return scaled(attended, l_v, ragged)


def cross_attention(
    q: Tensor, of_q: Ragged, kv: Tensor, of_k: Ragged, index: int, shared: dict[str, Any], l_k: Vector, l_v: Vector,
    heads: int, *, scale: float, p: float, seed: Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention over the encoder's output, `[target tokens, inner]`.

    Args:
        q: `[target tokens, inner]`.
        of_q: their examples and groups.
        kv: keys and values of all layers, `[source tokens, layers · 2 · inner]`.
        of_k: their examples.
        index: the layer.
        shared: one dict a forward, empty at first, where the layers share what they make of kv, their kernels its
            gradient; each layer's output must depend on that of the layer before.
        l_k, l_v, heads, scale, p, seed, backend: as in `self_attention`.
    """
    if backend == "triton" and q.numel() < MAX_NUMBERS:
        out: Tensor = _CrossAttention.apply(q, of_q, kv, of_k, index, shared, l_k, l_v, heads, scale, p, seed)
        return out
    # Cut once for all layers, whose gradients are then put together once; each slice's own would fill a whole kv.
    if "parts" not in shared:
        shared["parts"] = kv.split(q.shape[-1], -1)
    k, v = shared["parts"][2 * index : 2 * index + 2]
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
    found: Tensor = _Unpad.apply(attended.transpose(1, 2).flatten(2), ragged)
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


class _Launcher:
    """One attention's sizes: what forward and backward hand to their kernels.

    Args:
        width: of queries.
        of_q: the queries' examples and groups.
        of_k: the keys' examples.
        bias: `[1, heads, queries, keys]`, contiguous; None for none.
        l_k: the keys' vector.
        l_v: the values'.
        heads: of the width.
        scale: of the scores, before the bias.
        causal: each query sees the keys up to its own place.
        p: dropout's, on the weights.
    """

    def __init__(
        self, width: int, of_q: Ragged, of_k: Ragged, bias: Tensor | None, l_k: Vector, l_v: Vector, heads: int,
        scale: float, causal: bool, p: float,
    ) -> None:  # fmt: skip
        self.of_q, self.of_k, self.heads, self.floats = of_q, of_k, heads, (p, None if scale == 1.0 else scale)
        vector = l_k if l_k is not None else l_v
        self.partials, self.groups = (1, of_q.examples) if vector is None else (vector.shape[0], of_q.groups)
        bias_strides = (0, 0) if bias is None else bias.stride()[1:3]
        self.strides = (partials_and_stride(l_k)[1], partials_and_stride(l_v)[1], *bias_strides)
        self.lengths = (of_q.max_seqlen, of_k.max_seqlen, of_q.examples // self.groups)
        dim = width // heads
        self.sizes = {"HEADS": heads, "DIM": dim, "BLOCK_D": max(16, next_power_of_2(dim)), "CAUSAL": causal}

    def blocks(self, kernel: str, x: Tensor) -> dict[str, int]:
        """How many queries and keys a program takes at a time: as measured on an H200 for heads of up to 64 channels.

        Of wider heads fewer, and fewer read ahead, so that they have room in the shared memory of a smaller GPU.
        """
        block_d = self.sizes["BLOCK_D"]
        wide, small = block_d > 64, x.element_size() == 2 and block_d <= 128
        most = 128 if small else 32 if block_d * x.element_size() <= 256 else 16
        keys = 16 if self.of_k.max_seqlen <= 16 else min(most, max(64, next_power_of_2(self.of_k.max_seqlen)))
        queries = 16 if self.of_q.max_seqlen <= 16 else min(most, 64)
        whole = self.of_k.max_seqlen <= keys
        if kernel == "backward q" or (wide and not whole):
            keys = min(keys, 64)
        found = {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2 if wide else 3}
        if kernel == "backward q":
            return found | {"num_warps": 8 if small and wide else 4}
        if kernel == "backward":
            found |= {"BLOCK_M": min(queries, 32) if whole else queries, "num_stages": 1}
            found |= {"num_warps": 8 if keys == 128 or (small and wide) else 4}
        return found | {"WHOLE": whole}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, l_k: Vector, l_v: Vector, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What attention returns, and lse."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(self.heads, len(q), dtype=torch.float32, device=q.device)
        blocks = self.blocks("forward", q)
        launch(
            attention_forward, (self.of_q.examples * self.heads, cdiv(self.of_q.max_seqlen, blocks["BLOCK_M"])),
            q, k, v, bias, self.of_q.cu_seqlens, self.of_k.cu_seqlens, l_k, l_v, out, lse, seed, *self.floats,
            len(q), q.stride(0), k.stride(0), *self.strides, *self.lengths, **blocks, **self.sizes,
        )  # fmt: skip
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, l_k: Vector, l_v: Vector, seed: Tensor | None,
        lse: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> tuple[Vector, Vector]:  # fmt: skip
        """Fills the gradients of queries, keys and values; returns the vectors'."""
        d_l_k, d_l_v, delta = empty_gradient(l_k), empty_gradient(l_v), None
        inputs = (q, k, v, bias, self.of_q.cu_seqlens, self.of_k.cu_seqlens, l_k, l_v, do.contiguous(), lse)
        programs, strides = (self.partials * self.groups, self.heads), (len(q), q.stride(0), k.stride(0), dq.stride(0))
        lengths = (*self.strides, *self.lengths, self.groups, self.partials)
        blocks = self.blocks("backward", q)
        if not blocks["WHOLE"]:
            delta = torch.empty_like(lse)
            launch(
                attention_backward_q, programs, *inputs, delta, dq, d_l_k, d_l_v, seed, *self.floats, *strides,
                *lengths, **self.blocks("backward q", q), **self.sizes,
            )  # fmt: skip
        launch(
            attention_backward, programs, *inputs, delta, dq if blocks["WHOLE"] else None, dk, dv, d_l_k, d_l_v, seed,
            *self.floats, *strides, dk.stride(0), *lengths, **blocks, **self.sizes,
        )  # fmt: skip
        return d_l_k, d_l_v


class _SelfAttention(torch.autograd.Function):
    """Keeps queries, keys, values, and one number a query and head."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, ragged: Ragged, l_k: Vector, l_v: Vector, heads: int, scale: float,
        causal: bool, p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = qkv.chunk(3, -1)
        bias = None if bias is None else bias.contiguous()
        ctx.launcher = _Launcher(q.shape[-1], ragged, ragged, bias, l_k, l_v, heads, scale, causal, p)
        out, lse = ctx.launcher.forward(q, k, v, bias, l_k, l_v, seed)
        ctx.save_for_backward(qkv, bias, l_k, l_v, seed, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        qkv, *rest = ctx.saved_tensors
        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        d_vectors = ctx.launcher.backward(*qkv.chunk(3, -1), *rest, do, *d_qkv.chunk(3, -1))
        return d_qkv, None, None, *d_vectors, None, None, None, None, None


class _CrossAttention(torch.autograd.Function):
    """The same; all layers fill one gradient of kv, each its own columns."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, of_q: Ragged, kv: Tensor, of_k: Ragged, index: int, shared: dict[str, Tensor], l_k: Vector,
        l_v: Vector, heads: int, scale: float, p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.launcher = _Launcher(q.shape[-1], of_q, of_k, None, l_k, l_v, heads, scale, False, p)
        ctx.index, ctx.shared = index, shared
        out, lse = ctx.launcher.forward(q, *of_layer(kv, index, q.shape[-1]), None, l_k, l_v, seed)
        ctx.save_for_backward(q, kv, l_k, l_v, seed, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        q, kv, *rest = ctx.saved_tensors
        # The first layer's backward is the last, and hands the gradient on.
        if "gradient" not in ctx.shared:
            ctx.shared["gradient"] = torch.empty_like(kv)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        d_k, d_v = of_layer(ctx.shared["gradient"], ctx.index, q.shape[-1])
        k, v = of_layer(kv, ctx.index, q.shape[-1])
        d_vectors = ctx.launcher.backward(q, k, v, None, *rest, do, dq, d_k, d_v)
        whole = ctx.shared.pop("gradient") if ctx.index == 0 else None
        return dq, None, whole, None, None, None, *d_vectors, None, None, None, None
