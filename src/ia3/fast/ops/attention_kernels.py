"""The kernels of attention; `ops/attention.py` has the definition, and launches them.

The vectors are on the queries, and on the gradient of what attention returns, rounded as these are. Keys and values go
into the products as they are read, and their gradients come out of them as they are written:

    q' = l_k ∘ q    dq = l_k ∘ dq'    d l_k = Σ q ∘ dq'        g' = l_v ∘ g    d l_v = Σ g ∘ (weights · v)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ia3.fast.ops.dropout import keep_mask
from ia3.fast.ops.launch import jit

if TYPE_CHECKING:
    import triton.language as tl

# What the kernels have in common:
#   q                 [query tokens, HEADS · DIM], a token every q_stride numbers; written by a product
#   k, v              [key tokens, HEADS · DIM], a token every kv_stride numbers
#   bias              [HEADS, queries, keys], contiguous, a head every bias_head numbers, a query every bias_row, which
#                     the kernels are compiled for: of a multiple of 16, as batches mostly have, a thread reads several
#                     numbers at once
#   cu_seqlens_q, _k  [examples + 1], int32; each group has group_examples
#   l_k, l_v          [groups, HEADS · DIM], fp32, a group every stride_k or stride_v numbers; None without
#   seed              one int64; None without dropout
#   p, scale          of dropout and of the scores, floats; scale is None for 1, so that a product's sums start at bias
#   lse               [HEADS, q_tokens], fp32: log2 of the sum of exponentials of a query's scores
#   delta             [HEADS, q_tokens], fp32: the sum over the keys of weights times their gradients
#   do                [query tokens, HEADS · DIM], contiguous: the gradient of out
#   WHOLE             BLOCK_N holds all keys of an example
# All dropout masks are of one tensor of weights, [examples, HEADS, max_seqlen_q, max_seqlen_k].


@jit
def _seen_scores(scores, bias, bias_row, at_m, at_n, seqlen_q, seqlen_k, scale, CAUSAL: tl.constexpr):
    """Products of queries and keys as scores; -inf where a query sees no key.

    Rows of queries behind an example's last are zeros, as are their gradients, so that nothing comes of their weights.

    Args:
        scores: `[queries, keys]` or `[keys, queries]`.
        bias: this head's.
        at_m: the queries' places in their example, along their axis of the scores.
        at_n: the keys'.
    """
    if scale is not None:
        scores *= scale
    if bias is not None:
        # Where keys end is no multiple of what a thread reads at once; where a row ends it may be.
        scores += tl.load(bias + at_m * bias_row + at_n, (at_m < seqlen_q) & (at_n < bias_row), 0.0).to(tl.float32)
    seen = at_n < seqlen_k
    if CAUSAL:
        seen = seen & (at_n <= at_m)
    return tl.where(seen, scores, -float("inf"))


@jit
def _extent(cu_seqlens, example):
    """An example's first token, and how many it has."""
    begin = tl.load(cu_seqlens + example)
    return begin, tl.load(cu_seqlens + example + 1) - begin


@jit
def _blocks_of_program(max_seqlen, group_examples, groups, partials, BLOCK: tl.constexpr):
    """Which of its group's blocks a program goes through, of `groups · partials` along the first axis.

    Returns:
        The group, how many blocks each example has, the first of the program's among all of the group's, and the end.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(max_seqlen, BLOCK)
    each = tl.cdiv(group_examples * blocks, partials)
    first = (program // groups) * each
    return program % groups, blocks, first, tl.minimum(first + each, group_examples * blocks)


@jit
def _exp(x, bits):
    """exp(x) / 2^bits: the power of two is the device's own, and a product and a difference one instruction."""
    return tl.exp2(x * 1.4426950408889634 - bits)


@jit(do_not_specialize=["q_tokens", "max_seqlen_q", "max_seqlen_k", "group_examples"])
def attention_forward(
    q, k, v, bias, cu_seqlens_q, cu_seqlens_k, l_k, l_v, out, lse, seed, p, scale, q_tokens, q_stride, kv_stride,
    stride_k, stride_v, bias_head, bias_row, max_seqlen_q, max_seqlen_k, group_examples,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program an example, a head and a block of BLOCK_M queries, over the keys BLOCK_N at a time.

    Args:
        out: written, `[query tokens, HEADS · DIM]`, but for padding tokens.
        lse: written.
    """
    example, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    group = example // group_examples
    begin_q, seqlen_q = _extent(cu_seqlens_q, example)
    begin_k, seqlen_k = _extent(cu_seqlens_k, example)
    start_m = tl.program_id(1) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    channels = head * DIM + offs_d
    mask_d = offs_d < DIM
    mask_q = (offs_m < seqlen_q)[:, None] & mask_d[None, :]
    if start_m < seqlen_q:
        query = tl.load(q + (begin_q + offs_m)[:, None] * q_stride + channels[None, :], mask=mask_q, other=0.0)
        if l_k is not None:
            query *= tl.load(l_k + group * stride_k + channels, mask=mask_d, other=0.0).to(query.dtype)[None, :]
        own_bias = None
        if bias is not None:
            own_bias = bias + head.to(tl.int64) * bias_head
        if seed is not None:
            drawn = tl.load(seed)
        most = tl.full([BLOCK_M], -1e30, tl.float32)  # an example without keys gets nothing, instead of NaN
        total = tl.zeros([BLOCK_M], tl.float32)
        attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        end_n = seqlen_k
        if CAUSAL:
            end_n = tl.minimum(seqlen_k, start_m + BLOCK_M)
        if WHOLE:
            end_n = BLOCK_N
        for start_n in range(0, end_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_k = (offs_n < seqlen_k)[:, None] & mask_d[None, :]
            offs_kv = (begin_k + offs_n).to(tl.int64)[:, None] * kv_stride + channels[None, :]
            key = tl.load(k + offs_kv, mask=mask_k, other=0.0)
            value = tl.load(v + offs_kv, mask=mask_k, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="tf32x3")
            scores = _seen_scores(
                scores, own_bias, bias_row, offs_m[:, None], offs_n[None, :], seqlen_q, seqlen_k, scale, CAUSAL
            )
            more = tl.maximum(most, tl.max(scores, 1))
            weights = _exp(scores, more[:, None] * 1.4426950408889634)
            shrunk = tl.exp2((most - more) * 1.4426950408889634)
            most = more
            total = total * shrunk + tl.sum(weights, 1)
            if seed is not None:
                row = ((example * HEADS + head) * max_seqlen_q + offs_m) * max_seqlen_k
                weights = tl.where(keep_mask(drawn, row[:, None] + offs_n[None, :], p), weights, 0.0)
            if not WHOLE:
                attended *= shrunk[:, None]
            attended += tl.dot(weights.to(query.dtype), value, input_precision="tf32x3")
        total = tl.maximum(total, 1e-30)
        bits = most * 1.4426950408889634 + tl.log2(total)
        tl.store(lse + head * q_tokens + begin_q + offs_m, bits, mask=offs_m < seqlen_q)
        share = 1 / total
        if seed is not None:
            share /= 1 - p
        attended *= share[:, None]
        if l_v is not None:
            factor = tl.load(l_v + group * stride_v + channels, mask=mask_d, other=0.0)
            attended *= factor.to(query.dtype).to(tl.float32)[None, :]
        offs = (begin_q + offs_m)[:, None] * (HEADS * DIM) + channels[None, :]
        tl.store(out + offs, attended.to(query.dtype), mask=mask_q)


@jit
def _load_queries(
    q, do, lse, q_tokens, begin_q, seqlen_q, offs_m, head, channels, mask_d, q_stride, HEADS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Some of an example's queries, the gradients of what attention returned for them, and their lse."""
    mask_q = (offs_m < seqlen_q)[:, None] & mask_d[None, :]
    tokens_q = (begin_q + offs_m)[:, None]
    query = tl.load(q + tokens_q * q_stride + channels[None, :], mask=mask_q, other=0.0)
    g = tl.load(do + tokens_q * (HEADS * DIM) + channels[None, :], mask=mask_q, other=0.0)
    return query, g, tl.load(lse + head * q_tokens + begin_q + offs_m, mask=offs_m < seqlen_q, other=0.0)


@jit(do_not_specialize=["q_tokens", "max_seqlen_q", "max_seqlen_k", "group_examples", "groups", "partials"])
def attention_backward(
    q, k, v, bias, cu_seqlens_q, cu_seqlens_k, l_k, l_v, do, lse, delta, dq, dk, dv, d_l_k, d_l_v, seed, p, scale,
    q_tokens, q_stride, kv_stride, dq_stride, dkv_stride, stride_k, stride_v, bias_head, bias_row, max_seqlen_q,
    max_seqlen_k, group_examples, groups, partials,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's blocks of BLOCK_N keys, and a head, over the queries BLOCK_M at a time.

    The keys are rows, so that gradients of keys and values are summed from products as they come.

    Args:
        delta: read; None where WHOLE, since a block then sums it.
        dq: written where WHOLE, as q, a token every `dq_stride` numbers; None elsewhere.
        dk, dv: written, as k and v, a token every `dkv_stride` numbers.
        d_l_k, d_l_v: written where WHOLE, `[partials, groups, HEADS · DIM]`, fp32; None without a vector.
    """
    group, blocks, first, last = _blocks_of_program(max_seqlen_k, group_examples, groups, partials, BLOCK_N)
    program, head = tl.program_id(0), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    channels = head * DIM + offs_d
    mask_d = offs_d < DIM
    dtype = q.dtype.element_ty
    own_bias = None
    if bias is not None:
        own_bias = bias + head.to(tl.int64) * bias_head
    more = 1.0
    if seed is not None:
        more = 1 / (1 - p)
        drawn = tl.load(seed)
    if l_k is not None:
        factor_k = tl.load(l_k + group * stride_k + channels, mask=mask_d, other=0.0).to(dtype)
    if l_v is not None:
        factor_v = tl.load(l_v + group * stride_v + channels, mask=mask_d, other=0.0).to(dtype)
    sum_k = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_D], tl.float32)
    for block in range(first, last):
        example, start_n = group * group_examples + block // blocks, (block % blocks) * BLOCK_N
        begin_q, seqlen_q = _extent(cu_seqlens_q, example)
        begin_k, seqlen_k = _extent(cu_seqlens_k, example)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_k = (offs_n < seqlen_k)[:, None] & mask_d[None, :]
        tokens_k = (begin_k + offs_n).to(tl.int64)[:, None]
        # What comes from memory takes longest, and is asked for at once, or a block of queries ahead.
        key = tl.load(k + tokens_k * kv_stride + channels[None, :], mask=mask_k, other=0.0)
        value = tl.load(v + tokens_k * kv_stride + channels[None, :], mask=mask_k, other=0.0)
        first_m = start_n if CAUSAL else 0
        offs_m = first_m + tl.arange(0, BLOCK_M)
        query, g, own_lse = _load_queries(
            q, do, lse, q_tokens, begin_q, seqlen_q, offs_m, head, channels, mask_d, q_stride, HEADS, DIM
        )
        d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        end_m = seqlen_q
        if not WHOLE:
            end_m = tl.where(start_n < seqlen_k, seqlen_q, 0)
        for start_m in range(first_m, end_m, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            next_query, next_g, next_lse = _load_queries(
                q, do, lse, q_tokens, begin_q, seqlen_q, offs_m + BLOCK_M, head, channels, mask_d, q_stride, HEADS, DIM
            )
            own_query, own_g = query, g
            if l_k is not None:
                own_query = query * factor_k[None, :]
            if l_v is not None:
                own_g = g * factor_v[None, :]
            scores = tl.dot(key, tl.trans(own_query), input_precision="tf32x3")
            scores = _seen_scores(
                scores, own_bias, bias_row, offs_m[None, :], offs_n[:, None], seqlen_q, seqlen_k, scale, CAUSAL
            )
            weights = _exp(scores, own_lse[None, :])
            d_weights = tl.dot(value, tl.trans(own_g), input_precision="tf32x3")
            kept = weights
            if seed is not None:
                row = ((example * HEADS + head) * max_seqlen_q + offs_m) * max_seqlen_k
                keep = keep_mask(drawn, row[None, :] + offs_n[:, None], p)
                kept = tl.where(keep, weights, 0.0)
                d_weights = tl.where(keep, d_weights, 0.0)
            kept = kept.to(dtype)
            d_value += tl.dot(kept, own_g, input_precision="tf32x3")
            if WHOLE:
                dot = tl.sum(weights * d_weights, 0) * more
            else:
                dot = tl.load(delta + head * q_tokens + begin_q + offs_m, mask=offs_m < seqlen_q, other=0.0)
            d_scores = weights * (d_weights * more - dot[None, :])
            if scale is not None:
                d_scores *= scale
            d_scores = d_scores.to(dtype)
            d_key += tl.dot(d_scores, own_query, input_precision="tf32x3")
            if WHOLE:
                # Queries stay the rows here. Of the product the other way, tl.dot(tl.trans(key), d_scores), Triton 3.6
                # made code that read behind its shared memory where four warps computed it.
                if l_v is not None:
                    attended = tl.dot(tl.trans(kept), value, input_precision="tf32x3")
                    sum_v += tl.sum(g.to(tl.float32) * attended, 0)
                d_query = tl.dot(tl.trans(d_scores), key, input_precision="tf32x3")
                if l_k is not None:
                    sum_k += tl.sum(query.to(tl.float32) * d_query, 0)
                    d_query *= factor_k.to(tl.float32)[None, :]
                offs = (begin_q + offs_m)[:, None] * dq_stride + channels[None, :]
                tl.store(dq + offs, d_query.to(dtype), mask=(offs_m < seqlen_q)[:, None] & mask_d[None, :])
            query, g, own_lse = next_query, next_g, next_lse
        offs_dkv = tokens_k * dkv_stride + channels[None, :]
        tl.store(dk + offs_dkv, d_key.to(dtype), mask=mask_k)
        tl.store(dv + offs_dkv, (d_value * more).to(dtype), mask=mask_k)
    offs = program * (HEADS * DIM) + channels
    if WHOLE and l_k is not None:
        tl.store(d_l_k + offs, sum_k, mask=mask_d)
    if WHOLE and l_v is not None:
        tl.store(d_l_v + offs, sum_v * more, mask=mask_d)


@jit(do_not_specialize=["q_tokens", "max_seqlen_q", "max_seqlen_k", "group_examples", "groups", "partials"])
def attention_backward_q(
    q, k, v, bias, cu_seqlens_q, cu_seqlens_k, l_k, l_v, do, lse, delta, dq, d_l_k, d_l_v, seed, p, scale, q_tokens,
    q_stride, kv_stride, dq_stride, stride_k, stride_v, bias_head, bias_row, max_seqlen_q, max_seqlen_k, group_examples,
    groups, partials,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's blocks of BLOCK_M queries, and a head, twice over the keys BLOCK_N at a time.

    What the first time sums, delta, the second time needs; the other way is to keep what the forward returned.

    Args:
        delta: written.
        dq: written, as q, a token every `dq_stride` numbers.
        d_l_k, d_l_v: written, `[partials, groups, HEADS · DIM]`, fp32; None without a vector.
    """
    group, blocks, first, last = _blocks_of_program(max_seqlen_q, group_examples, groups, partials, BLOCK_M)
    program, head = tl.program_id(0), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    channels = head * DIM + offs_d
    mask_d = offs_d < DIM
    dtype = q.dtype.element_ty
    own_bias = None
    if bias is not None:
        own_bias = bias + head.to(tl.int64) * bias_head
    more = 1.0
    if seed is not None:
        more = 1 / (1 - p)
        drawn = tl.load(seed)
    if l_k is not None:
        factor_k = tl.load(l_k + group * stride_k + channels, mask=mask_d, other=0.0).to(dtype)
    if l_v is not None:
        factor_v = tl.load(l_v + group * stride_v + channels, mask=mask_d, other=0.0).to(dtype)
    sum_k = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_D], tl.float32)
    for block in range(first, last):
        example, start_m = group * group_examples + block // blocks, (block % blocks) * BLOCK_M
        begin_q, seqlen_q = _extent(cu_seqlens_q, example)
        begin_k, seqlen_k = _extent(cu_seqlens_k, example)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        query, g, own_lse = _load_queries(
            q, do, lse, q_tokens, begin_q, seqlen_q, offs_m, head, channels, mask_d, q_stride, HEADS, DIM
        )
        own_query, own_g = query, g
        if l_k is not None:
            own_query = query * factor_k[None, :]
        if l_v is not None:
            own_g = g * factor_v[None, :]
        row = ((example * HEADS + head) * max_seqlen_q + offs_m) * max_seqlen_k
        end_n = tl.where(start_m < seqlen_q, seqlen_k, 0)
        if CAUSAL:
            end_n = tl.minimum(end_n, start_m + BLOCK_M)
        dot = tl.zeros([BLOCK_M], tl.float32)
        attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for turn in tl.static_range(2):
            for start_n in range(0, end_n, BLOCK_N):
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask_k = (offs_n < seqlen_k)[:, None] & mask_d[None, :]
                offs_kv = (begin_k + offs_n).to(tl.int64)[:, None] * kv_stride + channels[None, :]
                key = tl.load(k + offs_kv, mask=mask_k, other=0.0)
                value = tl.load(v + offs_kv, mask=mask_k, other=0.0)
                scores = tl.dot(own_query, tl.trans(key), input_precision="tf32x3")
                scores = _seen_scores(
                    scores, own_bias, bias_row, offs_m[:, None], offs_n[None, :], seqlen_q, seqlen_k, scale, CAUSAL
                )
                weights = _exp(scores, own_lse[:, None])
                d_weights = tl.dot(own_g, tl.trans(value), input_precision="tf32x3")
                kept = weights
                if seed is not None:
                    keep = keep_mask(drawn, row[:, None] + offs_n[None, :], p)
                    kept = tl.where(keep, weights, 0.0)
                    d_weights = tl.where(keep, d_weights * more, 0.0)
                if turn == 0:
                    dot += tl.sum(weights * d_weights, 1)
                    if l_v is not None:
                        attended += tl.dot(kept.to(dtype), value, input_precision="tf32x3")
                else:
                    d_scores = weights * (d_weights - dot[:, None])
                    if scale is not None:
                        d_scores *= scale
                    d_query += tl.dot(d_scores.to(dtype), key, input_precision="tf32x3")
        tl.store(delta + head * q_tokens + begin_q + offs_m, dot, mask=offs_m < seqlen_q)
        if l_v is not None:
            sum_v += tl.sum(g.to(tl.float32) * attended, 0)
        if l_k is not None:
            sum_k += tl.sum(query.to(tl.float32) * d_query, 0)
            d_query *= factor_k.to(tl.float32)[None, :]
        offs = (begin_q + offs_m)[:, None] * dq_stride + channels[None, :]
        tl.store(dq + offs, d_query.to(dtype), mask=(offs_m < seqlen_q)[:, None] & mask_d[None, :])
    offs = program * (HEADS * DIM) + channels
    if l_k is not None:
        tl.store(d_l_k + offs, sum_k, mask=mask_d)
    if l_v is not None:
        tl.store(d_l_v + offs, sum_v * more, mask=mask_d)
