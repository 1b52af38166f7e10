"""Which adapter each example of a running call uses: one row of vectors an example.

The rows of a call belong to its thread and to its model: two threads, or two models in one thread, see only their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ia3.layers import channel_dims, check_numbers
from ia3.sites import Layout, Side, Site
from ia3.stacked import StackedHead

# The name for no adapter.
BASE = "__base__"


class _Call(threading.local):
    """The call that is under way in a thread."""

    rows: Rows | None = None
    tokens: frozenset[int] = frozenset()


_call = _Call()


@dataclass(frozen=True)
class Flat:
    """Rows of vectors before they are split by site.

    Args:
        layout: their sites, whole ones.
        vectors: `[names, D]`.
        own: the sites at which each name has vectors; at the others there are ones.
    """

    layout: Layout
    vectors: Tensor
    own: tuple[tuple[Site, ...], ...]


@dataclass(frozen=True)
class Rows:
    """The vectors of a batch whose examples use different adapters.

    Args:
        names: the adapter of each example; with `places` the adapters in the batch, each once.
        slices: by a site's module, the side and one vector a name, `[names, width]`; every site of the model is
            there, those that no example has a vector for without any.
        places: for rows that pack several examples, which of the names each token uses, `[batch, length]`.
        heads: modules that adapters of a table train in full.
        flat: the same vectors, for what computes without the modules; None where nobody can.
    """

    names: tuple[str, ...]
    slices: Mapping[nn.Module, Mapping[Side, Tensor]]
    places: Tensor | None = None
    heads: Mapping[nn.Module, StackedHead] = field(default_factory=dict)
    flat: Flat | None = None

    def chosen(self, rows: Sequence[int]) -> Rows:
        """Those of some examples, one row an example."""
        slices = {
            site: {side: vectors[list(rows)] for side, vectors in sides.items()} for site, sides in self.slices.items()
        }
        return Rows(tuple(self.names[row] for row in rows), slices)

    def has(self, site: nn.Module, side: Side) -> bool:
        """Whether any example has a vector here."""
        return self.slices[site].get(side) is not None

    def scale(self, site: nn.Module, side: Side, activation: Tensor, *, channels_first: bool) -> Tensor:
        """The product of an activation with its examples' vectors, at a site and side that `has` them.

        Args:
            site: the site's module.
            side: which side of it.
            activation: `[batch · k, …, width]`, with k rows an example in their order, as beams and samples stand; or
                `[batch · k, width, …]` with the channels first.
            channels_first: a convolution's.

        Raises:
            ValueError: a number of rows that is no multiple of the examples', or of tokens that isn't the places'.
            TypeError: the activation is not of floating-point or complex numbers, or has other channels.
        """
        vectors = self.slices[site][side]
        check_numbers(activation)
        if self.places is not None:
            return activation * self._of_each_token(vectors, self.places, activation)
        count = self.rows_an_example(activation)
        if count > 1:  # else the product alone is one kernel
            vectors = vectors.repeat_interleave(count, dim=0)
        vectors = vectors.to(activation)
        after = activation.dim() - 2 if channels_first else 0
        dims = channel_dims(activation.shape, vectors.shape[-1], spatial=after)
        before = activation.dim() - 1 - len(dims) - after
        return activation * vectors.view(len(vectors), *(1,) * before, *dims, *(1,) * after)

    def _of_each_token(self, vectors: Tensor, places: Tensor, activation: Tensor) -> Tensor:
        """The tokens' own vectors, shaped as the activation `[batch, length, width]` or `[batch · length, width]`."""
        if activation.shape[:-1] not in (places.shape, (places.numel(),)):
            raise ValueError(
                f"An activation of {tuple(activation.shape)} doesn't hold the {tuple(places.shape)} tokens of "
                "adapter_names one by one: this model can't take a name a token. Pass one example a row."
            )
        chosen = vectors.to(activation).index_select(0, places.flatten().to(activation.device))
        return chosen.view(activation.shape)

    def of_tokens(self, tokens: int, device: torch.device) -> Tensor:
        """Which row of vectors each of a batch's tokens uses, one after another, `[tokens]`.

        Raises:
            ValueError: other tokens than those of the batch, so that it can't be said whose they are.
        """
        counts = _call.tokens
        if (counts and tokens not in counts) or (self.places is not None and tokens != self.places.numel()):
            raise ValueError(
                f"{tokens} tokens can't be told apart by adapter_names: the batch has {sorted(counts)}, and this model "
                "sends some of them another way. Run the adapters one after the other."
            )
        if self.places is not None:
            return self.places.flatten().to(device)
        count, rest = divmod(tokens, len(self.names))
        if rest:
            raise ValueError(f"{tokens} tokens can't be told apart by {len(self.names)} adapter_names.")
        return torch.arange(len(self.names), device=device).repeat_interleave(count)

    def alike(self) -> list[list[int]]:
        """The rows that have the same vectors, those of each adapter; a row of none stands alone."""
        found: dict[str | int, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(row if name == BASE else name, []).append(row)
        return list(found.values())

    def rows_an_example(self, activation: Tensor) -> int:
        """How many rows of an activation belong to each example.

        Raises:
            ValueError: a number of rows that is no multiple of the examples'.
        """
        count, rest = divmod(activation.shape[0], len(self.names))
        if rest:
            raise ValueError(
                f"An activation of {activation.shape[0]} rows can't be told apart by {len(self.names)} adapter_names: "
                "this model puts its examples together in a way that mixed batches don't support."
            )
        return count


def running(site: nn.Module) -> Rows | None:
    """The rows of the call that is under way in this thread, if it is one of this site's model."""
    rows = _call.rows
    return None if rows is None or site not in rows.slices else rows


def act_here() -> bool:
    """Whether any rows act in this thread."""
    return _call.rows is not None


def acting_here() -> Rows | None:
    """The rows that act in this thread, of whichever model."""
    return _call.rows


@contextmanager
def acting(rows: Rows) -> Iterator[None]:
    """Let the rows act in this thread, until the end of it, however that comes."""
    former, _call.rows = _call.rows, rows
    try:
        yield
    finally:
        _call.rows = former


@contextmanager
def holding(tokens: frozenset[int]) -> Iterator[None]:
    """Let it be known in this thread how many tokens the batch of the forward that begins has."""
    former, _call.tokens = _call.tokens, tokens
    try:
        yield
    finally:
        _call.tokens = former


def split_by_name(names: Sequence[str], count: int, device: torch.device) -> dict[str, Tensor]:
    """The indices of each name's rows among `count` rows an example."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(name for name in names for _ in range(count)):
        places.setdefault(name, []).append(place)
    return {name: torch.tensor(indices, device=device) for name, indices in places.items()}
