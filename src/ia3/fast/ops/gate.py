"""The feed-forward's intermediate: activated, gated (Shazeer 2020, arXiv:2002.05202), multiplied by l_ff, dropped."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ia3.fast.ops.backend import Backend, Vector, scaled
from ia3.fast.ops.dropout import dropout
from ia3.fast.ragged import Ragged


def gated(
    h: Tensor, vector: Vector, ragged: Ragged, activation: str, function: Callable[[Tensor], Tensor], is_gated: bool,
    p: float, seed: Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """The feed-forward intermediate `[tokens, d_ff]`.

    Args:
        h: `[tokens, 2 · d_ff]`, the gate before the linear half; `[tokens, d_ff]` without a gate.
        vector: l_ff.
        ragged: the tokens' examples and groups.
        activation: its name in transformers.
        function: itself.
        is_gated: whether h has two halves.
        p: dropout's.
        seed: from `DropoutSeeds`.
        backend: who computes it.
    """
    if backend == "triton":
        from ia3.fast import kernels

        assert seed is not None
        return kernels.gated(h, vector, ragged, activation, is_gated, p, seed)
    if is_gated:
        gate, linear = h.chunk(2, -1)
        h = function(gate) * linear
    else:
        h = function(h)
    return dropout(scaled(h, vector, ragged), p)
