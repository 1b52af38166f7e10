"""A base model that doesn't fit one GPU: its blocks divided among the processes, what is trained whole in each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter


def is_asked_for() -> bool:
    """Whether the launcher's configuration asks for FSDP, as accelerate writes it into the environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def shard(model: Any, trained: Iterable[Parameter], device: torch.device) -> None:
    """Divide the frozen weights of each block among the processes (FSDP2); a block's are whole while it computes.

    What is trained, the embeddings and the output layer stay whole in each process: an adapter is saved by one of them
    as ever, and a part of the model may run by itself, as an encoder does before labels are scored.

    Args:
        model: in every process the same, on the CPU.
        trained: its trained parameters.
        device: this process's.

    Raises:
        ValueError: a model that names no blocks, or whose weights are held in few bits.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"A {type(model).__name__} doesn't say which of its modules are blocks, so that FSDP could divide them: "
            "train without FSDP."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError("FSDP divides plain weights, and this model's are held in few bits: leave out one of the two.")
    own = set(trained)
    for block in blocks:
        fully_shard(block, ignored_params=own, reshard_after_forward=True)
    divided = {parameter for block in blocks for parameter in block.parameters()} - own
    whole = {parameter for parameter in model.parameters() if parameter not in divided}
    for module in model.modules():
        _move_whole(module, divided, device)
    fully_shard(model, ignored_params=whole)
    # The first thing that is computed may be a part of the model, which would take itself for the whole.
    model._get_fsdp_state()._lazy_init()
    for (
        block
    ) in blocks:  # what is first made whole in inference mode, where labels are scored, could not be trained with
        block.unshard()
        block.reshard()


def _move_whole(module: nn.Module, divided: set[Parameter], device: torch.device) -> None:
    """Bring what a module itself holds to the device, unless it is divided and there already."""
    if not any(parameter in divided for parameter in module.parameters(recurse=False)):
        module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
