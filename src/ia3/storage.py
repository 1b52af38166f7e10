"""Frozen fused weights: several linear layers' next to each other in memory, so that one product does."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_STATE = "_ia3_fused_weights"


class _FusedWeights:
    """What of a model was laid out: the layers' paths, and the weights together as long as somebody needs them.

    A copy of the model has nothing of it: its weights are copied one by one.
    """

    def __init__(self) -> None:
        self.paths: dict[str, None] = {}
        self.together: dict[tuple[str, ...], weakref.ref[Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> _FusedWeights:
        return _FusedWeights()

    def __reduce__(self) -> tuple[type[_FusedWeights], tuple[()]]:
        return _FusedWeights, ()


def fuse_weights(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """Put each group's weights next to each other; the layers' own weights are parts of that memory from then on.

    Parameters stay the same objects with the same values under the same names, each with a storage of its own, so that
    checkpoints, optimizers and whoever calls the layers notice nothing. No memory is kept twice.

    Args:
        model: the model.
        groups: paths of linear layers with equal inputs.

    Returns:
        One tensor a group, `[sum of outputs, in]`; it stops being the layers' where the model is moved or cast.
    """
    state: _FusedWeights = model.__dict__.setdefault(_STATE, _FusedWeights())
    found = []
    for group in groups:
        paths = tuple(group)
        weights = [model.get_parameter(f"{path}.weight") for path in paths]
        held = state.together.get(paths)
        together = None if held is None else held()
        if together is None or not _are_parts(weights, together):
            together = _join(weights)
            state.together[paths] = weakref.ref(together)
        state.paths.update(dict.fromkeys(paths))
        found.append(together)
    return found


def _join(weights: Sequence[nn.Parameter]) -> Tensor:
    with torch.inference_mode(False):  # a weight made in it could never again be trained through
        together = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, torch.split(together, [len(weight) for weight in weights]), strict=True):
            # A view would share its storage, and who saves a model by its storages would leave it out.
            weight.data = part if part.is_meta else torch.from_dlpack(part)  # type: ignore[attr-defined]
    return together


def _are_parts(weights: Sequence[Tensor], together: Tensor) -> bool:
    """Whether the weights are one after the other in this memory."""
    place, end = together.data_ptr(), together.data_ptr() + together.numel() * together.element_size()
    for weight in weights:
        if weight.data_ptr() != place or weight.dtype is not together.dtype or not weight.is_contiguous():
            return False
        place += weight.numel() * weight.element_size()
    return place == end


def restore(model: nn.Module) -> None:
    """Give each weight that `fuse_weights` moved memory of its own again, with the same bits."""
    state: _FusedWeights | None = model.__dict__.get(_STATE)
    for path in state.paths if state is not None else ():
        weight = model.get_parameter(f"{path}.weight")
        weight.data = weight.data.clone()
    model.__dict__.pop(_STATE, None)
