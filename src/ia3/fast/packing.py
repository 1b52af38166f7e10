"""Batches without padding: the tokens of all examples one after another, and where each example's are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

IGNORED = -100
INPUTS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Spans:
    """Where each example's tokens are.

    Args:
        starts: example e has the rows from `starts[e]` to before `starts[e + 1]`; `[examples + 1]`, int32. Rows from
            the last on belong to nobody.
        longest: no example has more rows.
        rows: of all, those of nobody included.
        groups: the examples are divided into so many equal groups in their order.
        uniform: every example has `longest` rows and nobody's are left, which the host knows.

    Raises:
        ValueError: the examples can't be divided into these groups.
    """

    starts: Tensor
    longest: int
    rows: int
    groups: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.examples % self.groups:
            raise ValueError(f"{self.examples} examples can't be divided into {self.groups} equal groups.")

    @classmethod
    def even(cls, examples: int, length: int, groups: int, device: torch.device) -> Spans:
        """Examples of equal length."""
        starts = torch.arange(0, (examples + 1) * length, length, dtype=torch.int32, device=device)
        return cls(starts, length, examples * length, groups, uniform=True)

    @property
    def examples(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def edges(self) -> Tensor:
        """The first row of each group, and the end of the last, `[groups + 1]`."""
        return self.starts[:: self.examples // self.groups].contiguous()

    @cached_property
    def of_row(self) -> Tensor:
        """The example of each row, `[rows]`; nobody's rows count as the last's."""
        rows = torch.arange(self.rows, dtype=torch.int32, device=self.starts.device)
        return torch.searchsorted(self.starts[1:], rows, right=True).clamp(max=self.examples - 1)

    @cached_property
    def group_of_row(self) -> Tensor:
        """`[rows]`, int32."""
        return (self.of_row // (self.examples // self.groups)).int()

    @cached_property
    def mask(self) -> Tensor:
        """Where an example has a row, `[examples, longest]`."""
        lengths = self.starts[1:] - self.starts[:-1]
        return torch.arange(self.longest, device=self.starts.device) < lengths[:, None]

    @cached_property
    def _padded(self) -> Tensor:
        places = self.starts[:-1, None] + torch.arange(self.longest, device=self.starts.device)
        return places.clamp(max=self.rows - 1).flatten()

    @cached_property
    def _unpadded(self) -> Tensor:
        row = torch.arange(self.rows, device=self.starts.device)
        place = self.of_row * self.longest + row - self.starts[self.of_row]
        return place.clamp(max=self.examples * self.longest - 1)

    def pad(self, x: Tensor) -> Tensor:
        """`[rows, width]` to `[examples, longest, width]`; where an example has no row is some other's."""
        if not self.uniform:
            x = x.index_select(0, self._padded)
        return x.reshape(self.examples, self.longest, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        x = x.flatten(0, 1)
        return x if self.uniform else x.index_select(0, self._unpadded)


@dataclass(frozen=True)
class Packed:
    """A batch of inputs and labels, without padding.

    Args:
        tokens: of all inputs, `[rows]`.
        starts: see `Spans`.
        labels: `[examples, target]`, -100 where nothing is learned.
        longest: no input has more tokens.
        uniform: see `Spans`.
    """

    tokens: Tensor
    starts: Tensor
    labels: Tensor
    longest: int
    uniform: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, "starts": self.starts, "labels": self.labels}

    def spans(self, groups: int) -> Spans:
        """Of the inputs.

        Raises:
            ValueError: the examples can't be divided into these groups.
        """
        return Spans(self.starts, self.longest, len(self.tokens), groups, self.uniform)


def pack(batch: Mapping[str, Tensor]) -> Packed:
    """Leave out the padding.

    Args:
        batch: `input_ids` and `attention_mask` `[batch, source]`, `labels` `[batch, target]`, best on the CPU: how long
            the examples are must be known here.

    Raises:
        ValueError: other or missing inputs; a mask that hides tokens between others; an example with labels whose
            input has no token.
    """
    if set(batch) != set(INPUTS):
        raise ValueError(f"The batch holds {sorted(batch)}; this step takes {sorted(INPUTS)} and no more.")
    ids, mask, labels = batch["input_ids"].cpu(), batch["attention_mask"].cpu() != 0, batch["labels"].cpu()
    lengths, pieces = mask.sum(1), _pieces(mask)
    if bool((pieces > 1).any()):
        raise ValueError(
            f"The attention_mask of example {int(pieces.argmax())} hides tokens between others. This step leaves "
            "padding out, at the end or the beginning; train with the model's own forward where a mask has holes."
        )
    empty = (lengths == 0) & (labels != IGNORED).any(1)
    if bool(empty.any()):
        raise ValueError(f"Example {int(empty.int().argmax())} has labels, and no token in its input.")
    starts = torch.zeros(len(ids) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    longest = max(1, int(lengths.max()))
    return Packed(ids[mask], starts, labels, longest, uniform=bool((lengths == longest).all()))


def packable(mask: Tensor) -> bool:
    """Whether each example has tokens, without any hidden between others: `[batch, source]`, 0 at padding."""
    mask = mask.cpu() != 0
    return bool((_pieces(mask) == 1).all())


def _pieces(mask: Tensor) -> Tensor:
    """In how many pieces each row's tokens are."""
    return mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)


def round_up(packed: Packed, examples: int, filler: int) -> Packed:
    """To one of few shapes, so that few graphs serve all batches: filled up with rows and examples that are nobody's.

    Args:
        packed: a batch.
        examples: as many as the largest batch has.
        filler: a token.
    """
    rows = _rounded(len(packed.tokens))
    missing = (0, rows - len(packed.tokens))
    more = examples - len(packed.labels)
    width = -packed.labels.shape[1] % 4
    return Packed(
        torch.nn.functional.pad(packed.tokens, missing, value=filler),
        torch.cat([packed.starts, packed.starts[-1:].expand(more)]),
        torch.nn.functional.pad(packed.labels, (0, width, 0, more), value=IGNORED),
        next((length for length in (16, 64, 128, 256) if packed.longest <= length), -(-packed.longest // 64) * 64),
    )


def _rounded(count: int) -> int:
    """Up to a multiple of 64, of more from 2,048 on: at most a fifteenth more."""
    multiple = max(64, 1 << max(0, count.bit_length() - 5))
    return max(1, -(-count // multiple)) * multiple
