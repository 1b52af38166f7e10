"""Attention: the plain definition against one example at a time, the kernels against the plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import (  # fmt: skip
    DEVICE,
    NARROW,
    compare,
    draw,
    inside,
    masked_dropout,
    needs_kernels,
    ragged_of,
    seed,
    vector,
)

from ia3.fast.ops.attention import causal_attention, cross_attention, self_attention
from ia3.fast.ragged import Ragged


def vectors_of(which: str, partials: int, groups: int, width: int) -> list[Tensor | None]:
    return [vector(partials, groups, width) if part in which else None for part in "kv"]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, of_q: Ragged, of_k: Ragged, bias: Tensor | None, l_k: Tensor | None,
    l_v: Tensor | None, heads: int, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Each example by the paper's formula, softmax(q (l_k ∘ k)ᵀ) (l_v ∘ v)."""
    found = []
    for example in range(of_q.examples):
        first, last = of_q.cu_seqlens[example : example + 2]
        begin, end = of_k.cu_seqlens[example : example + 2]
        group = example // (of_q.examples // of_q.groups)
        own_k = k[begin:end] * (1.0 if l_k is None else l_k[0, group])
        own_v = v[begin:end] * (1.0 if l_v is None else l_v[0, group])
        own_q, own_k, own_v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q[first:last], own_k, own_v))
        scores = own_q @ own_k.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[0, :, : last - first, : end - begin]
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        found.append((scores.softmax(-1) @ own_v).transpose(0, 1).flatten(1))
    return torch.cat(found)


@pytest.mark.parametrize("longest", [7, 20])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_is_each_examples_own(longest: int, biased: bool, causal: bool) -> None:
    ragged, heads, width = ragged_of((longest, 3, 1, longest - 1), 2), 2, 8
    qkv, bias = draw(ragged.total_tokens, 3 * width), draw(1, heads, longest, longest) if biased else None
    l_k, l_v = vector(1, 2, width), vector(1, 2, width)
    given = {"scale": 0.4, "causal": causal, "p": 0.0, "seed": None}
    found = self_attention(qkv, bias, ragged, l_k, l_v, heads, **given, backend="torch")  # type: ignore[arg-type]
    expected = one_by_one(*qkv.chunk(3, -1), ragged, ragged, bias, l_k, l_v, heads, 0.4, causal)
    torch.testing.assert_close(inside(found, ragged), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_attention_is_each_examples_own(window: int | None, softcap: float | None) -> None:
    ragged = ragged_of((7, 2, 5), 1)
    q, k, v = draw(3, 4, 7, 6), draw(3, 2, 7, 6), draw(3, 2, 7, 6)
    found = causal_attention(q, k, v, ragged, 0.0, scale=0.3, window=window, softcap=softcap)
    expected = []
    for example, length in enumerate((7, 2, 5)):
        own_q = q[example, :, :length]
        own_k, own_v = (x[example, :, :length].repeat_interleave(2, 0) for x in (k, v))
        scores = own_q @ own_k.transpose(1, 2) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(length, device=DEVICE)[:, None] - torch.arange(length, device=DEVICE)
        scores = scores.masked_fill((distance < 0) | (distance >= (window or length)), -torch.inf)
        expected.append((scores.softmax(-1) @ own_v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(inside(found, ragged), torch.cat(expected))


def checked(
    ragged: Ragged, heads: int, dim: int, *, which: str = "kv", partials: int = 2, biased: bool = False,
    causal: bool = False, p: float = 0.0, scale: float = 1.0, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    longest = ragged.max_seqlen
    bias = draw(1, heads, longest, longest).to(dtype) if biased else None

    def function(backend: Any, qkv: Tensor, l_k: Tensor | None, l_v: Tensor | None) -> Tensor:
        own = None if bias is None else bias.to(qkv.dtype)
        given = {"scale": scale, "causal": causal, "p": p, "seed": seed()}
        return inside(self_attention(qkv, own, ragged, l_k, l_v, heads, **given, backend=backend), ragged)  # type: ignore[arg-type]

    qkv = 0.6 * draw(ragged.total_tokens, 3 * heads * dim)
    vectors = vectors_of(which, partials, ragged.groups, heads * dim)
    compare(function, [qkv, *vectors], dtype, vectors=[1, 2], tokens=[0], ragged=ragged)


def lengths(longest: int) -> list[int]:
    return [longest, 3, longest - 1, 0, longest // 2, 1]


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "longest", "heads", "dim"),
    [(torch.float32, 5, 2, 8), (torch.float32, 21, 2, 12), (NARROW, 5, 2, 16), (NARROW, 21, 1, 16)],
)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_self_attention(
    dtype: torch.dtype, longest: int, heads: int, dim: int, biased: bool, causal: bool, groups: int
) -> None:
    ragged = ragged_of(lengths(longest), groups)
    checked(ragged, heads, dim, biased=biased, causal=causal, scale=dim**-0.5, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("causal", [True, False])
def test_more_than_a_block_of_queries_and_of_keys(causal: bool) -> None:
    checked(ragged_of([70, 3, 69, 0], 2), 1, 12, biased=not causal, causal=causal, scale=0.3)


def test_more_numbers_than_a_kernel_counts_are_pytorchs(monkeypatch: Any) -> None:
    monkeypatch.setattr("ia3.fast.ops.attention.MAX_NUMBERS", 1)
    checked(ragged_of([7, 3], 2), 2, 8, causal=True, p=0.0)


@needs_kernels
@pytest.mark.parametrize("longest", [5, 21])
@pytest.mark.parametrize(("which", "partials", "groups"), [("", 1, 1), ("k", 3, 1), ("v", 1, 2), ("kv", 7, 3)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_vectors_of_groups(longest: int, which: str, partials: int, groups: int, p: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("ia3.fast.ops.attention.dropout", masked_dropout)
    monkeypatch.setattr("ia3.fast.ops.attention._FEW_QUERIES", 1000)
    ragged = ragged_of(lengths(longest), groups)
    checked(ragged, 2, 8, which=which, partials=partials, biased=True, p=p, scale=0.7)


@needs_kernels
@pytest.mark.parametrize("longest", [5, 40])
def test_dropout_of_causal_attention(longest: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("ia3.fast.ops.attention.dropout", masked_dropout)
    monkeypatch.setattr("ia3.fast.ops.attention._FEW_QUERIES", 1000)
    checked(ragged_of(lengths(longest), 3), 2, 8, causal=True, p=0.3, scale=0.7)


@needs_kernels
@pytest.mark.parametrize("causal", [True, False])
def test_examples_of_equal_length(causal: bool) -> None:
    checked(Ragged.even(6, 9, 3, torch.device(DEVICE)), 2, 8, causal=causal, scale=0.5)


@needs_kernels
@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 70), (NARROW, 128), (NARROW, 129), (NARROW, 200)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("which", "groups"), [("kv", 2), ("", 1)])
def test_longer_examples_than_a_program_holds(
    dtype: torch.dtype, longest: int, causal: bool, which: str, groups: int, monkeypatch: Any
) -> None:
    """All keys of up to 128, in fp32 of up to 32, are in one program's registers; of more, it goes over them."""
    monkeypatch.setattr("ia3.fast.ops.attention.dropout", masked_dropout)
    monkeypatch.setattr("ia3.fast.ops.attention._FEW_QUERIES", 1000)
    ragged = ragged_of([longest, 40, 0, 7], groups)
    checked(ragged, 1, 16, which=which, biased=not causal, causal=causal, p=0.2, scale=0.25, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 3), (NARROW, 80), (NARROW, 128), (NARROW, 160)])
@pytest.mark.parametrize("longest", [4, 70])
def test_heads_of_any_width(dtype: torch.dtype, dim: int, longest: int) -> None:
    checked(ragged_of([longest, 1, 3], 1), 2, dim, biased=True, scale=dim**-0.5, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("length", [3, 40])
def test_cross_attention_over_a_long_source(length: int) -> None:
    source, target = ragged_of((70, 17, 0, 33), 2), Ragged.even(4, length, 2, torch.device(DEVICE))

    def function(backend: Any, q: Tensor, kv: Tensor, *vectors: Tensor) -> Tensor:
        given = {"scale": 0.8, "p": 0.0, "seed": None}
        found = cross_attention(q, target, kv, source, 0, {}, *vectors, 2, **given, backend=backend)  # type: ignore[arg-type]
        return found.unflatten(0, (4, length))[[0, 1, 3]]  # one has no keys

    inputs = [draw(4 * length, 16), draw(source.total_tokens, 32), *vectors_of("kv", 3, 2, 16)]
    compare(function, inputs, vectors=[2, 3], tokens=[1], ragged=source)


@needs_kernels
@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 3), (torch.float32, 20), (NARROW, 3)])
@pytest.mark.parametrize(("which", "partials", "groups"), [("kv", 2, 3), ("k", 2, 1), ("v", 2, 2), ("", 1, 1)])
def test_cross_attention_of_two_layers(dtype: torch.dtype, length: int, which: str, partials: int, groups: int) -> None:
    """Both fill one gradient of keys and values."""
    heads, inner = 2, 32
    source, target = ragged_of((20, 17, 7, 1, 20, 3), groups), Ragged.even(6, length, groups, torch.device(DEVICE))

    def function(backend: Any, q: Tensor, kv: Tensor, l_k: Tensor | None, l_v: Tensor | None) -> Tensor:
        shared: dict[str, Tensor] = {}

        def layer(q: Tensor, index: int) -> Tensor:
            given = {"scale": 0.8, "p": 0.0, "seed": seed()}
            return cross_attention(q, target, kv, source, index, shared, l_k, l_v, heads, **given, backend=backend)  # type: ignore[arg-type]

        return layer(layer(q, 0) + q, 1)

    compare(
        function,
        [
            draw(6 * length, inner),
            0.5 * draw(source.total_tokens, 4 * inner),
            *vectors_of(which, partials, groups, inner),
        ],
        dtype,
        vectors=[2, 3],
        tokens=[1],
        ragged=source,
    )


@needs_kernels
@pytest.mark.parametrize("length", [3, 20])
def test_dropout_of_cross_attention(length: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("ia3.fast.ops.attention.dropout", masked_dropout)
    monkeypatch.setattr("ia3.fast.ops.attention._FEW_QUERIES", 1000)
    source, target = ragged_of((20, 17, 7, 1), 2), Ragged.even(4, length, 2, torch.device(DEVICE))

    def function(backend: Any, q: Tensor, kv: Tensor, *vectors: Tensor) -> Tensor:
        given = {"scale": 0.8, "p": 0.3, "seed": seed()}
        return cross_attention(q, target, kv, source, 0, {}, *vectors, 2, **given, backend=backend)  # type: ignore[arg-type]

    inputs = [draw(4 * length, 16), draw(source.total_tokens, 32), *vectors_of("kv", 2, 2, 16)]
    compare(function, inputs, vectors=[2, 3], tokens=[1], ragged=source)


@needs_kernels
@pytest.mark.parametrize("length", [3, 20])
def test_an_example_without_keys_gets_nothing(length: int) -> None:
    source, target = ragged_of((4, 0), 1), Ragged.even(2, length, 1, torch.device(DEVICE))
    q, kv = draw(2 * length, 32).float().requires_grad_(), draw(source.total_tokens, 64).float().requires_grad_()
    given: dict[str, Any] = {"scale": 1.0, "p": 0.0, "seed": None, "backend": "triton"}
    found = cross_attention(q, target, kv, source, 0, {}, None, None, 2, **given)
    assert bool(found[:length].abs().min() > 0)
    assert float(found[length:].abs().max()) == 0
    found.sum().backward()
    assert q.grad is not None
    assert float(q.grad[length:].abs().max()) == 0


@needs_kernels
@pytest.mark.parametrize("longest", [5, 21])
def test_a_bias_that_lies_across(longest: int) -> None:
    ragged = ragged_of([longest, 3], 1)
    qkv, bias = draw(ragged.total_tokens, 48).float(), draw(1, 2, longest, longest).float()
    given: dict[str, Any] = {"scale": 1.0, "causal": False, "p": 0.0, "seed": None, "backend": "triton"}
    across = bias.transpose(2, 3).contiguous().transpose(2, 3)
    straight, other = (inside(self_attention(qkv, x, ragged, None, None, 2, **given), ragged) for x in (bias, across))
    assert torch.equal(straight, other)
