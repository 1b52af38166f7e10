"""From the name of a base and a folder of adapters to an engine that answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from ia3.inference.loading import Base
from ia3.serving.engine import Engine, Limits
from ia3.serving.registry import Registry

_CAPACITY = 256


def start(
    name: str,
    adapters: Path,
    limits: Limits,
    *,
    trust_remote_code: bool = False,
    tell: Callable[[str], object] = lambda doing: None,
) -> Engine:
    """Load a base onto this machine's accelerator and watch a folder of adapters for it.

    Args:
        name: a folder, a hub repository, or a bundled model.
        adapters: the folder with a folder for each adapter.
        limits: how requests become batches.
        trust_remote_code: run code that comes with the base.
        tell: hears what is being done.

    Raises:
        FileNotFoundError: there is no such folder or base.
        ValueError: a base that writes nothing, or what `Registry` and `Engine` raise.
    """
    if not adapters.is_dir():  # before the base is loaded
        raise FileNotFoundError(
            f"There is no folder {adapters}: `adapters` is one that holds a folder for each adapter."
        )
    tell(f"Loading {name}")
    disable_progress_bar()
    base = Base(name, trust_remote_code=trust_remote_code)
    if not base.kind.writes:
        raise ValueError(f"{name} is a model for {base.kind}, and those that write are served: seq2seq and causal.")
    tokenizer = base.tokenizer
    model = base.load(base.kind).eval().to(torch.accelerator.current_accelerator() or "cpu")
    tell(f"Reading the adapters in {adapters}")
    own = Path(name).resolve().name if Path(name).exists() else name
    registry = Registry(model, adapters, base=own, capacity=max(_CAPACITY, limits.batch_size))
    registry.watch()
    return Engine(model, tokenizer, registry, limits)
