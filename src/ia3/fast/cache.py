"""Caches of keys and values that stay in one place, for a model's own forward, and the masks over them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one attention, at fixed places: a prompt's at the front, then one position a step.

    Args:
        length: the most positions.
        written: how many are there, `[1]`.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, length: int, written: Tensor) -> None:
        super().__init__()
        self.length, self.written = length, written

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.length, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is attended to: the prompt alone as long as there is no more, then all places, under a mask."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if count > 1:
            self.keys[:, :, :count].copy_(key_states)
            self.values[:, :, :count].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.written, key_states)
        self.values.index_copy_(2, self.written, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.written[0]

    def get_max_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0


def fixed_cache(length: int, written: Tensor) -> Any:
    """A cache whose layers are made as the model asks for them."""
    return Cache(layer_class_to_replicate=partial(FixedLayer, length, written))


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores, so that only the places are seen where this is true."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def fill_up(batch: Tensor, rows: int) -> Tensor:
    """A batch with copies of its first row behind it, `[rows, …]`."""
    missing = rows - len(batch)
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch
