"""Rotary positions: the plain definition against complex numbers, the kernel against the plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import DEVICE, compare, draw, needs_kernels, ragged_of, vector

from ia3.fast.ops.norm import Norm
from ia3.fast.ops.rotary import rotary_heads
from ia3.fast.ragged import Ragged

LENGTHS = (6, 17, 0, 1, 35, 3)


def angles(length: int, half: int) -> tuple[Tensor, Tensor]:
    drawn = torch.rand(length, half, dtype=torch.float64, device=DEVICE) * 6
    return drawn.cos(), drawn.sin()


@pytest.mark.parametrize("rotated", [6, 4])
def test_the_definition_turns_complex_numbers(rotated: int) -> None:
    ragged, (cos, sin) = Ragged.even(2, 5, 1, torch.device(DEVICE)), angles(5, rotated // 2)
    qkv, l_k = draw(10, 4 * 6), vector(1, 1, 6)
    q, k, v = rotary_heads(qkv, cos, sin, ragged, l_k, None, 2, 1, backend="torch")
    plain = qkv.view(2, 5, 4, 6).transpose(1, 2)
    turn = torch.complex(cos, sin)
    for found, given in ((q, plain[:, :2]), (k, plain[:, 2:3] * l_k[0, 0])):
        half = rotated // 2
        expected = torch.complex(given[..., :half], given[..., half:rotated]) * turn
        torch.testing.assert_close(torch.complex(found[..., :half], found[..., half:rotated]), expected)
        assert torch.equal(found[..., rotated:], given[..., rotated:])
    assert torch.equal(v, plain[:, 3:])


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim"),
    [(torch.float32, 4, 2, 6), (torch.float32, 2, 2, 16), (torch.bfloat16, 2, 1, 6)],
)
@pytest.mark.parametrize(("which", "partials", "groups"), [("kv", 4, 3), ("k", 2, 1), ("v", 2, 2), ("", 1, 3)])
def test_kernel(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, which: str, partials: int, groups: int
) -> None:
    ragged, (cos, sin) = ragged_of(LENGTHS, groups), (x.to(dtype) for x in angles(35, dim // 2))
    mask = ragged.mask[:, None, :, None]

    def function(backend: Any, qkv: Tensor, *vectors: Tensor | None) -> tuple[Tensor, ...]:
        given = (cos.to(qkv.dtype), sin.to(qkv.dtype), ragged, *vectors, heads, kv_heads)
        return tuple(x * mask for x in rotary_heads(qkv, *given, backend=backend))

    vectors = [vector(partials, groups, kv_heads * dim) if part in which else None for part in "kv"]
    qkv = draw(ragged.total_tokens, (heads + 2 * kv_heads) * dim)
    compare(function, [qkv, *vectors], dtype, vectors=[1, 2], tokens=[0], ragged=ragged)


@needs_kernels
def test_nothing_where_an_example_has_no_token() -> None:
    ragged = ragged_of((3, 5), 1)
    cos, sin = torch.ones(5, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    qkv = draw(ragged.total_tokens, 4 * 8).float()
    for x in rotary_heads(qkv, cos, sin, ragged, None, None, 2, 1, backend="triton"):
        assert float(x[0, :, 3:].abs().max()) == 0
        assert float(x[0, :, :3].abs().min()) > 0


@needs_kernels
def test_angles_that_lie_across() -> None:
    ragged, qkv = ragged_of((3, 5), 1), draw(11, 4 * 8).float()
    cos, sin = (x.float() for x in angles(5, 4))
    across = [torch.cat([x, x], -1).chunk(2, -1)[0] for x in (cos, sin)]
    for x, y in zip(
        rotary_heads(qkv, cos, sin, ragged, None, None, 2, 1, backend="triton"),
        rotary_heads(qkv, *across, ragged, None, None, 2, 1, backend="triton"),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("part", ["half a head", "norms"])
def test_what_the_kernel_does_not_know_is_pytorchs(part: str) -> None:
    ragged, qkv = ragged_of((3, 5), 1), draw(11, 4 * 8)
    cos, sin = angles(5, 2 if part == "half a head" else 4)
    norm = Norm(draw(8), None, 1e-6, False)
    given: dict[str, Any] = {"qk_norm": (norm, norm)} if part == "norms" else {}
    for x, y in zip(
        rotary_heads(qkv, cos, sin, ragged, None, None, 2, 1, backend="triton", **given),
        rotary_heads(qkv, cos, sin, ragged, None, None, 2, 1, backend="torch", **given),
        strict=True,
    ):
        assert torch.equal(x, y)
