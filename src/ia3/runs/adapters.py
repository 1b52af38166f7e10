"""Adapters without their base model: read from their folders, looked at block by block, combined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ia3.adapter import plan_combination
from ia3.arithmetic import CombinationType, Vectors, combine
from ia3.card import write_card
from ia3.config import PeftConfig
from ia3.errors import naming, shorten
from ia3.runs.run import check_output
from ia3.sites import VECTORS, Layout, Site, is_at_input, matching
from ia3.state import Adapter
from ia3.structure import made_by
from ia3.tasks.task import Task, load_task, save_task
from ia3.tensors import PREFIX, SAFETENSORS_NAME, load_peft_weights, write_tensors

_CROSS = re.compile(r"EncDecAttention|encoder_attn|cross_?att", re.IGNORECASE)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's files.

    Args:
        name: its folder or repository.
        config: its configuration.
        task: what it was trained to do, where that is known.
        vectors: by site, as the file holds them, the encoder's before the decoder's.
        others: its other tensors by name, those of modules trained in full.
    """

    name: str
    config: Any
    task: Task | None
    vectors: dict[Site, Tensor]
    others: dict[str, Tensor]

    @property
    def size(self) -> int:
        """The numbers in its vectors."""
        return sum(vector.numel() for vector in self.vectors.values())


def read_adapter(name: str | Path) -> SavedAdapter:
    """Read an adapter's files and check that they can be used.

    Args:
        name: a folder or a hub repository.

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: a damaged file, no vectors in it, a vector with NaN or infinity.
    """
    config: Any = PeftConfig.from_pretrained(name)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_peft_weights(name).items()}
    paths = sorted((key.removesuffix(f".{VECTORS}") for key in tensors if key.endswith(f".{VECTORS}")), key=_in_order)
    if not paths:
        raise ValueError(f"{name} holds no vectors of (IA)³: expected tensors whose names end in .{VECTORS}.")
    with naming(name):
        inputs = matching(config.feedforward_modules, paths, "feedforward_modules")
    found = {path: tensors.pop(f"{path}.{VECTORS}") for path in paths}
    vectors = {_site(path, vector, path in inputs): vector for path, vector in found.items()}
    broken = [site.path for site, vector in vectors.items() if not vector.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} vectors of {name} hold NaN or infinity (such as {broken[0]}): the training that "
            "wrote the file had diverged. Take an earlier checkpoint."
        )
    return SavedAdapter(str(name), config, load_task(name), vectors, dict(sorted(tensors.items())))


def _site(path: str, vector: Tensor, listed: bool) -> Site:
    """A vector's place: its shape tells the side, but for a convolution, where the configuration does."""
    is_input = is_at_input(vector) if vector.ndim == 2 else listed
    return Site(path, "input" if is_input else "output", tuple(vector.shape))


def _in_order(path: str) -> list[tuple[bool, int, str]]:
    """Block 2 before block 10, and the encoder before the decoder."""
    parts = [(part != "encoder", part) for part in path.split(".")]
    return [(other, int(part) if part.isdigit() else 0, part) for other, part in parts]


def combine_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    combination_type: CombinationType = "mean",
    density: float | None = None,
) -> SavedAdapter:
    """Write one adapter out of several of one base model, as `add_weighted_adapter` makes it, without the base.

    Args:
        adapters: folders or hub repositories.
        output: the folder to write; it must not exist yet.
        weights: one each; 1 where left out.
        combination_type: `"mean"`, `"sum"` for PEFT's rule, `"task_arithmetic"`, `"ties"` or `"product"`.
        density: for `"ties"`, the share of an adapter's numbers that is kept.

    Returns:
        What was written; without a task where the adapters have none or different ones.

    Raises:
        FileNotFoundError: no such adapter.
        OSError: the folder can't be made or written.
        ValueError: it exists, an adapter's file can't be used, different bases, or what `arithmetic.combine`
            and `add_weighted_adapter` raise.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"{folder} exists already, and a combination replaces nothing: name a new folder.")
    check_output(folder)
    read = [read_adapter(each) for each in adapters]
    bases = [each.config.base_model_name_or_path for each in read]
    if len({*bases}) > 1:
        other = next(place for place, base in enumerate(bases) if base != bases[0])
        raise ValueError(
            f"The adapters belong to different base models, {adapters[0]} to {shorten(bases[0])} and "
            f"{adapters[other]} to {shorten(bases[other])}: combine those of one."
        )
    weights = [1.0] * len(read) if weights is None else weights
    values = combine([each.vectors for each in read], weights, combination_type, density=density)
    config = plan_combination([_as_attached(each) for each in read], values)
    others = {key: tensor for each in read for key, tensor in each.others.items()}  # of one adapter at most
    made = SavedAdapter(str(folder), config, _common_task(read), values, others)
    _write(made, folder)
    return made


def _as_attached(saved: SavedAdapter) -> Adapter:
    modules = dict.fromkeys(key.rpartition(".")[0] for key in saved.others)
    return Adapter(saved.name, saved.config, Layout(tuple(saved.vectors)), tuple(modules))


def _common_task(adapters: Sequence[SavedAdapter]) -> Task | None:
    tasks = [each.task for each in adapters]
    if len({*tasks}) > 1:  # how they are asked need not be the same, and is then the usual way
        tasks = [task and replace(task, answer_by="rank", precision=None, quantize=None) for task in tasks]
    return tasks[0] if len({*tasks}) == 1 else None


def _write(adapter: SavedAdapter, folder: Path) -> None:
    """Write the files that PEFT reads, and the task."""
    folder.mkdir(parents=True)
    named = {site.key: vector for site, vector in adapter.vectors.items()} | adapter.others
    write_tensors(folder / SAFETENSORS_NAME, {f"{PREFIX}{key}": tensor for key, tensor in named.items()})
    adapter.config.save_pretrained(folder)
    write_card(folder, adapter.config)
    if adapter.task is not None:
        save_task(folder, adapter.task)


@dataclass(frozen=True)
class VectorMap:
    """One stack of blocks: the mean |l − 1| of each vector, NaN where a block has none."""

    title: str
    blocks: list[str]
    columns: list[str]
    distances: list[list[float]]


def vector_maps(vectors: Vectors) -> list[VectorMap]:
    """How far each learned vector is from one, by stack, block and kind.

    Args:
        vectors: an adapter's, by site, in the order of the model's modules.

    Returns:
        One map a stack; `k`, `v`, `cross k`, `cross v` and `ff` (a vector on the input side) are the columns, other
        vectors go by their module's name.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for site, vector in vectors.items():
        stack, block = place_of(site.path)
        row = found.setdefault(stack, {}).setdefault(block, {})
        row[_column(site)] = (vector.detach().float() - 1).abs().mean().item()
    maps = []
    for stack, blocks in found.items():
        columns = list(dict.fromkeys(column for row in blocks.values() for column in row))
        distances = [[row.get(column, float("nan")) for column in columns] for row in blocks.values()]
        maps.append(VectorMap(stack.capitalize(), list(blocks), columns, distances))
    return maps


def place_of(path: str) -> tuple[str, str]:
    """A module's stack (`encoder`, `decoder` or `model`) and its block, or its own name outside of blocks."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    stack = next((part for part in reversed(parts[:number]) if part in ("encoder", "decoder")), "model")
    return stack, parts[number]


def _column(site: Site) -> str:
    name = site.path.rpartition(".")[2]
    makes = made_by(name)
    if site.side == "input":
        return "experts" if site.shape[0] > 1 else "ff"
    kind = makes if makes in ("k", "v") else name
    return f"cross {kind}" if _CROSS.search(site.path) else kind
