"""Batches without padding: the tokens of all examples one after another, and where each example's are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Ragged:
    """Where each example's tokens are.

    Args:
        cu_seqlens: example e has the tokens from `cu_seqlens[e]` to before `cu_seqlens[e + 1]`; `[examples + 1]`,
            int32. Tokens from the last on are padding, which fills a batch up to one of few sizes.
        max_seqlen: no example has more tokens.
        total_tokens: padding tokens included.
        groups: the examples are divided into so many equal groups in their order.
        uniform: every example has `max_seqlen` tokens and there is no padding, which the host knows.

    Raises:
        ValueError: the examples can't be divided into these groups.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    total_tokens: int
    groups: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.examples % self.groups:
            raise ValueError(f"{self.examples} examples can't be divided into {self.groups} equal groups.")

    @classmethod
    def even(cls, examples: int, length: int, groups: int, device: torch.device) -> Ragged:
        """Examples of equal length."""
        cu_seqlens = torch.arange(0, (examples + 1) * length, length, dtype=torch.int32, device=device)
        return cls(cu_seqlens, length, examples * length, groups, uniform=True)

    @property
    def examples(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def group_edges(self) -> Tensor:
        """The first token of each group, and the end of the last, `[groups + 1]`."""
        return self.cu_seqlens[:: self.examples // self.groups].contiguous()

    @cached_property
    def example_of_token(self) -> Tensor:
        """`[total_tokens]`; padding tokens count as the last example's."""
        tokens = torch.arange(self.total_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], tokens, right=True).clamp(max=self.examples - 1)

    @cached_property
    def group_of_token(self) -> Tensor:
        """`[total_tokens]`, int32."""
        return (self.example_of_token // (self.examples // self.groups)).int()

    @cached_property
    def mask(self) -> Tensor:
        """Where an example has a token, `[examples, max_seqlen]`."""
        lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        return torch.arange(self.max_seqlen, device=self.cu_seqlens.device) < lengths[:, None]

    @cached_property
    def _padded(self) -> Tensor:
        at = self.cu_seqlens[:-1, None] + torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return at.clamp(max=self.total_tokens - 1).flatten()

    @cached_property
    def _unpadded(self) -> Tensor:
        token = torch.arange(self.total_tokens, device=self.cu_seqlens.device)
        at = self.example_of_token * self.max_seqlen + token - self.cu_seqlens[self.example_of_token]
        return at.clamp(max=self.examples * self.max_seqlen - 1)

    def pad(self, x: Tensor) -> Tensor:
        """`[total_tokens, width]` to `[examples, max_seqlen, width]`; where an example has no token is some other's."""
        if not self.uniform:
            x = x.index_select(0, self._padded)
        return x.reshape(self.examples, self.max_seqlen, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        x = x.flatten(0, 1)
        return x if self.uniform else x.index_select(0, self._unpadded)
