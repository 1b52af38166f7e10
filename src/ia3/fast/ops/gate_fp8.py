"""The feed-forward's intermediate as a product in fp8 takes it, and its gradient: rounded where they are made.

A row's largest number is known when all of the row is. Here a program therefore has whole rows, unlike in `gate.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ia3.fast.ops.backend import ACTIVATIONS, Vector
from ia3.fast.ops.dropout import dropped_by
from ia3.fast.ops.gate import activated_and_slope
from ia3.fast.ops.launch import jit, launch, next_power_of_2
from ia3.fast.ops.partials import partials_and_stride, tokens_of_program
from ia3.fast.ops.quantise import in_fp8, scale_for_fp8
from ia3.fast.ragged import Ragged

if TYPE_CHECKING:
    import triton.language as tl

MOST_CHANNELS = 8192
"""A program has no room for wider rows."""

# So many programs fill a GPU, two on each of its processors.
_PROGRAMS = 256
# So many channels of the next tokens have room beside, while a token is worked on.
_CHANNELS_READ_AHEAD = 3072


def gated_rows(
    h: Tensor, vector: Vector, ragged: Ragged, activation: str, is_gated: bool, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`gated`, as `quantise_rows` gives rows: `[tokens, d_ff]` in e4m3 and scales `[tokens, 1]`.

    Args:
        h: as in `gated`, contiguous, and the others too.
    """
    tokens, width = len(h), h.shape[1] // (1 + is_gated)
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=h.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=h.device)
    grouped = vector is not None and ragged.groups > 1
    launch(
        _gated_rows, (tokens,), h, vector, ragged.group_of_token if grouped else None, out, scales, seed, p,
        partials_and_stride(vector)[1], WIDTH=width, **_parts(width), KIND=ACTIVATIONS[activation], GATED=is_gated,
        num_warps=4 if width <= 4096 else 16,
    )  # fmt: skip
    return out, scales


def gated_rows_backward(
    grad: Tensor, factors: Tensor, h: Tensor, vector: Vector, ragged: Ragged, activation: str, is_gated: bool, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Vector]:  # fmt: skip
    """The gradient of h, multiplied by factors and rounded: rows in e4m3, scales, and the gradient of the vector.

    Args:
        grad: `[tokens, d_ff]`, of what `gated` gives.
        factors: one a channel of h, `[channels, 1]`, fp32.
        h: the forward's, and so are the others.

    Returns:
        Rows and scales of padding tokens are anything.
    """
    (tokens, channels), groups = h.shape, ragged.groups
    width = channels // (1 + is_gated)
    dh = torch.empty(tokens, channels, dtype=torch.float8_e4m3fn, device=h.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=h.device)
    partials, stride = partials_and_stride(vector)
    parts = _parts(width)
    ahead = sum(parts.values()) <= _CHANNELS_READ_AHEAD
    each = max(1, _PROGRAMS // (partials * groups))
    sums = None if vector is None else torch.empty(partials, each, groups, width, dtype=torch.float32, device=h.device)
    launch(
        _gated_rows_backward, (partials * each * groups,), h, vector, ragged.group_edges, grad, factors, dh, scales,
        sums, seed, p, groups, partials * each, stride, WIDTH=width, **parts, KIND=ACTIVATIONS[activation],
        GATED=is_gated, STAGES=3 if ahead else 1, num_warps=8 if width <= 4096 else 16,
    )  # fmt: skip
    return dh, scales, None if sums is None else sums.sum(1)


def _parts(width: int) -> dict[str, int]:
    """A row as a block of a power of two, and one that holds the rest: less is idle than in one block over all."""
    head = next_power_of_2(width + 1) // 2
    rest = width - head
    return {"HEAD": head, "REST": next_power_of_2(rest) if rest else 0}


@jit
def _gated_part(
    h, vector, drawn, p, token, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """A token's BLOCK channels of the intermediate from FIRST on, fp32.

    Args:
        h: the token's row.
        vector: the group's `[WIDTH]`; None without.
        drawn: the seed; None without dropout.
    """
    offs = FIRST + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    value = tl.load(h + offs, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        linear = tl.load(h + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    if vector is not None:
        factor = tl.load(vector + offs, mask=mask, other=0.0).to(h.dtype.element_ty).to(tl.float32)
    value, _ = activated_and_slope(value, KIND)
    if GATED:
        value *= linear
    if vector is not None:
        value *= factor
    if drawn is not None:
        value = dropped_by(drawn, value, token * WIDTH + offs, p)
    return value


@jit
def _gated_rows(
    h, vector, group_of_token, out, scales, seed, p, vector_stride,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program a token.

    Args:
        h, vector, group_of_token, seed: as in `_gated_forward`.
        out: written, `[tokens, WIDTH]` in e4m3.
        scales: written, `[tokens]`, fp32.
    """
    token = tl.program_id(0)
    h += token.to(tl.int64) * (2 * WIDTH if GATED else WIDTH)
    out += token.to(tl.int64) * WIDTH
    if group_of_token is not None:
        vector += tl.load(group_of_token + token) * vector_stride
    drawn = None
    if seed is not None:
        drawn = tl.load(seed)
    head = _gated_part(h, vector, drawn, p, token, WIDTH, 0, HEAD, KIND, GATED)
    most = tl.max(tl.abs(head), 0)
    if REST:
        rest = _gated_part(h, vector, drawn, p, token, WIDTH, HEAD, REST, KIND, GATED)
        most = tl.maximum(most, tl.max(tl.abs(rest), 0))
    scale = scale_for_fp8(most)
    tl.store(scales + token, scale)
    tl.store(out + tl.arange(0, HEAD), in_fp8(head, scale))
    if REST:
        offs = HEAD + tl.arange(0, REST)
        tl.store(out + offs, in_fp8(rest, scale), mask=offs < WIDTH)


@jit
def _slopes_of_part(
    h, grad, factor, drawn, p, token, factors, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """A token's BLOCK channels from FIRST on: what it adds to the vector's gradient, and the gradients of its h.

    Args:
        h, grad: the token's rows.
        factor: of the vector, `[BLOCK]`; None without.
        factors: by which the gradients of h are multiplied.

    Returns:
        fp32; of the linear half where GATED, otherwise twice the same.
    """
    offs = FIRST + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    gate = tl.load(h + offs, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        linear = tl.load(h + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offs, mask=mask, other=0.0).to(tl.float32)
    if drawn is not None:
        g = dropped_by(drawn, g, token * WIDTH + offs, p)
    value, slope = activated_and_slope(gate, KIND)
    d_product = g if factor is None else g * factor
    d_gate = d_product * slope * tl.load(factors + offs, mask=mask, other=0.0)
    d_linear = d_gate
    if GATED:
        d_linear = d_product * value * tl.load(factors + WIDTH + offs, mask=mask, other=0.0)
        d_gate *= linear
        value *= linear
    return g * value, d_gate, d_linear


@jit
def _load_part(vector, dtype, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK factors of a vector from FIRST on, rounded as the activations are."""
    offs = FIRST + tl.arange(0, BLOCK)
    return tl.load(vector + offs, mask=offs < WIDTH, other=0.0).to(dtype).to(tl.float32)


@jit
def _store_slopes(
    dh, d_gate, d_linear, scale, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr
):
    offs = FIRST + tl.arange(0, BLOCK)
    tl.store(dh + offs, in_fp8(d_gate, scale), mask=offs < WIDTH)
    if GATED:
        tl.store(dh + WIDTH + offs, in_fp8(d_linear, scale), mask=offs < WIDTH)


@jit(do_not_specialize=["groups", "programs"])
def _gated_rows_backward(
    h, vector, group_edges, grad, factors, dh, scales, sums, seed, p, groups, programs, vector_stride,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a part of a group's tokens, a token at a time.

    Args:
        h, vector, seed: the forward's.
        group_edges: `[groups + 1]`, int32.
        grad: `[tokens, WIDTH]`.
        factors: of h's channels.
        dh: written, as h in e4m3, but for padding tokens.
        scales: written, `[tokens]`, fp32, but for padding tokens.
        sums: written, `[programs, groups, WIDTH]`, fp32: of the vector's gradient; None without a vector.
    """
    group, first, end = tokens_of_program(group_edges, groups, programs)
    channels = 2 * WIDTH if GATED else WIDTH
    drawn, factor, factor_of_rest = None, None, None
    if seed is not None:
        drawn = tl.load(seed)
    if vector is not None:
        vector += group * vector_stride
        factor = _load_part(vector, h.dtype.element_ty, WIDTH, 0, HEAD)
        if REST:
            factor_of_rest = _load_part(vector, h.dtype.element_ty, WIDTH, HEAD, REST)
    total = tl.zeros([HEAD], tl.float32)
    if REST:
        total_of_rest = tl.zeros([REST], tl.float32)
    for token in tl.range(first, end, num_stages=STAGES):
        row, of_row = h + token * channels, grad + token * WIDTH
        added, d_gate, d_linear = _slopes_of_part(
            row, of_row, factor, drawn, p, token, factors, WIDTH, 0, HEAD, KIND, GATED
        )
        total += added
        most = tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_linear)), 0)
        if REST:
            added, d_gate_rest, d_linear_rest = _slopes_of_part(
                row, of_row, factor_of_rest, drawn, p, token, factors, WIDTH, HEAD, REST, KIND, GATED
            )
            total_of_rest += added
            most = tl.maximum(most, tl.max(tl.maximum(tl.abs(d_gate_rest), tl.abs(d_linear_rest)), 0))
        scale = scale_for_fp8(most)
        tl.store(scales + token, scale)
        out = dh + token * channels
        _store_slopes(out, d_gate, d_linear, scale, WIDTH, 0, HEAD, GATED)
        if REST:
            _store_slopes(out, d_gate_rest, d_linear_rest, scale, WIDTH, HEAD, REST, GATED)
    if vector is not None:
        sums += tl.program_id(0) * WIDTH
        tl.store(sums + tl.arange(0, HEAD), total)
        if REST:
            offs = HEAD + tl.arange(0, REST)
            tl.store(sums + offs, total_of_rest, mask=offs < WIDTH)
