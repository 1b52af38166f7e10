"""How alike two adapters are, in all and block by block, and a picture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ia3.arithmetic import cosine, distance
from ia3.runs.picture import STYLE
from ia3.sites import Site


@dataclass(frozen=True)
class Likeness:
    """Of two adapters' differences from the base.

    Args:
        cosine: from −1 to 1; near 0 for unrelated ones.
        distance: Euclidean.
        blocks: the cosine in each block of the model.
    """

    cosine: float
    distance: float
    blocks: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {"blocks": self.blocks, "cosine": self.cosine, "distance": self.distance}


def likeness(one: Mapping[Site, Tensor], other: Mapping[Site, Tensor]) -> Likeness:
    """Compare two adapters, an absent vector being one."""
    blocks: dict[str, tuple[dict[Site, Tensor], dict[Site, Tensor]]] = {}
    for side, vectors in enumerate((one, other)):
        for site, vector in vectors.items():
            blocks.setdefault(_block(site.path), ({}, {}))[side][site] = vector
    found = {name: cosine(a, b) if a and b else 0.0 for name, (a, b) in sorted(blocks.items(), key=_in_order)}
    return Likeness(cosine(one, other), distance(one, other), found)


def draw_likeness(names: Sequence[str], pairs: Mapping[tuple[str, str], Likeness], path: Path) -> Path:
    """Draw all adapters' cosines as a matrix, and each pair's block by block.

    Args:
        names: the adapters'.
        pairs: each two of them, in their order.
        path: where the picture goes.

    Returns:
        The path.
    """
    blocks = list(next(iter(pairs.values())).blocks)
    with matplotlib.rc_context(STYLE):
        height = max(3.4, 1.4 + 0.45 * max(len(names), len(pairs)))
        figure = Figure(figsize=(13, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        matrix_axes, block_axes = figure.subplots(1, 2, width_ratios=[1, 2])
        _draw_matrix(matrix_axes, names, pairs)
        rows = [[found.blocks.get(block, np.nan) for block in blocks] for found in pairs.values()]
        image = block_axes.imshow(rows, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        block_axes.set_xticks(range(len(blocks)), blocks, rotation=90)
        block_axes.set_yticks(range(len(pairs)), [f"{one}, {other}" for one, other in pairs])
        block_axes.set_title("Cosine in each block")
        block_axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=block_axes, fraction=0.03, pad=0.02)
        bar.set_label("cosine of l − 1")
        bar.outline.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _draw_matrix(axes: Any, names: Sequence[str], pairs: Mapping[tuple[str, str], Likeness]) -> None:
    place = {name: index for index, name in enumerate(names)}
    matrix = np.eye(len(names))
    for (one, other), found in pairs.items():
        matrix[place[one], place[other]] = matrix[place[other], place[one]] = found.cosine
    axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(matrix):
        dark = abs(value) > 0.6
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "#202124")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Cosine of l − 1")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _block(path: str) -> str:
    """`encoder.block.3.layer.0.SelfAttention.k` is in `encoder 3`."""
    parts = path.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    stack = next((part for part in parts if part in ("encoder", "decoder")), "block")
    return f"{stack} {number}".strip()


def _in_order(item: tuple[str, Any]) -> tuple[bool, int, str]:
    stack, _, number = item[0].partition(" ")
    return stack != "encoder", int(number or 0), stack
