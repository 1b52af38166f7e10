"""What a model's own modules make of positions: the bias of relative ones, the angles of rotary ones."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ia3.architectures import Architecture
from ia3.fast.layers import SelfLayer
from ia3.fast.tables import Tables


class Positions:
    """What a model's own modules make of positions, in tables by length, since they are frozen.

    A CPU meets every length, and a bias takes heads × length².

    Args:
        model: the model.
        architecture: its description.

    Attributes:
        folded: the weights that it is made of, so that a change in place would go unnoticed.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.rotary: Any = None if architecture.rotary is None else model.get_submodule(architecture.rotary)
        self.weight: Tensor = model.get_input_embeddings().weight
        self.folded: list[Tensor] = [] if self.rotary is None else list(self.rotary.buffers())
        if architecture.relative is not None:
            self.folded += [
                own.weight for name, own in model.named_modules() if name.endswith(".relative_attention_bias")
            ]
        self.by_kind = self.rotary is not None and "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.tables = Tables()

    def bias(self, layer: SelfLayer, length: int) -> Tensor | None:
        """Added to a layer's scores, `[1, heads, length, length]`; a decoder's hides what comes later."""
        attention: Any = layer.relative
        if attention is None:
            return None

        def make() -> Tensor:
            bias: Tensor = attention.compute_bias(length, length).to(self.weight.dtype)
            if layer.causal:
                bias = bias + torch.full_like(bias, torch.finfo(bias.dtype).min).triu(1)
            return bias.contiguous()

        return self.tables.get((attention, length), make)

    def bias_by_distance(self, layer: SelfLayer, length: int) -> Tensor | None:
        """The same of one query and the keys up to it, by how far before it they are, `[heads, length]`."""
        attention: Any = layer.relative
        if attention is None:
            return None

        def make() -> Tensor:
            bias: Tensor = attention.compute_bias(1, length, past_seen_tokens=length - 1)[0].to(self.weight.dtype)
            return bias[:, 0].flip(-1).contiguous()

        return self.tables.get((attention, "distance", length), make)

    def angles(self, layer: SelfLayer, length: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines of the first positions, `[length, rotated / 2]`."""
        kind = layer.kind if self.by_kind else None

        def make() -> Tensor:
            at = torch.arange(length, device=self.weight.device)[None]
            both = self.rotary(self.weight, at) if kind is None else self.rotary(self.weight, at, kind)
            # The second half is the first again.
            return torch.stack([each[0].chunk(2, -1)[0] for each in both])

        cos, sin = self.tables.get((kind, length), make)
        return cos, sin
