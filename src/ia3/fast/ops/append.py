"""Keys and values on their way into a cache, multiplied by their vectors, so that no attention has to read these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.launch import cdiv, jit, launch
from ia3.fast.ops.partials import partials_and_stride
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl


def append(kv: Tensor, l_k: Vector, l_v: Vector, ragged: Ragged, cache: Tensor, backend: Backend) -> None:
    """Write keys and values where a generation reads them; nothing has a gradient.

    Args:
        kv: `[tokens, 2 · inner]`, the keys first.
        l_k: the keys' vector.
        l_v: the values'.
        ragged: the tokens' groups.
        cache: written, `[at least tokens, 2 · inner]`.
        backend: who computes it.
    """
    if backend == "triton":
        _append(kv, l_k, l_v, ragged, cache)
        return
    k, v = kv.chunk(2, -1)
    cache[: len(kv)].copy_(torch.cat([scaled(k, l_k, ragged), scaled(v, l_v, ragged)], -1))


@jit(do_not_specialize=["kv_stride", "cache_stride"])
def _append_kernel(
    kv, l_k, l_v, group_of_token, cache, kv_stride, cache_stride, stride_k, stride_v,
    INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token and a block of channels of its key and its value.

    Args:
        kv: `[tokens, 2 · INNER]`, a token every `kv_stride` numbers.
        l_k, l_v: `[groups, INNER]`, a group every `stride_k` or `stride_v` numbers; None without.
        group_of_token: `[tokens]`, int32; None for one group.
        cache: written, a token every `cache_stride` numbers.
    """
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < INNER
    kv += token * kv_stride
    cache += token * cache_stride
    if group_of_token is not None:
        group = tl.load(group_of_token + token).to(tl.int64)
        if l_k is not None:
            l_k += group * stride_k
        if l_v is not None:
            l_v += group * stride_v
    dtype = cache.dtype.element_ty
    key = tl.load(kv + offs, mask=mask, other=0.0)
    value = tl.load(kv + INNER + offs, mask=mask, other=0.0)
    if l_k is not None:
        factor = tl.load(l_k + offs, mask=mask, other=0.0).to(dtype).to(tl.float32)
        key = (key.to(tl.float32) * factor).to(dtype)
    if l_v is not None:
        factor = tl.load(l_v + offs, mask=mask, other=0.0).to(dtype).to(tl.float32)
        value = (value.to(tl.float32) * factor).to(dtype)
    tl.store(cache + offs, key, mask=mask)
    tl.store(cache + INNER + offs, value, mask=mask)


def _append(kv: Tensor, l_k: Vector, l_v: Vector, ragged: Ragged, cache: Tensor) -> None:
    inner = kv.shape[1] // 2
    grouped = ragged.groups > 1 and not (l_k is None and l_v is None)
    launch(
        _append_kernel, (len(kv), cdiv(inner, 1024)), kv, l_k, l_v, ragged.group_of_token if grouped else None, cache,
        kv.stride(0), cache.stride(0), partials_and_stride(l_k)[1], partials_and_stride(l_v)[1], INNER=inner,
        BLOCK=1024,
    )  # fmt: skip
