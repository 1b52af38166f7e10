"""Rotary positions (Su et al. 2021, arXiv:2104.09864): queries, keys and values by heads, multiplied, then rotated.

The keys' vector must act before the rotation, which mixes channels. The values' acts here too: with fewer heads of
values than of queries that is cheaper than on what attention returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.launch import cdiv, jit, launch, next_power_of_2
from ia3.fast.ops.norm import Norm
from ia3.fast.ops.partials import empty_gradient, partials_and_stride, tokens_of_program
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl


def rotary_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, ragged: Ragged, l_k: Vector, l_v: Vector, heads: int, kv_heads: int, *,
    backend: Backend, qk_norm: tuple[Norm, Norm] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values, `[examples, heads, max_seqlen, dim]`.

    Kernels know whole heads without norms; what is rotated in part or normed is PyTorch's.

    Args:
        qkv: `[tokens, (heads + 2 · kv_heads) · dim]`, the queries first.
        cos: of the angles, `[max_seqlen, rotated / 2]`: channel i of a head rotates with channel i + rotated / 2, as
            transformers has it; channels from `rotated` on stay.
        sin: alike.
        ragged: the tokens' examples and groups.
        l_k: the keys' vector.
        l_v: the values'.
        heads: of the queries.
        kv_heads: of the keys, and of the values.
        backend: who computes it.
        qk_norm: of the queries and of the keys, each head's or all heads' together, between the vector and the
            rotation; None without.

    Returns:
        What is finite and of no example's where an example has no token.
    """
    dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    if backend == "triton" and qk_norm is None and 2 * cos.shape[-1] == dim:
        q, k, v = _RotaryHeads.apply(qkv, cos, sin, ragged, l_k, l_v, heads, kv_heads)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k, v = torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], -1)
    k, v = scaled(k, l_k, ragged), scaled(v, l_v, ragged)
    if qk_norm is not None:
        q, k = (
            norm(x.unflatten(1, (-1, len(norm.weight)))).flatten(1) for norm, x in zip(qk_norm, (q, k), strict=True)
        )
    q, k, v = (ragged.pad(x).view(ragged.examples, ragged.max_seqlen, -1, dim).transpose(1, 2) for x in (q, k, v))
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `[…, dim]`, rotated by angles `[…, rotated / 2]`; the channels behind stay."""
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
    # Angles may be in fp32 beside activations in half precision.
    halves = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    return torch.cat([*halves, rest] if rest.shape[-1] else halves, -1)


@jit
def _rotate(first, second, cos, sin):
    """Both halves of a head's channels by the angles; by the angles' negatives with -sin."""
    return first * cos - second * sin, second * cos + first * sin


@jit
def _load_halves(pointer, offs, mask, HALF: tl.constexpr):
    first = tl.load(pointer + offs, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(pointer + HALF + offs, mask=mask, other=0.0).to(tl.float32)


@jit
def _store_halves(pointer, offs, first, second, mask, HALF: tl.constexpr):
    tl.store(pointer + offs, first.to(pointer.dtype.element_ty), mask=mask)
    tl.store(pointer + HALF + offs, second.to(pointer.dtype.element_ty), mask=mask)


@jit
def _load_factors(vector, offs, dtype, HALF: tl.constexpr):
    """A head's part of a vector, rounded as the activations are."""
    first, second = _load_halves(vector, offs, offs < HALF, HALF)
    return first.to(dtype).to(tl.float32)[None, :], second.to(dtype).to(tl.float32)[None, :]


@jit
def _head_forward(
    source, out, vector, unscaled, cos, sin, head, tokens, positions, seqlen, max_seqlen, source_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """One head of HEADS, at some positions of an example: read at its tokens, written at its positions.

    Args:
        source: `[tokens, HEADS · dim]`, a token every `source_stride` numbers.
        out: written, the example's `[max_seqlen, HEADS · dim]`; zeros from seqlen on.
        vector: the group's `[HEADS · dim]`; None without.
        unscaled: written where there is a vector, `[tokens, HEADS · dim]`: what it multiplied, for its gradient.
        cos, sin: `[max_seqlen, HALF]`.
    """
    offs = tl.arange(0, BLOCK)[None, :]
    mask_source = (positions < seqlen)[:, None] & (offs < HALF)
    mask_out = (positions < max_seqlen)[:, None] & (offs < HALF)
    begin = head * 2 * HALF
    first, second = _load_halves(source + tokens[:, None] * source_stride + begin, offs, mask_source, HALF)
    if vector is not None:
        _store_halves(unscaled + tokens[:, None] * (HEADS * 2 * HALF) + begin, offs, first, second, mask_source, HALF)
        l_first, l_second = _load_factors(vector + begin, tl.arange(0, BLOCK), out.dtype.element_ty, HALF)
        first, second = first * l_first, second * l_second
    if ROTATED:
        c = tl.load(cos + positions[:, None] * HALF + offs, mask=mask_out, other=0.0).to(tl.float32)
        s = tl.load(sin + positions[:, None] * HALF + offs, mask=mask_out, other=0.0).to(tl.float32)
        first, second = _rotate(first, second, c, s)
    _store_halves(out + positions[:, None] * (HEADS * 2 * HALF) + begin, offs, first, second, mask_out, HALF)


@jit(do_not_specialize=["max_seqlen", "blocks", "group_examples"])
def _heads_forward(
    qkv, cos, sin, cu_seqlens, l_k, l_v, q, k, v, unscaled_k, unscaled_v, stride_k, stride_v, max_seqlen, blocks,
    group_examples,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program a block of an example's positions (of `blocks`), and a head of the queries, keys or values.

    Args:
        qkv: `[tokens, (HEADS + 2 · KV_HEADS) · 2 · HALF]`.
        cos, sin: `[max_seqlen, HALF]`.
        cu_seqlens: `[examples + 1]`, int32; each group has `group_examples`.
        l_k, l_v: `[groups, KV_HEADS · 2 · HALF]`, a group every `stride_k` or `stride_v` numbers; None without.
        q, k, v: written, `[examples, max_seqlen, heads, 2 · HALF]`.
        unscaled_k, unscaled_v: written, see `_head_forward`; None without a vector.
    """
    example, head = tl.program_id(0) // blocks, tl.program_id(1)
    group = example // group_examples
    begin = tl.load(cu_seqlens + example)
    seqlen = tl.load(cu_seqlens + example + 1) - begin
    positions = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = (begin + positions).to(tl.int64)
    width = (HEADS + 2 * KV_HEADS) * 2 * HALF
    before = example.to(tl.int64) * max_seqlen * (2 * HALF)
    if head < HEADS:
        _head_forward(
            qkv, q + before * HEADS, None, None, cos, sin, head, tokens, positions, seqlen, max_seqlen, width,
            HEADS, HALF, BLOCK, True,
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        if l_k is not None:
            l_k += group * stride_k
        _head_forward(
            qkv + HEADS * 2 * HALF, k + before * KV_HEADS, l_k, unscaled_k, cos, sin, head - HEADS, tokens, positions,
            seqlen, max_seqlen, width, KV_HEADS, HALF, BLOCK, True,
        )  # fmt: skip
    else:
        if l_v is not None:
            l_v += group * stride_v
        _head_forward(
            qkv + (HEADS + KV_HEADS) * 2 * HALF, v + before * KV_HEADS, l_v, unscaled_v, cos, sin,
            head - HEADS - KV_HEADS, tokens, positions, seqlen, max_seqlen, width, KV_HEADS, HALF, BLOCK, False,
        )  # fmt: skip


@jit
def _head_backward(
    grad, d_source, vector, unscaled, d_vector, cos, sin, head, example_of_token, cu_seqlens, first_token, end,
    example_stride, head_stride, position_stride, source_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """One head of HEADS, for a part of a group's tokens: read at their positions, written at the tokens.

    Args:
        grad: `[examples, HEADS, max_seqlen, dim]` of these strides, the last 1: the gradient of the forward's out.
        d_source: written, `[tokens, HEADS · dim]`, a token every `source_stride` numbers.
        vector, unscaled, cos, sin: the forward's.
        d_vector: written where there is a vector, `[HEADS · dim]`, fp32: the sum over the part.
    """
    offs = tl.arange(0, BLOCK)[None, :]
    begin = head * 2 * HALF
    if vector is not None:
        l_first, l_second = _load_factors(vector + begin, tl.arange(0, BLOCK), d_source.dtype.element_ty, HALF)
    # Added up over tokens at the end alone, since threads wait for each other where they do that.
    sum_first = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    sum_second = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(first_token, end, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        inside = tokens < end
        mask = inside[:, None] & (offs < HALF)
        example = tl.load(example_of_token + tokens, mask=inside, other=0)
        positions = tokens - tl.load(cu_seqlens + example, mask=inside, other=0)
        padded = example.to(tl.int64) * example_stride + positions * position_stride
        first, second = _load_halves(grad + head * head_stride + padded[:, None], offs, mask, HALF)
        if ROTATED:
            c = tl.load(cos + positions[:, None] * HALF + offs, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(sin + positions[:, None] * HALF + offs, mask=mask, other=0.0).to(tl.float32)
            first, second = _rotate(first, second, c, -s)
        tokens = tokens.to(tl.int64)[:, None]
        if vector is not None:
            was_first, was_second = _load_halves(unscaled + tokens * (HEADS * 2 * HALF) + begin, offs, mask, HALF)
            sum_first += first * was_first
            sum_second += second * was_second
            first, second = first * l_first, second * l_second
        _store_halves(d_source + tokens * source_stride + begin, offs, first, second, mask, HALF)
    if vector is not None:
        columns = tl.arange(0, BLOCK)
        _store_halves(d_vector + begin, columns, tl.sum(sum_first, 0), tl.sum(sum_second, 0), columns < HALF, HALF)


@jit(do_not_specialize=["groups", "partials"])
def _heads_backward(
    dq, dk, dv, example_of_token, cu_seqlens, group_edges, cos, sin, l_k, l_v, unscaled_k, unscaled_v, d_qkv, d_l_k,
    d_l_v, dq_example, dq_head, dq_position, dk_example, dk_head, dk_position, dv_example, dv_head, dv_position,
    stride_k, stride_v, groups, partials,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's tokens, BLOCK_M at a time, and a head of the queries, keys or values.

    Args:
        dq, dk, dv: the gradients, `[examples, max_seqlen, heads, 2 · HALF]` of any strides, the last 1.
        example_of_token: `[tokens]`, int64.
        cu_seqlens, cos, sin, l_k, l_v, unscaled_k, unscaled_v: the forward's.
        group_edges: `[groups + 1]`, int32.
        d_qkv: written, as qkv, but for padding tokens.
        d_l_k, d_l_v: written, `[partials, groups, KV_HEADS · 2 · HALF]`, fp32; None without a vector.
    """
    group, first_token, end = tokens_of_program(group_edges, groups, partials)
    head = tl.program_id(1)
    width = (HEADS + 2 * KV_HEADS) * 2 * HALF
    partial = tl.program_id(0) * (KV_HEADS * 2 * HALF)
    if head < HEADS:
        _head_backward(
            dq, d_qkv, None, None, None, cos, sin, head, example_of_token, cu_seqlens, first_token, end, dq_example,
            dq_head, dq_position, width, HEADS, HALF, BLOCK, BLOCK_M, True,
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        if l_k is not None:
            l_k += group * stride_k
            d_l_k += partial
        _head_backward(
            dk, d_qkv + HEADS * 2 * HALF, l_k, unscaled_k, d_l_k, cos, sin, head - HEADS, example_of_token, cu_seqlens,
            first_token, end, dk_example, dk_head, dk_position, width, KV_HEADS, HALF, BLOCK, BLOCK_M, True,
        )  # fmt: skip
    else:
        if l_v is not None:
            l_v += group * stride_v
            d_l_v += partial
        _head_backward(
            dv, d_qkv + (HEADS + KV_HEADS) * 2 * HALF, l_v, unscaled_v, d_l_v, cos, sin, head - HEADS - KV_HEADS,
            example_of_token, cu_seqlens, first_token, end, dv_example, dv_head, dv_position, width, KV_HEADS, HALF,
            BLOCK, BLOCK_M, False,
        )  # fmt: skip


class _RotaryHeads(torch.autograd.Function):
    """Of keys and values that a vector multiplies it keeps what they were before; of the product nothing else."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, ragged: Ragged, l_k: Vector, l_v: Vector, heads: int,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        dim = qkv.shape[1] // (heads + 2 * kv_heads)
        q = qkv.new_empty(ragged.examples, ragged.max_seqlen, heads, dim)
        k, v = (qkv.new_empty(ragged.examples, ragged.max_seqlen, kv_heads, dim) for _ in range(2))
        unscaled_k, unscaled_v = (
            None if vector is None else qkv.new_empty(len(qkv), kv_heads * dim) for vector in (l_k, l_v)
        )
        ctx.ragged, ctx.shape = ragged, qkv.shape
        ctx.sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": dim // 2, "BLOCK": next_power_of_2(dim // 2)}
        blocks = cdiv(ragged.max_seqlen, 32)
        launch(
            _heads_forward, (ragged.examples * blocks, heads + 2 * kv_heads), qkv, cos, sin, ragged.cu_seqlens, l_k,
            l_v, q, k, v, unscaled_k, unscaled_v, partials_and_stride(l_k)[1], partials_and_stride(l_v)[1],
            ragged.max_seqlen, blocks, ragged.examples // ragged.groups, BLOCK_M=32, **ctx.sizes,
        )  # fmt: skip
        ctx.save_for_backward(cos, sin, l_k, l_v, unscaled_k, unscaled_v)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        cos, sin, l_k, l_v, unscaled_k, unscaled_v = ctx.saved_tensors
        ragged = ctx.ragged
        d_qkv = torch.empty(ctx.shape, dtype=dq.dtype, device=dq.device)
        d_l_k, d_l_v = empty_gradient(l_k), empty_gradient(l_v)
        dq, dk, dv = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in (dq, dk, dv))
        strides = [grad.stride(axis) for grad in (dq, dk, dv) for axis in (0, 2, 1)]
        (partials, stride_k), (of_v, stride_v) = partials_and_stride(l_k), partials_and_stride(l_v)
        partials = max(partials, of_v)
        if l_k is None and l_v is None:
            partials = cdiv(len(d_qkv), 64 * ragged.groups)
        heads = ctx.sizes["HEADS"] + 2 * ctx.sizes["KV_HEADS"]
        launch(
            _heads_backward, (partials * ragged.groups, heads), dq, dk, dv, ragged.example_of_token, ragged.cu_seqlens,
            ragged.group_edges, cos, sin, l_k, l_v, unscaled_k, unscaled_v, d_qkv, d_l_k, d_l_v, *strides, stride_k,
            stride_v, ragged.groups, partials, BLOCK_M=32, **ctx.sizes,
        )  # fmt: skip
        return d_qkv, None, None, None, d_l_k, d_l_v, None, None
