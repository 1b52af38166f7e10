"""The residual sum and its norm: the plain definition against the formulas, the kernel against the plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from twins import DEVICE, DTYPES, compare, draw, keep_mask, masked_dropout, near, needs_kernels, seed

from ia3.fast.ops.norm import Norm, add_norm, add_norm_rounded
from ia3.fast.ops.quantise import MAX_FP8

KINDS = {
    "rms": (False, False),
    "rms with a shift": (False, True),
    "layer": (True, True),
    "layer unshifted": (True, False),
}


def norm_of(kind: str, width: int, dtype: torch.dtype = torch.float64) -> Norm:
    centred, shifts = KINDS[kind]
    weight, bias = (x.to(dtype) for x in (1 + 0.3 * draw(width), 0.3 * draw(width)))
    return Norm(weight, bias if shifts else None, 1e-3, centred)


def cast(norm: Norm, dtype: torch.dtype) -> Norm:
    weight, bias = (None if x is None else x.to(dtype) for x in (norm.weight, norm.bias))
    assert weight is not None
    return Norm(weight, bias, norm.eps, norm.centred)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_is_the_formula(kind: str) -> None:
    norm, x = norm_of(kind, 24), 2 + 3 * draw(5, 24)
    unit = x - x.mean(-1, keepdim=True) if norm.centred else x
    unit = unit / (unit.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    expected = unit * norm.weight + (0.0 if norm.bias is None else norm.bias)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)  # the variance is in fp32, as in transformers


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_fp32_norm_activations_in_bf16(kind: str) -> None:
    """As Gemma's 1 + w: computed in fp32, rounded once."""
    norm, x = norm_of(kind, 64, torch.float32), draw(5, 64).bfloat16()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, norm(x.float()).bfloat16(), rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize(("adds", "p"), [(True, 0.0), (True, 0.3), (False, 0.0), (False, 0.3)])
def test_kernel(dtype: torch.dtype, kind: str, width: int, adds: bool, p: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("ia3.fast.ops.norm.dropout", masked_dropout)
    norm = norm_of(kind, width, dtype)

    def function(backend: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(x, h, cast(norm, x.dtype), p, seed(), backend)

    compare(function, [1 + draw(3, 5, width), draw(3, 5, width) if adds else None], dtype)


@needs_kernels
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_where_only_the_sum_or_only_its_norm_is_used(
    kind: str, used: int, p: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ia3.fast.ops.norm.dropout", masked_dropout)
    norm = norm_of(kind, 24)
    compare(
        lambda backend, x, h: add_norm(x, h, cast(norm, x.dtype), p, seed(), backend)[used],
        [1 + draw(7, 24), draw(7, 24)],
    )


@needs_kernels
def test_kernel_with_weights_in_fp32_and_activations_in_bf16() -> None:
    norm = norm_of("rms", 64, torch.float32)
    compare(
        lambda backend, x, h: add_norm(
            x, h, norm if backend == "triton" else cast(norm, torch.float64), 0.0, None, backend
        ),
        [draw(5, 64), draw(5, 64)],
        torch.bfloat16,
    )


@needs_kernels
def test_kernel_of_a_tensor_that_lies_across() -> None:
    norm = norm_of("layer", 24)
    compare(
        lambda backend, x, h: add_norm(x.t(), h.t(), cast(norm, x.dtype), 0.0, None, backend),
        [draw(24, 6), draw(24, 6)],
    )


@needs_kernels
def test_dropout_is_inverted_and_the_same_in_the_backward() -> None:
    h = torch.ones(64, 128, device=DEVICE, requires_grad=True)
    x = torch.zeros(64, 128, device=DEVICE)
    norm = cast(norm_of("rms", 128), torch.float32)
    total, _ = add_norm(x, h, norm, 0.25, seed(), "triton")
    kept = keep_mask(x.shape, 0.25)
    assert 0.73 < float(kept.float().mean()) < 0.77
    torch.testing.assert_close(total, kept / 0.75)
    total.sum().backward()
    torch.testing.assert_close(h.grad, kept / 0.75)
    other, _ = add_norm(x, h, norm, 0.25, seed(1), "triton")
    assert float(((other != 0) != kept).float().mean()) > 0.3
    high, _ = add_norm(x, h, norm, 0.25, seed(1 << 32), "triton")
    assert float(((high != 0) != kept).float().mean()) > 0.3


@needs_kernels
def test_norm_of_a_constant_is_its_shift() -> None:
    norm = cast(norm_of("layer", 24), torch.float32)
    x = torch.full((2, 24), 1000.0, device=DEVICE)
    _, normed = add_norm(x, None, norm, 0.0, None, "triton")
    near(normed, functional.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps), torch.float32)


@needs_kernels
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_rounded_norm_has_the_gradients_of_one_that_is_not(kind: str, p: float) -> None:
    norm = cast(norm_of(kind, 24), torch.float32)
    x, h, of_total, of_normed = (draw(7, 24).float().requires_grad_() for _ in range(4))
    total, normed = add_norm(x, h, norm, p, seed(), "triton")
    expected = torch.autograd.grad((total * of_total + normed * of_normed).sum(), (x, h))
    again, rounded = add_norm_rounded(x, h, norm, p, seed())
    assert torch.equal(again, total)
    assert rounded.carrier.shape == normed.shape
    torch.testing.assert_close(rounded.scales * MAX_FP8, normed.abs().amax(1, keepdim=True))
    # Triton's interpreter rounds to fp8 without carrying.
    error = (rounded.rows.float() * rounded.scales - normed).norm() / normed.norm()
    assert float(error) < (0.04 if DEVICE == "cuda" else 0.2)
    found = torch.autograd.grad((again, rounded.carrier), (x, h), (of_total, of_normed))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
