"""Dropout: PyTorch's own, or a kernel's as a function of a seed, so that a backward can compute the same mask again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ia3.fast.ops.backend import Backend
from ia3.fast.ops.launch import jit

if TYPE_CHECKING:
    import triton.language as tl


def dropout(x: Tensor, p: float) -> Tensor:
    """PyTorch's, where there is anything to drop."""
    return functional.dropout(x, p) if p else x


@jit
def keep_mask(drawn, offsets, p):
    """Which numbers a dropout keeps: a hash of each offset and the seed.

    Two multiplications, after Wellons' lowbias32. Philox, which torch uses, took half of the attention kernels' time.

    Args:
        drawn: an int64 from `DropoutSeeds`.
        offsets: of the numbers in a tensor, in any order; what is over 2³² wraps around.
        p: the part that is dropped.
    """
    x = offsets.to(tl.uint32) * 0x9E3779B9 + drawn.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (drawn >> 32).to(tl.uint32)) * 0x846CA68B
    return (x ^ (x >> 16)) >= tl.cast(p * 4294967296.0, tl.uint32)


@jit
def dropped(x, seed, offsets, p):
    """Inverted dropout; the same seed and offsets give the same mask."""
    return dropped_by(tl.load(seed), x, offsets, p)


@jit
def dropped_by(drawn, x, offsets, p):
    """The same with a seed that was read before: in a loop a kernel would read it again after each of its writes."""
    return tl.where(keep_mask(drawn, offsets, p), x * (1 / (1 - p)), 0.0)


class DropoutSeeds:
    """The seeds of a step's dropouts by kernels, drawn from the device's own generator.

    Args:
        device: the model's.
        count: how many dropouts a step has; none where nothing is dropped.
        backend: PyTorch's dropout draws for itself.
        drops: whether any of them drops anything. If not, nothing is drawn, and any seed will do.
    """

    def __init__(self, device: torch.device, count: int, backend: Backend, *, drops: bool) -> None:
        self.backend, self.place = backend, 0
        self.seeds: tuple[Tensor, ...] | None = None
        if backend == "triton" and count:
            whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
            seeds = torch.randint(0, 2**62, (count,), **whole) if drops else torch.zeros(count, **whole)
            self.seeds = seeds.unbind()

    def next(self) -> Tensor | None:
        """A seed for one dropout; None where PyTorch draws, or nothing is dropped."""
        self.place += 1
        return None if self.seeds is None else self.seeds[self.place - 1]

    def recompute(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part now, keep nothing of its inside, and run it again with the same seeds in the backward."""
        start = self.place

        def run(*arguments: Any) -> Any:
            self.place = start
            return part(*arguments)

        draws = self.backend == "torch"
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=draws)
