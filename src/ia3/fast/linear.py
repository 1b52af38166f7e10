"""Products with frozen weights: in the model's own precision, in eight bits, or in fp32 on the tensor cores for bf16.

**Eight bits.** Each row of activations and of weights is scaled so that its largest number is the largest that fp8 has
(e4m3: 448), rounded, multiplied and scaled back (Micikevicius et al. 2022, arXiv:2209.05433). The weights are rounded
once, for both directions: backward, their scales go to the gradient before it is rounded,

    dx = (dy ∘ s) Ŵ   where   W ≈ diag(s) Ŵ.

Weights and inputs get an error of about 2⁻⁵ of each number; sums are in fp32. Rounding on its own reads and writes each
activation once more. Where kernels make what only such a product reads, a norm (`ops/norm.py`) or a feed-forward's
intermediate and its gradient (`feed.py`), they round it themselves and write nothing else.

**fp32.** A number of fp32 is the sum of three of bf16. Of the nine products of two such sums six matter (Henry, Tang
and Heinecke 2019, arXiv:1904.06376), and a GPU's tensor cores for bf16 are more than six times as fast as its units for
fp32:

    x w = x₁w₁ + (x₂w₁ + x₁w₂) + (x₃w₁ + x₂w₂ + x₁w₃)

They cut off what a sum has no room for, so that long ones drift; the first term, the only large one, is
therefore added in pieces.

**fp32 on a CPU.** PyTorch gives such products to MKL, which uses less than half of what a processor that is not Intel's
can do. oneDNN, which comes with it, is twice as fast there; on Intel's MKL is as fast or faster, and stays.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ia3.fast.ops.backend import has_triton
from ia3.fast.ops.quantise import Rounded, quantise_rows, split_bf16x3

Precision = Literal["fp8"]


class FrozenLinear:
    """One or several frozen linear layers with equal inputs, as one: x Wᵀ + b.

    Args:
        weight: `[out, in]`.
        bias: `[out]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def rounds(self, rows: int) -> bool:
        """Whether so many rows are rounded to fp8, so that it takes them as `Rounded`, too."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`."""
        return functional.linear(x, self.weight, self.bias)


class Fp8Linear(FrozenLinear):
    """The same in fp8 where there are many rows, with a gradient for x alone.

    Raises:
        ValueError: a width that is no multiple of 16, which a GPU's products in fp8 take.
    """

    # With fewer, rounding them takes as long as the product saves.
    many_rows = 2048

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ValueError(f"Products in fp8 take multiples of 16; a frozen weight here is {list(weight.shape)}.")
        super().__init__(weight, bias)
        self.quantised, self.scales = quantise_rows(weight.detach())
        # A GPU multiplies in fp8 along rows alone, so backward has a copy of its own.
        self.transposed = self.quantised.t().contiguous()
        self.ones = torch.ones(weight.shape[1], 1, dtype=self.scales.dtype, device=weight.device)

    def rounds(self, rows: int) -> bool:
        """See `FrozenLinear`."""
        return rows >= self.many_rows

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        """`[rows, in]` to `[rows, out]`."""
        if isinstance(x, Tensor) and not self.rounds(len(x)):
            return super().__call__(x)
        x = Rounded.of(x)
        y: Tensor = _Fp8.apply(x.carrier, x.rows, x.scales, self)  # type: ignore[no-untyped-call]
        return y

    def of_rows(self, rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The product with rows in fp8."""
        y = _multiply(rows, scales, self.quantised, self.scales, dtype)
        return y if self.bias is None else y + self.bias

    def gradient(self, grad: Tensor) -> Tensor:
        """Of the input, from that of the output."""
        return self.gradient_of_rows(*quantise_rows(grad.contiguous(), self.scales), grad.dtype)

    def gradient_of_rows(self, rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The same, the output's gradient multiplied by the weights' scales and rounded before."""
        return _multiply(rows, scales, self.transposed, self.ones, dtype)


class _Fp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, scales: Tensor, linear: Fp8Linear) -> Tensor:
        ctx.linear = linear
        return linear.of_rows(rows, scales, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.linear.gradient(grad), None, None, None


def _multiply(x: Tensor, of_x: Tensor, weight: Tensor, of_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, in]` in fp8 times `[out, in]` in fp8, each with the scales of its rows."""
    if x.is_cuda:
        return torch._scaled_mm(
            x, weight.t(), scale_a=of_x, scale_b=of_weight.t(), out_dtype=dtype, use_fast_accum=True
        )
    return ((x.to(of_x.dtype) * of_x) @ (weight.to(of_weight.dtype) * of_weight).t()).to(dtype)


# With fewer rows a product waits for its weights, and splitting them costs as much.
_MANY_ROWS = 512
# Larger weights would take much memory in parts.
_MOST_NUMBERS = 1 << 24
# So many numbers of a sum the tensor cores add up before it is added in fp32.
_PIECE = 512


class Bf16x3Linear(FrozenLinear):
    """The same in fp32 by a GPU's tensor cores for bf16, where there are many rows; with a gradient for x alone."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`."""
        settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends)
        if len(x) < _MANY_ROWS or any(each.fp32_precision == "tf32" for each in settings):
            return super().__call__(x)
        y: Tensor = _Split.apply(x, self.weight.detach())  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _add_parts(split_bf16x3(x, ascending=True), split_bf16x3(weight).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _add_parts(split_bf16x3(grad.contiguous(), ascending=True), split_bf16x3(weight, stacked=True)), None


def _add_parts(x: Tensor, w: Tensor) -> Tensor:
    """The product of two matrices in fp32.

    Args:
        x: the parts of `[rows, inner]` side by side, the smallest first.
        w: those of `[inner, columns]` below each other, the largest first.
    """
    inner = len(w) // 3
    first, largest = x[:, 2 * inner :], w[:inner]
    y = torch.mm(first[:, :_PIECE], largest[:_PIECE], out_dtype=torch.float32)
    more = [(first[:, at : at + _PIECE], largest[at : at + _PIECE]) for at in range(_PIECE, inner, _PIECE)]
    for left, right in (*more, (x[:, inner:], w[: 2 * inner]), (x, w)):
        torch.addmm(y, left, right, out_dtype=torch.float32, out=y)
    return y


class OneDnnLinear(FrozenLinear):
    """The same in fp32 by oneDNN on a CPU, with a gradient for x alone."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`."""
        y: Tensor = _OneDnn.apply(x, self.weight.detach(), self.bias)  # type: ignore[no-untyped-call]
        return y


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _by_onednn(grad, weight.t()), None, None


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[rows, in]` times `[out, in]`; the operation that torch's compiler uses, without anything behind the product."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> FrozenLinear:
    """The product with a weight in the model's own precision, whoever computes it."""
    in_fp32 = weight.device.type == "cpu" and weight.dtype is torch.float32
    return OneDnnLinear(weight, bias) if in_fp32 and _mkl_is_slow() else FrozenLinear(weight, bias)


@cache
def _mkl_is_slow() -> bool:
    """Whether products in fp32 would be MKL's on a processor that isn't Intel's, as far as that can be told."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def _processor() -> str:
    """What the system says of the processor's maker."""
    known = Path("/proc/cpuinfo")
    return known.read_text(encoding="utf-8", errors="replace")[:1000] if known.exists() else platform.processor()


def _splits(weight: Tensor) -> bool:
    """Whether products with a weight are those of `Bf16x3Linear`."""
    if not has_triton(weight.device) or weight.dtype is not torch.float32 or weight.numel() > _MOST_NUMBERS:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0)


def frozen_linear(weight: Tensor, bias: Tensor | None = None, *, frozen: Precision | None = None) -> FrozenLinear:
    """The product with a weight.

    Args:
        weight: `[out, in]`.
        bias: `[out]`.
        frozen: None for the model's own precision.
    """
    if frozen is not None:
        return Fp8Linear(weight, bias)
    return Bf16x3Linear(weight, bias) if _splits(weight) else plain_linear(weight, bias)


def fp8_unsupported_reason(model: Any) -> str | None:
    """Why a model's products can't be in fp8; None where they can."""
    if model.device.type != "cuda":
        return None  # a CPU computes the same numbers, slowly
    if torch.cuda.get_device_capability(model.device) < (8, 9):
        return "this GPU has no products in fp8, which came with compute capability 8.9"
    if model.dtype is not torch.bfloat16:
        return f"on a GPU the products in fp8 give bfloat16, and the model is {model.dtype}"
    return None
