"""`ia3 inspect`: what is in an adapter's file, without its base model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.adapters import expect_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from ia3.config import PeftConfig
    from ia3.runs.report import VectorMap
    from ia3.tasks.task import Task


def inspect(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show an adapter's vectors: shapes, and how far each has moved from one, the identity."""
    from rich.console import Console

    with Console(stderr=True).status(f"Reading {adapter}"):
        content = read_content(adapter)
        maps = content.maps()
    if as_json:
        typer.echo(json.dumps(content.summary(), ensure_ascii=False))
    else:
        _print(content, maps)


@dataclass(frozen=True)
class Content:
    """An adapter's files.

    Args:
        adapter: its folder or repository.
        config: its configuration.
        task: what it was trained to do, where that is known.
        vectors: module path to vector.
        others: the names of its other tensors, of modules trained in full.
    """

    adapter: str
    config: PeftConfig
    task: Task | None
    vectors: dict[str, Tensor]
    others: dict[str, Tensor]

    def maps(self) -> list[VectorMap]:
        """The mean |l − 1| by stack, block and kind."""
        from ia3.runs.report import vector_maps

        return vector_maps(_NamedVectors(self.vectors))

    def size(self) -> int:
        """The numbers in its vectors."""
        return sum(vector.numel() for vector in self.vectors.values())

    def summary(self) -> dict[str, Any]:
        """What JSON says."""
        return {
            "adapter": self.adapter,
            "base_model": self.config.base_model_name_or_path,
            "labels": list(self.task.labels) if self.task is not None else None,
            "modules_trained_in_full": {name: list(tensor.shape) for name, tensor in self.others.items()},
            "sites": [_site(path, vector) for path, vector in self.vectors.items()],
            "task_type": self.config.task_type,
            "template": self.task.template.pattern if self.task is not None else None,
            "vector_numbers": self.size(),
        }


class _NamedVectors:
    """Vectors under the names that a model gives them."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        self._vectors = vectors

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [(f"{path}.ia3_l.default", vector) for path, vector in self._vectors.items()]


def _site(path: str, vector: Tensor) -> dict[str, Any]:
    distance = (vector.float() - 1).abs()
    return {
        "path": path,
        "side": "input" if vector.shape[0] == 1 else "output",
        "shape": list(vector.shape),
        "mean_distance_from_one": distance.mean().item(),
        "max_distance_from_one": distance.max().item(),
    }


def read_content(adapter: str) -> Content:
    """Read an adapter's files and check that they can be used.

    Args:
        adapter: a folder or a hub repository.

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: a damaged file, no vectors in it, a vector with NaN or infinity.
    """
    from ia3.config import PeftConfig
    from ia3.tasks.task import load_task
    from ia3.tensors import PREFIX, load_peft_weights

    expect_adapter(adapter)
    config = PeftConfig.from_pretrained(adapter)
    task = load_task(adapter)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_peft_weights(adapter).items()}
    ordered = dict(sorted(tensors.items(), key=lambda pair: _in_order(pair[0])))
    vectors = {key.removesuffix(".ia3_l"): tensor for key, tensor in ordered.items() if key.endswith(".ia3_l")}
    if not vectors:
        raise ValueError(f"{adapter} holds no vectors of (IA)³: expected tensors whose names end in .ia3_l.")
    broken = [path for path, vector in vectors.items() if not vector.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} vectors of {adapter} hold NaN or infinity (such as {broken[0]}): the training that "
            "wrote the file had diverged. Take an earlier checkpoint."
        )
    others = {key: tensor for key, tensor in ordered.items() if not key.endswith(".ia3_l")}
    return Content(adapter, config, task, vectors, others)


def _in_order(path: str) -> list[tuple[bool, int, str]]:
    """Block 2 before block 10, and the encoder before the decoder."""
    parts = [(part != "encoder", part) for part in path.split(".")]
    return [(other, int(part) if part.isdigit() else 0, part) for other, part in parts]


def _print(content: Content, maps: list[VectorMap]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = Table(show_header=False, box=None, pad_edge=False, title="Adapter", title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _facts(content).items():
        facts.add_row(name, Text(value))
    console = Console()
    console.print(facts, highlight=False)
    for each in maps:
        console.print("", _map_table(each), highlight=False)


def _facts(content: Content) -> dict[str, str]:
    shapes = Counter(tuple(vector.shape) for vector in content.vectors.values())
    facts = {
        "base model": content.config.base_model_name_or_path or "not named",
        "task": str(content.config.task_type or "not named"),
        "vectors": f"{len(content.vectors):,} of {content.size():,} numbers",
        "shapes": ", ".join(f"{count} × {shape}" for shape, count in shapes.items()),
    }
    if content.task is not None:
        facts |= {"reads": content.task.template.pattern, "labels": ", ".join(content.task.labels)}
    if content.others:
        numbers = sum(tensor.numel() for tensor in content.others.values())
        facts["trained in full"] = f"{', '.join(content.others)} ({numbers:,} numbers)"
    return facts


def _map_table(found: VectorMap) -> Any:
    from math import isnan

    from rich.table import Table
    from rich.text import Text

    title = f"{found.title}: mean |l − 1|"
    table = Table("block", title=title, title_justify="left", box=None, pad_edge=False)
    for column in found.columns:
        table.add_column(Text(column), justify="right")
    for block, distances in zip(found.blocks, found.distances, strict=True):
        table.add_row(block, *("" if isnan(distance) else f"{distance:.3f}" for distance in distances))
    return table
