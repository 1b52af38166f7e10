"""Which part of a vector a rank of a tensor-parallel engine multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """One of the equal parts of an activation of `total` channels: the one at `place`, `width` channels wide."""

    total: int
    width: int
    place: int = 0

    def of(self, vector: Tensor) -> Tensor:
        """This rank's part of a vector `[total]`; a ValueError where it is of another length."""
        if len(vector) != self.total:
            raise ValueError(f"A vector of {len(vector)} numbers is for {self.total} channels in vLLM's layer.")
        return vector[self.place * self.width : (self.place + 1) * self.width]


def even(total: int, ranks: int, rank: int) -> Shard:
    """An activation that the ranks share evenly."""
    return Shard(total, total // ranks, rank)


def grouped_heads(heads: int, key_heads: int, size: int, value_size: int, ranks: int, rank: int) -> tuple[Shard, ...]:
    """Queries, keys and values of attention heads of these sizes; more ranks than key heads share them."""
    own, index = max(1, key_heads // ranks), rank // max(1, ranks // key_heads)
    return (
        even(heads * size, ranks, rank),
        *(Shard(key_heads * width, own * width, index) for width in (size, value_size)),
    )


def joined(parts: Sequence[Tensor | None], shards: Sequence[Shard]) -> Tensor:
    """This rank's parts of a projection's vectors, one after the other; an absent vector is one."""
    pairs = zip(parts, shards, strict=True)
    return torch.cat([torch.ones(shard.width) if part is None else shard.of(part) for part, shard in pairs])
