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


def blank(examples: int, ends: list[int], least: int) -> Answers:
    whole: dict[str, Any] = {"dtype": torch.long, "device": DEVICE}
    return Answers(
        token=torch.full((examples, 1), PAD, **whole),
        tokens=torch.full((examples, 3), PAD, **whole),
        count=torch.zeros(1, **whole),
        ended=torch.zeros(examples, dtype=torch.bool, device=DEVICE),
        all_ended=torch.zeros((), dtype=torch.bool, device=DEVICE),
        ends=torch.tensor(ends, **whole),
        min_tokens=torch.full((1,), least, **whole),
        pad=PAD,
    )


def likeliest(row: Tensor, hidden: list[int]) -> int:
    scores = [-torch.inf if token in hidden else score for token, score in enumerate(row.tolist())]
    return scores.index(max(scores))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("examples", "vocabulary"), [(1, 5), (6, 33), (2, 20_000)])
@pytest.mark.parametrize(("ends", "least"), [([], 0), ([], 2), ([2], 0), ([4, 1, 3], 2)])
def test_tokens(backend: Any, dtype: torch.dtype, examples: int, vocabulary: int, ends: list[int], least: int) -> None:
    answers, over = blank(examples, ends, least), [False] * examples
    for step in range(3):
        logits = torch.randn(examples, vocabulary, device=DEVICE).round().to(dtype)  # many are equal
        logits[:, :5] += step  # where the ends are
        take_likeliest(logits, answers, has_least=least > 0, backend=backend)
        for example in range(examples):
            wanted = PAD if over[example] else likeliest(logits[example], ends if step < least else [])
            over[example] = over[example] or wanted in ends
            assert int(answers.token[example]) == int(answers.tokens[example, step]) == wanted
        assert answers.ended.tolist() == over
        assert bool(answers.all_ended) == all(over)
        assert int(answers.count) == step + 1


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
