"""What a linear layer makes under its vector: the kernel against the plain definition, which is the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import compare, draw, inside, needs_kernels, ragged_of, vector

from ia3.fast.ops.scale import scale

LENGTHS = (5, 1, 0, 3, 19, 2)


def test_the_definition_is_the_formula() -> None:
    ragged, factors = ragged_of(LENGTHS, 3), vector(1, 3, 8)
    x = draw(ragged.total_tokens, 8)
    found = scale(x, factors, ragged, "torch")
    for token in range(int(ragged.cu_seqlens[-1])):
        example = int((ragged.cu_seqlens[1:] <= token).sum())
        assert torch.equal(found[token], x[token] * factors[0, example // 2])
    assert scale(x, None, ragged, "triton") is x


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("partials", "groups"), [(1, 1), (4, 1), (2, 3)])
def test_vectors_of_groups(partials: int, groups: int, dtype: torch.dtype) -> None:
    ragged = ragged_of(LENGTHS, groups)

    def function(backend: Any, x: Tensor, factors: Tensor) -> Tensor:
        return inside(scale(x, factors, ragged, backend), ragged)

    given = [draw(ragged.total_tokens, 300), vector(partials, groups, 300)]
    compare(function, given, dtype, vectors=[1], tokens=[0], ragged=ragged)
