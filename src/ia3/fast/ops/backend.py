"""By what a model's operations are computed: plain PyTorch, or Triton's kernels on a GPU."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from ia3.fast.ragged import Ragged

Backend = Literal["torch", "triton"]
Vector = Tensor | None

ACTIVATIONS = {"relu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "silu": 3}
"""The activations that kernels know, by their name in transformers."""
# All groups' gradients are summed in about so many parts.
_PARTIALS = 16


def has_triton(device: torch.device) -> bool:
    """Whether a device is one that Triton's kernels here are written for."""
    on_gpu = device.type == "cuda" and torch.version.hip is None
    return on_gpu and importlib.util.find_spec("triton") is not None


def backend_for(weight: Tensor, activation: str) -> Backend:
    """Kernels on a GPU, in a dtype and with an activation that they know.

    Args:
        weight: one of the model's.
        activation: the name in transformers.
    """
    if not has_triton(weight.device) or weight.dtype == torch.float64 or activation not in ACTIVATIONS:
        return "torch"
    return "triton" if torch.cuda.get_device_capability(weight.device) >= (8, 0) else "torch"


def with_partials(table: Tensor, backend: Backend) -> Tensor:
    """A table `[groups, D]` as `[partials, groups, D]`; its backward is the sum over the partials.

    Args:
        table: a row of vectors a group.
        backend: a kernel's programs sum the gradient in parts of their own; PyTorch needs one.
    """
    groups = len(table)
    partials = max(1, _PARTIALS // groups) if backend == "triton" else 1
    return table.expand(partials, *table.shape)


def scaled(x: Tensor, vector: Vector, ragged: Ragged) -> Tensor:
    """The product of `[tokens, width]` with each group's vector."""
    if vector is None:
        return x
    factors = vector[0].to(x.dtype)
    if len(factors) == len(x) and ragged.uniform:  # a token a group
        return x * factors
    return x * (factors[0] if len(factors) == 1 else factors.index_select(0, ragged.group_of_token))
