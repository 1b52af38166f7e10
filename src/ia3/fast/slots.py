"""Slots for an encoder-decoder's generations: a request gets a free one while the others go on.

Whatever a step reads stays in one place in memory, and each slot has a part of it: its adapter's vectors, the keys and
values of its input and of its tokens so far, and how many tokens it may have. So one recorded step serves whoever is
in the slots, and an admission only writes the slots that it fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ia3.architectures import architecture_of, has_learned_positions
from ia3.fast.batch import Packed, pack_prompts, round_up
from ia3.fast.capture import GraphedCallable
from ia3.fast.decoding import Decoding, Room
from ia3.fast.fused import FusedLoss, seq2seq_unsupported_reason
from ia3.fast.generate import unsupported_reason
from ia3.fast.guard import Guard
from ia3.fast.ops.decode import Source
from ia3.fast.ops.greedy import Answers, take_likeliest
from ia3.fast.ops.launch import compile_kernels, next_power_of_2
from ia3.fast.ragged import Ragged
from ia3.fast.sessions import BUCKET, GenerationPlan, Watch, over, round_up_to
from ia3.sites import Layout


class Slots:
    """Greedy generations side by side, each with an adapter, a length and an end of its own.

    The tokens of a slot are those of `compile_generate` for its request alone, whoever is in the other slots; in half
    precision as far as rounding goes, which depends on how many are computed at once. One thread at a time may use
    them.

    Args:
        model: a T5 or another encoder-decoder that `compile_generate` can capture, in evaluation mode on its device.
        slots: how many requests are written at once.
        max_source: no input has more tokens; the keys and values of so many are kept for each slot.
        max_new_tokens: no request gets more.
        layout: the sites that an adapter may have vectors at, such as an `AdapterTable`'s.
        settings: other arguments of `generate` that are the same for all requests.

    Attributes:
        lengths: the tokens of each live slot's input, by slot.

    Raises:
        ValueError: a model, sites or settings that can't be computed here; sizes below one or beyond the model's
            positions.

    Example:
        >>> slots = Slots(model, 32, max_source=512, max_new_tokens=64, layout=table.layout)
        >>> slots.admit(slots.free[:2], [ids, other_ids], *gather_flat(model, ["news", "sports"]))
        >>> for slot in slots.step():
        ...     print(slots.tokens(slot))
    """

    def __init__(
        self, model: Any, slots: int, max_source: int, max_new_tokens: int, layout: Layout, **settings: Any
    ) -> None:
        settings = {"do_sample": False, "num_beams": 1, **settings, "max_new_tokens": max_new_tokens}
        _check_sizes(slots=slots, max_source=max_source, max_new_tokens=max_new_tokens)
        reason = seq2seq_unsupported_reason(model, layout.sites) or unsupported_reason(model, **settings)
        reason = reason or _positions_unsupported_reason(model, max_source, max_new_tokens)
        if reason is not None:
            raise ValueError(f"No slots for this model: {reason}. Use compile_generate, which takes whole batches.")
        self.model, self.count, self.max_source, self.layout = model, slots, max_source, layout
        self.plan, device = GenerationPlan.of(model, settings), model.device
        self.fused = FusedLoss(model, layout)
        self.guard, self.backend = Guard(model, self.fused.folded), self.fused.backend
        # One more than are lent: an admission of a recorded size writes there what fills it up.
        every, positions = slots + 1, round_up_to(max_new_tokens, BUCKET)
        self.decoding = Decoding(self.fused, Room(every, every, positions, every * max_source, max_source))
        self.most = slots, positions, max_source
        self.flat = torch.ones(every, layout.size, dtype=model.dtype, device=device)
        self.first = torch.arange(every, dtype=torch.int32, device=device) * max_source
        self.end = self.first.clone()
        self.answers = Answers.none(every, max_new_tokens, self.plan.ends, self.plan.pad, self.plan.last, device)
        self.answers.ended.fill_(True)
        self.one = Ragged.even(slots, 1, slots, device)
        _ = self.one.group_of_token  # known before a step is recorded
        self.reading = GraphedCallable(self._read, device, repeatable=True)
        self.stepping = GraphedCallable(self._write, device)
        self.watch, self.steps = Watch(device), 0
        self.lengths: dict[int, int] = {}
        self.since, self.known = [0] * slots, [0] * slots  # the last step before an admission; tokens that were seen
        with torch.inference_mode():
            compile_kernels(lambda: self._write(*self.most), device)

    @property
    def free(self) -> list[int]:
        """The slots for which nothing is written, the first ones first: a CPU computes up to the last live one."""
        return [slot for slot in range(self.count) if slot not in self.lengths]

    def is_valid(self) -> bool:
        """Whether the model still is what it was; if not, only new slots compute what it does now."""
        return self.guard.is_valid()

    @torch.inference_mode()
    def admit(
        self, slots: Sequence[int], rows: Sequence[Sequence[int]], layout: Layout, flat: Tensor,
        max_new: Sequence[int] | None = None, min_new: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Read inputs and give each a slot, whose first token the next step writes. What it held before is forgotten.

        Args:
            slots: free ones.
            rows: the tokens of each input, without padding.
            layout: the sites of `flat`; at the slots' others there is no vector.
            flat: the vectors of each, `[inputs, D]`, on any device; see `mixing.gather_flat`.
            max_new: the most tokens of each, at most `max_new_tokens`, which it is where it is left out.
            min_new: the fewest tokens of each; what the settings say where it is left out.

        Raises:
            ValueError: any of these is wrong; no slot has changed then.
            RuntimeError: the model has changed since the slots were made.
        """
        most = [self.plan.max_new_tokens] * len(slots) if max_new is None else list(max_new)
        default = max(self.plan.min_length - 1, self.plan.min_new_tokens, 0)
        least = [default] * len(slots) if min_new is None else list(min_new)
        self._check(slots, rows, layout, flat, most, least)
        if not slots:
            return
        index = torch.tensor(slots, device=self.flat.device)
        self.flat.index_copy_(0, index, over(self.layout, layout, flat.to(self.flat)))
        fixed, tensors = self._packed(slots, rows, most, least)
        self.reading(*fixed, **tensors)
        for slot, row in zip(slots, rows, strict=True):
            self.lengths[slot], self.since[slot], self.known[slot] = len(row), self.steps, 0

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Write each live slot one more token; the slots that were seen to have ended, which are free from now on.

        A GPU goes on meanwhile: an end is seen a few steps late, and until then nothing more is written there.
        """
        if not self.lengths:
            return []
        seen = self.watch.sees(self.stepping(*self._reach()))
        self.steps += 1
        if seen is None:
            return []
        # Of an earlier step the slots that were filled after it say nothing.
        number, (counts, ended) = self.steps - len(self.watch.pending), seen.tolist()
        old = [slot for slot in sorted(self.lengths) if self.since[slot] < number]
        for slot in old:
            self.known[slot] = counts[slot]
        over_now = [slot for slot in old if ended[slot]]
        for slot in over_now:
            del self.lengths[slot]
        return over_now

    def tokens(self, slot: int) -> list[int]:
        """What was seen of a slot's tokens, all of them with the end token where it has ended, until it is lent again.

        Raises:
            ValueError: no such slot.
        """
        self._check_slots([slot])
        found: list[int] = self.answers.tokens[slot, : self.known[slot]].tolist()
        return found

    @torch.inference_mode()
    def stop(self, slots: Sequence[int]) -> None:
        """Write no more for these slots, which are free from now on.

        Raises:
            ValueError: no such slot.
        """
        self._check_slots(slots)
        self.answers.ended.index_fill_(0, torch.tensor(slots, dtype=torch.long, device=self.flat.device), True)
        for slot in slots:
            self.lengths.pop(slot, None)

    # What is recorded

    def _read(
        self, max_seqlen: int, uniform: bool, *, slots: Tensor, places: Tensor, limits: Tensor, **tensors: Tensor
    ) -> None:
        """Encode packed inputs into slots.

        Args:
            max_seqlen, uniform, tensors: see `Packed`.
            slots: whose the inputs are, `[inputs]`.
            places: of each token among the keys and values of all slots, `[total_tokens]`.
            limits: the most and the fewest new tokens, `[2, inputs]`.
        """
        packed, answers, decoding = Packed(tensors, max_seqlen, uniform), self.answers, self.decoding
        vectors = self.layout.split(self.flat.index_select(0, slots)[None])
        kv = decoding.read_source(packed, packed.ragged(len(slots)), vectors)
        assert decoding.kv is not None
        if self.backend == "torch":  # which multiplies what it doesn't see by zero, and infinity stays no number
            decoding.kv.view(self.count + 1, self.max_source, -1).index_fill_(0, slots, 0)
            for cache in decoding.caches:
                cache.index_fill_(1, slots, 0)
        decoding.kv.index_copy_(0, places, kv)
        decoding.place.index_fill_(0, slots, 0)
        lengths = packed["cu_seqlens"][1:] - packed["cu_seqlens"][:-1]
        self.end.index_copy_(0, slots, self.first.index_select(0, slots) + lengths)
        answers.token.index_fill_(0, slots, self.plan.start)
        answers.count.index_fill_(0, slots, 0)
        answers.max_tokens.index_copy_(0, slots, limits[0])
        answers.min_tokens.index_copy_(0, slots, limits[1])
        answers.ended.index_copy_(0, slots, lengths == 0)  # of what fills up

    def _write(self, slots: int, positions: int, source: int) -> Tensor:
        """One more token for the first slots; how many each has and whether it has ended, `[2, slots]`.

        Args:
            slots: so many.
            positions: no more have been written for any of them, this one included.
            source: none of their inputs has more tokens.
        """
        answers, place = self.answers.first(slots), self.decoding.place[:slots]
        first, end = self.first[:slots], self.end[:slots]
        logits = self.decoding.logits_behind(
            answers.token.flatten(),
            self.layout.split(self.flat[None, :slots]),
            place,
            [cache[:, :slots, :, :positions] for cache in self.decoding.caches],
            Source(first, end, source, stride=self.max_source),
            self.one if slots == self.count else Ragged.even(slots, 1, slots, place.device),
        )
        take_likeliest(logits, answers, has_least=True, backend=self.backend)
        # Slots that have ended have nothing to read until they are lent again.
        place.mul_(~answers.ended)
        end.copy_(torch.where(answers.ended, first, end))
        return torch.stack([answers.count, answers.ended.long()])

    # What goes there

    def _reach(self) -> tuple[int, int, int]:
        """What the next step looks at: where nothing is recorded, no more than is live."""
        if self.stepping.captures:
            return self.most
        written = max(self.known[slot] for slot in self.lengths) + 1
        return max(self.lengths) + 1, round_up_to(written, BUCKET), max(self.lengths.values())

    def _packed(
        self, slots: Sequence[int], rows: Sequence[Sequence[int]], most: Sequence[int], least: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The arguments of `_read`; where it is recorded, filled up to one of few shapes."""
        ids, mask = (
            pad_sequence([torch.tensor(row) for row in each], batch_first=True)
            for each in (rows, [[1] * len(row) for row in rows])
        )
        packed = pack_prompts(ids, mask, positions=has_learned_positions(self.fused.architecture))
        real, filled = packed.total_tokens, len(rows)
        tensors = dict(packed.tensors)
        if self.reading.captures:
            filled = next_power_of_2(len(rows))
            packed = round_up(packed, filled, self.plan.pad)
            more = next_power_of_2(packed.total_tokens) - packed.total_tokens
            tensors = dict(packed.tensors)
            for name in {"tokens", "positions"} & set(tensors):
                tensors[name] = functional.pad(tensors[name], (0, more))
        spare = [self.count] * (filled - len(rows))
        tensors["slots"] = torch.tensor([*slots, *spare])
        tensors["limits"] = functional.pad(torch.tensor([most, least]), (0, len(spare)))
        tensors["places"] = torch.full((len(tensors["tokens"]),), self.count * self.max_source)
        begins = [slot * self.max_source for slot in slots]
        tensors["places"][:real] = torch.cat(
            [torch.arange(begin, begin + len(row)) for begin, row in zip(begins, rows, strict=True)]
        )
        return packed.fixed, tensors

    # What is refused

    def _check(
        self, slots: Sequence[int], rows: Sequence[Sequence[int]], layout: Layout, flat: Tensor, most: Sequence[int],
        least: Sequence[int],
    ) -> None:  # fmt: skip
        if not self.is_valid():
            raise RuntimeError("The model has changed since these slots were made: make new ones for what it is now.")
        counts = [len(slots), len(rows), len(flat), len(most), len(least)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"There are {counts[0]} slots, {counts[1]} inputs, {counts[2]} rows of vectors, and limits for "
                f"{counts[3]} and {counts[4]}: pass one of each an input."
            )
        self._check_slots(slots)
        taken = sorted({slot for slot in slots if slot in self.lengths or slots.count(slot) > 1})
        if taken:
            raise ValueError(f"Slot {taken[0]} is not free, or named twice: choose different ones of `free`.")
        for row, new in zip(rows, most, strict=True):
            if not 0 < len(row) <= self.max_source:
                raise ValueError(f"An input has {len(row)} tokens: these slots take from 1 to {self.max_source}.")
            if not 0 < new <= self.plan.max_new_tokens:
                raise ValueError(f"max_new is {new}: these slots write from 1 to {self.plan.max_new_tokens} tokens.")
        layout.split(flat)  # which says what is wrong with their width
        known = set(self.layout.sites)
        other = [site.path for site in layout.sites if site not in known]
        if other:
            raise ValueError(
                f"There are vectors at {other[0]}, and these slots have no place there: make slots with a layout of "
                "all adapters' sites."
            )

    def _check_slots(self, slots: Sequence[int]) -> None:
        unknown = [slot for slot in slots if not 0 <= slot < self.count]
        if unknown:
            raise ValueError(f"There is no slot {unknown[0]}: these are 0 to {self.count - 1}.")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1.")


def _positions_unsupported_reason(model: Any, max_source: int, max_new_tokens: int) -> str | None:
    """Why a model has not so many positions; None where it has."""
    architecture = architecture_of(model)
    assert architecture is not None
    names = ("max_source", "max_new_tokens")
    for stack, name, size in zip(architecture.stacks, names, (max_source, max_new_tokens), strict=True):
        if stack.positions is not None:
            path, offset = stack.positions
            known = len(model.get_submodule(path).weight) - offset
            if size > known:
                return f"{name} is {size}, and its {path} has {known} positions"
    return None
