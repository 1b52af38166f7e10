"""Keys and values in their cache: the kernel beside the plain definition, and that beside its formula."""

from __future__ import annotations

import pytest
import torch
from twins import DEVICE, needs_kernels, ragged_of

from ia3.fast.ops.append import append
from ia3.fast.ragged import Ragged

BACKENDS = ["torch", pytest.param("triton", marks=needs_kernels)]


def vectors(groups: int, inner: int, which: str) -> list[torch.Tensor | None]:
    """As slices of a wider table."""
    table = 1 + 0.5 * torch.randn(1, groups, 2 * inner + 3, device=DEVICE)
    both = table[..., 3 : 3 + inner], table[..., 3 + inner :]
    return [vector if name in which else None for name, vector in zip("kv", both, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["", "k", "v", "kv"])
@pytest.mark.parametrize("groups", [1, 4])
def test_each_group_has_its_vectors(backend: str, which: str, groups: int) -> None:
    inner, one = 5, Ragged.even(4, 1, groups, torch.device(DEVICE))
    l_k, l_v = vectors(groups, inner, which)
    qkv, cache = torch.randn(4, 3 * inner, device=DEVICE), torch.zeros(6, 2 * inner, device=DEVICE)
    append(qkv[:, inner:], l_k, l_v, one, cache, backend)
    wanted = qkv[:, inner:].clone()
    for half, vector in ((wanted[:, :inner], l_k), (wanted[:, inner:], l_v)):
        if vector is not None:
            half *= vector[0] if groups == 4 else vector[0, 0]
    torch.testing.assert_close(cache[:4], wanted)
    assert not cache[4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompts_keys_and_values_have_their_groups_vectors(backend: str) -> None:
    inner, ragged = 5, ragged_of([3, 0, 4, 2], groups=2)
    l_k, l_v = vectors(2, inner, "kv")
    kv, into = torch.randn(ragged.total_tokens, 6 * inner, device=DEVICE), torch.zeros(20, 6 * inner, device=DEVICE)
    own = slice(2 * inner, 4 * inner)
    append(kv[:, own], l_k, l_v, ragged, into[:, own], backend)
    both = torch.cat([l_k[0], l_v[0]], -1)
    wanted = kv[:9, own] * both[torch.tensor([0] * 3 + [1] * 6, device=DEVICE)]
    torch.testing.assert_close(into[:9, own], wanted)
    assert not into[:, : 2 * inner].any()
    assert not into[:, 4 * inner :].any()
