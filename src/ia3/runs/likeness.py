"""How alike two adapters are, in all and block by block, and a picture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ia3.arithmetic import Vectors, cosine, distance
from ia3.runs.adapters import place_of
from ia3.runs.picture import colour_bar, heat_map, picture
from ia3.sites import Site


@dataclass(frozen=True)
class Likeness:
    """Of two adapters' differences from the base.

    Args:
        blocks: the cosine in each block of the model.
        cosine: from −1 to 1; near 0 for unrelated ones.
        distance: Euclidean.
    """

    blocks: dict[str, float]
    cosine: float
    distance: float

    def summary(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self)


def likeness(one: Vectors, other: Vectors) -> Likeness:
    """Compare two adapters, an absent vector being one.

    Raises:
        ValueError: they have no vector in the same place.
    """
    if not one.keys() & other.keys():
        raise ValueError(
            "they have no vector in the same place, so they belong to different models, or to different "
            "layers of one: compare adapters of one model."
        )
    blocks: dict[tuple[str, str], tuple[dict[Site, Tensor], dict[Site, Tensor]]] = {}
    for side, vectors in enumerate((one, other)):
        for site, vector in vectors.items():
            blocks.setdefault(place_of(site.path), ({}, {}))[side][site] = vector
    found = {
        f"{'block' if stack == 'model' else stack} {block}": cosine(a, b) if a and b else 0.0
        for (stack, block), (a, b) in sorted(blocks.items(), key=_in_order)
    }
    return Likeness(found, cosine(one, other), distance(one, other))


def _in_order(item: tuple[tuple[str, str], Any]) -> tuple[bool, str, int, str]:
    (stack, block), _ = item
    return stack != "encoder", stack, int(block) if block.isdigit() else 0, block


def draw_likeness(names: Sequence[str], pairs: Mapping[tuple[str, str], Likeness], path: Path) -> Path:
    """Draw all adapters' cosines as a matrix, and each pair's block by block.

    Args:
        names: the adapters'.
        pairs: each two of them, in their order.
        path: where the picture goes.

    Returns:
        The path.
    """
    blocks = list(dict.fromkeys(block for found in pairs.values() for block in found.blocks))
    rows = [[found.blocks.get(block, np.nan) for block in blocks] for found in pairs.values()]
    place = {name: index for index, name in enumerate(names)}
    matrix = np.eye(len(names))
    for (one, other), found in pairs.items():
        matrix[place[one], place[other]] = matrix[place[other], place[one]] = found.cosine
    colours: dict[str, Any] = {"colours": "RdBu", "low": -1, "high": 1}
    with picture(path, (13, max(3.4, 1.4 + 0.45 * max(len(names), len(pairs))))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, 2])
        write = lambda row, column: f"{matrix[row, column]:.2f}"  # noqa: E731 (handed on as an argument)
        heat_map(left, matrix, names, names, write=write, title="Cosine of l − 1", **colours)
        left.set_aspect("equal")
        left.set_xticks(range(len(names)), names, rotation=45, ha="right")
        pair_names = [f"{one}, {other}" for one, other in pairs]
        image = heat_map(right, rows, pair_names, blocks, title="Cosine in each block", **colours)
        right.tick_params(axis="x", labelrotation=90)
        colour_bar(figure, image, right, "cosine of l − 1")
    return path
