"""Answers that are written side by side in slots: who comes gets a free one while the others go on."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ia3.architectures import architecture_of
from ia3.fast.fused import seq2seq_unsupported_reason
from ia3.fast.generate import unsupported_reason
from ia3.fast.layers import unexpected_site
from ia3.fast.ops.launch import next_power_of_2
from ia3.fast.slots import Slots
from ia3.inference.complete import end_tokens
from ia3.inference.predict import most_positions
from ia3.serving.found import Found, before_end, found_of
from ia3.serving.pieces import Pieces
from ia3.serving.reading import Prompt
from ia3.sites import Layout, Site
from ia3.state import attached
from ia3.tasks.task import TaskKind

_logger = logging.getLogger(__name__)

# What `compile_words` asks for.
_SETTINGS: dict[str, Any] = {"min_length": 0, "num_beams": 1, "do_sample": False}
# Smaller slots would not save much.
_LEAST_SOURCE, _LEAST_NEW = 128, 32
# For longer inputs too much would be kept in slots that are free.
_MOST_SOURCE = 2048
# Slots of so many sizes are kept, each with keys and values of their whole length.
_KEPT = 4


class Size(NamedTuple):
    """Of slots, by a request's own task: so they never have to grow, and who came before changes no answer.

    Args:
        source: the most tokens of an input.
        new: the most tokens of an answer.
    """

    source: int
    new: int


class Place(NamedTuple):
    """Where an answer is written."""

    size: Size
    slot: int


@dataclass
class _Held:
    """Slots, and what is in them.

    Args:
        slots: the slots.
        layout: the table's, when they were made.
        pieces: by slot, what was told of each.
    """

    slots: Slots
    layout: Layout
    pieces: dict[int, Pieces] = field(default_factory=dict)


class Writing:
    """Writes answers of an encoder-decoder under the adapters of its table. One thread at a time may use it.

    Args:
        model: the base model with its table.
        tokenizer: its tokenizer.
        count: the most answers at once, of each size.
        invariant: see `Slots`.
    """

    def __init__(self, model: Any, tokenizer: Any, count: int, *, invariant: bool = False) -> None:
        self.model, self.tokenizer, self.count, self.invariant = model.eval(), tokenizer, count, invariant
        self.reason = seq2seq_unsupported_reason(model, ()) or unsupported_reason(model, **_SETTINGS, max_new_tokens=1)
        self._ends = end_tokens(model, tokenizer) if self.reason is None else []
        self._held: OrderedDict[Size, _Held] = OrderedDict()
        self._refused: set[Size] = set()

    def place_of(self, prompt: Prompt) -> Hashable:
        """With whom a request is answered: a size of slots, or a task in whole batches. Any thread may ask."""
        if self.reason is not None or prompt.task.kind is not TaskKind.GENERATION:
            return prompt.task
        most = most_positions(self.model)
        sizes = (
            next_power_of_2(max(own, least))
            for own, least in ((prompt.room, _LEAST_SOURCE), (prompt.task.max_new_tokens or 1, _LEAST_NEW))
        )
        size = Size(*(each if most is None else min(each, most) for each in sizes))
        fits = 0 < len(prompt.tokens) <= size.source <= _MOST_SOURCE and prompt.longest <= size.new
        return size if fits and size not in self._refused else prompt.task

    def room(self, size: Size) -> int:
        """How many more answers may begin."""
        held = self._held.get(size)
        if held is None:
            return self.count
        if held.layout is not self._layout:  # those in it are written first, then there are others
            return 0 if held.slots.lengths else self.count
        return len(held.slots.free)

    @property
    def sizes(self) -> list[Size]:
        """Of the slots in which something is written."""
        return [size for size, held in self._held.items() if held.slots.lengths]

    def make_ready(self, size: Size) -> bool:
        """Make the slots where there are none for what the model and its table are now.

        Returns:
            Whether there are; if not, what is in the former ones must be written first.

        Raises:
            Exception: whatever stands against slots of this size; `place_of` gives none from then on.
        """
        held = self._held.get(size)
        if held is None or held.layout is not self._layout or not held.slots.is_valid():
            if held is not None and held.slots.lengths:
                held.layout = Layout(())  # so that nobody comes meanwhile
                return False
            self.forget(size)
            self._make(size)
        self._held.move_to_end(size)
        return True

    def admit(self, size: Size, prompts: Sequence[Prompt], vectors: tuple[Layout, Tensor]) -> list[Place | None]:
        """Begin to write answers, for which there is `room` in what was made ready.

        Args:
            size: of the slots.
            prompts: what is read.
            vectors: of each, as `gather_flat` gives them.

        Returns:
            Where each is written; None of an adapter that has vectors where the slots can have none.
        """
        held = self._held[size]
        layout, flat, fits = _within(held.slots.layout, *vectors)
        chosen = [index for index, fit in enumerate(fits) if fit]
        free = held.slots.free[: len(chosen)]
        own = [prompts[index] for index in chosen]
        held.slots.admit(free, [each.tokens for each in own], layout, flat[chosen], [each.longest for each in own])
        for slot in free:
            held.pieces[slot] = Pieces(self.tokenizer)
        places = dict(zip(chosen, free, strict=True))
        return [Place(size, places[index]) if index in places else None for index in range(len(prompts))]

    def step(self, size: Size) -> list[tuple[Place, Found]]:
        """Write each answer of a size one more token; those that have ended."""
        slots = self._held[size].slots
        return [(Place(size, slot), found_of(self.tokenizer, self._ends, slots.tokens(slot))) for slot in slots.step()]

    def more(self, place: Place) -> str:
        """What can be told of an answer since the last time."""
        held = self._held[place.size]
        return held.pieces[place.slot].more(before_end(self._ends, held.slots.tokens(place.slot)))

    def stop(self, places: Sequence[Place]) -> None:
        """Write these no more."""
        for size in {place.size for place in places}:
            self._held[size].slots.stop([place.slot for place in places if place.size == size])

    def forget(self, size: Size) -> None:
        """Let the slots of a size go, whatever is in them."""
        self._held.pop(size, None)

    # Inside

    @property
    def _layout(self) -> Layout:
        table = attached(self.model).table
        assert table is not None
        return table.layout

    def _make(self, size: Size) -> None:
        idle = [each for each, held in self._held.items() if not held.slots.lengths]
        for former in idle[: max(0, len(self._held) + 1 - _KEPT)]:
            self.forget(former)
        layout = self._layout
        try:
            slots = Slots(
                self.model, self.count, *size, _possible(self.model, layout), invariant=self.invariant, **_SETTINGS
            )
        except ValueError:  # else it may be another time
            self._refused.add(size)
            raise
        self._held[size] = _Held(slots, layout)


def _possible(model: Any, layout: Layout) -> Layout:
    """Of a layout's sites those that slots can have, all at once."""
    architecture = architecture_of(model)
    assert architecture is not None
    if unexpected_site(model, architecture, layout.sites) is None:
        return layout
    taken: list[Site] = []
    for site in layout.sites:
        if unexpected_site(model, architecture, [*taken, site]) is None:
            taken.append(site)
    return Layout(tuple(taken))


def _within(known: Layout, layout: Layout, flat: Tensor) -> tuple[Layout, Tensor, list[bool]]:
    """Vectors `[requests, D]` over known sites alone, and which of the requests have none elsewhere."""
    places = set(known.sites)
    inside = [site in places for site in layout.sites]
    if all(inside):
        return layout, flat, [True] * len(flat)
    is_inside = torch.tensor(inside).repeat_interleave(torch.tensor(layout.widths)).to(flat.device)
    fits: list[bool] = (flat[:, ~is_inside] == 1).all(1).tolist()
    sites = tuple(site for site, is_known in zip(layout.sites, inside, strict=True) if is_known)
    return Layout(sites), flat[:, is_inside], fits
