"""The feed-forward's intermediate in fp8: the kernels against the plain definition, rounded afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from twins import CUDA, draw, inside, masked_dropout, needs_kernels, ragged_of, seed, vector

from ia3.fast.ops.gate import gated
from ia3.fast.ops.gate_fp8 import gated_rows, gated_rows_backward
from ia3.fast.ops.quantise import MAX_FP8

LENGTHS = (5, 1, 0, 3, 19, 2)


def near_rounded(rounded: Tensor, scales: Tensor, exact: Tensor) -> None:
    """Scales to rounding, and each number to fp8's step. Triton's interpreter rounds to fp8 without carrying."""
    wanted = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30) / MAX_FP8
    torch.testing.assert_close(scales.double(), wanted, rtol=1e-4, atol=0)
    error = (rounded.double() * scales.double() - exact).abs()
    wrong = error > 1.01 * exact.abs() / 16 + wanted * 2**-9
    assert float(wrong.double().mean()) <= (0.0 if CUDA else 0.1)
    assert bool((error <= 0.55 * exact.abs() + wanted * 2**-6).all())


@needs_kernels
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize(("partials", "groups"), [(4, 1), (2, 3), (0, 1)])
@pytest.mark.parametrize(("activation", "width", "p"), [("gelu_new", 40, 0.3), ("silu", 64, 0.0)])
def test_rows_and_their_gradients(
    activation: str, is_gated: bool, partials: int, groups: int, width: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a width that is a power of two, and of one that is not; no partials stand for no vector."""
    monkeypatch.setattr("ia3.fast.ops.gate.dropout", masked_dropout)
    ragged, drawn = ragged_of(LENGTHS, groups), seed() if p else None
    channels = width * (1 + is_gated)
    h, grad, factors = (draw(*shape).float() for shape in ((33, channels), (33, width), (channels, 1)))
    factors = factors.exp()
    l_ff = vector(partials, groups, width).float() if partials else None
    how = (ragged, activation, is_gated, p, drawn)

    exact_h = h.double().requires_grad_()
    exact_l = None if l_ff is None else l_ff.double().requires_grad_()
    function: Callable[[Tensor], Tensor] = ACT2FN[activation]
    exact = gated(exact_h, exact_l, ragged, activation, function, is_gated, p, None, "torch")
    inside(exact * grad, ragged).sum().backward()
    assert exact_h.grad is not None

    near_rounded(*(inside(x, ragged) for x in (*gated_rows(h, l_ff, *how), exact.detach())))
    dh, scales, d_vector = gated_rows_backward(grad, factors, h, l_ff, *how)
    near_rounded(*(inside(x, ragged) for x in (dh, scales, exact_h.grad * factors.t().double())))
    if exact_l is None:
        assert d_vector is None
        return
    assert d_vector is not None
    assert d_vector.shape == exact_l.shape
    assert exact_l.grad is not None
    torch.testing.assert_close(d_vector.double().sum(0), exact_l.grad.sum(0), rtol=1e-4, atol=1e-4)
