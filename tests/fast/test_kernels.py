"""Each kernel computes what its plain twin computes in float64, gradients included.

They run on a GPU, and without one in Triton's interpreter: `make test-kernels`. It runs one program after another in
numpy, so that it says nothing of what is compiled, of memory that programs share, or of speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ia3.fast import operations

CUDA = torch.cuda.is_available()
if os.environ.get("TRITON_INTERPRET") != "1":  # who asks for the interpreter is told where it is missing
    if not CUDA:
        pytest.skip("there is no GPU, and Triton is not told to interpret", allow_module_level=True)
    pytest.importorskip("triton")

from ia3.fast import kernels  # noqa: E402
from ia3.fast.packing import Spans  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# Interpreted, a number in bf16 is its bits as an integer, and `tl.dot` multiplies those.
DTYPES_OF_DOTS = DTYPES if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def seed() -> Tensor:
    return torch.tensor(7, device=DEVICE)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def vector(stripes: int, groups: int, width: int) -> Tensor:
    """As a slice of a larger table is: with a stride between the groups."""
    table = 1 + 0.5 * torch.randn(groups, width + 5, dtype=torch.float64, device=DEVICE)
    return table[:, 3 : 3 + width].expand(stripes, groups, width)


def spans_of(lengths: Sequence[int], groups: int) -> Spans:
    """Examples of these lengths, and three rows of nobody's."""
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    return Spans(starts, max(lengths), sum(lengths) + 3, groups)


def inside(function: Callable[..., Any], spans: Spans) -> Callable[..., Any]:
    """Without nobody's rows, which hold anything."""
    return lambda *inputs: function(*inputs)[: int(spans.starts[-1])]


def leaf(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype).requires_grad_()


def compare(
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    vectors: Sequence[int],
    rows: int | None = None,
) -> None:
    """Outputs and gradients of a kernel in a dtype against its twin in float64 on the same rounded inputs.

    Gradients beyond `rows` may be anything.
    """
    rounded = [
        leaf(x.to(torch.bfloat16 if dtype == torch.bfloat16 else dtype), torch.float32 if i in vectors else dtype)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for i, x in enumerate(inputs)
    ]
    exact = [leaf(x, torch.float64) for x in rounded]
    found, expected = kernel(*rounded), twin(*exact)
    found, expected = [x if isinstance(x, tuple) else (x,) for x in (found, expected)]
    weights = [draw(*y.shape) for y in expected]
    sum((x.double() * w).sum() for x, w in zip(found, weights, strict=True)).backward()
    sum((y * w).sum() for y, w in zip(expected, weights, strict=True)).backward()
    for x, y in zip(found, expected, strict=True):
        near(x, y, dtype)
    for index, (x, y) in enumerate(zip(rounded, exact, strict=True)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or y.grad is None:
            continue
        assert x.grad is not None, index
        near(*(each.grad.double().sum(0) if index in vectors else each.grad[:rows] for each in (x, y)), dtype)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error.item() < TOLERANCE[dtype], error.item()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(dtype: torch.dtype, width: int, adds: bool) -> None:
    weight = 1 + 0.1 * draw(width)
    inputs = [draw(3, 5, width), draw(3, 5, width) if adds else None, weight.detach()]

    def kernel(x: Tensor, h: Tensor | None, weight: Tensor) -> Any:
        return kernels.add_norm(x, h, weight.detach(), 1e-6, 0.0, seed())

    def twin(x: Tensor, h: Tensor | None, weight: Tensor) -> Any:
        total = x if h is None else x + h
        return total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.detach()

    compare(kernel, twin, inputs, dtype, vectors=[])


LENGTHS = (5, 1, 7, 3, 9, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "gelu_new", "gelu", "silu"])
@pytest.mark.parametrize(("stripes", "groups"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("is_gated", [True, False])
def test_gated(dtype: torch.dtype, act: str, stripes: int, groups: int, is_gated: bool) -> None:
    spans = spans_of(LENGTHS, groups)
    compare(
        inside(lambda h, l_ff: kernels.gated(h, l_ff, spans, act, is_gated, 0.0, seed()), spans),
        inside(lambda h, l_ff: operations.gated(h, l_ff, spans, act, ACT2FN[act], is_gated, 0.0, None), spans),
        [draw(spans.rows, 40 * (1 + is_gated)), vector(stripes, groups, 40)],
        dtype,
        vectors=[1],
        rows=int(spans.starts[-1]),
    )


@pytest.mark.parametrize("dtype", DTYPES_OF_DOTS)
@pytest.mark.parametrize(("longest", "heads", "dim"), [(5, 2, 8), (21, 3, 16), (70, 2, 16)])
@pytest.mark.parametrize(("stripes", "groups"), [(1, 1), (4, 1), (2, 3)])
def test_self_attention(dtype: torch.dtype, longest: int, heads: int, dim: int, stripes: int, groups: int) -> None:
    spans = spans_of([longest, 3, longest - 1, 1, longest // 2, longest], groups)
    bias = draw(1, heads, longest, longest).to(dtype)
    compare(
        inside(lambda qkv, *vectors: kernels.self_attention(qkv, bias, spans, *vectors, heads, 0.0, seed()), spans),
        inside(
            lambda qkv, *vectors: operations.self_attention(qkv, bias.double(), spans, *vectors, heads, 0.0, None),
            spans,
        ),
        [0.6 * draw(spans.rows, 3 * heads * dim), *(vector(stripes, groups, heads * dim) for _ in range(2))],
        dtype,
        vectors=[1, 2],
        rows=int(spans.starts[-1]),
    )


@pytest.mark.parametrize("dtype", DTYPES_OF_DOTS)
@pytest.mark.parametrize(
    ("which", "stripes", "groups"), [("kv", 1, 1), ("kv", 2, 3), ("k", 2, 1), ("v", 2, 2), ("", 1, 1)]
)
def test_cross_attention_of_two_layers(dtype: torch.dtype, which: str, stripes: int, groups: int) -> None:
    heads, inner = 2, 32
    source, target = spans_of((20, 17, 7, 1, 20, 3), groups), Spans.even(6, 3, groups, torch.device(DEVICE))
    vectors = [vector(stripes, groups, inner) if part in which else None for part in ("k", "v")]

    def two_layers(function: Callable[..., Tensor], given: Tensor | None) -> Callable[..., Tensor]:
        def forward(q: Tensor, kv: Tensor, *vectors: Tensor | None) -> Tensor:
            shared: dict[str, Tensor] = {}
            first = function(q, target, kv, source, 0, shared, *vectors, heads, 0.0, given)
            return function(first + q, target, kv, source, 1, shared, *vectors, heads, 0.0, given)

        return forward

    compare(
        two_layers(kernels.cross_attention, seed()),
        two_layers(operations.cross_attention, None),
        [draw(18, inner), 0.5 * draw(source.rows, 4 * inner), *vectors],
        dtype,
        vectors=[2, 3],
        rows=int(source.starts[-1]),
    )


@pytest.mark.parametrize("dtype", DTYPES_OF_DOTS)
@pytest.mark.parametrize("biased", [True, False])
def test_attention_of_a_decoder_that_writes(dtype: torch.dtype, biased: bool) -> None:
    heads, inner, lengths = 2, 32, (9, 4, 1)
    written, read = Spans.even(3, 1, 3, torch.device(DEVICE)), spans_of(lengths, 1)
    bias = draw(1, heads, 1, max(lengths)).to(dtype) if biased else None
    q, k, v = draw(3, inner).to(dtype), draw(read.rows, inner).to(dtype), draw(read.rows, inner).to(dtype)
    vectors = [vector(1, 3, inner).float() for _ in range(2)]
    found = kernels.attention(q, written, k, v, read, bias, *vectors, heads, seed())
    exact = [None if x is None else x.double() for x in (q, k, v, bias, *vectors)]
    expected = operations.attention(exact[0], written, *exact[1:3], read, *exact[3:], heads, None)
    near(found, expected, dtype)


def test_an_example_without_keys_gets_nothing() -> None:
    source, target = spans_of((4, 0), 1), Spans.even(2, 3, 1, torch.device(DEVICE))
    q, kv = draw(6, 32).float(), draw(source.rows, 64).float()
    found = kernels.cross_attention(q, target, kv, source, 0, {}, None, None, 2, 0.0, seed())
    assert bool(found[:3].abs().min() > 0)
    assert float(found[3:].abs().max()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [30, 5000])
def test_token_losses(dtype: torch.dtype, words: int) -> None:
    labels = torch.randint(0, words, (4, 3), device=DEVICE)
    labels[1, 1:] = -100
    compare(
        lambda logits: kernels.token_losses(logits * 1, labels),
        lambda logits: operations.token_losses(logits, labels, by_kernels=False),
        [3 * draw(4, 3, words)],
        dtype,
        vectors=[],
    )


def test_dropout_is_inverted_and_the_same_in_the_backward() -> None:
    h = torch.ones(64, 128, device=DEVICE)
    x = torch.zeros(64, 128, device=DEVICE, requires_grad=True)
    h.requires_grad_()
    total, _ = kernels.add_norm(x, h, torch.ones(128, device=DEVICE), 1e-6, 0.25, seed())
    kept = total != 0
    assert 0.72 < float(kept.float().mean()) < 0.78
    torch.testing.assert_close(total[kept], torch.full_like(total[kept], 1 / 0.75))
    total.sum().backward()
    torch.testing.assert_close(h.grad, kept / 0.75)
    other, _ = kernels.add_norm(x, h, torch.ones(128, device=DEVICE), 1e-6, 0.25, seed() + 1)
    assert bool(((other != 0) != kept).any())


@pytest.mark.parametrize("part", ["gated", "attention"])
def test_gradients_under_dropout_are_the_slopes(part: str) -> None:
    """With the seed held, a kernel is a fixed function: its gradient is its slope."""
    spans = Spans.even(4, 6, 2, torch.device(DEVICE))
    if part == "gated":
        x = draw(24, 48).float()
        factors = [vector(2, 2, 24).float()]

        def function(x: Tensor, *factors: Tensor) -> Tensor:
            return kernels.gated(x, factors[0], spans, "gelu_new", True, 0.3, seed())
    else:
        x = 0.6 * draw(24, 3 * 32).float()
        bias = draw(1, 2, 6, 6).float()
        factors = [vector(2, 2, 32).float() for _ in range(2)]

        def function(x: Tensor, *factors: Tensor) -> Tensor:
            return kernels.self_attention(x, bias, spans, *factors, 2, 0.3, seed())

    weights = torch.randn_like(function(x, *factors))
    inputs = [x.requires_grad_(), *(factor.clone().requires_grad_() for factor in factors)]
    (function(*inputs) * weights).sum().backward()
    for index, each in enumerate(inputs):
        way = torch.randn_like(each if index == 0 else each[:1])
        moved = [
            sum(
                (
                    function(*[e.detach() + s * 1e-2 * way if i == index else e.detach() for i, e in enumerate(inputs)])
                    * weights
                )
                .double()
                .sum()
                * s
                for s in (1, -1)
            )
            / 2e-2
        ]
        assert each.grad is not None
        gradient = each.grad if index == 0 else each.grad.sum(0, keepdim=True)
        assert float((gradient * way).double().sum()) == pytest.approx(float(moved[0]), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 6), (3, 3, 16)])
@pytest.mark.parametrize(
    ("which", "stripes", "groups"), [("kv", 1, 1), ("kv", 3, 3), ("k", 2, 1), ("v", 2, 2), ("", 1, 2)]
)
def test_rotary_heads(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, which: str, stripes: int, groups: int
) -> None:
    spans = spans_of((20, 17, 0, 1, 35, 3), groups)
    angles = torch.rand(35, dim // 2, dtype=torch.float64, device=DEVICE) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    mask = spans.mask[:, None, :, None]

    def rows(
        function: Callable[..., tuple[Tensor, ...]], cos: Tensor, sin: Tensor
    ) -> Callable[..., tuple[Tensor, ...]]:
        return lambda qkv, l_k, l_v: tuple(x * mask for x in function(qkv, cos, sin, spans, l_k, l_v, heads, kv_heads))

    def twin(*inputs: Any) -> tuple[Tensor, ...]:
        return operations.rotary_heads(*inputs, by_kernels=False)

    width = kv_heads * dim
    compare(
        rows(kernels.rotary_heads, cos, sin),
        rows(twin, cos.double(), sin.double()),
        [
            draw(spans.rows, (heads + 2 * kv_heads) * dim),
            *(vector(stripes, groups, width) if part in which else None for part in "kv"),
        ],
        dtype,
        vectors=[1, 2],
        rows=int(spans.starts[-1]),
    )


def test_rotary_heads_are_zero_where_no_row_is() -> None:
    spans = spans_of((3, 5), 1)
    angles = torch.zeros(5, 4, device=DEVICE)
    qkv = draw(spans.rows, 4 * 8).float()
    for x in kernels.rotary_heads(qkv, angles.cos(), angles.sin(), spans, None, None, 2, 1):
        assert float(x[0, :, 3:].abs().max()) == 0
        assert float(x[0, :, :3].abs().min()) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_losses(dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr("ia3.fast.operations._LOGITS_AT_ONCE", 1)
    weight = draw(300, 16).to(dtype)
    places, labels = torch.arange(10, 270, device=DEVICE), torch.randint(0, 300, (260,), device=DEVICE)
    labels[-5:], places[-5:] = -100, 0

    def plain(y: Tensor) -> Tensor:
        logits = y[places] @ weight.double().T
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    compare(
        lambda y: operations.head_losses(y, weight, places, labels, by_kernels=True),
        plain,
        [draw(280, 16)],
        dtype,
        vectors=[],
    )


@pytest.mark.skipif(not CUDA, reason="Triton's interpreter rounds to fp8 without carrying")
@pytest.mark.parametrize("width", [5, 48, 1500, 5000])
@pytest.mark.parametrize("scaled", [False, True])
def test_round_rows(width, scaled) -> None:
    x = (draw(6, 2 * width) * torch.logspace(-3, 3, 6, device=DEVICE)[:, None]).float()[:, :width]
    factors = draw(width, 1).exp().float() if scaled else None
    rounded, scales = kernels.round_rows(x, factors)
    wanted, of_wanted = operations.round_rows(x.cpu(), None if factors is None else factors.cpu())
    torch.testing.assert_close(scales.cpu(), of_wanted, rtol=1e-6, atol=0)
    differ = rounded.cpu().float() != wanted.float()
    assert float(differ.float().mean()) < 0.01  # where a division rounds another way
    torch.testing.assert_close(rounded.cpu().float(), wanted.float(), rtol=0.13, atol=0.002)


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_split_in_three(falling, stacked) -> None:
    x = (draw(6, 3000) * torch.logspace(-3, 3, 6, device=DEVICE)[:, None]).float()[:, :1500]
    parts = list(kernels.split_in_three(x, falling, stacked).chunk(3, 0 if stacked else 1))
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert {part.shape for part in parts} == {x.shape}
    first, second, third = (part.double() for part in (parts[::-1] if falling else parts))
    assert torch.equal(first + second + third, x.double())
    # Interpreted, a cast cuts off.
    assert bool((second.abs() <= first.abs() * 2 ** (-8 if CUDA else -7)).all())
    assert bool((third.abs() <= first.abs() * 2 ** (-16 if CUDA else -14)).all())
