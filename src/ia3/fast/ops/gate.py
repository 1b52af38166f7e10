"""The feed-forward's intermediate: activated, gated (Shazeer 2020, arXiv:2002.05202), multiplied by l_ff, dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ia3.fast.ops.backend import ACTIVATIONS, Backend, Vector, scaled
from ia3.fast.ops.dropout import dropout, dropped, dropped_by
from ia3.fast.ops.launch import MAX_NUMBERS, cdiv, jit, launch
from ia3.fast.ops.partials import empty_gradient, partials_and_stride, tokens_of_program
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl


def gated(
    h: Tensor, vector: Vector, ragged: Ragged, activation: str, function: Callable[[Tensor], Tensor], is_gated: bool,
    p: float, seed: Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """The feed-forward intermediate `[tokens, d_ff]`.

    Args:
        h: `[tokens, 2 · d_ff]`, the gate before the linear half; `[tokens, d_ff]` without a gate.
        vector: l_ff.
        ragged: the tokens' examples and groups.
        activation: its name in transformers.
        function: itself.
        is_gated: whether h has two halves.
        p: dropout's.
        seed: from `DropoutSeeds`; needed by kernels that drop.
        backend: who computes it.
    """
    if backend == "triton" and h.numel() < MAX_NUMBERS:
        out: Tensor = _Gated.apply(h, vector, ragged, activation, is_gated, p, seed)
        return out
    if is_gated:
        gate, linear = h.chunk(2, -1)
        h = function(gate) * linear
    else:
        h = function(h)
    return dropout(scaled(h, vector, ragged), p)


@jit
def activated_and_slope(x, KIND: tl.constexpr):
    """One of `ACTIVATIONS`, and its derivative."""
    if KIND == 0:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    if KIND == 1:
        squared = x * x
        s = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * squared))
        value = x * s
        return value, s + (value - value * s) * (1.5957691216057308 + 0.21406444881780073 * squared)
    if KIND == 2:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    s = tl.sigmoid(x)
    value = x * s
    return value, s + (value - value * s)


@jit(do_not_specialize=["count"])
def _gated_forward(
    h, vector, group_of_token, out, seed, p, count, vector_stride,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M tokens of `count`, and a block of channels.

    Args:
        h: `[tokens, WIDTH]`, `[tokens, 2 · WIDTH]` where GATED.
        vector: `[groups, WIDTH]`, a group every `vector_stride` numbers; None without.
        group_of_token: `[tokens]`, int32; None for one group.
        out: written, `[tokens, WIDTH]`.
        seed: one int64; None without dropout.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    both = (tokens < count)[:, None] & (offs < WIDTH)
    narrow = tokens[:, None] * WIDTH + offs
    wide = tokens[:, None] * (2 * WIDTH if GATED else WIDTH) + offs
    gate = tl.load(h + wide, mask=both, other=0.0)
    if GATED:
        linear = tl.load(h + wide + WIDTH, mask=both, other=0.0)
    if vector is not None:
        if group_of_token is None:
            factor = tl.load(vector + offs, mask=offs < WIDTH, other=0.0)
        else:
            groups = tl.load(group_of_token + tokens, mask=tokens < count, other=0)
            factor = tl.load(vector + groups[:, None] * vector_stride + offs, mask=both, other=0.0)
    value, _ = activated_and_slope(gate.to(tl.float32), KIND)
    if GATED:
        value *= linear.to(tl.float32)
    if vector is not None:
        value *= factor.to(h.dtype.element_ty).to(tl.float32)
    if seed is not None:
        value = dropped(value, seed, narrow, p)
    tl.store(out + narrow, value.to(out.dtype.element_ty), mask=both)


@jit(do_not_specialize=["groups", "partials"])
def _gated_backward(
    h, vector, group_edges, grad, dh, d_vector, seed, p, groups, partials, vector_stride,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's tokens, BLOCK_M at a time, and a block of channels.

    Args:
        h, vector, seed: the forward's.
        group_edges: `[groups + 1]`, int32.
        grad: `[tokens, WIDTH]`, the gradient of the forward's out.
        dh: written, as h, but for padding tokens.
        d_vector: written, `[partials, groups, WIDTH]`, fp32; None without a vector.
    """
    group, first, end = tokens_of_program(group_edges, groups, partials)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    if vector is not None:
        factor = tl.load(vector + group * vector_stride + offs, mask=mask, other=0.0)
        factor = factor.to(h.dtype.element_ty).to(tl.float32)[None, :]
    if seed is not None:
        drawn = tl.load(seed)
    # Added up over tokens at the end alone, since threads wait for each other where they do that.
    totals = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(first, end, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        both = (tokens < end)[:, None] & mask[None, :]
        narrow = tokens[:, None] * WIDTH + offs[None, :]
        wide = tokens[:, None] * (2 * WIDTH if GATED else WIDTH) + offs[None, :]
        gate = tl.load(h + wide, mask=both, other=0.0)
        if GATED:
            linear = tl.load(h + wide + WIDTH, mask=both, other=0.0)
        g = tl.load(grad + narrow, mask=both, other=0.0).to(tl.float32)
        if seed is not None:
            g = dropped_by(drawn, g, narrow, p)
        value, slope = activated_and_slope(gate.to(tl.float32), KIND)
        d_product = g if vector is None else g * factor
        if GATED:
            tl.store(dh + wide + WIDTH, (d_product * value).to(dh.dtype.element_ty), mask=both)
            value *= linear.to(tl.float32)
            d_product *= linear.to(tl.float32)
        if vector is not None:
            totals += g * value
        tl.store(dh + wide, (d_product * slope).to(dh.dtype.element_ty), mask=both)
    if vector is not None:
        tl.store(d_vector + tl.program_id(0) * WIDTH + offs, tl.sum(totals, 0), mask=mask)


class _Gated(torch.autograd.Function):
    """Keeps h alone, of a product with frozen weights the only part that a backward needs."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, vector: Vector, ragged: Ragged, activation: str, is_gated: bool, p: float,
        seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = h.contiguous()
        width = h.shape[-1] // 2 if is_gated else h.shape[-1]
        out = h.new_empty(*h.shape[:-1], width)
        ctx.ragged, ctx.p = ragged, p
        ctx.sizes = {"WIDTH": width, "KIND": ACTIVATIONS[activation], "GATED": is_gated}
        group_of_token = ragged.group_of_token if vector is not None and ragged.groups > 1 else None
        count = out.numel() // width
        launch(
            _gated_forward, (cdiv(count, 4), cdiv(width, 256)), h, vector, group_of_token, out, seed, p, count,
            partials_and_stride(vector)[1], BLOCK_M=4, BLOCK=256, **ctx.sizes,
        )  # fmt: skip
        ctx.save_for_backward(h, vector, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, vector, seed = ctx.saved_tensors
        dh, d_vector = torch.empty_like(h), empty_gradient(vector)
        width, groups = ctx.sizes["WIDTH"], ctx.ragged.groups
        partials, stride = partials_and_stride(vector)
        launch(
            _gated_backward, (partials * groups, cdiv(width, 64)), h, vector, ctx.ragged.group_edges,
            grad.contiguous(), dh, d_vector, seed, ctx.p, groups, partials, stride, BLOCK_M=16, BLOCK=64, **ctx.sizes,
        )  # fmt: skip
        return dh, d_vector, None, None, None, None, None
