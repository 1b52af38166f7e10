"""From the name of a base and a folder of adapters to an engine that answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ia3.errors import fit_screen
from ia3.inference.loading import Base
from ia3.serving import on_vllm
from ia3.serving.continuous import ContinuousEngine
from ia3.serving.engine import Engine
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.table import AdapterTable
from ia3.tasks.task import TaskKind

_logger = logging.getLogger(__name__)

# Adapters that have room beside the files' numbers, at least.
_CAPACITY = 256

AnyEngine = Engine | ContinuousEngine


def start(
    name: str,
    adapters: Path,
    limits: Limits,
    *,
    trust_remote_code: bool = False,
    tell: Callable[[str], object] = lambda doing: None,
) -> AnyEngine:
    """Load a base onto this machine's accelerator and watch a folder of adapters for it.

    Args:
        name: a folder, a hub repository, or a bundled model.
        adapters: the folder with a folder for each adapter.
        limits: how requests become batches.
        trust_remote_code: run code that comes with the base.
        tell: hears what is being done.

    Returns:
        vLLM's, for a causal base where it is installed with its plugin; else our own.

    Raises:
        FileNotFoundError: there is no such folder or base.
        ValueError: a base whose answers are not served, or what `Registry` and `Engine` raise.
    """
    if not adapters.is_dir():  # before the base is loaded
        raise FileNotFoundError(
            f"There is no folder {adapters}: `adapters` is one that holds a folder for each adapter."
        )
    tell(f"Loading {name}")
    disable_progress_bar()
    base = Base(name, trust_remote_code=trust_remote_code)
    if base.kind is TaskKind.TOKEN_CLASSIFICATION:
        raise ValueError(
            f"{name} is a model for {base.kind}, and those for words, and for classes of texts, are served."
        )
    own = Path(name).resolve().name if Path(name).exists() else name
    plan = None if limits.batch_invariant else plan_of_vllm(base, limits.batch_size)
    if plan is not None:
        tell(f"Starting vLLM with {name}")
        engine: AnyEngine = on_vllm.start(base, adapters, plan, name=own, limits=limits)
    else:
        tokenizer, model = base.tokenizer, base.load(base.kind, labels=_labels_of(base.config)).eval()
        model.to(torch.accelerator.current_accelerator() or "cpu")
        tell(f"Reading the adapters in {adapters}")
        registry = registry_for(model, adapters, base=own, batch_size=limits.batch_size)
        engine = Engine(model, tokenizer, registry, limits)
    engine.registry.watch()
    return engine


def registry_for(model: Any, adapters: Path, *, base: str, batch_size: int) -> Registry:
    """The adapters of a folder, as many of them on the device as it has room for; see `Registry`."""
    table = AdapterTable(model, capacity=max(_CAPACITY, batch_size))
    registry = Registry(model, adapters, base=base, table=table)
    table.capacity = max(table.capacity, room_for(table, model.device))
    return registry


def room_for(table: AdapterTable, device: torch.device) -> int:
    """How many of a table's adapters a GPU has room for, within a sixteenth of its memory and half of what is free."""
    if device.type != "cuda" or not table.layout.size:
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return min(len(table), min(total // 16, free // 2) // (4 * table.layout.size))


def plan_of_vllm(base: Base, batch_size: int) -> Any | None:
    """What vLLM is to run; None where it isn't there, or can't, of which the reason is logged."""
    if not on_vllm.is_wanted(base):
        return None
    try:
        return on_vllm.plan(base, batch_size)
    except (ValueError, RuntimeError) as error:
        _logger.warning("%s is served without vLLM. %s", base.name, fit_screen(str(error)))
        return None


def _labels_of(config: Any) -> tuple[str, ...]:
    """What a base's own head chooses from, which then stays as it is; without such a head any two will do."""
    labels = tuple((getattr(config, "id2label", None) or {}).values())
    return labels if len({*labels}) == len(labels) > 1 else ("0", "1")
