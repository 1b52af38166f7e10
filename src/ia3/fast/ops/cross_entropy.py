"""Cross-entropy of labels, and of labels behind a frozen head without all logits at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ia3.fast.ops.backend import Backend
from ia3.fast.ops.launch import cdiv, jit, launch
from ia3.fast.ragged import IGNORE_INDEX

if TYPE_CHECKING:
    import triton.language as tl

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
        losses: Tensor = _TokenLosses.apply(logits, labels)
        return losses
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
    return functional.cross_entropy(wide, labels.reshape(-1), reduction="none", ignore_index=IGNORE_INDEX)


@jit
def _cross_entropy_forward(logits, labels, losses, lse, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token, over the vocabulary a block at a time.

    Args:
        logits: `[tokens, VOCABULARY]`.
        labels: `[tokens]`, negative for none.
        losses, lse: written, `[tokens]`, fp32; lse, the logarithm of the sum of exponentials, only where there is a
            label.
    """
    token = tl.program_id(0)
    label = tl.load(labels + token)
    if label >= 0:
        logits += token.to(tl.int64) * VOCABULARY
        most = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, VOCABULARY, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            x = tl.load(logits + offs, mask=offs < VOCABULARY, other=-1e30).to(tl.float32)
            larger = tl.maximum(most, x)
            total = total * tl.exp(most - larger) + tl.exp(x - larger)
            most = larger
        top = tl.max(most, 0)
        found = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
        tl.store(lse + token, found)
        tl.store(losses + token, found - tl.load(logits + label).to(tl.float32))
    else:
        tl.store(losses + token, 0.0)


@jit
def _cross_entropy_backward(logits, labels, lse, grad, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token and a block of the vocabulary.

    Args:
        logits: the forward's; their gradient is written in their place.
        labels, lse: the forward's.
        grad: `[tokens]`, fp32, the gradient of the losses.
    """
    token = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < VOCABULARY
    at = logits + (token.to(tl.int64) * VOCABULARY + offs)
    label = tl.load(labels + token)
    if label >= 0:
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        d = tl.exp(x - tl.load(lse + token)) - tl.where(offs == label, 1.0, 0.0)
        tl.store(at, (d * tl.load(grad + token)).to(logits.dtype.element_ty), mask=mask)
    else:
        tl.store(at, tl.zeros([BLOCK], logits.dtype.element_ty), mask=mask)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        width = logits.shape[-1]
        losses = torch.empty(logits.numel() // width, dtype=torch.float32, device=logits.device)
        lse = torch.empty_like(losses)
        launch(
            _cross_entropy_forward, (len(losses),), logits, labels, losses, lse, VOCABULARY=width, BLOCK=4096,
            num_warps=8,
        )  # fmt: skip
        ctx.spent = False
        ctx.save_for_backward(logits, labels, lse)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.spent:
            raise RuntimeError("The logits' memory holds their gradient since the first backward: there is no second.")
        ctx.spent = True
        logits, labels, lse = ctx.saved_tensors
        width = logits.shape[-1]
        launch(
            _cross_entropy_backward, (len(lse), cdiv(width, 4096)), logits, labels, lse, grad.contiguous(),
            VOCABULARY=width, BLOCK=4096,
        )  # fmt: skip
        return logits, None


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
    losses: Tensor = _HeadLosses.apply(y, weight, bias, at, labels, backend, scale, softcap)
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
