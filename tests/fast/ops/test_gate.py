"""The feed-forward's intermediate: the kernel against the plain definition, which is the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from twins import DEVICE, compare, draw, inside, masked_dropout, needs_kernels, ragged_of, seed, vector

from ia3.fast.ops.backend import ACTIVATIONS
from ia3.fast.ops.gate import gated
from ia3.fast.ragged import Ragged

LENGTHS = (5, 1, 0, 3, 19, 2)


def checked(
    ragged: Ragged, activation: str, is_gated: bool, p: float, l_ff: Tensor | None, dtype: torch.dtype = torch.float32
) -> None:
    def function(backend: Any, h: Tensor, l_ff: Tensor | None) -> Tensor:
        given = (activation, ACT2FN[activation], is_gated, p, seed(), backend)
        return inside(gated(h, l_ff, ragged, *given), ragged)

    h = draw(ragged.total_tokens, 40 * (1 + is_gated))
    compare(function, [h, l_ff], dtype, vectors=[1], tokens=[0], ragged=ragged)


@pytest.mark.parametrize("is_gated", [True, False])
def test_the_definition_is_the_formula(is_gated: bool) -> None:
    ragged, l_ff = ragged_of(LENGTHS, 3), vector(1, 3, 8)
    h = draw(ragged.total_tokens, 8 * (1 + is_gated))
    found = gated(h, l_ff, ragged, "relu", torch.relu, is_gated, 0.0, None, "torch")
    for token in range(int(ragged.cu_seqlens[-1])):
        example = int((ragged.cu_seqlens[1:] <= token).sum())
        expected = h[token, :8].relu() * (h[token, 8:] if is_gated else 1.0) * l_ff[0, example // 2]
        assert torch.equal(found[token], expected)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [True, False])
def test_activations(activation: str, is_gated: bool) -> None:
    checked(ragged_of(LENGTHS, 3), activation, is_gated, 0.0, vector(2, 3, 40))


def test_more_numbers_than_a_kernel_counts_are_pytorchs(monkeypatch: Any) -> None:
    ragged, h = ragged_of(LENGTHS, 1), draw(33, 16)
    monkeypatch.setattr("ia3.fast.ops.gate.MAX_NUMBERS", 33 * 16)
    found, expected = (gated(h, None, ragged, "relu", torch.relu, True, 0.0, None, by) for by in ("triton", "torch"))  # type: ignore[arg-type]
    assert torch.equal(found, expected)


@needs_kernels
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.float32, 0.3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize(("partials", "groups"), [(1, 1), (4, 1), (2, 3), (0, 1), (0, 3)])
def test_vectors_of_groups(
    dtype: torch.dtype, p: float, is_gated: bool, partials: int, groups: int, monkeypatch: Any
) -> None:
    """No partials stand for no vector."""
    monkeypatch.setattr("ia3.fast.ops.gate.dropout", masked_dropout)
    l_ff = vector(partials, groups, 40) if partials else None
    checked(ragged_of(LENGTHS, groups), "gelu_new", is_gated, p, l_ff, dtype)


@needs_kernels
def test_examples_of_equal_length() -> None:
    checked(Ragged.even(6, 4, 3, torch.device(DEVICE)), "silu", True, 0.0, vector(2, 3, 40))


@needs_kernels
def test_more_channels_than_a_block_has() -> None:
    ragged = ragged_of((2, 3), 2)
    compare(
        lambda backend, h, l_ff: inside(gated(h, l_ff, ragged, "relu", torch.relu, True, 0.0, None, backend), ragged),
        [draw(ragged.total_tokens, 2 * 1030), vector(1, 2, 1030)],
        vectors=[1],
        tokens=[0],
        ragged=ragged,
    )
