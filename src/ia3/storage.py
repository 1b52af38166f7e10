"""Frozen weights laid out anew: several linear layers' weights as views of one storage, so that one product does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_STATE = "_ia3_laid_out"


def lay_out(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """Put each group's weights into one storage; the layers' own weights become views of it.

    Parameters stay the same objects with the same values under the same names, so that checkpoints, optimizers and
    whoever calls the layers notice nothing. No memory is kept twice.

    Args:
        model: the model.
        groups: paths of linear layers with equal inputs.

    Returns:
        One tensor a group, `[sum of outputs, in]`; it stops being the layers' where the model is moved or cast.
    """
    together = [_join(model, paths) for paths in groups]
    held: dict[str, Any] = model.__dict__.setdefault(_STATE, {})
    held.update(dict.fromkeys(path for paths in groups for path in paths))
    return together


def _join(model: nn.Module, paths: Sequence[str]) -> Tensor:
    weights = [model.get_parameter(f"{path}.weight") for path in paths]
    joined = _already_joined(weights)
    if joined is not None:
        return joined
    with torch.inference_mode(False):  # a weight made in it could never again be trained through
        joined = torch.cat([weight.detach() for weight in weights])
        for weight, view in zip(weights, torch.split(joined, [len(weight) for weight in weights]), strict=True):
            weight.data = view
    return joined


def _already_joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The tensor that these are views of already, one after the other."""
    first = weights[0]
    start = first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and weight.is_contiguous()
        if not same or weight.data_ptr() != start:
            return None
        start += weight.numel() * weight.element_size()
    rows = sum(len(weight) for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def restore(model: nn.Module) -> None:
    """Give each weight that `lay_out` moved a storage of its own again, with the same bits."""
    for path in model.__dict__.pop(_STATE, {}):
        weight = model.get_parameter(f"{path}.weight")
        weight.data = weight.data.clone()
