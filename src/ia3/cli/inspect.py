"""`ia3 inspect`: what is in an adapter's file, without its base model."""

from __future__ import annotations

from collections import Counter
from math import isnan
from typing import TYPE_CHECKING, Any

from ia3.cli.flags import Adapter, AsJson, print_json
from ia3.runs.screen import Screen
from ia3.runs.tables import Column, facts, print_table

if TYPE_CHECKING:
    from ia3.runs.adapters import SavedAdapter


# Blocks that a table shows; models have some hundred at most.
_MOST_ROWS = 1000


def inspect(adapter: Adapter, as_json: AsJson = False) -> None:
    """Show an adapter's vectors: shapes, and how far each has moved from one, the identity."""
    with Screen(stderr=True).status(f"Reading {adapter}"):
        from ia3.runs.adapters import read_adapter, vector_maps

        saved = read_adapter(adapter)
        maps = vector_maps(saved.vectors)
    if as_json:
        print_json(_summary(saved))
        return
    console = Screen()
    console.print(facts("Adapter", _facts(saved)), highlight=False)
    for each in maps:
        if len(each.blocks) > _MOST_ROWS:
            console.print(f"\n{each.title}: {len(each.blocks):,} blocks, more than fit here: --json has them all.")
            continue
        columns = [Column("block", each.blocks, text=True)]
        for name, distances in zip(each.columns, zip(*each.distances, strict=True), strict=True):
            columns.append(Column(name, ["" if isnan(distance) else f"{distance:.3f}" for distance in distances], 1))
        print_table(console, columns, f"{each.title}: mean |l − 1|")


def _summary(saved: SavedAdapter) -> dict[str, Any]:
    sites = []
    for site, vector in saved.vectors.items():
        distance = (vector.float() - 1).abs()
        moved = {"mean_distance_from_one": distance.mean().item(), "max_distance_from_one": distance.max().item()}
        sites.append({"path": site.path, "side": site.side, "shape": site.shape, **moved})
    return {
        "adapter": saved.name,
        "base_model": saved.config.base_model_name_or_path,
        "labels": saved.task and saved.task.labels,
        "modules_trained_in_full": {name: list(tensor.shape) for name, tensor in saved.others.items()},
        "sites": sites,
        "task_type": saved.config.task_type,
        "template": saved.task and saved.task.template.pattern,
        "vector_numbers": saved.size,
    }


def _facts(saved: SavedAdapter) -> dict[str, str]:
    shapes = Counter(site.shape for site in saved.vectors)
    found = {
        "base model": saved.config.base_model_name_or_path or "not named",
        "task": str(saved.config.task_type or "not named"),
        "vectors": f"{len(saved.vectors):,} of {saved.size:,} numbers",
        "shapes": ", ".join(f"{count} × {shape}" for shape, count in shapes.items()),
    }
    if saved.task is not None:
        found |= {"reads": saved.task.template.pattern, "labels": ", ".join(saved.task.labels)}
    if saved.others:
        numbers = sum(tensor.numel() for tensor in saved.others.values())
        found["trained in full"] = f"{', '.join(saved.others)} ({numbers:,} numbers)"
    return found
