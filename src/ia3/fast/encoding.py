"""What an encoder makes of texts, by its fused blocks without padding, each text under a row of vectors of its own.

The model's own embeddings stand before the blocks and its own head behind them. On a GPU the blocks are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ia3.fast import fused
from ia3.fast.batch import FEW_PARTS, Packed, pack_encoder
from ia3.fast.capture import GraphedCallable
from ia3.fast.compare import Numbers, difference
from ia3.fast.fused import FusedLoss
from ia3.fast.graphed import moved_by, unsupported_at
from ia3.fast.guard import Guard
from ia3.fast.own import answered
from ia3.fast.ragged import Ragged
from ia3.sites import Layout


def unsupported_reason(model: Any, layout: Layout) -> str | None:
    """Why an encoder with vectors at these sites has no fused blocks; None where it has them."""
    if fused.front_of(model) is None:
        return f"a {type(model).__name__} has no described encoder below a head of its own"
    return unsupported_at(model, layout)


class FusedEncoder:
    """The blocks of an encoder, below whatever head.

    Args:
        model: one in evaluation mode for which `unsupported_reason` has nothing to say; its weights are fused.
        layout: the sites of the rows of vectors.

    What is found is right as long as `guard.is_valid()` and where `difference` has nothing to say.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.losses = FusedLoss(model, layout)
        self.losses.drops = False
        self.guard = Guard(model, self.losses.folded)
        self.body, _, self.inside = self.losses.architecture.front.partition(".")
        self.compared: set[bool] = set()
        self.blocks = GraphedCallable(self._through, model.device, repeatable=True)

    def __call__(self, batch: Mapping[str, Tensor], table: Tensor, *, head: bool) -> Any:
        """What the model's forward returns, or that of its body; nothing is drawn.

        Args:
            batch: `input_ids` and `attention_mask` `[texts, length]`, padded on the right, on the CPU.
            table: a row of vectors a text, `[texts, D]`.
            head: whether the model's head answers; else there are hidden states `[texts, length or more, width]`.
        """
        packed = pack_encoder({**batch, "labels": batch["input_ids"]})
        if self.blocks.captures:
            packed = self.losses.round_up(packed, packed.examples, FEW_PARTS)
        root, front = (self.model, f"{self.body}.{self.inside}") if head else (self._body, self.inside)
        return answered(root, front, self._encode(packed, table))(input_ids=packed["input_ids"].to(self.model.device))

    @property
    def _body(self) -> Any:
        return getattr(self.model, self.body)

    def _encode(self, packed: Packed, table: Tensor) -> Callable[[Tensor], Tensor]:
        """From the padded embeddings to the padded hidden states."""
        token_at, slot_of = packed["token_at"].to(table.device), packed["slot_of"].to(table.device)
        cu_seqlens = packed["cu_seqlens"].to(table.device)

        def encode(hidden: Tensor) -> Tensor:
            x = hidden.flatten(0, 1).index_select(0, token_at)
            y: Tensor = self.blocks(*packed.fixed, x=x, table=table, cu_seqlens=cu_seqlens)
            return y.index_select(0, slot_of).view_as(hidden)

        return encode

    def _through(self, max_seqlen: int, uniform: bool, *, x: Tensor, table: Tensor, cu_seqlens: Tensor) -> Tensor:
        ragged = Ragged(cu_seqlens, max_seqlen, len(x), len(table), uniform)
        return self.losses.encoded(x, ragged, table)

    def difference(
        self, batch: Mapping[str, Tensor], table: Tensor, own: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    ) -> str | None:
        """In what the hidden states of a kind of batch that comes for the first time are not the model's own; None if
        in nothing.

        Args:
            batch: as in the call.
            table: as in the call.
            own: the hidden states of the model's own body for a batch under rows of vectors.
        """
        kind = bool(batch["attention_mask"].all())
        if kind in self.compared:
            return None
        seen = batch["attention_mask"].bool().to(table.device)

        def numbers(hidden: Tensor) -> Numbers:
            states = hidden[:, : seen.shape[1]][seen]
            return states.double().square().mean(), states.flatten()

        def moved(part: float) -> Numbers:
            return numbers(own(batch, moved_by(table, part).detach()))

        def found() -> Numbers:
            return numbers(self(batch, table, head=False).last_hidden_state)

        reason = difference(self.model, found, moved, dtype=self.model.dtype)
        self.compared.add(kind)
        return reason
