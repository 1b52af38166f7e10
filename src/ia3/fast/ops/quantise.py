"""Numbers in fewer bits: rows in fp8, and fp32 as a sum of three of bf16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ia3.fast.ops.backend import has_triton
from ia3.fast.ops.launch import cdiv, jit, launch, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_FP8 = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class Rounded:
    """A tensor whose rows were rounded to fp8, as a product takes them.

    Args:
        carrier: what autograd knows, whose gradient is the tensor's; where nobody else reads it, of its shape and dtype
            without memory.
        rows: `[rows, width]` in e4m3.
        scales: theirs, `[rows, 1]`.
    """

    carrier: Tensor
    rows: Tensor
    scales: Tensor

    @classmethod
    def of(cls, x: Tensor | Rounded) -> Rounded:
        """Now, if it isn't yet."""
        return x if isinstance(x, Rounded) else cls(x, *quantise_rows(x.detach()))

    def __len__(self) -> int:
        return len(self.rows)


def quantise_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row in fp8 (e4m3), scaled so that its largest number is the largest of fp8, and the scales `[rows, 1]`.

    Args:
        x: `[rows, width]`.
        factors: one a column, `[width, 1]`, which multiply x before.
    """
    if has_triton(x.device) and x.dtype != torch.float64:
        return _quantise_rows_by_kernel(x, factors)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if factors is not None:
        wide = wide * factors.t()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / MAX_FP8
    return (wide / scales).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn), scales


@jit(do_not_specialize=["count"])
def _quantise_rows(
    x, factors, out, scales, count, x_stride, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """One program BLOCK_M rows of `count`; where BLOCK holds them they are read once, otherwise a second time to round.

    Args:
        x: `[rows, WIDTH]`, a row every `x_stride` numbers.
        factors: `[WIDTH]`, fp32; None without.
        out: written, `[rows, WIDTH]` in e4m3.
        scales: written, `[rows]`, fp32.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < count)[:, None]
    x += rows.to(tl.int64)[:, None] * x_stride
    out += rows.to(tl.int64)[:, None] * WIDTH
    if BLOCK >= WIDTH:
        value = _part_of_rows(x, factors, mask, 0, WIDTH, BLOCK)
        scale = scale_for_fp8(tl.max(tl.abs(value), 1))
        _store_part(out, value, scale, mask, 0, WIDTH, BLOCK)
    else:
        most = tl.zeros([BLOCK_M, BLOCK], tl.float32)
        for first in range(0, WIDTH, BLOCK):
            most = tl.maximum(most, tl.abs(_part_of_rows(x, factors, mask, first, WIDTH, BLOCK)))
        scale = scale_for_fp8(tl.max(most, 1))
        for first in range(0, WIDTH, BLOCK):
            value = _part_of_rows(x, factors, mask, first, WIDTH, BLOCK)
            _store_part(out, value, scale, mask, first, WIDTH, BLOCK)
    tl.store(scales + rows, scale, mask=rows < count)


@jit
def _part_of_rows(x, factors, mask, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of each row from the first on, multiplied by the factors."""
    offs = first + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + offs, mask=mask & (offs < WIDTH), other=0.0).to(tl.float32)
    if factors is not None:
        value *= tl.load(factors + offs, mask=offs < WIDTH, other=0.0)
    return value


@jit
def _store_part(out, value, scale, mask, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offs = first + tl.arange(0, BLOCK)[None, :]
    tl.store(out + offs, in_fp8(value, scale[:, None]), mask=mask & (offs < WIDTH))


@jit
def scale_for_fp8(most):
    """By what numbers up to the largest are divided before they are rounded to e4m3."""
    return tl.maximum(most, 1e-30) / 448.0


@jit
def in_fp8(value, scale):
    """Numbers of a row divided by its scale and rounded; what rounding makes larger than 448 becomes that."""
    return (value * (1 / scale)).to(tl.float8e4nv)


def _quantise_rows_by_kernel(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(8192, next_power_of_2(width))
    block_m = max(1, 4096 // block)
    launch(
        _quantise_rows, (cdiv(rows, block_m),), x, factors, out, scales, rows, x.stride(0), WIDTH=width,
        BLOCK_M=block_m, BLOCK=block,
    )  # fmt: skip
    return out, scales


def split_bf16x3(x: Tensor, *, ascending: bool = False, stacked: bool = False) -> Tensor:
    """Three tensors of bf16 whose sum is x in fp32, each the rounding of what those before leave.

    Args:
        x: `[rows, width]` in fp32.
        ascending: the smallest part first.
        stacked: below each other, `[3 · rows, width]`, not side by side, `[rows, 3 · width]`.
    """
    if has_triton(x.device):
        return _split_bf16x3_by_kernel(x, ascending, stacked)
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return torch.cat(parts[::-1] if ascending else parts, 0 if stacked else 1)


@jit(do_not_specialize=["first_part"])
def _split_bf16x3(x, out, first_part, out_stride, part_stride, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row and a block of columns.

    Args:
        x: `[rows, WIDTH]`, fp32, a row every `x_stride` numbers.
        out: written, bf16: the largest part from `first_part` on, a row every `out_stride` numbers, and each next part
            `part_stride` numbers further.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    rest = tl.load(x + row * x_stride + offs, mask=mask, other=0.0)
    out += first_part + row * out_stride
    for _ in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        tl.store(out + offs, part, mask=mask)
        rest -= part.to(tl.float32)
        out += part_stride


def _split_bf16x3_by_kernel(x: Tensor, ascending: bool, stacked: bool) -> Tensor:
    rows, width = x.shape
    out = torch.empty((3 * rows, width) if stacked else (rows, 3 * width), dtype=torch.bfloat16, device=x.device)
    part = rows * width if stacked else width
    first_part, part_stride = (2 * part, -part) if ascending else (0, part)
    launch(
        _split_bf16x3, (rows, cdiv(width, 1024)), x, out, first_part, out.stride(0), part_stride, x.stride(0),
        WIDTH=width, BLOCK=1024,
    )  # fmt: skip
    return out
