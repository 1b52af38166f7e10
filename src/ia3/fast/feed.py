"""The feed-forward between its norms: up, gated, down. In eight bits as one, so that nothing is rounded on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ia3.fast.linear import Fp8Linear, FrozenLinear
from ia3.fast.ops.backend import Backend, Vector
from ia3.fast.ops.gate import gated
from ia3.fast.ops.gate_fp8 import MOST_CHANNELS, gated_rows, gated_rows_backward
from ia3.fast.ops.launch import MAX_NUMBERS
from ia3.fast.ops.quantise import Rounded
from ia3.fast.ops.scale import scale
from ia3.fast.ragged import Ragged


def feed_forward(
    x: Tensor | Rounded, up: FrozenLinear, down: FrozenLinear, of_up: Vector, vector: Vector, ragged: Ragged,
    activation: str, function: Callable[[Tensor], Tensor], is_gated: bool, p: float, seed: Tensor | None,
    backend: Backend,
) -> Tensor:  # fmt: skip
    """What a feed-forward makes of `[tokens, width]`, the same shape.

    Args:
        x: its input; rounded only where `up` rounds it.
        up: to the intermediate, or to both halves of it.
        down: back to the width.
        of_up: of what `up` makes.
        vector, ragged, activation, function, is_gated, p, seed, backend: see `gated`.
    """
    by_kernels = backend == "triton" and of_up is None
    if by_kernels and isinstance(up, Fp8Linear) and isinstance(down, Fp8Linear) and _fits(len(x), up, down):
        x = Rounded.of(x)
        y: Tensor = _Fp8FeedForward.apply(  # type: ignore[no-untyped-call]
            x.carrier, x.rows, x.scales, up, down, vector, ragged, activation, is_gated, p, seed
        )
        return y
    h = scale(up(x), of_up, ragged, backend)  # type: ignore[arg-type]
    return down(gated(h, vector, ragged, activation, function, is_gated, p, seed, backend))


def _fits(rows: int, up: Fp8Linear, down: Fp8Linear) -> bool:
    (channels, _), width = up.weight.shape, down.weight.shape[1]
    return up.rounds(rows) and down.rounds(rows) and width <= MOST_CHANNELS and rows * channels < MAX_NUMBERS


class _Fp8FeedForward(torch.autograd.Function):
    """Keeps the product before the gate alone, as the products and the gate on their own do."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, scales: Tensor, up: Fp8Linear, down: Fp8Linear, vector: Vector,
        ragged: Ragged, activation: str, is_gated: bool, p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        h = up.of_rows(rows, scales, x.dtype)
        ctx.up, ctx.down, ctx.gate = up, down, (ragged, activation, is_gated, p, seed)
        ctx.save_for_backward(h, vector)
        return down.of_rows(*gated_rows(h, vector, *ctx.gate), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, vector = ctx.saved_tensors
        dh, scales, d_vector = gated_rows_backward(ctx.down.gradient(grad), ctx.up.scales, h, vector, *ctx.gate)
        dx = ctx.up.gradient_of_rows(dh, scales, grad.dtype)
        return dx, None, None, None, None, d_vector, None, None, None, None, None
