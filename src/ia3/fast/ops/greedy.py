"""The likeliest token of each example, and what a generation notes of it: two kernels instead of a dozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    """What examples have been given so far; all of it changes in place.

    Args:
        token: the last of each example, `[examples, 1]`, int64.
        tokens: all of them, `[examples, most]`, int64.
        count: how many each has, `[1]`, int64.
        ended: which examples have ended, `[examples]`.
        all_ended: whether all have, `[]`.
        ends: the end tokens, int64.
        min_tokens: as long as there are fewer, none of these is written, `[1]`, int64.
        pad: what is written behind an end.
    """

    token: Tensor
    tokens: Tensor
    count: Tensor
    ended: Tensor
    all_ended: Tensor
    ends: Tensor
    min_tokens: Tensor
    pad: int


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
        ends = logits[:, answers.ends].masked_fill(answers.count < answers.min_tokens, -torch.inf)
        logits = logits.index_copy(1, answers.ends, ends)
    token = logits.argmax(-1)
    if len(answers.ends):
        token = token.masked_fill(answers.ended, answers.pad)
        answers.ended.logical_or_((token[:, None] == answers.ends).any(1))
    answers.token.copy_(token[:, None])
    answers.tokens.index_copy_(1, answers.count, answers.token)
    answers.count.add_(1)
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
        most: written, `[examples, parts]`, fp32: a part's largest score; one that is no number counts as the largest.
        place: written alike, int32: its token.
    """
    example, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += example * VOCABULARY
    hides_ends = False
    if HAS_LEAST:
        hides_ends = tl.load(count) < tl.load(min_tokens)
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


@jit(do_not_specialize=["examples", "ends_count", "tokens_stride", "pad"])
def _note_likeliest(
    most, place, ends, token, tokens, count, ended, all_ended, examples, ends_count, tokens_stride, pad,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all examples, BLOCK at a time.

    Args:
        most, place: see `_likeliest_of_part`.
        ends, token, tokens, count, ended, all_ended, pad: see `Answers`.
    """
    at = tl.load(count)
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
        over = tl.load(ended + rows, mask=inside, other=1) != 0
        chosen = tl.where(over & (ends_count > 0), pad, chosen)
        for number in range(ends_count):
            over = over | (chosen == tl.load(ends + number))
        tl.store(token + rows, chosen, mask=inside)
        tl.store(tokens + rows.to(tl.int64) * tokens_stride + at, chosen, mask=inside)
        tl.store(ended + rows, over, mask=inside)
        go_on += tl.sum((inside & (over == 0)).to(tl.int32), 0)
    tl.store(all_ended, go_on == 0)
    tl.store(count, at + 1)


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
        _note_likeliest, (1,), most, place, answers.ends, answers.token, answers.tokens, answers.count, answers.ended,
        answers.all_ended, examples, ends, answers.tokens.stride(0), answers.pad, PARTS=_PARTS, BLOCK=_ROWS,
        num_warps=8,
    )  # fmt: skip
