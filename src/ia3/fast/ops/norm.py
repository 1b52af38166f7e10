"""The residual sum and its norm: root mean square (Zhang and Sennrich 2019), or LayerNorm (Ba et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ia3.fast.ops.backend import Backend
from ia3.fast.ops.dropout import dropout


@dataclass(frozen=True)
class Norm:
    """A norm's weights.

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
        """Of `[…, width]`, computed in fp32 at least."""
        if self.centred:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """No mean, no shift; the variance in fp32, as transformers has it."""
    wide = x if weight.dtype == x.dtype else x.to(weight.dtype)
    variance = wide.float().pow(2).mean(-1, keepdim=True)
    return (weight * (wide * torch.rsqrt(variance + eps)).to(weight.dtype)).to(x.dtype)


def add_norm(
    x: Tensor, h: Tensor | None, norm: Norm, p: float, seed: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """The residual stream x plus what a layer made of it, and its norm for the next layer.

    Args:
        x: `[tokens, width]`.
        h: the same shape, dropped by p before it is added; None where x is the first.
        norm: the next layer's.
        p: dropout's.
        seed: from `DropoutSeeds`.
        backend: who computes it.
    """
    if backend == "triton":
        from ia3.fast import kernels

        assert seed is not None
        assert not norm.centred
        return kernels.add_norm(x, h, norm.weight, norm.eps, p, seed)
    if h is not None:
        x = x + dropout(h, p)
    return x, norm(x)
