"""The residual sum and its norm: root mean square (Zhang and Sennrich 2019), or LayerNorm (Ba et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ia3.fast.ops.backend import Backend
from ia3.fast.ops.dropout import dropout, dropped
from ia3.fast.ops.launch import jit, launch, next_power_of_2
from ia3.fast.ops.quantise import Rounded, in_fp8, scale_for_fp8

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True)
class Norm:
    """A norm's frozen weights.

    Args:
        weight: `[width]`.
        bias: `[width]`; None without one.
        eps: added to the variance.
        centred: subtract the mean (LayerNorm).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Of `[…, width]`, in x's dtype; computed in that of the weights."""
        wide = x.to(self.weight.dtype)
        if self.centred:
            return functional.layer_norm(wide, x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)
        normed = rms_norm(wide, self.weight, self.eps)
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """No mean, no shift; the variance in fp32, as transformers has it."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def add_norm(
    x: Tensor, h: Tensor | None, norm: Norm, p: float, seed: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """The residual stream x plus what a layer made of it, and its norm for the next layer.

    Args:
        x: `[tokens, width]`.
        h: the same shape, dropped by p before it is added; None where x is the first.
        norm: the next layer's.
        p: dropout's.
        seed: from `DropoutSeeds`; needed by kernels that drop.
        backend: who computes it.
    """
    if backend == "triton":
        total, normed = _AddNorm.apply(x, h, norm, p, seed if h is not None else None)
        return total, normed
    if h is not None:
        x = x + dropout(h, p)
    return x, norm(x)


def add_norm_rounded(x: Tensor, h: Tensor | None, norm: Norm, p: float, seed: Tensor | None) -> tuple[Tensor, Rounded]:
    """`add_norm` by kernels whose norm only products in fp8 take."""
    total, *parts = _AddNorm.apply(x, h, norm, p, seed if h is not None else None, True)
    return total, Rounded(*parts)


@jit
def _add_norm_forward(
    x, h, weight, bias, total, normed, scales, mean, rstd, seed, p, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """One program a token.

    Args:
        x, h: `[tokens, WIDTH]`; h None without.
        weight, bias: `[WIDTH]` of any dtype; bias None without.
        total, normed: written, as x; total only where there is an h.
        scales: written where there are any, `[tokens]`, fp32: normed is in fp8 then.
        mean, rstd: written, `[tokens]`, fp32: the mean (only where CENTRED), and 1 / √(variance + eps).
        seed: one int64; None without dropout.
    """
    token = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    begin = token.to(tl.int64) * WIDTH
    value = tl.load(x + begin + offs, mask=mask, other=0.0).to(tl.float32)
    if h is not None:
        added = tl.load(h + begin + offs, mask=mask, other=0.0).to(tl.float32)
        if seed is not None:
            added = dropped(added, seed, token * WIDTH + offs, p)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + begin + offs, rounded, mask=mask)
        value = rounded.to(tl.float32)
    if CENTRED:
        centre = tl.sum(value, 0) / WIDTH
        tl.store(mean + token, centre)
        value = tl.where(mask, value - centre, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    tl.store(rstd + token, scale)
    value = value * scale * tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + offs, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        of_row = scale_for_fp8(tl.max(tl.abs(value), 0))
        tl.store(scales + token, of_row)
        tl.store(normed + begin + offs, in_fp8(value, of_row), mask=mask)
    else:
        tl.store(normed + begin + offs, value.to(normed.dtype.element_ty), mask=mask)


@jit
def _add_norm_backward(
    d_total, d_normed, total, weight, mean, rstd, dx, dh, seed, p,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """One program a token.

    Args:
        d_total, d_normed: `[tokens, WIDTH]`, the gradients of what the forward wrote; d_total None where only the
            norm was used.
        total, weight, mean, rstd, seed: the forward's.
        dx, dh: written, as total; dh only where there is a seed, otherwise it is dx.
    """
    token = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    begin = token.to(tl.int64) * WIDTH
    scale = tl.load(rstd + token)
    unit = tl.load(total + begin + offs, mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        unit -= tl.load(mean + token)
    unit *= scale
    gain = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(d_normed + begin + offs, mask=mask, other=0.0).to(tl.float32) * gain
    d = g - unit * (tl.sum(g * unit, 0) / WIDTH)
    if CENTRED:
        d -= tl.sum(g, 0) / WIDTH
    d *= scale
    if d_total is not None:
        d += tl.load(d_total + begin + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + begin + offs, d.to(dx.dtype.element_ty), mask=mask)
    if seed is not None:
        d = dropped(d, seed, token * WIDTH + offs, p)
        tl.store(dh + begin + offs, d.to(dh.dtype.element_ty), mask=mask)


class _AddNorm(torch.autograd.Function):
    """Keeps the residual stream and two numbers a token at most.

    Where the norm is rounded it gives the parts of `Rounded` in its place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, norm: Norm, p: float, seed: Tensor | None, rounded: bool = False
    ) -> Any:
        x, h = x.contiguous(), None if h is None else h.contiguous()
        width = x.shape[-1]
        total = x if h is None else torch.empty_like(x)
        normed = torch.empty_like(x, dtype=torch.float8_e4m3fn if rounded else x.dtype)
        rstd = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if norm.centred else None
        scales = torch.empty_like(rstd)[:, None] if rounded else None
        ctx.norm, ctx.p, ctx.adds = norm, p, h is not None
        ctx.sizes = {"WIDTH": width, "BLOCK": next_power_of_2(width), "CENTRED": norm.centred}
        launch(
            _add_norm_forward, (len(rstd),), x, h, norm.weight, norm.bias, total, normed, scales, mean, rstd, seed, p,
            norm.eps, **ctx.sizes,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, mean, rstd, seed)
        if scales is None:
            return total, normed
        ctx.mark_non_differentiable(normed, scales)
        return total, x.new_empty(1).expand_as(x), normed, scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *of_parts: None) -> Any:
        total, mean, rstd, seed = ctx.saved_tensors
        d_total = None if d_total is None else d_total.contiguous()
        d_normed = torch.zeros_like(total) if d_normed is None else d_normed.contiguous()
        dx = torch.empty_like(total)
        dh = dx if seed is None else torch.empty_like(total)
        launch(
            _add_norm_backward, (len(rstd),), d_total, d_normed, total, ctx.norm.weight, mean, rstd, dx, dh, seed,
            ctx.p, **ctx.sizes,
        )  # fmt: skip
        return dx, dh if ctx.adds else None, None, None, None, None
