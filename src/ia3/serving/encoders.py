"""What encoders answer: classes by the head of each text's adapter, and a text's vector by its encoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GenerationMixin

from ia3.inference.classify import head_logits
from ia3.inference.predict import pad_rows
from ia3.inference.rank import Ranking, rankings
from ia3.mixing import gather_rows
from ia3.rows import acting


class Encoder:
    """The encoder of a model, under the adapters of its table. One thread at a time may call it.

    Args:
        model: one with a head for classes of texts, or one that writes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.unsupported_reason = _unsupported_reason(model)
        """Why this model's hidden states are no texts' vectors; None where they are."""

    def classes(self, texts: Sequence[Sequence[int]], rows: Sequence[str], labels: Sequence[Any]) -> list[Ranking]:
        """The classes of texts, as `ia3.inference.classify.classify` finds them.

        Args:
            texts: tokens.
            rows: the table's name for the adapter of each.
            labels: what each one's head chooses from.
        """
        with acting(gather_rows(self.model, rows)):
            logits = head_logits(self.model, texts)
        return [
            rankings(own, row[None, : len(own)])[0] for own, row in zip(labels, logits, strict=True)
        ]  # behind its own classes a row of the batch may be padded

    @torch.inference_mode()
    def vectors(self, texts: Sequence[Sequence[int]], rows: Sequence[str]) -> list[list[float]]:
        """The mean of the last hidden states of each text's tokens, special ones included, of the length 1 in fp32.

        Args:
            texts: tokens.
            rows: the table's name for the adapter of each.
        """
        batch = {name: each.to(self.model.device) for name, each in pad_rows(texts, _padding(self.model)).items()}
        with acting(gather_rows(self.model, rows)):
            hidden = _body(self.model)(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        found: list[list[float]] = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).tolist()
        return found


def _body(model: Any) -> Any:
    """What makes hidden states of tokens: an encoder-decoder's encoder, else all below the head."""
    return model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix)


def _padding(model: Any) -> int:
    """What a batch is filled up with, which is masked; RoBERTa counts positions without it."""
    return model.config.get_text_config().pad_token_id or 0


@torch.inference_mode()
def _unsupported_reason(model: Any) -> str | None:
    if isinstance(model, GenerationMixin):
        return None if model.config.is_encoder_decoder else "a causal model's tokens don't see what comes after them"
    # Whether the first token's state changes with the last token tells it of any architecture.
    tokens = torch.tensor([[0, 1, 1], [0, 1, 2]], device=model.device)
    both: Tensor = _body(model)(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[:, 0]
    return "its tokens don't see what comes after them" if torch.equal(both[0], both[1]) else None
