"""The likeliest token of each example, and what a generation notes of it: two kernels instead of a dozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ia3.fast.ops.backend import Backend
from ia3.fast.ops.launch import cdiv, jit, launch

if TYPE_CHECKING:
    import triton.language as tl

# An example's scores are looked through in so many parts.
_PARTS = 16
# So many examples are noted at once.
_ROWS = 256


@dataclass(frozen=True)
class Answers:
    """What examples have been given so far; all tensors but the ends change in place.

    Args:
        token: the last of each example, padding where it has ended, `[examples, 1]`, int64.
        tokens: all of them, `[examples, most]`, int64; behind them stays what is there.
        count: how many each has, `[examples]`, int64.
        ended: which examples have ended, `[examples]`; they are given no more.
        all_ended: whether all have, `[]`.
        ends: the end tokens, int64.
        min_tokens: as long as an example has fewer, it gets none of these, `[examples]`, int64.
        max_tokens: an example that has so many has ended, `[examples]`, int64.
        last: what the last of so many is; None for the likeliest.
        pad: padding.
    """

    token: Tensor
    tokens: Tensor
    count: Tensor
    ended: Tensor
    all_ended: Tensor
    ends: Tensor
    min_tokens: Tensor
    max_tokens: Tensor
    last: int | None
    pad: int

    @classmethod
    def none(
        cls, examples: int, most: int, ends: Sequence[int], pad: int, last: int | None, device: torch.device
    ) -> Answers:
        """Of examples that have no token yet, and get as many as there is room for."""
        whole: dict[str, Any] = {"dtype": torch.long, "device": device}
        return cls(
            token=torch.full((examples, 1), pad, **whole),
            tokens=torch.full((examples, most), pad, **whole),
            count=torch.zeros(examples, **whole),
            ended=torch.zeros(examples, dtype=torch.bool, device=device),
            all_ended=torch.zeros((), dtype=torch.bool, device=device),
            ends=torch.tensor(ends, **whole),
            min_tokens=torch.zeros(examples, **whole),
            max_tokens=torch.full((examples,), most, **whole),
            last=last,
            pad=pad,
        )

    def first(self, examples: int) -> Answers:
        """Those of the first examples, in the same places."""
        own = ("token", "tokens", "count", "ended", "min_tokens", "max_tokens")
        return replace(self, **{name: getattr(self, name)[:examples] for name in own})


def take_likeliest(logits: Tensor, answers: Answers, *, has_least: bool, backend: Backend) -> None:
    """Write each example its likeliest token, the first of equal ones.

    Args:
        logits: `[examples, vocabulary]`.
        answers: where.
        has_least: whether there is a least number of tokens.
        backend: who computes it.
    """
    if backend == "triton":
        _by_kernels(logits, answers, has_least)
        return
    if has_least and len(answers.ends):
        early = answers.count < answers.min_tokens
        ends = logits[:, answers.ends].masked_fill(early[:, None], -torch.inf)
        logits = logits.index_copy(1, answers.ends, ends)
    token, at = logits.argmax(-1), answers.count.clamp(max=answers.tokens.shape[1] - 1)[:, None]
    is_last = answers.count + 1 >= answers.max_tokens
    if answers.last is not None:
        token = token.masked_fill(is_last, answers.last)
    held = answers.tokens.gather(1, at)
    answers.tokens.scatter_(1, at, torch.where(answers.ended[:, None], held, token[:, None]))
    answers.token.copy_(token.masked_fill(answers.ended, answers.pad)[:, None])
    answers.count.add_(~answers.ended)
    answers.ended.logical_or_(is_last | (token[:, None] == answers.ends).any(1))
    answers.all_ended.copy_(answers.ended.all())


@jit(do_not_specialize=["ends_count"])
def _likeliest_of_part(
    logits, ends, count, min_tokens, most, place, ends_count,
    VOCABULARY: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, HAS_LEAST: tl.constexpr,
):  # fmt: skip
    """One program an example and EACH of its scores.

    Args:
        logits: `[examples, VOCABULARY]`.
        ends: `[ends_count]`, int64; they count for nothing while count < min_tokens where HAS_LEAST.
        count, min_tokens: see `Answers`.
        most: written, `[examples, parts]`, fp32: a part's largest score; one that is no number counts as the largest.
        place: written alike, int32: its token.
    """
    example, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += example * VOCABULARY
    hides_ends = False
    if HAS_LEAST:
        hides_ends = tl.load(count + example) < tl.load(min_tokens + example)
    found = tl.full([BLOCK], -float("inf"), tl.float32)
    at = tl.full([BLOCK], VOCABULARY, tl.int32)
    for start in range(part * EACH, (part + 1) * EACH, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < VOCABULARY
        scores = tl.load(logits + offs, mask=inside, other=-float("inf")).to(tl.float32)
        scores = tl.where(scores == scores, scores, float("inf"))
        if HAS_LEAST:
            for number in range(ends_count):
                scores = tl.where(hides_ends & (offs == tl.load(ends + number)), -float("inf"), scores)
        better = inside & ((scores > found) | (at == VOCABULARY))
        at = tl.where(better, offs, at)
        found = tl.where(better, scores, found)
    largest = tl.max(found, 0)
    parts = tl.num_programs(1)
    tl.store(most + example * parts + part, largest)
    tl.store(place + example * parts + part, tl.min(tl.where(found == largest, at, VOCABULARY), 0))


@jit(do_not_specialize=["examples", "ends_count", "tokens_stride", "last", "pad"])
def _note_likeliest(
    most, place, ends, token, tokens, count, max_tokens, ended, all_ended, examples, ends_count, tokens_stride, last,
    pad, HAS_LAST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all examples, BLOCK at a time.

    Args:
        most, place: see `_likeliest_of_part`.
        ends, token, tokens, count, max_tokens, ended, all_ended, pad: see `Answers`.
        last: alike, where HAS_LAST.
    """
    parts = tl.arange(0, PARTS)[None, :]
    go_on = 0
    for start in range(0, examples, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < examples
        offs = rows[:, None] * PARTS + parts
        scores = tl.load(most + offs, mask=inside[:, None], other=-float("inf"))
        places = tl.load(place + offs, mask=inside[:, None], other=0)
        # Among equals the lowest token, which is in the first part.
        chosen = tl.min(tl.where(scores == tl.max(scores, 1)[:, None], places, 0x7FFFFFFF), 1).to(tl.int64)
        before = tl.load(ended + rows, mask=inside, other=1) != 0
        at = tl.load(count + rows, mask=inside, other=0)
        over = before | (at + 1 >= tl.load(max_tokens + rows, mask=inside, other=0))
        if HAS_LAST:
            chosen = tl.where(over, last, chosen)
        chosen = tl.where(before, pad, chosen)
        for number in range(ends_count):
            over = over | (chosen == tl.load(ends + number))
        goes_on = inside & (before == 0)
        tl.store(token + rows, chosen, mask=inside)
        tl.store(tokens + rows.to(tl.int64) * tokens_stride + at, chosen, mask=goes_on)
        tl.store(count + rows, at + 1, mask=goes_on)
        tl.store(ended + rows, over, mask=inside)
        go_on += tl.sum((inside & (over == 0)).to(tl.int32), 0)
    tl.store(all_ended, go_on == 0)


def _by_kernels(logits: Tensor, answers: Answers, has_least: bool) -> None:
    logits = logits.contiguous()
    examples, vocabulary = logits.shape
    most = torch.empty(examples, _PARTS, dtype=torch.float32, device=logits.device)
    place = torch.empty(examples, _PARTS, dtype=torch.int32, device=logits.device)
    ends, block = len(answers.ends), 1024
    each = cdiv(cdiv(vocabulary, _PARTS), block) * block
    launch(
        _likeliest_of_part, (examples, _PARTS), logits, answers.ends, answers.count, answers.min_tokens, most, place,
        ends, VOCABULARY=vocabulary, EACH=each, BLOCK=block, HAS_LEAST=has_least and ends > 0,
    )  # fmt: skip
    launch(
        _note_likeliest, (1,), most, place, answers.ends, answers.token, answers.tokens, answers.count,
        answers.max_tokens, answers.ended, answers.all_ended, examples, ends, answers.tokens.stride(0),
        answers.last or 0, answers.pad, HAS_LAST=answers.last is not None, PARTS=_PARTS, BLOCK=_ROWS, num_warps=8,
    )  # fmt: skip
