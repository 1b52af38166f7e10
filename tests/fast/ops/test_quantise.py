"""Numbers in fewer bits: bounds on the errors, the kernels against the plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twins import CUDA, DEVICE, draw, needs_gpu, needs_kernels

from ia3.fast.ops.quantise import (
    MAX_FP8,
    _quantise_rows_by_kernel,
    _split_bf16x3_by_kernel,
    quantise_rows,
    split_bf16x3,
)  # fmt: skip


def rows_of(width: int) -> Tensor:
    """Of very different sizes, each a part of a longer row."""
    return (draw(6, 2 * width) * torch.logspace(-3, 3, 6, device=DEVICE)[:, None]).float()[:, :width]


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_keep_four_bits_and_their_largest_number(scaled: bool) -> None:
    x, factors = rows_of(48), draw(48, 1).exp().float() if scaled else None
    rounded, scales = quantise_rows(x, factors)
    wanted = x if factors is None else x * factors.t()
    assert float(rounded.float().abs().amax(-1).min()) == MAX_FP8
    error = (rounded.float() * scales - wanted).abs()
    assert bool((error <= wanted.abs() / 16 + scales * 2**-10).all())


def test_a_row_of_zeros() -> None:
    rounded, _ = quantise_rows(torch.zeros(1, 16, device=DEVICE))
    assert float(rounded.float().abs().max()) == 0


@needs_gpu  # Triton's interpreter rounds to fp8 without carrying
@pytest.mark.parametrize("width", [5, 48, 1500, 5000])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_rounds_rows(width: int, scaled: bool) -> None:
    x, factors = rows_of(width), draw(width, 1).exp().float() if scaled else None
    rounded, scales = _quantise_rows_by_kernel(x, factors)
    wanted, of_wanted = quantise_rows(x.cpu(), None if factors is None else factors.cpu())
    torch.testing.assert_close(scales.cpu(), of_wanted, rtol=1e-6, atol=0)
    differ = rounded.cpu().float() != wanted.float()
    assert float(differ.float().mean()) < 0.01  # where a division rounds another way
    torch.testing.assert_close(rounded.cpu().float(), wanted.float(), rtol=0.13, atol=0.002)


@needs_kernels
@pytest.mark.parametrize("width", [48, 5000])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernel_finds_the_largest_number(width: int, scaled: bool) -> None:
    x, factors = rows_of(width), draw(width, 1).exp().float() if scaled else None
    for found, wanted in zip(_quantise_rows_by_kernel(x, factors)[1], quantise_rows(x, factors)[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("by_kernel", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_three_of_bf16_are_one_of_fp32(by_kernel: bool, ascending: bool, stacked: bool) -> None:
    x = rows_of(1500)
    if by_kernel:
        found = _split_bf16x3_by_kernel(x, ascending, stacked)
    else:
        found = split_bf16x3(x, ascending=ascending, stacked=stacked)
    parts = list(found.chunk(3, 0 if stacked else 1))
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert {part.shape for part in parts} == {x.shape}
    first, second, third = (part.double() for part in (parts[::-1] if ascending else parts))
    assert torch.equal(first + second + third, x.double())
    bits = 0 if CUDA or not by_kernel else 1  # interpreted, a cast cuts off
    assert bool((second.abs() <= first.abs() * 2.0 ** (-8 + bits)).all())
    assert bool((third.abs() <= first.abs() * 2.0 ** (-16 + 2 * bits)).all())
