"""The plain definitions agree bit for bit with those that they replace, until these are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ia3.fast import operations
from ia3.fast.ops import attention, cross_entropy, gate, norm, quantise, rotary
from ia3.fast.packing import Spans
from ia3.fast.ragged import Ragged

GIVEN: dict[str, Any] = {"p": 0.3, "seed": None, "backend": "torch"}


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request: Any) -> Any:
    return request.param


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def both(lengths: tuple[int, ...], groups: int) -> tuple[Spans, Ragged]:
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    sizes = max(lengths), sum(lengths) + 3, groups
    return Spans(cu_seqlens, *sizes), Ragged(cu_seqlens, *sizes)


def same(old: Any, new: Any) -> None:
    """Under the same dropout."""
    torch.manual_seed(1)
    expected = old()
    torch.manual_seed(1)
    found = new()
    for x, y in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x.float(), y.float())


def test_norm(dtype: torch.dtype) -> None:
    x, h, weight = draw(5, 16, dtype=dtype), draw(5, 16, dtype=dtype), draw(16, dtype=dtype)
    own = norm.Norm(weight, None, 1e-6, False)
    for added in (h, None):
        same(
            lambda added=added: operations.add_norm(x, added, weight, 1e-6, 0.3, None),
            lambda added=added: norm.add_norm(x, added, own, 0.3, None, "torch"),
        )


def test_gate(dtype: torch.dtype) -> None:
    spans, ragged = both((5, 0, 3), 3)
    h, vector = draw(11, 16, dtype=dtype), torch.randn(1, 3, 8)
    same(
        lambda: operations.gated(h, vector, spans, "relu", functional.relu, True, 0.3, None),
        lambda: gate.gated(h, vector, ragged, "relu", functional.relu, True, 0.3, None, "torch"),
    )


@pytest.mark.parametrize("longest", [5, 20])
def test_self_attention(longest: int, dtype: torch.dtype) -> None:
    spans, ragged = both((longest, 0, 3), 3)
    qkv, bias = draw(longest + 6, 48, dtype=dtype), draw(1, 2, longest, longest, dtype=dtype)
    vectors = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    same(
        lambda: operations.self_attention(qkv, bias, spans, *vectors, 2, 0.3, None),
        lambda: attention.self_attention(qkv, bias, ragged, *vectors, 2, scale=1.0, causal=False, **GIVEN),
    )


@pytest.mark.parametrize("length", [3, 20])
def test_cross_attention_and_generation(length: int, dtype: torch.dtype) -> None:
    (of_q, ragged_q), (of_k, ragged_k) = both((length, length), 2), both((9, 4), 2)
    q, kv = draw(2 * length + 3, 16, dtype=dtype), draw(16, 64, dtype=dtype)
    vectors = torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    same(
        lambda: operations.cross_attention(q, of_q, kv, of_k, 1, {}, *vectors, 2, 0.3, None),
        lambda: attention.cross_attention(q, ragged_q, kv, ragged_k, 1, {}, *vectors, 2, scale=1.0, **GIVEN),
    )
    k, v = operations.of_layer(kv, 0, 16)
    same(
        lambda: operations.attention(q, of_q, k, v, of_k, None, *vectors, 2, None),
        lambda: attention.attention(q, ragged_q, k, v, ragged_k, None, *vectors, 2, scale=1.0, backend="torch"),
    )


def test_rotary_and_causal_attention(dtype: torch.dtype) -> None:
    spans, ragged = both((9, 0, 4), 3)
    qkv, angles, vectors = draw(16, 4 * 16, dtype=dtype), torch.rand(9, 8), (torch.randn(1, 3, 16), None)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def old() -> Tensor:
        heads = operations.rotary_heads(qkv, cos, sin, spans, *vectors, 2, 1, by_kernels=False)
        return operations.causal_attention(*heads, spans, 0.3)

    def new() -> Tensor:
        heads = rotary.rotary_heads(qkv, cos, sin, ragged, *vectors, 2, 1, backend="torch")
        return attention.causal_attention(*heads, ragged, 0.3, scale=16**-0.5)

    same(old, new)


def test_cross_entropy(dtype: torch.dtype) -> None:
    logits, labels = draw(4, 9, dtype=dtype), torch.tensor([1, -100, 8, 0])
    same(
        lambda: operations.token_losses(logits, labels, by_kernels=False),
        lambda: cross_entropy.token_losses(logits, labels, "torch"),
    )
    y, weight, at = draw(7, 8, dtype=dtype), draw(9, 8, dtype=dtype), torch.tensor([0, 2, 2, 6])

    def gradient(losses: Any) -> Any:
        def run() -> tuple[Tensor, Tensor]:
            own = y.clone().requires_grad_()
            found = losses(own)
            return found.detach(), *torch.autograd.grad(found.sum(), own)

        return run

    same(
        gradient(lambda y: operations.head_losses(y, weight, at, labels, by_kernels=False)),
        gradient(lambda y: cross_entropy.head_losses(y, weight, None, at, labels, "torch")),
    )


def test_quantise(dtype: torch.dtype) -> None:
    x = draw(3, 16, dtype=dtype)
    for factors in (None, torch.rand(16, 1)):
        same(
            lambda factors=factors: operations.round_rows(x, factors),
            lambda factors=factors: quantise.quantise_rows(x, factors),
        )
