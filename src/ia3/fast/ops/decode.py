"""Attention of one new token an example, as a generation needs it; nothing has a gradient.

The new token's key and value are multiplied by their vectors, rotated, and written behind those of the tokens before,
and the queries attend to all of them, in one kernel: its time is that of reading the keys and values that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.launch import cdiv, jit, launch, next_power_of_2
from ia3.fast.ops.norm import Norm
from ia3.fast.ops.partials import partials_and_stride
from ia3.fast.ops.rotary import rotated
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl


# So many programs of one warp fill a GPU.
_MANY = 2048


@dataclass(frozen=True)
class Scores:
    """What queries and keys make.

    Args:
        scale: of their products.
        softcap: the scores' bound, softcap · tanh(scores / softcap); None without one.
        window: no token sees one so far before it; None without a window.
        bias: `[heads, distances]`, added to the scores by how far before the query a key is; None without.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Source:
    """Where each example's keys and values of an encoder's output are.

    Args:
        first: the place of each example's first, `[examples]`, int32.
        end: the place behind its last, `[examples]`, int32.
        most: no example has more.
        stride: of examples at equal distances, whose firsts are 0, stride, 2 · stride, …; None for others.
    """

    first: Tensor
    end: Tensor
    most: int
    stride: int | None = None

    @cached_property
    def mask(self) -> Tensor:
        """Which places are filled, `[examples, most]`."""
        return torch.arange(self.most, device=self.first.device) < (self.end - self.first)[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """`[places, width]` to `[examples, most, width]`; what is at places that aren't filled is anything."""
        examples = len(self.first)
        if self.stride is not None:
            return x[: examples * self.stride].view(examples, self.stride, -1)[:, : self.most]
        return x.index_select(0, self._places.clamp(max=len(x) - 1)).view(examples, self.most, -1)

    @cached_property
    def _places(self) -> Tensor:
        return (self.first[:, None] + torch.arange(self.most, device=self.first.device)).flatten()


def attend_to_cache(
    qkv: Tensor, cache: Tensor, place: Tensor, l_k: Vector, l_v: Vector, ragged: Ragged, heads: int, scores: Scores,
    angles: tuple[Tensor, Tensor] | None, backend: Backend, qk_norm: tuple[Norm, Norm] | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each example's new token to itself and to those before, `[examples, heads · dim]`.

    Args:
        qkv: `[examples, (heads + 2 · kv_heads) · dim]`, the queries first.
        cache: keys and values, multiplied and rotated, `[2, examples, kv_heads, positions, dim]`; the new ones are
            written there.
        place: the position of each new token, `[examples]`, int64: so many tokens are before it.
        l_k: the keys' vector.
        l_v: the values'.
        ragged: one token an example, and their groups.
        heads: of the queries.
        scores: how they are made.
        angles: cosines and sines, `[positions, rotated / 2]`, as in `rotary_heads`; None where nothing rotates.
        backend: who computes it.
        qk_norm: as in `rotary_heads`.
    """
    if backend == "torch":
        return _by_torch(qkv, cache, place, l_k, l_v, ragged, heads, scores, angles, qk_norm)
    if qk_norm is not None and not all(_is_of_heads(norm, cache.shape[4]) for norm in qk_norm):
        qkv = torch.cat(_prepared(qkv, cache, l_k, l_v, ragged, heads, qk_norm), -1)
        l_k = l_v = qk_norm = None
    return _by_kernel(qkv, cache, place, l_k, l_v, ragged, heads, scores, angles, qk_norm)


def attend_across(
    q: Tensor, k: Tensor, v: Tensor, source: Source, heads: int, scale: float, backend: Backend
) -> Tensor:
    """Attention of each example's new token to an encoder's output, `[examples, heads · dim]`; 0 where that is empty.

    Args:
        q: `[examples, heads · dim]`.
        k: keys, multiplied, `[places, heads · dim]`.
        v: values, alike.
        source: where each example's are.
        heads: of all three.
        scale: of the scores.
        backend: who computes it.
    """
    if backend == "triton":
        return _across_by_kernel(q, k, v, source, heads, scale)
    query, keys, values = (x.unflatten(-1, (heads, -1)) for x in (q, source.pad(k), source.pad(v)))
    found = torch.einsum("ehd,enhd->ehn", query, keys) * scale
    return _weighted(found, source.mask[:, None], values.transpose(1, 2)) * source.mask.any(1, keepdim=True)


def _by_torch(
    qkv: Tensor, cache: Tensor, place: Tensor, l_k: Vector, l_v: Vector, ragged: Ragged, heads: int, scores: Scores,
    angles: tuple[Tensor, Tensor] | None, qk_norm: tuple[Norm, Norm] | None,
) -> Tensor:  # fmt: skip
    _, examples, kv_heads, most, dim = cache.shape
    q, k, v = (x.view(examples, -1, dim) for x in _prepared(qkv, cache, l_k, l_v, ragged, heads, qk_norm))
    if angles is not None:
        cos, sin = (each[place][:, None] for each in angles)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    cache.scatter_(3, place.view(1, -1, 1, 1, 1).expand(2, -1, kv_heads, 1, dim), torch.stack([k, v])[:, :, :, None])
    keys, values = cache if heads == kv_heads else cache.repeat_interleave(heads // kv_heads, 2)
    found = (q[:, :, None] @ keys.transpose(-1, -2)).squeeze(2) * scores.scale
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    distance = place[:, None] - torch.arange(most, device=place.device)
    if scores.bias is not None:
        found = found + scores.bias[:, distance.clamp(min=0)].transpose(0, 1)
    seen = (distance >= 0) & (distance < (scores.window or most))
    return _weighted(found, seen[:, None], values)


def _prepared(
    qkv: Tensor, cache: Tensor, l_k: Vector, l_v: Vector, ragged: Ragged, heads: int,
    qk_norm: tuple[Norm, Norm] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values, multiplied and normed, `[examples, heads · dim]` each."""
    inner, dim = cache.shape[2] * cache.shape[4], cache.shape[4]
    q, k, v = torch.split(qkv, [heads * dim, inner, inner], -1)
    k, v = scaled(k, l_k, ragged), scaled(v, l_v, ragged)
    if qk_norm is not None:
        q, k = (
            norm(x.unflatten(1, (-1, len(norm.weight)))).flatten(1) for norm, x in zip(qk_norm, (q, k), strict=True)
        )
    return q, k, v


def _is_of_heads(norm: Norm, dim: int) -> bool:
    """Whether the kernel knows a norm: each head's root mean square."""
    return len(norm.weight) == dim and norm.bias is None and not norm.centred


def _weighted(scores: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    """Of scores `[examples, heads, keys]` and values `[examples, heads, keys, dim]`."""
    hidden = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = hidden.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(values.dtype)
    return (weights[:, :, None] @ values).flatten(1)


@jit
def _multiplied(source, vector, offs, mask):
    """Some channels in fp32, multiplied by their vector, which is rounded as they are; None without."""
    x = tl.load(source + offs, mask=mask, other=0.0).to(tl.float32)
    if vector is not None:
        x *= tl.load(vector + offs, mask=mask, other=0.0).to(source.dtype.element_ty).to(tl.float32)
    return x


@jit
def _turned(source, vector, offs, mask, weight, eps, cos, sin, offs_d, DIM: tl.constexpr, HALF: tl.constexpr):
    """Some heads' channels in fp32, multiplied, normed and rotated.

    Args:
        offs: `[heads, BLOCK_D]`, where they are.
        weight: of each head's norm, `[DIM]`; None without.
        cos, sin: of the position, `[HALF]`; None where nothing rotates.
        offs_d: `[BLOCK_D]`: channel i rotates with channel i + HALF, and those from 2 · HALF on stay.
    """
    x = _multiplied(source, vector, offs, mask)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x *= scale * tl.load(weight + offs_d, mask=offs_d < DIM, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        first = offs_d < HALF
        turns = offs_d < 2 * HALF
        other = tl.where(turns, tl.where(first, HALF, -HALF), 0)
        partner = _multiplied(source, vector, offs + other[None, :], mask)
        if weight is not None:
            partner *= scale * tl.load(weight + offs_d + other, mask=offs_d < DIM, other=0.0).to(tl.float32)[None, :]
        c = tl.load(cos + offs_d % HALF, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + offs_d % HALF, mask=turns, other=0.0).to(tl.float32)
        x = x * c[None, :] + partner * tl.where(first, -s, s)[None, :]
    return x


@jit
def _bounded(scores, softcap):
    """softcap · tanh(scores / softcap); the scores where there is none."""
    if softcap is not None:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores


@jit
def _attend_on(
    query, most, total, attended, k, v, stride, first, end, bias, place, scale, softcap, offs_d, mask_d,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention that goes on over the keys from first to before end.

    Args:
        query: `[ROWS, BLOCK_D]`, in the activations' dtype.
        most, total: `[ROWS]`: the largest score so far, and the sum of the exponentials below it.
        attended: `[ROWS, BLOCK_D]`, the sum of values so far, in fp32.
        k, v: a head's keys and values, every `stride` numbers.
        bias: of each row, `[ROWS, 1]`, by the distance from place; None without.
    """
    for start in range(first, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = offs_n < end
        offs = offs_n.to(tl.int64)[:, None] * stride + offs_d[None, :]
        mask = inside[:, None] & mask_d[None, :]
        key = tl.load(k + offs, mask=mask, other=0.0)
        value = tl.load(v + offs, mask=mask, other=0.0)
        if ROWS == 1:
            scores = tl.sum(key.to(tl.float32) * query.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        scores = _bounded(scores * scale, softcap)
        if bias is not None:
            scores += tl.load(bias + (place - offs_n)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        scores = tl.where(inside[None, :], scores, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        before = tl.exp(most - larger)
        total = total * before + tl.sum(weights, 1)
        if ROWS == 1:
            product = tl.sum(tl.trans(weights) * value.to(tl.float32), 0)[None, :]
        else:
            product = tl.dot(weights.to(value.dtype), value, input_precision="tf32x3")
        attended = attended * before[:, None] + product
        most = larger
    return most, total, attended


@jit(do_not_specialize=["most_positions", "group_examples"])
def _attend_to_cache(
    qkv, cache_k, cache_v, place, norm_q, norm_k, cos, sin, bias, l_k, l_v, out, scale, softcap, window, eps_q, eps_k,
    stride_k, stride_v, bias_stride, most_positions, group_examples,
    KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program an example and a head of its keys, for the QUERIES that attend to them, in ROWS.

    Args:
        qkv: `[examples, (KV_HEADS · QUERIES + 2 · KV_HEADS) · DIM]`.
        cache_k, cache_v: `[examples, KV_HEADS, most_positions, DIM]`; the new token's are written.
        place: `[examples]`, int64.
        norm_q, norm_k: of each head's root mean square, `[DIM]`; None without.
        cos, sin: `[most_positions, HALF]`; None where nothing rotates.
        bias: `[KV_HEADS · QUERIES, at least most_positions]`, a head every `bias_stride` numbers; None without.
        l_k, l_v: `[groups, KV_HEADS · DIM]`, a group every `stride_k` or `stride_v` numbers; None without.
        out: written, `[examples, KV_HEADS · QUERIES · DIM]`.
        softcap: None without.
        window: None without.
    """
    example, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    at = tl.load(place + example).to(tl.int32)
    dtype = qkv.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < DIM
    rows = tl.arange(0, ROWS)
    mask_q = (rows < QUERIES)[:, None] & mask_d[None, :]
    if cos is not None:
        cos += at * HALF
        sin += at * HALF
    group = (example // group_examples).to(tl.int64)
    if l_k is not None:
        l_k += group * stride_k + head * DIM
    if l_v is not None:
        l_v += group * stride_v + head * DIM
    qkv += example.to(tl.int64) * (KV_HEADS * (QUERIES + 2) * DIM)
    channels = (head * QUERIES + rows)[:, None] * DIM + offs_d[None, :]
    query = _turned(qkv, None, channels, mask_q, norm_q, eps_q, cos, sin, offs_d, DIM, HALF).to(dtype)
    of_head = qkv + (KV_HEADS * QUERIES + head) * DIM
    key = _turned(
        of_head, l_k, offs_d[None, :], mask_d[None, :], norm_k, eps_k, cos, sin, offs_d, DIM, HALF
    ).to(dtype)  # fmt: skip
    value = _multiplied(of_head + KV_HEADS * DIM, l_v, offs_d[None, :], mask_d[None, :]).to(dtype)
    begin = tl.program_id(0).to(tl.int64) * most_positions * DIM
    cache_k += begin
    cache_v += begin
    tl.store(cache_k + at * DIM + offs_d[None, :], key, mask=mask_d[None, :])
    tl.store(cache_v + at * DIM + offs_d[None, :], value, mask=mask_d[None, :])
    # The token itself, from registers.
    most = _bounded(tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale, softcap)
    if bias is not None:
        bias += (head * QUERIES + tl.minimum(rows, QUERIES - 1))[:, None] * bias_stride
        most += tl.reshape(tl.load(bias), [ROWS]).to(tl.float32)
    total = tl.full([ROWS], 1.0, tl.float32)
    attended = tl.zeros([ROWS, BLOCK_D], tl.float32) + value.to(tl.float32)
    first = 0
    if window is not None:
        first = tl.maximum(at + 1 - window, 0)
    most, total, attended = _attend_on(
        query, most, total, attended, cache_k, cache_v, DIM, first, at, bias, at, scale, softcap, offs_d, mask_d, ROWS,
        BLOCK_N,
    )  # fmt: skip
    out += example.to(tl.int64) * (KV_HEADS * QUERIES * DIM)
    tl.store(out + channels, (attended / total[:, None]).to(dtype), mask=mask_q)


@jit
def _attend_across(
    q, k, v, source_first, source_end, out, scale, q_stride, kv_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program an example and a head.

    Args:
        q: `[examples, HEADS · DIM]`, an example every `q_stride` numbers.
        k, v: `[places, HEADS · DIM]`, a place every `kv_stride` numbers.
        source_first, source_end: `[examples]`, int32; see `Source`.
        out: written, `[examples, HEADS · DIM]`.
    """
    example, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    first, end = tl.load(source_first + example), tl.load(source_end + example)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < DIM
    channels = head * DIM + offs_d[None, :]
    query = tl.load(q + example * q_stride + channels, mask=mask_d[None, :], other=0.0)
    # An example without keys gets nothing, instead of NaN.
    most = tl.full([1], -1e30, tl.float32)
    total = tl.full([1], 1e-30, tl.float32)
    attended = tl.zeros([1, BLOCK_D], tl.float32)
    most, total, attended = _attend_on(
        query, most, total, attended, k + head * DIM, v + head * DIM, kv_stride, first, end, None, 0, scale, None,
        offs_d, mask_d, 1, BLOCK_N,
    )  # fmt: skip
    attended = (attended / total[:, None]).to(q.dtype.element_ty)
    tl.store(out + example * (HEADS * DIM) + channels, attended, mask=mask_d[None, :])


def _by_kernel(
    qkv: Tensor, cache: Tensor, place: Tensor, l_k: Vector, l_v: Vector, ragged: Ragged, heads: int, scores: Scores,
    angles: tuple[Tensor, Tensor] | None, qk_norm: tuple[Norm, Norm] | None,
) -> Tensor:  # fmt: skip
    _, examples, kv_heads, most, dim = cache.shape
    cos, sin = (None, None) if angles is None else angles
    (norm_q, eps_q), (norm_k, eps_k) = ((norm.weight, norm.eps) for norm in qk_norm) if qk_norm else [(None, 0.0)] * 2
    bias, queries = scores.bias, heads // kv_heads
    out = qkv.new_empty(examples, heads * dim)
    # A product on the tensor cores takes 16 rows.
    half, rows = 1 if cos is None else cos.shape[-1], 1 if queries == 1 else max(16, next_power_of_2(queries))
    launch(
        _attend_to_cache, (examples * kv_heads,), qkv.contiguous(), cache[0], cache[1], place, norm_q, norm_k, cos, sin,
        bias, l_k, l_v, out, scores.scale, scores.softcap, scores.window, eps_q, eps_k, partials_and_stride(l_k)[1],
        partials_and_stride(l_v)[1], 0 if bias is None else bias.stride(0), most, examples // ragged.groups,
        KV_HEADS=kv_heads, QUERIES=queries, DIM=dim, HALF=half, ROWS=rows,
        **_blocks(qkv, dim, examples * kv_heads, 16, most),
    )  # fmt: skip
    return out


def _across_by_kernel(q: Tensor, k: Tensor, v: Tensor, source: Source, heads: int, scale: float) -> Tensor:
    dim, out = q.shape[-1] // heads, torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        _attend_across, (len(q) * heads,), q, k, v, source.first, source.end, out, scale, q.stride(0),
        k.stride(0), HEADS=heads, DIM=dim, **_blocks(q, dim, len(q) * heads, 32, source.most),
    )  # fmt: skip
    return out


def _blocks(x: Tensor, dim: int, programs: int, keys: int, most: int) -> dict[str, int]:
    """How many keys a program takes at once, as measured on an H200.

    Args:
        programs: where they are many, small ones hide each other's waiting; few have to be large.
        keys: of a small one, of 64 channels in half precision.
        most: no program has more.
    """
    block_d, warps = max(16, next_power_of_2(dim)), min(8, next_power_of_2(cdiv(_MANY, programs)))
    warps = min(warps, max(1, next_power_of_2(most) // keys))
    block_n = max(16, warps * keys * 128 // (block_d * x.element_size()))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": warps}
