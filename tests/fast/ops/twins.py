"""Kernels beside their plain twins: on a GPU, or in Triton's interpreter where TRITON_INTERPRET is 1."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ia3.fast.ragged import Ragged

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
_RUNS = importlib.util.find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not _RUNS, reason="no GPU with Triton, nor Triton with TRITON_INTERPRET=1")
needs_gpu = pytest.mark.skipif(not (_RUNS and CUDA), reason="no GPU with Triton")

DTYPES = [torch.float32, torch.bfloat16]
"""Interpreted, a cast to bfloat16 cuts off."""
NARROW = torch.bfloat16 if CUDA else torch.float16
"""For products: Triton's interpreter multiplies matrices of bfloat16 as if they were integers."""
_TOLERANCE = {
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}  # interpreted, a cast to bfloat16 cuts off
SEED = 0x1234567_89ABCDEF
"""Both halves of a seed count."""


def seed(more: int = 0) -> Tensor:
    return torch.tensor(SEED + more, device=DEVICE)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def vector(partials: int, groups: int, width: int) -> Tensor:
    """As a slice of a larger table is: with a stride between the groups."""
    table = 1 + 0.5 * torch.randn(groups, width + 5, dtype=torch.float64, device=DEVICE)
    return table[:, 3 : 3 + width].expand(partials, groups, width)


def ragged_of(lengths: Sequence[int], groups: int, padding: int = 3) -> Ragged:
    """Examples of these lengths, and padding tokens."""
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    return Ragged(cu_seqlens, max(lengths), sum(lengths) + padding, groups)


def inside(x: Tensor, ragged: Ragged) -> Tensor:
    """Without padding tokens, which hold anything."""
    return x[: int(ragged.cu_seqlens[-1])]


def keep_mask(shape: Sequence[int], p: float, more: int = 0) -> Tensor:
    """What a kernel's dropout keeps, by integers of 64 bits."""
    low, given = 0xFFFFFFFF, SEED + more
    x = torch.arange(torch.Size(shape).numel(), device=DEVICE)
    x = (x * 0x9E3779B9 + (given & low)) & low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15) ^ (given >> 32)) * 0x846CA68B) & low
    return ((x ^ (x >> 16)) >= int(p * 2**32)).view(*shape)


def masked_dropout(x: Tensor, p: float) -> Tensor:
    """In the place of PyTorch's dropout in a plain twin: the kernel's mask."""
    return x * keep_mask(x.shape, p) / (1 - p) if p else x


def compare(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    *,
    vectors: Sequence[int] = (),
    fp32: Sequence[int] = (),
    tokens: Sequence[int] = (),
    ragged: Ragged | None = None,
) -> None:
    """Outputs and gradients of `function("triton", …)` in a dtype, and of `function("torch", …)` in float64.

    Args:
        function: takes a backend and the inputs, whose gradients are compared.
        inputs: tensors, or None; both get the same numbers, rounded to the dtype.
        dtype: the kernel's.
        vectors: which inputs have partials, whose gradients are summed; they are fp32.
        fp32: which others are fp32.
        tokens: which inputs have padding tokens, whose gradients may be anything.
        ragged: theirs.
    """
    wide = {*vectors, *fp32}
    rounded = [
        None if x is None else x.detach().to(torch.float32 if i in wide else dtype).requires_grad_()
        for i, x in enumerate(inputs)
    ]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in rounded]
    found, expected = (
        y if isinstance(y, tuple) else (y,) for y in (function("triton", *rounded), function("torch", *exact))
    )
    weights = [draw(*y.shape) for y in expected]
    sum((y.double() * w).sum() for y, w in zip(found, weights, strict=True)).backward()  # type: ignore[union-attr]
    sum((y * w).sum() for y, w in zip(expected, weights, strict=True)).backward()  # type: ignore[union-attr]
    for y, z in zip(found, expected, strict=True):
        near(y, z, dtype)
    for index, (x, z) in enumerate(zip(rounded, exact, strict=True)):
        if x is None:
            continue
        assert x.grad is not None, index
        assert z.grad is not None, index
        gradients = [x.grad.double(), z.grad]
        if index in vectors:
            gradients = [each.sum(0) for each in gradients]
        elif index in tokens and ragged is not None:
            gradients = [inside(each, ragged) for each in gradients]
        near(*gradients, dtype)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    assert float(error) < _TOLERANCE[dtype], float(error)
