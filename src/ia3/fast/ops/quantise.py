"""Numbers in fewer bits: rows in fp8, and fp32 as a sum of three of bf16."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_FP8 = 448.0
"""The largest number of e4m3."""


def quantise_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row in fp8 (e4m3), scaled so that its largest number is the largest of fp8, and the scales `[rows, 1]`.

    Args:
        x: `[rows, width]`.
        factors: one a column, `[width, 1]`, which multiply x before.
    """
    if x.is_cuda and x.dtype != torch.float64:
        from ia3.fast import kernels

        return kernels.round_rows(x, factors)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if factors is not None:
        wide = wide * factors.t()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / MAX_FP8
    return (wide / scales).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn), scales


def split_bf16x3(x: Tensor, *, ascending: bool = False, stacked: bool = False) -> Tensor:
    """Three tensors of bf16 whose sum is x in fp32, each the rounding of what those before leave.

    Args:
        x: `[rows, width]` in fp32, on a GPU.
        ascending: the smallest part first.
        stacked: below each other, `[3 · rows, width]`, not side by side, `[rows, 3 · width]`.
    """
    from ia3.fast import kernels

    return kernels.split_in_three(x, ascending, stacked)
