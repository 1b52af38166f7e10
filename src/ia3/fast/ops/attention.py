"""Attention of examples without padding, with the vectors on the queries and on what it returns.

Without rotary positions the keys' vector may multiply the queries, and the values' what attention returns:

    q · (l ∘ k) = (l ∘ q) · k        softmax(…) (v diag(l)) = (softmax(…) v) diag(l)

Both are exact, and cheaper wherever the queries are the shorter side, as in a decoder that writes a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.dropout import dropout, dropped, keep_mask
from ia3.fast.ops.launch import MAX_NUMBERS, cdiv, jit, launch, next_power_of_2
from ia3.fast.ops.partials import empty_gradient, partials_and_stride
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl

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
        seed: from `DropoutSeeds`; needed by kernels that drop, which also take it with p = 0.
        backend: who computes it.
    """
    if backend == "triton" and ragged.max_seqlen <= MAX_KEYS and qkv.numel() < MAX_NUMBERS:
        out: Tensor = _SelfAttention.apply(qkv, bias, ragged, l_k, l_v, heads, scale, causal, p, seed)
        return out
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
    if backend == "triton" and of_k.max_seqlen <= MAX_KEYS and q.numel() < MAX_NUMBERS:
        bias = None if bias is None else bias.contiguous()
        launcher = _Launcher(q.shape[-1], of_q, of_k, bias, l_k, l_v, heads, scale, False, 0.0)
        return launcher.forward(q, k, v, bias, l_k, l_v, None)[0]
    return scaled(_attend(scaled(q, l_k, of_q), of_q, k, v, of_k, bias, heads, scale, False, 0.0), l_v, of_q)


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
    if backend == "triton" and of_k.max_seqlen <= MAX_KEYS and q.numel() < MAX_NUMBERS:
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


@jit
def _scores(q, k, bias, head, offs_m, offs_n, seqlen_q, seqlen_k, scale, bias_rows, max_seqlen_k, CAUSAL: tl.constexpr):
    """Of some of an example's queries and keys, `[BLOCK_M, BLOCK_N]`; -inf where a query sees no key."""
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if scale is not None:
        scores *= scale
    seen = (offs_m < seqlen_q)[:, None] & (offs_n < seqlen_k)[None, :]
    if bias is not None:
        offs = (head * bias_rows + offs_m)[:, None] * max_seqlen_k + offs_n[None, :]
        scores += tl.load(bias + offs, mask=seen, other=0.0).to(tl.float32)
    if CAUSAL:
        seen = seen & (offs_n[None, :] <= offs_m[:, None])
    return tl.where(seen, scores, -float("inf"))


@jit
def _load_factor(vector, offs, mask_d, dtype):
    """A head's part of a vector, rounded as the activations are, `[1, BLOCK_D]`."""
    return tl.load(vector + offs, mask=mask_d, other=0.0).to(dtype).to(tl.float32)[None, :]


# What the three kernels have in common:
#   q                 [query tokens, HEADS · DIM], a token every q_stride numbers; written by a product
#   k, v              [key tokens, HEADS · DIM], a token every kv_stride numbers
#   bias              [HEADS, bias_rows, max_seqlen_k], contiguous; None without
#   cu_seqlens_q, _k  [examples + 1], int32; each group has group_examples
#   l_k, l_v          [groups, HEADS · DIM], fp32, a group every stride_k or stride_v numbers; None without
#   seed              one int64; None without dropout
#   p, scale          of dropout and of the scores, floats; scale is None for 1, so that a product's sums start at bias
#   lse               [query tokens, HEADS], fp32: the logarithm of the sum of exponentials of a query's scores
#   delta             [query tokens, HEADS], fp32: the sum over the keys of weights times their gradients
#   do                [query tokens, HEADS · DIM], contiguous: the gradient of out
# All dropout masks are of one tensor of weights, [examples, HEADS, max_seqlen_q, max_seqlen_k].


@jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "bias_rows", "group_examples"])
def _attention_forward(
    q, k, v, bias, cu_seqlens_q, cu_seqlens_k, l_k, l_v, out, lse, seed, p, scale, q_stride, kv_stride, stride_k,
    stride_v, max_seqlen_q, max_seqlen_k, bias_rows, group_examples,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program an example, a head and a block of BLOCK_M queries; BLOCK_N holds all keys.

    Args:
        out: written, `[query tokens, HEADS · DIM]`, but for padding tokens.
        lse: written.
    """
    example, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    group = example // group_examples
    begin_q, begin_k = tl.load(cu_seqlens_q + example), tl.load(cu_seqlens_k + example)
    seqlen_q = tl.load(cu_seqlens_q + example + 1) - begin_q
    seqlen_k = tl.load(cu_seqlens_k + example + 1) - begin_k
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    channels = head * DIM + offs_d
    mask_d = offs_d < DIM
    mask_q = (offs_m < seqlen_q)[:, None] & mask_d[None, :]
    mask_k = (offs_n < seqlen_k)[:, None] & mask_d[None, :]
    dtype = q.dtype.element_ty
    query = tl.load(q + (begin_q + offs_m)[:, None] * q_stride + channels[None, :], mask=mask_q, other=0.0)
    if l_v is not None:  # read early, since it is on its way for long
        factor_v = _load_factor(l_v, group * stride_v + channels, mask_d, dtype)
    if l_k is not None:
        query = (query.to(tl.float32) * _load_factor(l_k, group * stride_k + channels, mask_d, dtype)).to(dtype)
    offs_kv = (begin_k + offs_n).to(tl.int64)[:, None] * kv_stride + channels[None, :]
    key = tl.load(k + offs_kv, mask=mask_k, other=0.0)
    scores = _scores(query, key, bias, head, offs_m, offs_n, seqlen_q, seqlen_k, scale, bias_rows, max_seqlen_k, CAUSAL)
    # An example without keys gets nothing, instead of NaN.
    most = tl.maximum(tl.max(scores, 1), -1e30)
    weights = tl.exp(scores - most[:, None])
    total = tl.maximum(tl.sum(weights, 1), 1e-30)
    tl.store(lse + (begin_q + offs_m) * HEADS + head, most + tl.log(total), mask=offs_m < seqlen_q)
    weights = weights / total[:, None]
    if seed is not None:
        offs = ((example * HEADS + head) * max_seqlen_q + offs_m)[:, None] * max_seqlen_k + offs_n[None, :]
        weights = dropped(weights, seed, offs, p)
    value = tl.load(v + offs_kv, mask=mask_k, other=0.0)
    attended = tl.dot(weights.to(dtype), value, input_precision="tf32x3")
    if l_v is not None:
        attended *= factor_v
    offs = (begin_q + offs_m)[:, None] * (HEADS * DIM) + channels[None, :]
    tl.store(out + offs, attended.to(dtype), mask=mask_q)


@jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "bias_rows", "group_examples", "groups", "partials"])
def _attention_backward_q(
    q, k, v, bias, cu_seqlens_q, cu_seqlens_k, l_k, l_v, do, lse, delta, dq, dk, dv, d_l_k, d_l_v, seed, p, scale,
    q_stride, kv_stride, dq_stride, dkv_stride, stride_k, stride_v, max_seqlen_q, max_seqlen_k, bias_rows,
    group_examples, groups, partials,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's blocks of BLOCK_M queries, and a head; BLOCK_N holds all keys.

    Where a block holds an example's queries WHOLE, it has all of what the gradients of keys and values are summed from.

    Args:
        dq: written, as q, a token every `dq_stride` numbers.
        dk, dv: written where WHOLE, as k and v, a token every `dkv_stride` numbers.
        d_l_k, d_l_v: written, `[partials, groups, HEADS · DIM]`, fp32; None without a vector.
        delta: written.
    """
    program, head = tl.program_id(0), tl.program_id(1)
    group = program % groups
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    each = tl.cdiv(group_examples * blocks, partials)
    first = (program // groups) * each
    last = tl.minimum(first + each, group_examples * blocks)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    channels = head * DIM + offs_d
    mask_d = offs_d < DIM
    dtype = q.dtype.element_ty
    if l_k is not None:
        factor_k = _load_factor(l_k, group * stride_k + channels, mask_d, dtype)
    if l_v is not None:
        factor_v = _load_factor(l_v, group * stride_v + channels, mask_d, dtype)
    sum_k = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_D], tl.float32)
    for block in range(first, last):
        example = group * group_examples + block // blocks
        begin_q, begin_k = tl.load(cu_seqlens_q + example), tl.load(cu_seqlens_k + example)
        seqlen_q = tl.load(cu_seqlens_q + example + 1) - begin_q
        seqlen_k = tl.load(cu_seqlens_k + example + 1) - begin_k
        offs_m = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        if (block % blocks) * BLOCK_M < seqlen_q:
            mask_q = (offs_m < seqlen_q)[:, None] & mask_d[None, :]
            mask_k = (offs_n < seqlen_k)[:, None] & mask_d[None, :]
            offs_kv = (begin_k + offs_n).to(tl.int64)[:, None] * kv_stride + channels[None, :]
            tokens_q = (begin_q + offs_m)[:, None]
            unscaled = tl.load(q + tokens_q * q_stride + channels[None, :], mask=mask_q, other=0.0)
            query = unscaled
            if l_k is not None:
                query = (unscaled.to(tl.float32) * factor_k).to(dtype)
            key = tl.load(k + offs_kv, mask=mask_k, other=0.0)
            scores = _scores(
                query, key, bias, head, offs_m, offs_n, seqlen_q, seqlen_k, scale, bias_rows, max_seqlen_k, CAUSAL
            )
            of_query = (begin_q + offs_m) * HEADS + head
            weights = tl.exp(scores - tl.load(lse + of_query, mask=offs_m < seqlen_q, other=0.0)[:, None])
            g = tl.load(do + tokens_q * (HEADS * DIM) + channels[None, :], mask=mask_q, other=0.0)
            value = tl.load(v + offs_kv, mask=mask_k, other=0.0)
            kept_weights = weights
            if seed is not None:
                offs = ((example * HEADS + head) * max_seqlen_q + offs_m)[:, None] * max_seqlen_k + offs_n[None, :]
                keep = keep_mask(seed, offs, p)
                kept_weights = tl.where(keep, weights / (1 - p), 0.0)
            if l_v is not None:
                attended = tl.dot(kept_weights.to(dtype), value, input_precision="tf32x3")
                sum_v += tl.sum(g.to(tl.float32) * attended, 0)
                g = (g.to(tl.float32) * factor_v).to(dtype)
            d_weights = tl.dot(g, tl.trans(value), input_precision="tf32x3")
            if seed is not None:
                d_weights = tl.where(keep, d_weights / (1 - p), 0.0)
            dot = tl.sum(weights * d_weights, 1)
            tl.store(delta + of_query, dot, mask=offs_m < seqlen_q)
            d_scores = weights * (d_weights - dot[:, None])
            if scale is not None:
                d_scores *= scale
            d_scores = d_scores.to(dtype)
            d_query = tl.dot(d_scores, key, input_precision="tf32x3")
            if l_k is not None:
                sum_k += tl.sum(d_query * unscaled.to(tl.float32), 0)
                d_query *= factor_k
            tl.store(dq + tokens_q * dq_stride + channels[None, :], d_query.to(dtype), mask=mask_q)
            if WHOLE:
                offs_dkv = (begin_k + offs_n).to(tl.int64)[:, None] * dkv_stride + channels[None, :]
                d_key = tl.dot(tl.trans(d_scores), query, input_precision="tf32x3")
                tl.store(dk + offs_dkv, d_key.to(dtype), mask=mask_k)
                d_value = tl.dot(tl.trans(kept_weights.to(dtype)), g, input_precision="tf32x3")
                tl.store(dv + offs_dkv, d_value.to(dtype), mask=mask_k)
    offs = program * (HEADS * DIM) + channels
    if l_k is not None:
        tl.store(d_l_k + offs, sum_k, mask=mask_d)
    if l_v is not None:
        tl.store(d_l_v + offs, sum_v, mask=mask_d)


@jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "bias_rows", "group_examples"])
def _attention_backward_kv(
    q, k, v, bias, cu_seqlens_q, cu_seqlens_k, l_k, l_v, do, lse, delta, dk, dv, seed, p, scale, q_stride, kv_stride,
    dkv_stride, stride_k, stride_v, max_seqlen_q, max_seqlen_k, bias_rows, group_examples,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program an example, a head and a block of BLOCK_N keys, over the queries BLOCK_M at a time.

    Args:
        dk, dv: written, as k and v, a token every `dkv_stride` numbers.
    """
    example, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    group = example // group_examples
    begin_q, begin_k = tl.load(cu_seqlens_q + example), tl.load(cu_seqlens_k + example)
    seqlen_q = tl.load(cu_seqlens_q + example + 1) - begin_q
    seqlen_k = tl.load(cu_seqlens_k + example + 1) - begin_k
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    channels = head * DIM + offs_d
    mask_d = offs_d < DIM
    mask_k = (offs_n < seqlen_k)[:, None] & mask_d[None, :]
    dtype = q.dtype.element_ty
    tokens_k = (begin_k + offs_n).to(tl.int64)[:, None]
    key = tl.load(k + tokens_k * kv_stride + channels[None, :], mask=mask_k, other=0.0)
    value = tl.load(v + tokens_k * kv_stride + channels[None, :], mask=mask_k, other=0.0)
    d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = tl.program_id(1) * BLOCK_N if CAUSAL else 0
    for start in range(first, seqlen_q, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_q = (offs_m < seqlen_q)[:, None] & mask_d[None, :]
        tokens_q = (begin_q + offs_m)[:, None]
        query = tl.load(q + tokens_q * q_stride + channels[None, :], mask=mask_q, other=0.0)
        if l_k is not None:
            query = (query.to(tl.float32) * _load_factor(l_k, group * stride_k + channels, mask_d, dtype)).to(dtype)
        g = tl.load(do + tokens_q * (HEADS * DIM) + channels[None, :], mask=mask_q, other=0.0)
        if l_v is not None:
            g = (g.to(tl.float32) * _load_factor(l_v, group * stride_v + channels, mask_d, dtype)).to(dtype)
        scores = _scores(
            query, key, bias, head, offs_m, offs_n, seqlen_q, seqlen_k, scale, bias_rows, max_seqlen_k, CAUSAL
        )
        of_query = (begin_q + offs_m) * HEADS + head
        weights = tl.exp(scores - tl.load(lse + of_query, mask=offs_m < seqlen_q, other=0.0)[:, None])
        d_weights = tl.dot(g, tl.trans(value), input_precision="tf32x3")
        kept_weights = weights
        if seed is not None:
            offs = ((example * HEADS + head) * max_seqlen_q + offs_m)[:, None] * max_seqlen_k + offs_n[None, :]
            keep = keep_mask(seed, offs, p)
            kept_weights = tl.where(keep, weights / (1 - p), 0.0)
            d_weights = tl.where(keep, d_weights / (1 - p), 0.0)
        d_value += tl.dot(tl.trans(kept_weights.to(dtype)), g, input_precision="tf32x3")
        dot = tl.load(delta + of_query, mask=offs_m < seqlen_q, other=0.0)
        d_scores = weights * (d_weights - dot[:, None])
        if scale is not None:
            d_scores *= scale
        d_scores = d_scores.to(dtype)
        d_key += tl.dot(tl.trans(d_scores), query, input_precision="tf32x3")
    tl.store(dk + tokens_k * dkv_stride + channels[None, :], d_key.to(dtype), mask=mask_k)
    tl.store(dv + tokens_k * dkv_stride + channels[None, :], d_value.to(dtype), mask=mask_k)


class _Launcher:
    """One attention's sizes: what forward and backward hand to their kernels."""

    def __init__(
        self, width: int, of_q: Ragged, of_k: Ragged, bias: Tensor | None, l_k: Vector, l_v: Vector, heads: int,
        scale: float, causal: bool, p: float,
    ) -> None:  # fmt: skip
        self.of_q, self.of_k, self.heads, self.floats = of_q, of_k, heads, (p, None if scale == 1.0 else scale)
        vector = l_k if l_k is not None else l_v
        self.partials, self.groups = (1, of_q.examples) if vector is None else (vector.shape[0], of_q.groups)
        self.vector_strides = (partials_and_stride(l_k)[1], partials_and_stride(l_v)[1])
        bias_rows = 0 if bias is None else bias.shape[-2]
        self.lengths = (of_q.max_seqlen, of_k.max_seqlen, bias_rows, of_q.examples // self.groups)
        self.block_m = 16 if of_q.max_seqlen <= 16 else 64
        self.all_keys = 16 if of_k.max_seqlen <= 16 else max(64, next_power_of_2(of_k.max_seqlen))
        dim = width // heads
        self.sizes = {"HEADS": heads, "DIM": dim, "BLOCK_D": max(16, next_power_of_2(dim)), "CAUSAL": causal}

    def blocks(self, kernel: str, x: Tensor) -> dict[str, int]:
        """How many queries and keys a program takes, as measured on an H100; more than registers hold is slow."""
        keys, narrow = self.all_keys, x.element_size() == 2
        if kernel == "backward kv":
            block_m, keys, warps = (64, min(keys, 64), 4) if narrow else (32, min(keys, 32), 4)
        elif kernel == "backward q":
            block_m, warps = (32, 4 if keys <= 128 else 8) if narrow else (16, 8)
        else:
            block_m, warps = (64 if keys <= 128 else 32, 4) if narrow else (32 if keys <= 128 else 16, 8)
        return {"BLOCK_M": min(block_m, self.block_m), "BLOCK_N": keys, "num_warps": warps}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, l_k: Vector, l_v: Vector, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What attention returns, and lse."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(len(q), self.heads, dtype=torch.float32, device=q.device)
        blocks = self.blocks("forward", q)
        launch(
            _attention_forward, (self.of_q.examples * self.heads, cdiv(self.of_q.max_seqlen, blocks["BLOCK_M"])),
            q, k, v, bias, self.of_q.cu_seqlens, self.of_k.cu_seqlens, l_k, l_v, out, lse, seed, *self.floats,
            q.stride(0), k.stride(0), *self.vector_strides, *self.lengths, **blocks, **self.sizes,
        )  # fmt: skip
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, l_k: Vector, l_v: Vector, seed: Tensor | None,
        lse: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> tuple[Vector, Vector]:  # fmt: skip
        """Fills the gradients of queries, keys and values; returns the vectors'."""
        d_l_k, d_l_v, delta = empty_gradient(l_k), empty_gradient(l_v), torch.empty_like(lse)
        cu_seqlens = (self.of_q.cu_seqlens, self.of_k.cu_seqlens)
        inputs = (q, k, v, bias, *cu_seqlens, l_k, l_v, do.contiguous(), lse, delta)
        blocks = self.blocks("backward q", q)
        whole = self.of_q.max_seqlen <= blocks["BLOCK_M"] and self.block_m == 16
        launch(
            _attention_backward_q, (self.partials * self.groups, self.heads), *inputs, dq, dk, dv, d_l_k, d_l_v, seed,
            *self.floats, q.stride(0), k.stride(0), dq.stride(0), dk.stride(0), *self.vector_strides, *self.lengths,
            self.groups, self.partials, WHOLE=whole, **blocks, **self.sizes,
        )  # fmt: skip
        if whole:
            return d_l_k, d_l_v
        blocks = self.blocks("backward kv", q)
        launch(
            _attention_backward_kv, (self.of_k.examples * self.heads, cdiv(self.of_k.max_seqlen, blocks["BLOCK_N"])),
            *inputs, dk, dv, seed, *self.floats, q.stride(0), k.stride(0), dk.stride(0), *self.vector_strides,
            *self.lengths, **blocks, **self.sizes,
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
