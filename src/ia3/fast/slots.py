"""Slots for an encoder-decoder's generations: a request gets a free one while the others go on.

Whatever a step reads stays in one place in memory, and each slot has a part of it: its adapter's vectors, the keys and
values of its input and of its tokens so far, and how many tokens it may have. So one recorded step serves whoever is
in the slots, and an admission only writes the slots that it fills.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ia3.architectures import architecture_of, has_learned_positions
from ia3.fast.batch import Packed, pack_prompts, pad_right, round_up, rounded_length
from ia3.fast.capture import GraphedCallable
from ia3.fast.compare_decoding import decoding_difference
from ia3.fast.decoding import Decoding, Room
from ia3.fast.fused import FusedLoss, seq2seq_unsupported_reason
from ia3.fast.generate import unsupported_reason
from ia3.fast.graphed import moved_by
from ia3.fast.guard import Guard, copied
from ia3.fast.ops.decode import Source
from ia3.fast.ops.greedy import Answers, take_likeliest
from ia3.fast.ops.launch import compile_kernels, next_power_of_2
from ia3.fast.ragged import Ragged
from ia3.fast.sessions import BUCKET, GenerationPlan, Watch, over, round_up_to
from ia3.fast.surroundings import INSTEAD_OF_AUTOCAST, is_autocast_on
from ia3.sites import Layout

# Where every computation has one shape, so many texts are read at once.
_READ = 8
# Vectors of a comparison are this much above and below one.
_MADE_UP = 0.1


class Slots:
    """Greedy generations side by side, each with an adapter, a length and an end of its own.

    The tokens of a slot are those of `compile_generate` for its request alone, whoever is in the other slots; in half
    precision as far as rounding goes, which depends on how many are computed at once, unless they are `invariant`. One
    thread at a time may use them.

    Args:
        model: a T5 or another encoder-decoder that `compile_generate` can capture, in evaluation mode on its device.
        slots: how many requests are written at once.
        max_source: no input has more tokens; the keys and values of so many are kept for each slot.
        max_new_tokens: no request gets more.
        layout: the sites that an adapter may have vectors at, such as an `AdapterTable`'s.
        invariant: whether the shape of all that is computed depends on a request's own length alone, so that its tokens
            are the same to the last bit of each number whoever comes with it. Every step then computes all slots, and
            inputs are read by eight of about the same length, filled up.
        settings: other arguments of `generate` that are the same for all requests.

    Attributes:
        lengths: the tokens of each live slot's input, by slot.

    Raises:
        ValueError: a model, sites or settings that can't be computed here, which the logits of two made-up inputs
            show, too; sizes below one or beyond the model's positions.

    Example:
        >>> slots = Slots(model, 32, max_source=512, max_new_tokens=64, layout=table.layout)
        >>> slots.admit(slots.free[:2], [ids, other_ids], *gather_flat(model, ["news", "sports"]))
        >>> for slot in slots.step():
        ...     print(slots.tokens(slot))
    """

    def __init__(
        self, model: Any, slots: int, max_source: int, max_new_tokens: int, layout: Layout, *,
        invariant: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        settings = {"do_sample": False, "num_beams": 1, **settings, "max_new_tokens": max_new_tokens}
        _check_sizes(slots=slots, max_source=max_source, max_new_tokens=max_new_tokens)
        reason = seq2seq_unsupported_reason(model, layout.sites) or unsupported_reason(model, **settings)
        reason = reason or _positions_unsupported_reason(model, max_source, max_new_tokens)
        _expect_none(reason)
        self.model, self.count, self.max_source, self.layout = model, slots, max_source, layout
        self.invariant, self.read_by = invariant, _columns_within(model, layout)
        self.plan, device = GenerationPlan.of(model, settings), model.device
        self.fused = FusedLoss(model, layout)
        _expect_none(_difference(self.fused, max_source, self.plan.start))
        self.guard, self.backend = Guard(model, self.fused.folded), self.fused.backend
        self.defaults = copied(vars(model.generation_config))
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
        self.since = [0] * slots  # the last step before an admission
        self.written: list[list[int]] = [[] for _ in range(slots)]  # what was seen of each
        with torch.inference_mode():
            compile_kernels(lambda: self._write(*self.most), device)

    @property
    def free(self) -> list[int]:
        """The slots for which nothing is written, the first ones first: a CPU computes up to the last live one."""
        return [slot for slot in range(self.count) if slot not in self.lengths]

    def is_valid(self) -> bool:
        """Whether the model, and how it generates, still is what it was; if not, only new slots do as it does now."""
        return self.guard.is_valid() and vars(self.model.generation_config) == self.defaults

    @torch.inference_mode()
    def admit(
        self, slots: Sequence[int], rows: Sequence[Sequence[int]], layout: Layout, flat: Tensor,
        max_new: Sequence[int] | None = None, min_new: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Read inputs and give each a slot, whose first token the next step writes. What it held before is forgotten.

        Inputs with the same tokens, and the same vectors in the encoder, are encoded once.

        Args:
            slots: free ones.
            rows: the tokens of each input, without padding.
            layout: the sites of `flat`; at the slots' others there is no vector.
            flat: the vectors of each, `[inputs, D]`, on any device; see `mixing.gather_flat`.
            max_new: the most tokens of each, at most `max_new_tokens`, which it is where it is left out.
            min_new: the fewest tokens of each; what the settings say where it is left out.

        Raises:
            ValueError: any of these is wrong; no slot has changed then.
            RuntimeError: the model has changed since the slots were made, or autocast is on.
        """
        self._expect_own_precision()
        most = [self.plan.max_new_tokens] * len(slots) if max_new is None else list(max_new)
        default = max(self.plan.min_length - 1, self.plan.min_new_tokens, 0)
        least = [default] * len(slots) if min_new is None else list(min_new)
        self._check(slots, rows, layout, flat, most, least)
        if not slots:
            return
        index = torch.tensor(slots, device=self.flat.device)
        own = over(self.layout, layout, flat.to(self.flat))
        self.flat.index_copy_(0, index, own)
        for part in self._parts(rows, self._texts(rows, own)):
            fixed, tensors = self._packed(part, slots, rows, most, least)
            self.reading(*fixed, **tensors)
        for slot, row in zip(slots, rows, strict=True):
            self.lengths[slot], self.since[slot], self.written[slot] = len(row), self.steps, []

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Write each live slot one more token; the slots that were seen to have ended, which are free from now on.

        A GPU goes on meanwhile: an end is seen a few steps late, and until then nothing more is written there.

        Raises:
            RuntimeError: autocast is on.
        """
        self._expect_own_precision()
        if not self.lengths:
            return []
        seen = self.watch.sees(self.stepping(*self._reach()))
        self.steps += 1
        if seen is None:
            return []
        # Of an earlier step the slots that were filled after it say nothing.
        number, (counts, ended, tokens) = self.steps - len(self.watch.pending), seen.tolist()
        old = [slot for slot in sorted(self.lengths) if self.since[slot] < number]
        for slot in old:
            if counts[slot] > len(self.written[slot]):
                self.written[slot].append(tokens[slot])
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
        return list(self.written[slot])

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
        self, max_seqlen: int, uniform: bool, *, slots: Tensor, places: Tensor, limits: Tensor,
        readers: Tensor | None = None, copied: Tensor | None = None, edges: Tensor | None = None, **tensors: Tensor,
    ) -> None:  # fmt: skip
        """Encode packed texts into slots.

        Args:
            max_seqlen, uniform, tensors: see `Packed`.
            slots: whose the inputs are, `[inputs]`.
            places: of each input's tokens among the keys and values of all slots, `[tokens]`.
            limits: the most and the fewest new tokens, `[2, inputs]`.
            readers: where some inputs share a text, a slot whose vectors each text is encoded with, `[texts]`.
            copied: alike, the text's token that each input's token is, `[tokens]`.
            edges: alike, where each input's tokens are among these, `[inputs + 1]`, int32.
        """
        packed, answers, decoding = Packed(tensors, max_seqlen, uniform), self.answers, self.decoding
        own = self._vectors_of(slots)
        by = own if readers is None else self._vectors_of(readers)
        source = packed.ragged(packed.examples)
        kv = self.fused.read_source(self.fused.run(by), packed, source)
        if copied is not None and edges is not None:
            kv, source = kv.index_select(0, copied), Ragged(edges, max_seqlen, len(copied), len(slots))
        decoding.multiply_source(kv, source, own, kv)
        assert decoding.kv is not None
        if self.backend == "torch":  # which multiplies what it doesn't see by zero, and infinity stays no number
            decoding.kv.view(self.count + 1, self.max_source, -1).index_fill_(0, slots, 0)
            for cache in decoding.caches:
                cache.index_fill_(1, slots, 0)
        decoding.kv.index_copy_(0, places, kv)
        decoding.place.index_fill_(0, slots, 0)
        lengths = source.cu_seqlens[1:] - source.cu_seqlens[:-1]
        self.end.index_copy_(0, slots, self.first.index_select(0, slots) + lengths)
        answers.token.index_fill_(0, slots, self.plan.start)
        answers.count.index_fill_(0, slots, 0)
        answers.max_tokens.index_copy_(0, slots, limits[0])
        answers.min_tokens.index_copy_(0, slots, limits[1])
        answers.ended.index_copy_(0, slots, lengths == 0)  # of what fills up

    def _vectors_of(self, slots: Tensor) -> tuple[Tensor, ...]:
        return self.layout.split(self.flat.index_select(0, slots)[None])

    def _write(self, slots: int, positions: int, source: int) -> Tensor:
        """One more token for the first slots; how many each has, whether it has ended, and the token, `[3, slots]`.

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
        return torch.stack([answers.count, answers.ended.long(), answers.token.flatten()])

    # What goes there

    def _reach(self) -> tuple[int, int, int]:
        """What the next step looks at: where nothing is recorded, no more than is live."""
        if self.stepping.captures or self.invariant:
            return self.most
        written = max(len(self.written[slot]) for slot in self.lengths) + 1
        return max(self.lengths) + 1, round_up_to(written, BUCKET), max(self.lengths.values())

    def _texts(self, rows: Sequence[Sequence[int]], flat: Tensor) -> list[list[int]]:
        """The inputs that are one text to the encoder, whose tokens and vectors there are the same."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(tuple(row), []).append(index)
        texts = []
        for rest in alike.values():
            while len(rest) > 1 and len(self.read_by):
                vectors = flat[rest].index_select(1, self.read_by)
                same = (vectors == vectors[0]).all(1).tolist()
                same[0] = True  # though it may hold what is no number
                texts.append([index for index, is_same in zip(rest, same, strict=True) if is_same])
                rest = [index for index, is_same in zip(rest, same, strict=True) if not is_same]
            if rest:
                texts.append(rest)
        return texts

    def _parts(self, rows: Sequence[Sequence[int]], texts: list[list[int]]) -> Iterator[list[list[int]]]:
        """The texts that are read at once."""
        if not self.invariant:
            yield texts
            return
        by_length: dict[int, list[list[int]]] = {}
        for text in texts:
            by_length.setdefault(rounded_length(len(rows[text[0]])), []).append(text)
        for some in by_length.values():
            yield from (some[start : start + _READ] for start in range(0, len(some), _READ))

    def _packed(
        self, texts: Sequence[Sequence[int]], slots: Sequence[int], rows: Sequence[Sequence[int]],
        most: Sequence[int], least: Sequence[int],
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:  # fmt: skip
        """The arguments of `_read` for some of the texts; where it is recorded, filled up to one of few shapes."""
        own, inputs = [rows[text[0]] for text in texts], [index for text in texts for index in text]
        ids, mask = pad_right([_here(row) for row in own])
        packed = pack_prompts(ids, mask, positions=has_learned_positions(self.fused.architecture))
        fills = self.reading.captures or self.invariant
        if fills:
            packed = self._filled(packed)
        tensors = dict(packed.tensors)
        tokens, filled = packed.total_tokens, packed.examples
        if len(texts) < len(inputs):
            begins = [0, *accumulate(len(row) for row in own)]
            copied = [begin + at for begin, text in zip(begins, texts, strict=False) for _ in text
                      for at in range(len(rows[text[0]]))]  # fmt: skip
            edges = [0, *accumulate(len(rows[index]) for index in inputs)]
            tokens, filled = (next_power_of_2(n) if fills else n for n in (len(copied), len(inputs)))
            readers = [slots[text[0]] for text in texts]
            tensors["readers"] = _here(readers + [self.count] * (packed.examples - len(texts)))
            tensors["copied"] = _here(copied + [0] * (tokens - len(copied)))
            tensors["edges"] = _here(edges + edges[-1:] * (filled - len(inputs)), torch.int32)
        spare = filled - len(inputs)
        tensors["slots"] = _here([slots[index] for index in inputs] + [self.count] * spare)
        limits = [[of[index] for index in inputs] for of in (most, least)]
        tensors["limits"] = functional.pad(_here(limits), (0, spare))
        places = [slots[index] * self.max_source + at for index in inputs for at in range(len(rows[index]))]
        # What fills up is written where no slot is.
        tensors["places"] = _here(places + [self.count * self.max_source] * (tokens - len(places)))
        return packed.fixed, tensors

    def _filled(self, packed: Packed) -> Packed:
        """Texts filled up to one of few shapes; an invariant one depends on their rounded length alone."""
        packed = round_up(packed, _READ if self.invariant else next_power_of_2(packed.examples), self.plan.pad)
        total = next_power_of_2(packed.total_tokens)
        if self.invariant:
            total = _READ * packed.max_seqlen
            total = round_up_to(total, max(1, next_power_of_2(total) // 16))  # no less than it is rounded up to
        tensors = dict(packed.tensors)
        for name in {"tokens", "positions"} & set(tensors):
            tensors[name] = functional.pad(tensors[name], (0, total - packed.total_tokens))
        return Packed(tensors, packed.max_seqlen, packed.uniform)

    # What is refused

    def _expect_own_precision(self) -> None:
        if is_autocast_on(self.flat.device):
            raise RuntimeError(
                "Autocast is on, and slots compute in the precision of the model's weights: call them outside of it, "
                f"and {INSTEAD_OF_AUTOCAST} if you want another."
            )

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


def _here(numbers: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """On the CPU, whatever PyTorch's default device is, for one transfer of all."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _columns_within(model: Any, layout: Layout) -> Tensor:
    """Which numbers of flat vectors act in the encoder."""
    architecture = architecture_of(model)
    assert architecture is not None
    front = f"{architecture.stacks[0].blocks}."
    inside = [torch.full((site.width,), site.path.startswith(front), device="cpu") for site in layout.sites]
    return torch.cat(inside or [torch.zeros(0, dtype=torch.bool, device="cpu")]).nonzero().flatten().to(model.device)


def _expect_none(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"No slots for this model: {reason}. Use compile_generate, which takes whole batches.")


def _difference(fused: FusedLoss, max_source: int, start: int) -> str | None:
    """In what the block's logits of made-up inputs, under made-up vectors, are not the model's own."""
    lengths = _here([min(length, max_source) for length in (7, 3)])
    ids = torch.arange(14, device="cpu").view(2, 7) % len(fused.model.get_input_embeddings().weight)
    mask = torch.arange(7, device="cpu") < lengths[:, None]
    like = torch.ones(2, fused.layout.size, device=fused.model.device)
    vectors = torch.stack([like[0], moved_by(like[1], _MADE_UP).detach()])
    return decoding_difference(fused, ids, mask, fused.layout, vectors, start)


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
