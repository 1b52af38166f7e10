"""The log-probabilities of answer choices by a T5's forward by hand, recorded on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ia3.adapter import vectors
from ia3.fast import t5
from ia3.fast.bypassing import NOT_ALONE
from ia3.fast.capture import Captured, Standing
from ia3.fast.packing import IGNORED, Packed, pack, round_up
from ia3.state import sole_active_adapter


def why_not(model: Any) -> str | None:
    """Why choices can't be scored by hand; None where they can."""
    adapter = sole_active_adapter(model)
    return NOT_ALONE if adapter is None else t5.why_not(model, adapter.layout.sites)


class ChoiceScores:
    """The log-probability of each token of each choice after each input, without padding.

    Args:
        model: a T5 for which `why_not` has nothing to say; its weights are laid out anew.
        choices: tokens `[choices, length]`, -100 after a choice's end.

    What is found is right as long as `standing.holds()`.
    """

    def __init__(self, model: Any, choices: Tensor) -> None:
        adapter = sole_active_adapter(model)
        assert adapter is not None
        self.model, self.choices, self.layout = model, choices.to(model.device), adapter.layout
        self.vectors = vectors(model, adapter)
        self.by_hand = t5.T5Loss(model, adapter.layout)
        self.computation = Captured(self._compute, model.device, rehearsal=self._compute)
        self.standing = Standing(model, self.by_hand.baked)
        self.rows = 0

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[rows, choices, length]` in fp32 at least.

        Args:
            input_ids: `[rows, source]`, best on the CPU.
            attention_mask: the same.
        """
        nothing = torch.full((len(input_ids), 1), IGNORED)
        packed = pack({"input_ids": input_ids, "attention_mask": attention_mask, "labels": nothing})
        if self.computation.records:
            self.rows = max(self.rows, len(input_ids))
            packed = round_up(packed, self.rows, self.model.config.pad_token_id or 0)
        found: Tensor = self.computation(packed.longest, packed.uniform, **packed.tensors)
        return found[: len(input_ids)].clone()

    @torch.no_grad()
    def _compute(self, longest: int, uniform: bool, **tensors: Tensor) -> Tensor:
        flat = self.layout.flatten(self.vectors)
        return self.by_hand.log_probabilities(
            Packed(**tensors, longest=longest, uniform=uniform), self.choices, flat[None]
        )
