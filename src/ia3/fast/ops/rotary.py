"""Rotary positions (Su et al. 2021, arXiv:2104.09864): queries, keys and values by heads, multiplied, then rotated.

The keys' vector must act before the rotation, which mixes channels. The values' acts here too: with fewer heads of
values than of queries that is cheaper than on what attention returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.norm import Norm
from ia3.fast.ragged import Ragged


def rotary_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, ragged: Ragged, l_k: Vector, l_v: Vector, heads: int, kv_heads: int, *,
    backend: Backend, qk_norm: tuple[Norm, Norm] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values, `[examples, heads, max_seqlen, dim]`.

    Args:
        qkv: `[tokens, (heads + 2 · kv_heads) · dim]`, the queries first.
        cos: of the angles, `[max_seqlen, rotated / 2]`: channel i of a head rotates with channel i + rotated / 2, as
            transformers has it; channels from `rotated` on stay.
        sin: alike.
        ragged: the tokens' examples and groups.
        l_k: the keys' vector.
        l_v: the values'.
        heads: of the queries.
        kv_heads: of the keys, and of the values.
        backend: who computes it.
        qk_norm: of the queries and of the keys, each head's or all heads' together, between the vector and the
            rotation; None without.

    Returns:
        What is finite and of no example's where an example has no token.
    """
    dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    if backend == "triton" and qk_norm is None and 2 * cos.shape[-1] == dim:
        from ia3.fast import kernels

        return kernels.rotary_heads(qkv, cos, sin, ragged, l_k, l_v, heads, kv_heads)
    q, k, v = torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], -1)
    k, v = scaled(k, l_k, ragged), scaled(v, l_v, ragged)
    if qk_norm is not None:
        q, k = (
            norm(x.unflatten(1, (-1, len(norm.weight)))).flatten(1) for norm, x in zip(qk_norm, (q, k), strict=True)
        )
    q, k, v = (ragged.pad(x).view(ragged.examples, ragged.max_seqlen, -1, dim).transpose(1, 2) for x in (q, k, v))
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*halves, rest] if rest.shape[-1] else halves, -1)
