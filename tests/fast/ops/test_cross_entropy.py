"""Cross-entropy: the kernel against the plain definition, which is PyTorch's; a head's losses against all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from twins import DEVICE, DTYPES, compare, draw, needs_kernels

from ia3.fast.ops.backend import Backend
from ia3.fast.ops.cross_entropy import head_losses, token_losses


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [30, 5000])
def test_kernel(dtype: torch.dtype, vocabulary: int) -> None:
    labels = torch.randint(0, vocabulary, (4, 3), device=DEVICE)
    labels[1, 1:] = -100
    labels[0, 0], labels[0, 1] = 0, vocabulary - 1
    compare(
        # Its memory becomes the gradient's, which a leaf's must not.
        lambda backend, logits: token_losses(logits * 1, labels, backend),
        [3 * draw(4, 3, vocabulary)],
        dtype,
    )


@needs_kernels
def test_a_second_backward_is_refused() -> None:
    logits = draw(2, 9).float().requires_grad_()
    losses = token_losses(logits * 1, torch.tensor([1, 2], device=DEVICE), "triton").sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second"):
        losses.backward()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (0.3, 5.0)])
def test_head_losses(backend: Backend, biased: bool, scale: float, softcap: float | None, monkeypatch: Any) -> None:
    """In pieces, as by all logits at a time."""
    monkeypatch.setattr("ia3.fast.ops.cross_entropy._LOGITS_AT_ONCE", 1)
    weight, bias = draw(40, 16).float(), draw(40).float() if biased else None
    at, labels = torch.arange(10, 270, device=DEVICE), torch.randint(0, 40, (260,), device=DEVICE)
    labels[-5:], at[-5:] = -100, 0

    def function(by: str, y: Tensor) -> Tensor:
        if by == "triton":
            return head_losses(y, weight, bias, at, labels, backend, scale=scale, softcap=softcap)
        logits = scale * functional.linear(y[at], weight.double(), None if bias is None else bias.double())
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return functional.cross_entropy(logits, labels, reduction="none")

    compare(function, [draw(280, 16)])


def test_losses_without_a_gradient() -> None:
    y, weight = draw(5, 16), draw(40, 16)
    at, labels = torch.arange(5, device=DEVICE), torch.randint(0, 40, (5,), device=DEVICE)
    with torch.no_grad():
        found = head_losses(y, weight, None, at, labels, "torch")
    torch.testing.assert_close(found, functional.cross_entropy(y @ weight.t(), labels, reduction="none"))
