"""What encoders answer: classes by the head of each text's adapter, and a text's vector by its encoder alone.

Where an encoder is described its blocks are fused, without padding, and captured on a GPU; a first batch is compared
with the model's own forward, which is the way for all others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GenerationMixin

from ia3.fast import encoding
from ia3.fast.batch import filled_examples
from ia3.fast.encoding import FusedEncoder
from ia3.fast.sessions import over
from ia3.inference.predict import pad_rows
from ia3.inference.rank import Ranking, rankings
from ia3.mixing import gather_rows, make_rows
from ia3.rows import BASE, Rows, acting
from ia3.sites import Layout
from ia3.state import attached

_logger = logging.getLogger(__name__)


class Encoder:
    """The encoder of a model, under the adapters of its table. One thread at a time may call it.

    Args:
        model: one with a head for classes of texts, or one that writes; in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reason: str | None = "there was no batch yet"
        """Why the model's own forward answers; None where its fused blocks do."""
        self._layout: Layout | None = None
        self._fused: FusedEncoder | None = None

    def classes(
        self, texts: Sequence[Sequence[int]], rows: Sequence[str], labels: Sequence[Any], length: int | None = None
    ) -> list[Ranking]:
        """The classes of texts, as `ia3.inference.classify.classify` finds them.

        Args:
            texts: tokens.
            rows: the table's name for the adapter of each.
            labels: what each one's head chooses from.
            length: pad to so many tokens, and take the model's own forward.
        """
        logits = self._answer(texts, rows, length, head=True).cpu().double()
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, own in enumerate(labels):
            alike.setdefault(tuple(own), []).append(index)
        found: dict[int, Ranking] = {}
        for own, indices in alike.items():
            # Behind its own classes a row may be filled up to those of another.
            found |= zip(indices, rankings(own, logits[indices, : len(own)]), strict=True)
        return [found[index] for index in range(len(labels))]

    def vectors(
        self, texts: Sequence[Sequence[int]], rows: Sequence[str], length: int | None = None
    ) -> list[list[float]]:
        """The mean of the last hidden states of each text's tokens, special ones included, of the length 1 in fp32.

        Args:
            texts: tokens.
            rows: the table's name for the adapter of each.
            length: pad to so many tokens, and take the model's own forward.
        """
        hidden = self._answer(texts, rows, length, head=False).float()
        lengths = torch.tensor([len(text) for text in texts], device=hidden.device)
        seen = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        found: list[list[float]] = normalize((hidden * seen[..., None]).sum(1), dim=-1).tolist()  # the mean's direction
        return found

    @torch.inference_mode()
    def _answer(self, texts: Sequence[Sequence[int]], rows: Sequence[str], length: int | None, *, head: bool) -> Tensor:
        """Logits `[texts, classes]`, or hidden states `[texts, length or more, width]`."""
        # Where blocks are captured, texts of one token fill a batch up to one of few sizes.
        captures = length is None and self._fused is not None and self._fused.blocks.captures
        more = filled_examples(len(texts)) - len(texts) if captures else 0
        names = [*rows, *[BASE] * more]
        batch = pad_rows([*texts, *[texts[0][:1]] * more], _padding(self.model), length)
        acts = gather_rows(self.model, names)
        layout, flat = self._over_all_sites(acts)
        with acting(acts):
            fused = self._fused_for(layout, batch, flat, acts) if length is None else None
            found = self._own(batch, head=head) if fused is None else fused(batch, flat, head=head)
        answer: Tensor = found.logits if head else found.last_hidden_state
        return answer[: len(texts)]

    def _over_all_sites(self, acts: Rows) -> tuple[Layout, Tensor]:
        """The rows' vectors on the model's device, over the table's sites where the base alone has none."""
        table = attached(self.model).table
        assert table is not None
        assert acts.flat is not None
        layout = acts.flat.layout if acts.flat.layout.sites else table.layout
        return layout, over(layout, acts.flat.layout, acts.flat.vectors.to(self.model.device))

    def _own(self, batch: Mapping[str, Tensor], *, head: bool) -> Any:
        """What the model's own forward makes of a batch, or its body."""
        run = self.model if head else _body(self.model)
        return run(**{name: each.to(self.model.device) for name, each in batch.items()})

    def _fused_for(self, layout: Layout, batch: Mapping[str, Tensor], flat: Tensor, acts: Rows) -> FusedEncoder | None:
        """The fused blocks for these sites, where they are right; made and compared where the model is another."""
        if layout is not self._layout or (self._fused is not None and not self._fused.guard.is_valid()):
            self._layout, self.reason = layout, encoding.unsupported_reason(self.model, layout)
            self._fused = FusedEncoder(self.model, layout) if self.reason is None else None
            self._tell()

        def own(batch: Mapping[str, Tensor], moved: Tensor) -> Tensor:
            with acting(make_rows(self.model, acts.names, layout, moved, heads=acts.heads)):
                states: Tensor = self._own(batch, head=False).last_hidden_state
            return states

        if self._fused is not None and (reason := self._fused.difference(batch, flat, own)) is not None:
            self._fused, self.reason = None, reason
            self._tell()
        return self._fused

    def _tell(self) -> None:
        how = "by fused blocks" if self.reason is None else f"the model's own way, since {self.reason}"
        _logger.info("Texts are encoded %s.", how)


@torch.inference_mode()
def no_vectors_reason(model: Any) -> str | None:
    """Why a model's hidden states are no texts' vectors; None where they are."""
    if isinstance(model, GenerationMixin):
        return None if model.config.is_encoder_decoder else "a causal model's tokens don't see what comes after them"
    # Whether the first token's state changes with the last token tells it of any architecture.
    tokens = torch.tensor([[0, 1, 1], [0, 1, 2]], device=model.device)
    both: Tensor = _body(model)(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[:, 0]
    return "its tokens don't see what comes after them" if torch.equal(both[0], both[1]) else None


def _body(model: Any) -> Any:
    """What makes hidden states of tokens: an encoder-decoder's encoder, else all below the head."""
    return model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix)


def _padding(model: Any) -> int:
    """What a batch is filled up with; by it RoBERTa's kind and causal models' heads know padding."""
    return model.config.get_text_config().pad_token_id or 0
