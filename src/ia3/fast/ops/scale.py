"""What a linear layer makes, multiplied by its vector, where no other kernel multiplies by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.launch import cdiv, jit, launch
from ia3.fast.ops.partials import empty_gradient, partials_and_stride, tokens_of_program
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl


def scale(x: Tensor, vector: Vector, ragged: Ragged, backend: Backend) -> Tensor:
    """`scaled`, with a gradient that reads no padding token, of which kernels write none.

    Args:
        x: `[tokens, width]`.
        vector: `[partials, groups, width]`.
        ragged: the tokens' examples and groups.
        backend: who computes it.
    """
    if vector is None or backend == "torch" or not vector.requires_grad:
        return scaled(x, vector, ragged)
    out: Tensor = _Scale.apply(x, vector, ragged)
    return out


@jit(do_not_specialize=["count"])
def _scale_forward(
    x, vector, group_of_token, out, count, vector_stride,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M tokens of `count`, and a block of channels.

    Args:
        x: `[tokens, WIDTH]`.
        vector: `[groups, WIDTH]`, a group every `vector_stride` numbers.
        group_of_token: `[tokens]`, int32; None for one group.
        out: written, as x.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    both = (tokens < count)[:, None] & (offs < WIDTH)
    if group_of_token is None:
        factor = tl.load(vector + offs, mask=offs < WIDTH, other=0.0)
    else:
        groups = tl.load(group_of_token + tokens, mask=tokens < count, other=0)
        factor = tl.load(vector + groups[:, None] * vector_stride + offs, mask=both, other=0.0)
    at = tokens[:, None].to(tl.int64) * WIDTH + offs
    value = tl.load(x + at, mask=both, other=0.0).to(tl.float32)
    value *= factor.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=both)


@jit(do_not_specialize=["groups", "partials"])
def _scale_backward(
    x, vector, group_edges, grad, dx, d_vector, groups, partials, vector_stride,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's tokens, BLOCK_M at a time, and a block of channels.

    Args:
        x, vector: the forward's.
        group_edges: `[groups + 1]`, int32.
        grad: `[tokens, WIDTH]`, the gradient of the forward's out.
        dx: written, as x, but for padding tokens.
        d_vector: written, `[partials, groups, WIDTH]`, fp32.
    """
    group, first, end = tokens_of_program(group_edges, groups, partials)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    factor = tl.load(vector + group * vector_stride + offs, mask=mask, other=0.0)
    factor = factor.to(x.dtype.element_ty).to(tl.float32)[None, :]
    totals = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(first, end, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        both = (tokens < end)[:, None] & mask[None, :]
        at = tokens[:, None].to(tl.int64) * WIDTH + offs[None, :]
        g = tl.load(grad + at, mask=both, other=0.0).to(tl.float32)
        totals += g * tl.load(x + at, mask=both, other=0.0).to(tl.float32)
        tl.store(dx + at, (g * factor).to(dx.dtype.element_ty), mask=both)
    tl.store(d_vector + tl.program_id(0) * WIDTH + offs, tl.sum(totals, 0), mask=mask)


class _Scale(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, ragged: Ragged) -> Tensor:
        x, ctx.ragged = x.contiguous(), ragged
        out, (count, width) = torch.empty_like(x), x.shape
        group_of_token = ragged.group_of_token if ragged.groups > 1 else None
        launch(
            _scale_forward, (cdiv(count, 4), cdiv(width, 256)), x, vector, group_of_token, out, count,
            partials_and_stride(vector)[1], WIDTH=width, BLOCK_M=4, BLOCK=256,
        )  # fmt: skip
        ctx.save_for_backward(x, vector)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, vector = ctx.saved_tensors
        dx, d_vector = torch.empty_like(x), empty_gradient(vector)
        (partials, stride), groups, width = partials_and_stride(vector), ctx.ragged.groups, x.shape[1]
        launch(
            _scale_backward, (partials * groups, cdiv(width, 64)), x, vector, ctx.ragged.group_edges,
            grad.contiguous(), dx, d_vector, groups, partials, stride, WIDTH=width, BLOCK_M=16, BLOCK=64,
        )  # fmt: skip
        return dx, d_vector, None
