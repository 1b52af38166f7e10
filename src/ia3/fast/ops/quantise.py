"""Numbers in fewer bits: rows in fp8, and fp32 as a sum of three of bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ia3.fast.ops.backend import has_triton
from ia3.fast.ops.launch import cdiv, jit, launch, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_FP8 = 448.0
"""The largest number of e4m3."""


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


@jit
def _quantise_rows(x, factors, out, scales, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row, read twice: for its largest number, and to round it.

    Args:
        x: `[rows, WIDTH]`, a row every `x_stride` numbers.
        factors: `[WIDTH]`, fp32; None without.
        out: written, `[rows, WIDTH]` in e4m3.
        scales: written, `[rows]`, fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    most = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        value = tl.load(x + offs, mask=offs < WIDTH, other=0.0).to(tl.float32)
        if factors is not None:
            value *= tl.load(factors + offs, mask=offs < WIDTH, other=0.0)
        most = tl.maximum(most, tl.abs(value))
    scale = tl.maximum(tl.max(most, 0), 1e-30) / 448.0
    tl.store(scales + row, scale)
    for first in range(0, WIDTH, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        value = tl.load(x + offs, mask=offs < WIDTH, other=0.0).to(tl.float32)
        if factors is not None:
            value *= tl.load(factors + offs, mask=offs < WIDTH, other=0.0)
        value = tl.clamp(value / scale, -448.0, 448.0)
        tl.store(out + row * WIDTH + offs, value.to(tl.float8e4nv), mask=offs < WIDTH)


def _quantise_rows_by_kernel(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(4096, next_power_of_2(width))
    launch(_quantise_rows, (rows,), x, factors, out, scales, x.stride(0), WIDTH=width, BLOCK=block)
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
