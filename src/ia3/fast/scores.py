"""The log-probabilities of answer choices by an encoder-decoder's fused forward, captured on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ia3.fast import fused
from ia3.fast.batch import Packed
from ia3.fast.capture import GraphedCallable
from ia3.fast.graphed import GraphedLoss
from ia3.fast.guard import NOT_ALONE, unsupported_modules
from ia3.fast.ragged import IGNORE_INDEX
from ia3.state import sole_active_adapter


def unsupported_reason(model: Any) -> str | None:
    """Why choices can't be scored by the fused forward; None where they can."""
    adapter = sole_active_adapter(model)
    if adapter is None:
        return NOT_ALONE
    return fused.seq2seq_unsupported_reason(model, adapter.layout.sites) or unsupported_modules(model)


class ChoiceScores:
    """The log-probability of each token of each choice after each input, without padding.

    Args:
        model: one for which `unsupported_reason` has nothing to say; its weights are fused.
        choices: tokens `[choices, length]`, -100 after a choice's end.

    What is found is right as long as `guard.is_valid()` and where `difference` has nothing to say.
    """

    def __init__(self, model: Any, choices: Tensor) -> None:
        self.model, self.choices = model, choices.to(model.device)
        self.loss = GraphedLoss(model)
        self.guard = self.loss.guard
        compute = partial(_log_probabilities, self.loss, self.choices)
        self.computation = GraphedCallable(compute, self.loss.device, warm_up=compute)

    def difference(self, input_ids: Tensor, attention_mask: Tensor) -> str | None:
        """In what the loss of the first choice is not the model's own, for a kind of batch that comes for the first
        time; None if in nothing.

        Args:
            input_ids: `[rows, source]`, best on the CPU.
            attention_mask: the same.
        """
        labels = self.choices[:1].cpu().expand(len(input_ids), -1)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return self.loss.difference(batch, self.loss.pack(batch))

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[rows, choices, length]` in fp32 at least; the random state stays as it was.

        Args:
            input_ids: `[rows, source]`, best on the CPU.
            attention_mask: the same.
        """
        nothing = torch.full((len(input_ids), 1), IGNORE_INDEX)
        packed = self.loss.pack({"input_ids": input_ids, "attention_mask": attention_mask, "labels": nothing})
        # Kernels are given seeds, which are drawn although nothing is dropped.
        device = self.loss.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            (found,) = self.loss.run(self.computation, packed)
        return found[: len(input_ids)]


@torch.no_grad()
def _log_probabilities(
    loss: GraphedLoss, choices: Tensor, training: bool, *fixed: Any, **tensors: Tensor
) -> tuple[Tensor]:
    flat = loss.layout.flatten(loss.vectors)
    return (loss.losses.log_probabilities(Packed(tensors, *fixed), choices, flat[None]),)
