"""Triton kernels of a transformer block with vectors: each computation of `operations.py` that is bound by memory.

A block's frozen products need nothing kept for their backward, so these keep only what they read: the residual stream,
the queries, keys and values, and both halves of a gate. What lies between is computed again, dropout masks included,
which are a function of a seed. A vector is read as `[stripes, groups, width]`, equal along the stripes: examples are
divided into groups, each with a vector of its own, and each stripe of a group's tokens gets a gradient of its own,
so that the sum over all tokens needs neither atomics nor a second kernel a site.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ia3.fast.operations import of_layer
from ia3.fast.packing import Spans

Vector = Tensor | None

ACTIVATIONS = {"relu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "silu": 3}


class _Mode(threading.local):
    """What this thread does with kernels; another one may run them meanwhile."""

    only_compiles = False


_mode = _Mode()


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if _mode.only_compiles:
        kernel.run(*arguments, grid=grid, warmup=True, **constants)
    else:
        kernel[grid](*arguments, **constants)


def compile_together(computation: Callable[[], object], device: torch.device) -> None:
    """Compile the kernels that a computation launches, side by side; one after the other they take many seconds.

    Args:
        computation: run once with all but the kernels, so that what it computes means nothing: it must be one that can
            be run again.
        device: the GPU.
    """
    _mode.only_compiles = True
    try:
        # A backward on a thread of its own would compile as ever. What can't be compiled says so when it is launched.
        on_this_thread = torch.autograd.set_multithreading_enabled(False)
        random = torch.cuda.get_rng_state(device)
        with on_this_thread, _Compilers(device) as compilers, triton.AsyncCompileMode(compilers, ignore_errors=True):
            computation()
        torch.cuda.set_rng_state(random, device)
    finally:
        _mode.only_compiles = False


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, each with the function that launches it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(lambda: _launchable(compile_kernel()))


def _launchable(kernel: Any) -> Any:
    getattr(kernel, "run", None)  # Triton makes the launcher when it is first asked for
    return kernel


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
        _launch(_add_norm_forward, (len(scales),), x, h, weight, total, normed, scales, seed, p, eps, **ctx.form)
        ctx.save_for_backward(total, weight, scales, seed)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> Any:
        total, weight, scales, seed = ctx.saved_tensors
        dx = torch.empty_like(total)
        dh = torch.empty_like(total) if ctx.add and ctx.p else dx
        _launch(
            _add_norm_backward,
            (len(scales),),
            d_total.contiguous(),
            d_normed.contiguous(),
            total,
            weight,
            scales,
            dx,
            dh,
            seed,
            ctx.p,
            **ctx.form,
        )
        return dx, dh if ctx.add else None, None, None, None, None


def add_norm(x: Tensor, h: Tensor | None, weight: Tensor, eps: float, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`operations.add_norm`."""
    found: tuple[Tensor, Tensor] = _AddNorm.apply(x, h, weight, eps, p, seed)
    return found


@triton.jit
def _round_rows(x, factors, out, scales, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    """A row twice: for its largest number, and to round it."""
    row = tl.program_id(0)
    start = x + row.to(tl.int64) * stride
    most = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(start + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(factors + at, mask=at < WIDTH, other=0.0)
        most = tl.maximum(most, tl.abs(value))
    scale = tl.maximum(tl.max(most, 0), 1e-30) / 448.0
    tl.store(scales + row, scale)
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(start + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(factors + at, mask=at < WIDTH, other=0.0)
        value = tl.clamp(value / scale, -448.0, 448.0)
        tl.store(out + row.to(tl.int64) * WIDTH + at, value.to(tl.float8e4nv), mask=at < WIDTH)


def round_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """`operations.round_rows`."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(width))
    _launch(
        _round_rows, (rows,), x, factors, out, scales, x.stride(0), WIDTH=width, BLOCK=block,
        SCALED=factors is not None,
    )  # fmt: skip
    return out, scales


@triton.jit(do_not_specialize=["base"])
def _split_in_three(x, out, base, row_stride, part_stride, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    rest = tl.load(x + row * stride + at, mask=inside, other=0.0)
    place = out + base + row * row_stride + at
    for _ in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        tl.store(place, part, mask=inside)
        rest -= part.to(tl.float32)
        place += part_stride


def split_in_three(x: Tensor, falling: bool, stacked: bool) -> Tensor:
    """`operations.split_in_three`."""
    rows, width = x.shape
    out = torch.empty((3 * rows, width) if stacked else (rows, 3 * width), dtype=torch.bfloat16, device=x.device)
    part = rows * width if stacked else width
    grid = (rows, triton.cdiv(width, 1024))
    _launch(
        _split_in_three, grid, x, out, 2 * part if falling else 0, out.stride(0), -part if falling else part,
        x.stride(0), WIDTH=width, BLOCK=1024,
    )  # fmt: skip
    return out


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
    if SCALED:
        if GROUPED:
            vector += tl.load(group_of_row + row) * vector_stride
        factor = tl.load(vector + at, mask=inside, other=0.0).to(h.dtype.element_ty).to(tl.float32)
    value, _ = _activation(tl.load(start + at, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(start + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= factor
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
        _launch(_gated_forward, (out.numel() // width, triton.cdiv(width, 1024)),
            h, vector, spans.group_of_row if grouped else None, out, seed, p, _measures(vector)[1], BLOCK=1024,
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
        _launch(_gated_backward, (stripes * groups, triton.cdiv(width, 64)),
            h, vector, ctx.spans.edges, grad.contiguous(), dh, d_vector, seed, ctx.p, groups, stripes, stride, ROWS=16,
            BLOCK=64, **ctx.form,
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
def _scores(q, k, bias, head, rows, columns, queries, keys, bias_rows, longest, BIASED: tl.constexpr):
    """Of some of an example's queries and keys, `[rows, columns]`; -inf where there is none."""
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    near = (rows < queries)[:, None] & (columns < keys)[None, :]
    if BIASED:
        places = (head * bias_rows + rows)[:, None] * longest + columns[None, :]
        scores += tl.load(bias + places, mask=near, other=0.0).to(tl.float32)
    return tl.where(near, scores, -float("inf"))


@triton.jit
def _factor(vector, place, deep, dtype):
    """A head's part of a vector, rounded as the activations are, `[1, BLOCK_D]`."""
    return tl.load(vector + place, mask=deep, other=0.0).to(dtype).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["longest_q", "longest_k", "bias_rows", "group_examples"])
def _attention_forward(
    q, k, v, bias, q_starts, k_starts, l_k, l_v, out, normalisers, seed, p, q_stride, kv_stride, stride_k, stride_v,
    longest_q, longest_k, bias_rows, group_examples, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr, SCALE_K: tl.constexpr, SCALE_V: tl.constexpr,
    DROP: tl.constexpr,
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
    if SCALE_V:  # read early, since it is on its way for long
        of_v = _factor(l_v, group * stride_v + channels, deep, dtype)
    if SCALE_K:
        query = (query.to(tl.float32) * _factor(l_k, group * stride_k + channels, deep, dtype)).to(dtype)
    of_keys = (first_k + columns).to(tl.int64)[:, None] * kv_stride + channels[None, :]
    key = tl.load(k + of_keys, mask=there, other=0.0)
    scores = _scores(query, key, bias, head, rows, columns, queries, keys, bias_rows, longest_k, BIASED)
    # An example without keys gets nothing, instead of NaN.
    most = tl.maximum(tl.max(scores, 1), -1e30)
    powers = tl.exp(scores - most[:, None])
    summed = tl.maximum(tl.sum(powers, 1), 1e-30)
    tl.store(normalisers + (first_q + rows) * HEADS + head, most + tl.log(summed), mask=rows < queries)
    weights = powers / summed[:, None]
    if DROP:
        places = ((example * HEADS + head) * longest_q + rows)[:, None] * longest_k + columns[None, :]
        weights = _dropped(weights, seed, places, p)
    value = tl.load(v + of_keys, mask=there, other=0.0)
    found = tl.dot(weights.to(dtype), value, input_precision="tf32x3")
    if SCALE_V:
        found *= of_v
    place = (first_q + rows)[:, None] * (HEADS * DIM) + channels[None, :]
    tl.store(out + place, found.to(dtype), mask=here)


@triton.jit(do_not_specialize=["longest_q", "longest_k", "bias_rows", "group_examples", "groups", "stripes"])
def _attention_backward_queries(
    q, k, v, bias, q_starts, k_starts, l_k, l_v, grad, normalisers, dots, dq, dk, dv, d_l_k, d_l_v, seed, p,
    q_stride, kv_stride, dq_stride, dkv_stride, stride_k, stride_v, longest_q, longest_k, bias_rows, group_examples,
    groups, stripes,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, SCALE_K: tl.constexpr, SCALE_V: tl.constexpr, DROP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program a stripe of a group's blocks of queries and a head: their gradients, the vectors', and the sums over
    the keys of weights times their gradients (`dots`), which the keys' gradients need. A block that holds an example's
    queries whole does these, too."""
    part, head = tl.program_id(0), tl.program_id(1)
    group = part % groups
    blocks = tl.cdiv(longest_q, BLOCK_Q)
    each = tl.cdiv(group_examples * blocks, stripes)
    first = (part // groups) * each
    last = tl.minimum(first + each, group_examples * blocks)
    depth = tl.arange(0, BLOCK_D)
    channels = head * DIM + depth
    deep = depth < DIM
    columns = tl.arange(0, BLOCK_K)
    dtype = q.dtype.element_ty
    if SCALE_K:
        of_k = _factor(l_k, group * stride_k + channels, deep, dtype)
    if SCALE_V:
        of_v = _factor(l_v, group * stride_v + channels, deep, dtype)
    sum_k = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_D], tl.float32)
    for unit in range(first, last):
        example = group * group_examples + unit // blocks
        first_q, first_k = tl.load(q_starts + example), tl.load(k_starts + example)
        queries, keys = tl.load(q_starts + example + 1) - first_q, tl.load(k_starts + example + 1) - first_k
        rows = (unit % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        if (unit % blocks) * BLOCK_Q < queries:
            here = (rows < queries)[:, None] & deep[None, :]
            there = (columns < keys)[:, None] & deep[None, :]
            of_keys = (first_k + columns).to(tl.int64)[:, None] * kv_stride + channels[None, :]
            tokens = (first_q + rows)[:, None]
            plain = tl.load(q + tokens * q_stride + channels[None, :], mask=here, other=0.0)
            query = plain
            if SCALE_K:
                query = (plain.to(tl.float32) * of_k).to(dtype)
            key = tl.load(k + of_keys, mask=there, other=0.0)
            scores = _scores(query, key, bias, head, rows, columns, queries, keys, bias_rows, longest_k, BIASED)
            normaliser = tl.load(normalisers + (first_q + rows) * HEADS + head, mask=rows < queries, other=0.0)
            weights = tl.exp(scores - normaliser[:, None])
            g = tl.load(grad + tokens * (HEADS * DIM) + channels[None, :], mask=here, other=0.0)
            value = tl.load(v + of_keys, mask=there, other=0.0)
            dropped = weights
            if DROP:
                places = ((example * HEADS + head) * longest_q + rows)[:, None] * longest_k + columns[None, :]
                kept = _kept(seed, places, p)
                dropped = tl.where(kept, weights / (1 - p), 0.0)
            if SCALE_V:
                found = tl.dot(dropped.to(dtype), value, input_precision="tf32x3")
                sum_v += tl.sum(g.to(tl.float32) * found, 0)
                g = (g.to(tl.float32) * of_v).to(dtype)
            d_weights = tl.dot(g, tl.trans(value), input_precision="tf32x3")
            if DROP:
                d_weights = tl.where(kept, d_weights / (1 - p), 0.0)
            dot = tl.sum(weights * d_weights, 1)
            tl.store(dots + (first_q + rows) * HEADS + head, dot, mask=rows < queries)
            d_scores = (weights * (d_weights - dot[:, None])).to(dtype)
            d_query = tl.dot(d_scores, key, input_precision="tf32x3")
            if SCALE_K:
                sum_k += tl.sum(d_query * plain.to(tl.float32), 0)
                d_query *= of_k
            tl.store(dq + tokens * dq_stride + channels[None, :], d_query.to(dtype), mask=here)
            if WHOLE:
                of_keys = (first_k + columns).to(tl.int64)[:, None] * dkv_stride + channels[None, :]
                d_key = tl.dot(tl.trans(d_scores), query, input_precision="tf32x3")
                tl.store(dk + of_keys, d_key.to(dtype), mask=there)
                d_value = tl.dot(tl.trans(dropped.to(dtype)), g, input_precision="tf32x3")
                tl.store(dv + of_keys, d_value.to(dtype), mask=there)
    place = part * (HEADS * DIM) + channels
    if SCALE_K:
        tl.store(d_l_k + place, sum_k, mask=deep)
    if SCALE_V:
        tl.store(d_l_v + place, sum_v, mask=deep)


@triton.jit(do_not_specialize=["longest_q", "longest_k", "bias_rows", "group_examples"])
def _attention_backward_keys(
    q, k, v, bias, q_starts, k_starts, l_k, l_v, grad, normalisers, dots, dk, dv, seed, p, q_stride, kv_stride,
    dkv_stride, stride_k, stride_v, longest_q, longest_k, bias_rows, group_examples,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, SCALE_K: tl.constexpr, SCALE_V: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """One program an example, a head and a block of keys."""
    example, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    group = example // group_examples
    first_q, first_k = tl.load(q_starts + example), tl.load(k_starts + example)
    queries, keys = tl.load(q_starts + example + 1) - first_q, tl.load(k_starts + example + 1) - first_k
    depth = tl.arange(0, BLOCK_D)
    channels = head * DIM + depth
    deep = depth < DIM
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = q.dtype.element_ty
    there = (columns < keys)[:, None] & deep[None, :]
    of_keys = (first_k + columns).to(tl.int64)[:, None]
    key = tl.load(k + of_keys * kv_stride + channels[None, :], mask=there, other=0.0)
    value = tl.load(v + of_keys * kv_stride + channels[None, :], mask=there, other=0.0)
    d_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, queries, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        here = (rows < queries)[:, None] & deep[None, :]
        tokens = (first_q + rows)[:, None]
        query = tl.load(q + tokens * q_stride + channels[None, :], mask=here, other=0.0)
        if SCALE_K:
            query = (query.to(tl.float32) * _factor(l_k, group * stride_k + channels, deep, dtype)).to(dtype)
        g = tl.load(grad + tokens * (HEADS * DIM) + channels[None, :], mask=here, other=0.0)
        if SCALE_V:
            g = (g.to(tl.float32) * _factor(l_v, group * stride_v + channels, deep, dtype)).to(dtype)
        scores = _scores(query, key, bias, head, rows, columns, queries, keys, bias_rows, longest_k, BIASED)
        normaliser = tl.load(normalisers + (first_q + rows) * HEADS + head, mask=rows < queries, other=0.0)
        weights = tl.exp(scores - normaliser[:, None])
        d_weights = tl.dot(g, tl.trans(value), input_precision="tf32x3")
        dropped = weights
        if DROP:
            places = ((example * HEADS + head) * longest_q + rows)[:, None] * longest_k + columns[None, :]
            kept = _kept(seed, places, p)
            dropped = tl.where(kept, weights / (1 - p), 0.0)
            d_weights = tl.where(kept, d_weights / (1 - p), 0.0)
        d_value += tl.dot(tl.trans(dropped.to(dtype)), g, input_precision="tf32x3")
        dot = tl.load(dots + (first_q + rows) * HEADS + head, mask=rows < queries, other=0.0)
        d_scores = (weights * (d_weights - dot[:, None])).to(dtype)
        d_key += tl.dot(tl.trans(d_scores), query, input_precision="tf32x3")
    tl.store(dk + of_keys * dkv_stride + channels[None, :], d_key.to(dtype), mask=there)
    tl.store(dv + of_keys * dkv_stride + channels[None, :], d_value.to(dtype), mask=there)


class _Form:
    """One attention's sizes: what forward and backward hand to their kernels."""

    def __init__(
        self, width: int, of_q: Spans, of_k: Spans, bias: Vector, l_k: Vector, l_v: Vector, heads: int, p: float
    ) -> None:
        self.of_q, self.of_k, self.heads, self.p = of_q, of_k, heads, p
        vector = l_k if l_k is not None else l_v
        self.stripes, self.groups = (1, of_q.examples) if vector is None else (vector.shape[0], of_q.groups)
        self.strides = (_measures(l_k)[1], _measures(l_v)[1])
        bias_rows = 0 if bias is None else bias.shape[-2]
        self.sizes = (of_q.longest, of_k.longest, bias_rows, of_q.examples // self.groups)
        self.block_q = 16 if of_q.longest <= 16 else 64
        self.all_keys = 16 if of_k.longest <= 16 else max(64, triton.next_power_of_2(of_k.longest))
        dim = width // heads
        self.form = {
            "HEADS": heads, "DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BIASED": bias is not None,
            "SCALE_K": l_k is not None, "SCALE_V": l_v is not None, "DROP": p > 0,
        }  # fmt: skip

    def blocks(self, kernel: str, x: Tensor) -> dict[str, int]:
        """How many queries and keys a program takes, as measured on an H100; more than registers hold is slow."""
        keys, narrow = self.all_keys, x.element_size() == 2
        if kernel == "keys":
            block_q, keys, warps = (64, min(keys, 64), 4) if narrow else (32, min(keys, 32), 4)
        elif kernel == "queries":
            block_q, warps = (32, 4 if keys <= 128 else 8) if narrow else (16, 8)
        else:
            block_q, warps = (64 if keys <= 128 else 32, 4) if narrow else (32 if keys <= 128 else 16, 8)
        return {"BLOCK_Q": min(block_q, self.block_q), "BLOCK_K": keys, "num_warps": warps}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Vector, l_k: Vector, l_v: Vector, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What attention returns, and the logarithms of the sums of each row's and head's powers."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        normalisers = torch.empty(len(q), self.heads, dtype=torch.float32, device=q.device)
        blocks = self.blocks("forward", q)
        grid = (self.of_q.examples * self.heads, triton.cdiv(self.of_q.longest, blocks["BLOCK_Q"]))
        _launch(_attention_forward, grid,
            q, k, v, bias, self.of_q.starts, self.of_k.starts, l_k, l_v, out, normalisers, seed, self.p, q.stride(0),
            k.stride(0), *self.strides, *self.sizes, **blocks, **self.form,
        )  # fmt: skip
        return out, normalisers

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Vector, l_k: Vector, l_v: Vector, seed: Tensor,
        normalisers: Tensor, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> tuple[Vector, Vector]:  # fmt: skip
        """Fills the gradients of queries, keys and values; returns the vectors'."""
        d_l_k = None if l_k is None else _gradient_of(l_k)
        d_l_v = None if l_v is None else _gradient_of(l_v)
        dots = torch.empty_like(normalisers)
        inputs = (q, k, v, bias, self.of_q.starts, self.of_k.starts, l_k, l_v, grad.contiguous(), normalisers, dots)
        blocks = self.blocks("queries", q)
        whole = self.of_q.longest <= blocks["BLOCK_Q"] and self.block_q == 16
        _launch(_attention_backward_queries, (self.stripes * self.groups, self.heads),
            *inputs, dq, dk, dv, d_l_k, d_l_v, seed, self.p, q.stride(0), k.stride(0), dq.stride(0), dk.stride(0),
            *self.strides, *self.sizes, self.groups, self.stripes, WHOLE=whole, **blocks, **self.form,
        )  # fmt: skip
        if whole:
            return d_l_k, d_l_v
        blocks = self.blocks("keys", q)
        grid = (self.of_k.examples * self.heads, triton.cdiv(self.of_k.longest, blocks["BLOCK_K"]))
        _launch(_attention_backward_keys, grid,
            *inputs, dk, dv, seed, self.p, q.stride(0), k.stride(0), dk.stride(0), *self.strides, *self.sizes,
            **blocks, **self.form,
        )  # fmt: skip
        return d_l_k, d_l_v


def attention(
    q: Tensor, of_q: Spans, k: Tensor, v: Tensor, of_k: Spans, bias: Vector, l_k: Vector, l_v: Vector, heads: int,
    seed: Tensor,
) -> Tensor:  # fmt: skip
    """`operations.attention`."""
    return _Form(q.shape[-1], of_q, of_k, bias, l_k, l_v, heads, 0.0).forward(q, k, v, bias, l_k, l_v, seed)[0]


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int, p: float, seed: Tensor
    ) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        ctx.form = _Form(q.shape[-1], spans, spans, bias, l_k, l_v, heads, p)
        out, normalisers = ctx.form.forward(q, k, v, bias, l_k, l_v, seed)
        ctx.save_for_backward(qkv, bias, l_k, l_v, seed, normalisers)
        return out  # type: ignore[no-any-return]

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
        out, normalisers = ctx.form.forward(q, *of_layer(kv, index, q.shape[-1]), None, l_k, l_v, seed)
        ctx.save_for_backward(q, kv, l_k, l_v, seed, normalisers)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, kv, *rest = ctx.saved_tensors
        # All layers fill one gradient, each its own columns. The first layer's backward is the last, and hands it on.
        if "gradient" not in ctx.shared:
            ctx.shared["gradient"] = torch.empty_like(kv)
        dq = torch.empty_like(q)
        d_k, d_v = of_layer(ctx.shared["gradient"], ctx.index, q.shape[-1])
        d_vectors = ctx.form.backward(q, *of_layer(kv, ctx.index, q.shape[-1]), None, *rest, grad, dq, d_k, d_v)
        whole = ctx.shared.pop("gradient") if ctx.index == 0 else None
        return dq, None, whole, None, None, None, *d_vectors, None, None, None


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
        _launch(_entropy_forward, (rows,), logits, labels, losses, normalisers, WORDS=words, BLOCK=4096, num_warps=8)
        ctx.save_for_backward(logits, labels, normalisers)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, labels, normalisers = ctx.saved_tensors
        words = logits.shape[-1]
        grid = (len(normalisers), triton.cdiv(words, 4096))
        _launch(_entropy_backward, grid, logits, labels, normalisers, grad.contiguous(), WORDS=words, BLOCK=4096)
        return logits, None


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """`operations.token_losses`; the logits' memory becomes their gradient's."""
    losses: Tensor = _TokenLosses.apply(logits, labels)
    return losses


@triton.jit
def _turned(first, second, cos, sin):
    """Both halves of a head's channels, rotated by their positions' angles; by the angles' negatives with -sin."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _halves(start, at, mask, HALF: tl.constexpr):
    first = tl.load(start + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(start + HALF + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(start, at, first, second, mask, HALF: tl.constexpr):
    tl.store(start + at, first.to(start.dtype.element_ty), mask=mask)
    tl.store(start + HALF + at, second.to(start.dtype.element_ty), mask=mask)


@triton.jit
def _factors(vector, at, dtype, HALF: tl.constexpr):
    first, second = _halves(vector, at, at < HALF, HALF)
    return first.to(dtype).to(tl.float32)[None, :], second.to(dtype).to(tl.float32)[None, :]


@triton.jit
def _head_forward(
    source, target, vector, plain, cos, sin, head, rows, places, length, longest, source_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Some places of one head of as many: read at rows, kept as they are where a vector needs that, written."""
    at = tl.arange(0, BLOCK)[None, :]
    here = (places < length)[:, None] & (at < HALF)
    there = (places < longest)[:, None] & (at < HALF)
    own = head * 2 * HALF
    first, second = _halves(source + rows[:, None] * source_stride + own, at, here, HALF)
    if SCALED:
        _store_halves(plain + rows[:, None] * (HEADS * 2 * HALF) + own, at, first, second, here, HALF)
        of_first, of_second = _factors(vector + own, tl.arange(0, BLOCK), target.dtype.element_ty, HALF)
        first, second = first * of_first, second * of_second
    if TURNED:
        c = tl.load(cos + places[:, None] * HALF + at, mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin + places[:, None] * HALF + at, mask=there, other=0.0).to(tl.float32)
        first, second = _turned(first, second, c, s)
    _store_halves(target + places[:, None] * (HEADS * 2 * HALF) + own, at, first, second, there, HALF)


@triton.jit(do_not_specialize=["longest", "blocks", "group_examples"])
def _heads_forward(
    qkv, cos, sin, starts, l_k, l_v, q, k, v, plain_k, plain_v, stride_k, stride_v, longest, blocks, group_examples,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SCALE_K: tl.constexpr, SCALE_V: tl.constexpr,
):  # fmt: skip
    """One program a block of an example's places and a head of queries, keys or values."""
    example, head = tl.program_id(0) // blocks, tl.program_id(1)
    group = example // group_examples
    begin = tl.load(starts + example)
    length = tl.load(starts + example + 1) - begin
    places = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    rows = (begin + places).to(tl.int64)
    width = (HEADS + 2 * KV_HEADS) * 2 * HALF
    before = example.to(tl.int64) * longest * (2 * HALF)
    if head < HEADS:
        _head_forward(
            qkv, q + before * HEADS, None, None, cos, sin, head, rows, places, length, longest, width,
            HEADS, HALF, BLOCK, False, True,
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        if SCALE_K:
            l_k += group * stride_k
        _head_forward(
            qkv + HEADS * 2 * HALF, k + before * KV_HEADS, l_k, plain_k, cos, sin, head - HEADS, rows, places, length,
            longest, width, KV_HEADS, HALF, BLOCK, SCALE_K, True,
        )  # fmt: skip
    else:
        if SCALE_V:
            l_v += group * stride_v
        _head_forward(
            qkv + (HEADS + KV_HEADS) * 2 * HALF, v + before * KV_HEADS, l_v, plain_v, cos, sin, head - HEADS - KV_HEADS,
            rows, places, length, longest, width, KV_HEADS, HALF, BLOCK, SCALE_V, False,
        )  # fmt: skip


@triton.jit
def _head_backward(
    grad, d_source, vector, plain, d_vector, cos, sin, head, of_row, starts, first_row, end, example_stride,
    head_stride, place_stride, source_stride, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A stripe of rows of one head of as many, read at their examples' places."""
    at = tl.arange(0, BLOCK)[None, :]
    own = head * 2 * HALF
    if SCALED:
        of_first, of_second = _factors(vector + own, tl.arange(0, BLOCK), d_source.dtype.element_ty, HALF)
    sum_first = tl.zeros([BLOCK], tl.float32)
    sum_second = tl.zeros([BLOCK], tl.float32)
    for start in range(first_row, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        near = rows < end
        here = near[:, None] & (at < HALF)
        example = tl.load(of_row + rows, mask=near, other=0)
        places = rows - tl.load(starts + example, mask=near, other=0)
        padded = example.to(tl.int64) * example_stride + places * place_stride
        first, second = _halves(grad + head * head_stride + padded[:, None], at, here, HALF)
        if TURNED:
            c = tl.load(cos + places[:, None] * HALF + at, mask=here, other=0.0).to(tl.float32)
            s = tl.load(sin + places[:, None] * HALF + at, mask=here, other=0.0).to(tl.float32)
            first, second = _turned(first, second, c, -s)
        rows = rows.to(tl.int64)[:, None]
        if SCALED:
            was_first, was_second = _halves(plain + rows * (HEADS * 2 * HALF) + own, at, here, HALF)
            sum_first += tl.sum(first * was_first, 0)
            sum_second += tl.sum(second * was_second, 0)
            first, second = first * of_first, second * of_second
        _store_halves(d_source + rows * source_stride + own, at, first, second, here, HALF)
    if SCALED:
        columns = tl.arange(0, BLOCK)
        _store_halves(d_vector + own, columns, sum_first, sum_second, columns < HALF, HALF)


@triton.jit(do_not_specialize=["groups", "stripes"])
def _heads_backward(
    dq, dk, dv, of_row, starts, edges, cos, sin, l_k, l_v, plain_k, plain_v, d_qkv, d_l_k, d_l_v, dq_example, dq_head,
    dq_place, dk_example, dk_head, dk_place, dv_example, dv_head, dv_place, stride_k, stride_v, groups, stripes,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SCALE_K: tl.constexpr, SCALE_V: tl.constexpr,
):  # fmt: skip
    """One program a stripe of a group's rows and a head of queries, keys or values."""
    group, first_row, end = _part(edges, groups, stripes)
    head = tl.program_id(1)
    width = (HEADS + 2 * KV_HEADS) * 2 * HALF
    summed = tl.program_id(0) * (KV_HEADS * 2 * HALF)
    if head < HEADS:
        _head_backward(
            dq, d_qkv, None, None, None, cos, sin, head, of_row, starts, first_row, end, dq_example, dq_head, dq_place,
            width, HEADS, HALF, BLOCK, ROWS, False, True,
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        if SCALE_K:
            l_k += group * stride_k
            d_l_k += summed
        _head_backward(
            dk, d_qkv + HEADS * 2 * HALF, l_k, plain_k, d_l_k, cos, sin, head - HEADS, of_row, starts, first_row, end,
            dk_example, dk_head, dk_place, width, KV_HEADS, HALF, BLOCK, ROWS, SCALE_K, True,
        )  # fmt: skip
    else:
        if SCALE_V:
            l_v += group * stride_v
            d_l_v += summed
        _head_backward(
            dv, d_qkv + (HEADS + KV_HEADS) * 2 * HALF, l_v, plain_v, d_l_v, cos, sin, head - HEADS - KV_HEADS, of_row,
            starts, first_row, end, dv_example, dv_head, dv_place, width, KV_HEADS, HALF, BLOCK, ROWS, SCALE_V, False,
        )  # fmt: skip


class _RotaryHeads(torch.autograd.Function):
    """Of keys and values that a vector multiplies it keeps what they were before; of the product nothing else."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dim = qkv.shape[1] // (heads + 2 * kv_heads)
        q = qkv.new_empty(spans.examples, spans.longest, heads, dim)
        k, v = (qkv.new_empty(spans.examples, spans.longest, kv_heads, dim) for _ in range(2))
        plain_k, plain_v = (
            None if vector is None else qkv.new_empty(len(qkv), kv_heads * dim) for vector in (l_k, l_v)
        )
        ctx.spans, ctx.shape = spans, qkv.shape
        ctx.form = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": dim // 2, "BLOCK": triton.next_power_of_2(dim // 2)}
        ctx.form |= {"SCALE_K": l_k is not None, "SCALE_V": l_v is not None}
        blocks = triton.cdiv(spans.longest, 32)
        _launch(_heads_forward, (spans.examples * blocks, heads + 2 * kv_heads),
            qkv, cos, sin, spans.starts, l_k, l_v, q, k, v, plain_k, plain_v, _measures(l_k)[1], _measures(l_v)[1],
            spans.longest, blocks, spans.examples // spans.groups, ROWS=32, **ctx.form,
        )  # fmt: skip
        ctx.save_for_backward(cos, sin, l_k, l_v, plain_k, plain_v)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        cos, sin, l_k, l_v, plain_k, plain_v = ctx.saved_tensors
        spans = ctx.spans
        d_qkv = torch.empty(ctx.shape, dtype=dq.dtype, device=dq.device)
        d_l_k, d_l_v = (None if vector is None else _gradient_of(vector) for vector in (l_k, l_v))
        dq, dk, dv = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in (dq, dk, dv))
        strides = [grad.stride(axis) for grad in (dq, dk, dv) for axis in (0, 2, 1)]
        stripes = max(_measures(l_k)[0], _measures(l_v)[0])
        if l_k is None and l_v is None:
            stripes = triton.cdiv(len(d_qkv), 64 * spans.groups)
        heads = ctx.form["HEADS"] + 2 * ctx.form["KV_HEADS"]
        _launch(_heads_backward, (stripes * spans.groups, heads),
            dq, dk, dv, spans.of_row, spans.starts, spans.edges, cos, sin, l_k, l_v, plain_k, plain_v, d_qkv, d_l_k,
            d_l_v, *strides, _measures(l_k)[1], _measures(l_v)[1], spans.groups, stripes, ROWS=16, **ctx.form,
        )  # fmt: skip
        return d_qkv, None, None, None, d_l_k, d_l_v, None, None


def rotary_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, spans: Spans, l_k: Vector, l_v: Vector, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`operations.rotary_heads`."""
    q, k, v = _RotaryHeads.apply(qkv, cos, sin, spans, l_k, l_v, heads, kv_heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
