"""Cross-entropy of labels, and of labels behind a frozen head without all logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ia3.fast.ops.backend import Backend
from ia3.fast.ragged import IGNORE_INDEX

# Logits and their gradient are made in pieces of about so many numbers.
_LOGITS_AT_ONCE = 1 << 27


def token_losses(logits: Tensor, labels: Tensor, backend: Backend) -> Tensor:
    """Cross-entropy of each token in fp32 at least, 0 where the label is -100, `[tokens]`.

    Args:
        logits: `[…, vocabulary]`; by kernels their memory is used for their gradient.
        labels: as many as there are rows of logits.
        backend: who computes it.
    """
    if backend == "triton":
        from ia3.fast import kernels

        return kernels.token_losses(logits, labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
    return functional.cross_entropy(wide, labels.reshape(-1), reduction="none", ignore_index=IGNORE_INDEX)


def head_losses(
    y: Tensor, weight: Tensor, bias: Tensor | None, at: Tensor, labels: Tensor, backend: Backend, *,
    scale: float = 1.0, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of labels behind a frozen head, `[labels]`.

    The loss of one label depends on one token, so that its gradient can be had with it: backward only multiplies
    (after Hsu et al. 2024, arXiv:2410.10989, section 3.2).

    Args:
        y: `[tokens, width]`.
        weight: the head's, `[vocabulary, width]`.
        bias: the head's.
        at: the token that predicts each label, `[labels]`.
        labels: `[labels]`, -100 for none.
        backend: who computes it.
        scale: of the logits.
        softcap: the logits' bound; None without one.
    """
    losses: Tensor = _HeadLosses.apply(y, weight, bias, at, labels, backend, scale, softcap)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, at: Tensor, labels: Tensor, backend: Backend,
        scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        at_once = max(128, _LOGITS_AT_ONCE // len(weight) // 128 * 128)
        learns = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        for part, wanted in zip(torch.split(at, at_once), torch.split(labels, at_once), strict=True):
            tokens = y.detach().index_select(0, part).requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = _bounded(functional.linear(tokens, weight, bias), scale, softcap)
                found = token_losses(logits, wanted, backend)
                slopes += torch.autograd.grad(found.sum(), tokens) if learns else []
            losses.append(found.detach())
        ctx.shape = y.shape
        ctx.save_for_backward(at, *([torch.cat(slopes)] if learns else []))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        at, slopes = ctx.saved_tensors
        d_y = slopes.new_zeros(ctx.shape)
        d_y.index_add_(0, at, (slopes * grad[:, None]).to(slopes.dtype))
        return d_y, None, None, None, None, None, None, None


def _bounded(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
