"""Triton kernels of a transformer block with vectors: each computation of `operations.py` that is bound by memory.

A block's frozen products need nothing kept for their backward, so these keep only what they read: the residual stream,
the queries, keys and values, and both halves of a gate. What lies between is computed again, dropout masks included,
which are a function of a seed. A vector is read as `[stripes, groups, width]`, equal along the stripes: examples are
divided into groups, each with a vector of its own, and each stripe of a group's tokens gets a gradient of its own,
so that the sum over all tokens needs neither atomics nor a second kernel a site.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ia3.fast.packing import Spans

Vector = Tensor | None

# Of more keys than this, a program could not hold its keys' and values' gradients.
MOST_KEYS = 256
ACTIVATIONS = {"relu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "silu": 3}


@triton.jit
def _kept(seed, places, p):
    """Which places a dropout keeps: a hash of each place and the seed (two multiplications, after Wellons' lowbias32).

    Philox, which torch uses, took half of the attention kernels' time.
    """
    drawn = tl.load(seed)
    x = places.to(tl.uint32) * 0x9E3779B9 + drawn.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (drawn >> 32).to(tl.uint32)) * 0x846CA68B
    return ((x ^ (x >> 16)) >> 8).to(tl.float32) >= p * 16777216.0


@triton.jit
def _dropped(values, seed, places, p):
    """Inverted dropout; the same seed and places give the same mask."""
    return tl.where(_kept(seed, places, p), values / (1 - p), 0.0)


@triton.jit
def _add_norm_forward(
    x, h, weight, total, normed, scales, seed, p, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    place = row * WIDTH + at
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            added = _dropped(added, seed, place, p)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    tl.store(scales + row, scale)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, (value * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_backward(
    d_total, d_normed, total, weight, scales, dx, dh, seed, p,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    place = row * WIDTH + at
    scale = tl.load(scales + row)
    unit = tl.load(total + place, mask=inside, other=0.0).to(tl.float32) * scale
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(d_normed + place, mask=inside, other=0.0).to(tl.float32) * gain
    d = scale * (g - unit * (tl.sum(g * unit, 0) / WIDTH))
    d += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)
    if ADD and DROP:
        tl.store(dh + place, _dropped(d, seed, place, p).to(dh.dtype.element_ty), mask=inside)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor | None, weight: Tensor, eps: float, p: float, seed: Tensor) -> Any:
        width = x.shape[-1]
        total = x if h is None else torch.empty_like(x)
        normed = torch.empty_like(x)
        scales = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
        ctx.p, ctx.add = p, h is not None
        ctx.form = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "ADD": ctx.add, "DROP": p > 0}
        _add_norm_forward[(len(scales),)](x, h, weight, total, normed, scales, seed, p, eps, **ctx.form)
        ctx.save_for_backward(total, weight, scales, seed)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> Any:
        total, weight, scales, seed = ctx.saved_tensors
        dx = torch.empty_like(total)
        dh = torch.empty_like(total) if ctx.add and ctx.p else dx
        _add_norm_backward[(len(scales),)](
            d_total.contiguous(), d_normed.contiguous(), total, weight, scales, dx, dh, seed, ctx.p, **ctx.form
        )
        return dx, dh if ctx.add else None, None, None, None, None


def add_norm(x: Tensor, h: Tensor | None, weight: Tensor, eps: float, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`operations.add_norm`."""
    found: tuple[Tensor, Tensor] = _AddNorm.apply(x, h, weight, eps, p, seed)
    return found


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """An activation and its derivative."""
    if KIND == 0:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    if KIND == 1:
        squared = x * x
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * squared))
        return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * squared)
    if KIND == 2:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    s = tl.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


@triton.jit
def _gated_forward(
    h, vector, group_of_row, out, seed, p, vector_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    GROUPED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    start = h + row * (2 * WIDTH if GATED else WIDTH)
    value, _ = _activation(tl.load(start + at, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(start + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        if GROUPED:
            vector += tl.load(group_of_row + row) * vector_stride
        value *= tl.load(vector + at, mask=inside, other=0.0).to(h.dtype.element_ty).to(tl.float32)
    if DROP:
        value = _dropped(value, seed, row * WIDTH + at, p)
    tl.store(out + row * WIDTH + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _part(edges, groups, stripes):
    """A program's stripe of a group: the group, the first row and the end."""
    part = tl.program_id(0)
    group = part % groups
    begin = tl.load(edges + group)
    end = tl.load(edges + group + 1)
    each = tl.cdiv(end - begin, stripes)
    first = begin + (part // groups) * each
    return group, first, tl.minimum(first + each, end)


@triton.jit(do_not_specialize=["groups", "stripes"])
def _gated_backward(
    h, vector, edges, grad, dh, d_vector, seed, p, groups, stripes, vector_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program a stripe of a group's rows and a block of columns."""
    group, first, last = _part(edges, groups, stripes)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    if SCALED:
        factor = tl.load(vector + group * vector_stride + at, mask=inside, other=0.0)
        factor = factor.to(h.dtype.element_ty).to(tl.float32)[None, :]
    summed = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        both = (rows < last)[:, None] & inside[None, :]
        place = rows[:, None] * WIDTH + at[None, :]
        wide = rows[:, None] * (2 * WIDTH if GATED else WIDTH) + at[None, :]
        g = tl.load(grad + place, mask=both, other=0.0).to(tl.float32)
        if DROP:
            g = _dropped(g, seed, place, p)
        value, slope = _activation(tl.load(h + wide, mask=both, other=0.0).to(tl.float32), KIND)
        if GATED:
            linear = tl.load(h + wide + WIDTH, mask=both, other=0.0).to(tl.float32)
            if SCALED:
                summed += tl.sum(g * value * linear, 0)
                g *= factor
            tl.store(dh + wide + WIDTH, (g * value).to(dh.dtype.element_ty), mask=both)
            g *= linear
        elif SCALED:
            summed += tl.sum(g * value, 0)
            g *= factor
        tl.store(dh + wide, (g * slope).to(dh.dtype.element_ty), mask=both)
    if SCALED:
        tl.store(d_vector + tl.program_id(0) * WIDTH + at, summed, mask=inside)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, vector: Vector, spans: Spans, act: str, is_gated: bool, p: float, seed: Tensor
    ) -> Tensor:
        width = h.shape[-1] // 2 if is_gated else h.shape[-1]
        out = h.new_empty(*h.shape[:-1], width)
        ctx.spans, ctx.p = spans, p
        ctx.form = {"WIDTH": width, "KIND": ACTIVATIONS[act], "GATED": is_gated}
        ctx.form |= {"SCALED": vector is not None, "DROP": p > 0}
        grouped = spans.groups > 1
        _gated_forward[(out.numel() // width, triton.cdiv(width, 512))](
            h, vector, spans.group_of_row if grouped else None, out, seed, p, _measures(vector)[1], BLOCK=512,
            GROUPED=grouped, **ctx.form,
        )  # fmt: skip
        ctx.save_for_backward(h, vector, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, vector, seed = ctx.saved_tensors
        dh = torch.empty_like(h)
        d_vector = None if vector is None else _gradient_of(vector)
        width, groups = ctx.form["WIDTH"], ctx.spans.groups
        stripes, stride = _measures(vector)
        _gated_backward[(stripes * groups, triton.cdiv(width, 128))](
            h, vector, ctx.spans.edges, grad.contiguous(), dh, d_vector, seed, ctx.p, groups, stripes, stride, ROWS=8,
            BLOCK=128, **ctx.form,
        )  # fmt: skip
        return dh, d_vector, None, None, None, None, None


def gated(h: Tensor, vector: Vector, spans: Spans, act: str, is_gated: bool, p: float, seed: Tensor) -> Tensor:
    """`operations.gated`."""
    found: Tensor = _Gated.apply(h, vector, spans, act, is_gated, p, seed)
    return found


def _measures(vector: Vector) -> tuple[int, int]:
    """Stripes, and what lies between two groups' vectors."""
    return (1, 0) if vector is None else (vector.shape[0], vector.stride(1))


def _gradient_of(vector: Tensor) -> Tensor:
    return torch.empty(vector.shape, dtype=torch.float32, device=vector.device)


@triton.jit
def _weights(q, k, bias, head, rows, queries, keys, longest, BLOCK_K: tl.constexpr, BIASED: tl.constexpr):
    """The softmax over an example's keys, `[rows, BLOCK_K]`."""
    columns = tl.arange(0, BLOCK_K)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if BIASED:
        places = (head * longest + rows)[:, None] * longest + columns[None, :]
        near = (rows < queries)[:, None] & (columns < keys)[None, :]
        scores += tl.load(bias + places, mask=near, other=0.0).to(tl.float32)
    scores = tl.where((columns < keys)[None, :], scores, -float("inf"))
    # An example without keys gets nothing, instead of NaN.
    powers = tl.exp(scores - tl.maximum(tl.max(scores, 1), -1e30)[:, None])
    return powers / tl.maximum(tl.sum(powers, 1), 1e-30)[:, None]


@triton.jit(do_not_specialize=["longest_q", "longest_k", "group_examples"])
def _attention_forward(
    q, k, v, bias, q_starts, k_starts, l_k, l_v, out, seed, p, q_stride, kv_stride, stride_k, stride_v, longest_q,
    longest_k, group_examples, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BIASED: tl.constexpr, SCALE_K: tl.constexpr, SCALE_V: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program an example, a head and a block of queries."""
    example, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    group = example // group_examples
    first_q, first_k = tl.load(q_starts + example), tl.load(k_starts + example)
    queries, keys = tl.load(q_starts + example + 1) - first_q, tl.load(k_starts + example + 1) - first_k
    depth = tl.arange(0, BLOCK_D)
    channels = head * DIM + depth
    deep = depth < DIM
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    dtype = q.dtype.element_ty
    here = (rows < queries)[:, None] & deep[None, :]
    there = (columns < keys)[:, None] & deep[None, :]
    query = tl.load(q + (first_q + rows)[:, None] * q_stride + channels[None, :], mask=here, other=0.0)
    if SCALE_K:
        factor = tl.load(l_k + group * stride_k + channels, mask=deep, other=0.0).to(dtype).to(tl.float32)
        query = (query.to(tl.float32) * factor[None, :]).to(dtype)
    of_keys = (first_k + columns).to(tl.int64)[:, None] * kv_stride + channels[None, :]
    key = tl.load(k + of_keys, mask=there, other=0.0)
    weights = _weights(query, key, bias, head, rows, queries, keys, longest_k, BLOCK_K, BIASED)
    if DROP:
        places = ((example * HEADS + head) * longest_q + rows)[:, None] * longest_k + columns[None, :]
        weights = _dropped(weights, seed, places, p)
    value = tl.load(v + of_keys, mask=there, other=0.0)
    found = tl.dot(weights.to(dtype), value, input_precision="tf32x3")
    if SCALE_V:
        found *= tl.load(l_v + group * stride_v + channels, mask=deep, other=0.0).to(dtype).to(tl.float32)[None, :]
    place = (first_q + rows)[:, None] * (HEADS * DIM) + channels[None, :]
    tl.store(out + place, found.to(dtype), mask=here)


@triton.jit(do_not_specialize=["longest_q", "longest_k", "group_examples", "groups", "stripes"])
def _attention_backward(
    q, k, v, bias, q_starts, k_starts, l_k, l_v, grad, dq, dk, dv, d_l_k, d_l_v, seed, p, q_stride, kv_stride,
    dq_stride, dkv_stride, stride_k, stride_v, longest_q, longest_k, group_examples, groups, stripes,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, SCALE_K: tl.constexpr, SCALE_V: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program a stripe of a group's examples and a head."""
    part, head = tl.program_id(0), tl.program_id(1)
    group = part % groups
    each = tl.cdiv(group_examples, stripes)
    first = group * group_examples + (part // groups) * each
    last = tl.minimum(first + each, (group + 1) * group_examples)
    depth = tl.arange(0, BLOCK_D)
    channels = head * DIM + depth
    deep = depth < DIM
    columns = tl.arange(0, BLOCK_K)
    dtype = q.dtype.element_ty
    if SCALE_K:
        of_k = tl.load(l_k + group * stride_k + channels, mask=deep, other=0.0).to(dtype).to(tl.float32)[None, :]
    if SCALE_V:
        of_v = tl.load(l_v + group * stride_v + channels, mask=deep, other=0.0).to(dtype).to(tl.float32)[None, :]
    sum_k = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_D], tl.float32)
    for example in range(first, last):
        first_q, first_k = tl.load(q_starts + example), tl.load(k_starts + example)
        queries, keys = tl.load(q_starts + example + 1) - first_q, tl.load(k_starts + example + 1) - first_k
        there = (columns < keys)[:, None] & deep[None, :]
        of_keys = (first_k + columns).to(tl.int64)[:, None] * kv_stride + channels[None, :]
        key = tl.load(k + of_keys, mask=there, other=0.0)
        value = tl.load(v + of_keys, mask=there, other=0.0)
        d_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        d_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for start in range(0, queries, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            here = (rows < queries)[:, None] & deep[None, :]
            tokens = (first_q + rows)[:, None]
            plain = tl.load(q + tokens * q_stride + channels[None, :], mask=here, other=0.0)
            query = plain
            if SCALE_K:
                query = (plain.to(tl.float32) * of_k).to(dtype)
            weights = _weights(query, key, bias, head, rows, queries, keys, longest_k, BLOCK_K, BIASED)
            dropped = weights
            if DROP:
                places = ((example * HEADS + head) * longest_q + rows)[:, None] * longest_k + columns[None, :]
                kept = _kept(seed, places, p)
                dropped = tl.where(kept, weights / (1 - p), 0.0)
            g = tl.load(grad + tokens * (HEADS * DIM) + channels[None, :], mask=here, other=0.0)
            if SCALE_V:
                found = tl.dot(dropped.to(dtype), value, input_precision="tf32x3")
                sum_v += tl.sum(g.to(tl.float32) * found, 0)
                g = (g.to(tl.float32) * of_v).to(dtype)
            d_value += tl.dot(tl.trans(dropped.to(dtype)), g, input_precision="tf32x3")
            d_weights = tl.dot(g, tl.trans(value), input_precision="tf32x3")
            if DROP:
                d_weights = tl.where(kept, d_weights / (1 - p), 0.0)
            d_scores = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])
            d_scores = d_scores.to(dtype)
            d_query = tl.dot(d_scores, key, input_precision="tf32x3")
            if SCALE_K:
                sum_k += tl.sum(d_query * plain.to(tl.float32), 0)
                d_query *= of_k
            tl.store(dq + tokens * dq_stride + channels[None, :], d_query.to(dtype), mask=here)
            d_key += tl.dot(tl.trans(d_scores), query, input_precision="tf32x3")
        of_keys = (first_k + columns).to(tl.int64)[:, None] * dkv_stride + channels[None, :]
        tl.store(dk + of_keys, d_key.to(dtype), mask=there)
        tl.store(dv + of_keys, d_value.to(dtype), mask=there)
    place = part * (HEADS * DIM) + channels
    if SCALE_K:
        tl.store(d_l_k + place, sum_k, mask=deep)
    if SCALE_V:
        tl.store(d_l_v + place, sum_v, mask=deep)


class _Form:
    """One attention's sizes: what forward and backward hand to their kernels."""

    def __init__(
        self, width: int, of_q: Spans, of_k: Spans, bias: Vector, l_k: Vector, l_v: Vector, heads: int, p: float
    ) -> None:
        self.of_q, self.of_k, self.heads, self.p = of_q, of_k, heads, p
        vector = l_k if l_k is not None else l_v
        self.stripes, self.groups = (1, of_q.examples) if vector is None else (vector.shape[0], of_q.groups)
        self.strides = (_measures(l_k)[1], _measures(l_v)[1])
        self.sizes = (of_q.longest, of_k.longest, of_q.examples // self.groups)
        block_k = 16 if of_k.longest <= 16 else max(64, triton.next_power_of_2(of_k.longest))
        self.block_q = 16 if of_q.longest <= 16 else 64 if block_k <= 128 else 32
        dim = width // heads
        self.form = {
            "HEADS": heads, "DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_Q": self.block_q,
            "BLOCK_K": block_k, "BIASED": bias is not None, "SCALE_K": l_k is not None, "SCALE_V": l_v is not None,
            "DROP": p > 0, "num_warps": 8 if self.block_q > 16 else 4,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Vector, l_k: Vector, l_v: Vector, seed: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _attention_forward[(self.of_q.examples * self.heads, triton.cdiv(self.of_q.longest, self.block_q))](
            q, k, v, bias, self.of_q.starts, self.of_k.starts, l_k, l_v, out, seed, self.p, q.stride(0), k.stride(0),
            *self.strides, *self.sizes, **self.form,
        )  # fmt: skip
        return out

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Vector, l_k: Vector, l_v: Vector, seed: Tensor, grad: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> tuple[Vector, Vector]:  # fmt: skip
        """Fills the gradients of queries, keys and values; returns the vectors'."""
        d_l_k = None if l_k is None else _gradient_of(l_k)
        d_l_v = None if l_v is None else _gradient_of(l_v)
        _attention_backward[(self.stripes * self.groups, self.heads)](
            q, k, v, bias, self.of_q.starts, self.of_k.starts, l_k, l_v, grad.contiguous(), dq, dk, dv, d_l_k, d_l_v,
            seed, self.p, q.stride(0), k.stride(0), dq.stride(0), dk.stride(0), *self.strides, *self.sizes, self.groups,
            self.stripes, **self.form,
        )  # fmt: skip
        return d_l_k, d_l_v


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int, p: float, seed: Tensor
    ) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        ctx.form = _Form(q.shape[-1], spans, spans, bias, l_k, l_v, heads, p)
        ctx.save_for_backward(qkv, bias, l_k, l_v, seed)
        return ctx.form.forward(q, k, v, bias, l_k, l_v, seed)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, *rest = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv)
        d_vectors = ctx.form.backward(*qkv.chunk(3, -1), *rest, grad, *d_qkv.chunk(3, -1))
        return d_qkv, None, None, *d_vectors, None, None, None


def self_attention(
    qkv: Tensor, bias: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int, p: float, seed: Tensor
) -> Tensor:
    """`operations.self_attention`."""
    found: Tensor = _SelfAttention.apply(qkv, bias, spans, l_k, l_v, heads, p, seed)
    return found


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, of_q: Spans, kv: Tensor, of_k: Spans, index: int, shared: dict[str, Tensor], l_k: Vector,
        l_v: Vector, heads: int, p: float, seed: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.form = _Form(q.shape[-1], of_q, of_k, None, l_k, l_v, heads, p)
        ctx.index, ctx.shared = index, shared
        ctx.save_for_backward(q, kv, l_k, l_v, seed)
        return ctx.form.forward(q, *_of_layer(kv, index, q), None, l_k, l_v, seed)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, kv, *rest = ctx.saved_tensors
        # All layers fill one gradient, each its own columns. The first layer's backward is the last, and hands it on.
        if "gradient" not in ctx.shared:
            ctx.shared["gradient"] = torch.empty_like(kv)
        dq = torch.empty_like(q)
        d_k, d_v = _of_layer(ctx.shared["gradient"], ctx.index, q)
        d_vectors = ctx.form.backward(q, *_of_layer(kv, ctx.index, q), None, *rest, grad, dq, d_k, d_v)
        whole = ctx.shared.pop("gradient") if ctx.index == 0 else None
        return dq, None, whole, None, None, None, *d_vectors, None, None, None


def _of_layer(kv: Tensor, index: int, q: Tensor) -> tuple[Tensor, Tensor]:
    inner = q.shape[-1]
    start = 2 * index * inner
    return kv[:, start : start + inner], kv[:, start + inner : start + 2 * inner]


def cross_attention(
    q: Tensor, of_q: Spans, kv: Tensor, of_k: Spans, index: int, shared: dict[str, Tensor], l_k: Vector, l_v: Vector,
    heads: int, p: float, seed: Tensor,
) -> Tensor:  # fmt: skip
    """`operations.cross_attention`."""
    found: Tensor = _CrossAttention.apply(q, of_q, kv, of_k, index, shared, l_k, l_v, heads, p, seed)
    return found


@triton.jit
def _entropy_forward(logits, labels, losses, normalisers, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label >= 0:
        start = logits + row.to(tl.int64) * WORDS
        most = tl.full([BLOCK], -float("inf"), tl.float32)
        summed = tl.zeros([BLOCK], tl.float32)
        for first in range(0, WORDS, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(start + at, mask=at < WORDS, other=-1e30).to(tl.float32)
            larger = tl.maximum(most, x)
            summed = summed * tl.exp(most - larger) + tl.exp(x - larger)
            most = larger
        top = tl.max(most, 0)
        normaliser = top + tl.log(tl.sum(summed * tl.exp(most - top), 0))
        tl.store(normalisers + row, normaliser)
        tl.store(losses + row, normaliser - tl.load(start + label).to(tl.float32))
    else:
        tl.store(losses + row, 0.0)


@triton.jit
def _entropy_backward(logits, labels, normalisers, grad, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The logits' gradient in their own place."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row.to(tl.int64) * WORDS + at
    label = tl.load(labels + row)
    if label >= 0:
        x = tl.load(place, mask=at < WORDS, other=0.0).to(tl.float32)
        d = tl.exp(x - tl.load(normalisers + row)) - tl.where(at == label, 1.0, 0.0)
        tl.store(place, (d * tl.load(grad + row)).to(logits.dtype.element_ty), mask=at < WORDS)
    else:
        tl.store(place, tl.zeros([BLOCK], logits.dtype.element_ty), mask=at < WORDS)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        words = logits.shape[-1]
        rows = logits.numel() // words
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        normalisers = torch.empty_like(losses)
        _entropy_forward[(rows,)](logits, labels, losses, normalisers, WORDS=words, BLOCK=4096, num_warps=8)
        ctx.save_for_backward(logits, labels, normalisers)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, labels, normalisers = ctx.saved_tensors
        words = logits.shape[-1]
        grid = (len(normalisers), triton.cdiv(words, 4096))
        _entropy_backward[grid](logits, labels, normalisers, grad.contiguous(), WORDS=words, BLOCK=4096)
        return logits, None


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """`operations.token_losses`; the logits' memory becomes their gradient's."""
    losses: Tensor = _TokenLosses.apply(logits, labels)
    return losses
