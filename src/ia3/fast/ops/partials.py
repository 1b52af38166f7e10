"""How kernels read a vector `[partials, groups, width]`, and sum its gradient without atomics or a second kernel.

A program of a backward goes through a part of one group's tokens and writes the sum over them into its own row of
`[partials, groups, width]`; `with_partials`' backward adds the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ia3.fast.ops.backend import Vector
from ia3.fast.ops.launch import jit

if TYPE_CHECKING:
    import triton.language as tl


def partials_and_stride(vector: Vector) -> tuple[int, int]:
    """How many partials a vector has, and what lies between two groups' vectors; 1 and 0 without a vector."""
    return (1, 0) if vector is None else (vector.shape[0], vector.stride(1))


def empty_gradient(vector: Vector) -> Vector:
    """Where a kernel writes the gradient of a vector: fp32, contiguous."""
    return None if vector is None else torch.empty(vector.shape, dtype=torch.float32, device=vector.device)


@jit
def tokens_of_program(group_edges, groups, partials):
    """Which tokens a program goes through, of `groups · partials` along the first axis.

    Args:
        group_edges: `[groups + 1]`, int32, `Ragged.group_edges`.

    Returns:
        The group, the first token and the end.
    """
    program = tl.program_id(0)
    group = program % groups
    begin = tl.load(group_edges + group)
    end = tl.load(group_edges + group + 1)
    each = tl.cdiv(end - begin, partials)
    first = begin + (program // groups) * each
    return group, first, tl.minimum(first + each, end)
