"""The likeliest token and what is noted of it: the kernels and their plain twin beside a loop over the examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import DEVICE, DTYPES, needs_kernels

from ia3.fast.ops.greedy import Answers, take_likeliest

BACKENDS = ["torch", pytest.param("triton", marks=needs_kernels)]
PAD = 7


def blank(examples: int, ends: list[int], least: int, last: int | None = None) -> Answers:
    answers = Answers.none(examples, 3, ends, PAD, last, torch.device(DEVICE))
    answers.min_tokens.fill_(least)
    return answers


def likeliest(row: Tensor, hidden: list[int]) -> int:
    scores = [-torch.inf if token in hidden else score for token, score in enumerate(row.tolist())]
    return scores.index(max(scores))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("examples", "vocabulary"), [(1, 5), (6, 33), (2, 20_000)])
@pytest.mark.parametrize(("ends", "least"), [([], 0), ([], 2), ([2], 0), ([4, 1, 3], 2)])
@pytest.mark.parametrize("last", [None, 0, 4])
def test_tokens(
    backend: Any, dtype: torch.dtype, examples: int, vocabulary: int, ends: list[int], least: int, last: int | None
) -> None:
    answers, wanted = blank(examples, ends, least, last), [[] for _ in range(examples)]
    over = [False] * examples
    for step in range(4):
        logits = torch.randn(examples, vocabulary, device=DEVICE).round().to(dtype)  # many are equal
        logits[:, :5] += step  # where the ends are
        take_likeliest(logits, answers, has_least=least > 0, backend=backend)
        for example, tokens in enumerate(wanted):
            before = over[example]
            if not before:
                found = likeliest(logits[example], ends if len(tokens) < least else [])
                tokens.append(last if last is not None and len(tokens) == 2 else found)
                over[example] = tokens[-1] in ends or len(tokens) == 3
            assert int(answers.token[example]) == (PAD if before else tokens[-1])
            assert answers.tokens[example].tolist() == tokens + [PAD] * (3 - len(tokens))
        assert answers.count.tolist() == list(map(len, wanted))
        assert answers.ended.tolist() == over
        assert bool(answers.all_ended) == all(over)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [None, 3])
def test_each_example_has_its_own_limits(last: int | None, backend: Any) -> None:
    """Three that began at other times, the first of which has ended, and another behind them that nobody asks about."""
    whole = blank(4, [2], 0, last)
    held = torch.tensor([[5, 2, PAD], [6, PAD, PAD], [PAD, PAD, PAD], [8, PAD, PAD]], device=DEVICE)
    whole.tokens.copy_(held)
    whole.count.copy_(torch.tensor([2, 1, 0, 1]))
    whole.min_tokens.copy_(torch.tensor([0, 2, 1, 0]))
    whole.max_tokens.copy_(torch.tensor([3, 2, 3, 3]))
    whole.ended.copy_(torch.tensor([True, False, False, False]))
    logits = torch.zeros(3, 9, device=DEVICE)
    logits[:, 2], logits[:, 4] = 2, 1  # the end is likeliest, then 4
    answers = whole.first(3)
    for counts, tokens, ended in (
        ([2, 2, 1, 1], [[5, 2, PAD], [6, last or 4, PAD], [4, PAD, PAD]], [True, True, False]),
        ([2, 2, 2, 1], [[5, 2, PAD], [6, last or 4, PAD], [4, 2, PAD]], [True, True, True]),
    ):
        take_likeliest(logits, answers, has_least=True, backend=backend)
        assert whole.count.tolist() == counts
        assert whole.tokens.tolist() == [*tokens, [8, PAD, PAD]]
        assert whole.ended.tolist() == [*ended, False]
        assert bool(whole.all_ended) == all(ended)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_is_the_largest(backend: Any) -> None:
    answers, logits = blank(1, [], 0), torch.randn(1, 5000, device=DEVICE)
    logits[0, 1234] = torch.nan
    take_likeliest(logits, answers, has_least=False, backend=backend)
    assert int(answers.token) == 1234


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", [0.5, -torch.inf])
def test_of_equal_ones_the_first(score: float, backend: Any) -> None:
    answers, logits = blank(1, [], 0), torch.full((1, 40_000), score, device=DEVICE)
    logits[0, :7] = -torch.inf
    take_likeliest(logits, answers, has_least=False, backend=backend)
    assert int(answers.token) == (0 if score == -torch.inf else 7)
