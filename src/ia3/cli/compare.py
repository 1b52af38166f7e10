"""`ia3 compare`: how alike adapters are, as a table and a picture."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.combine import sites_of
from ia3.cli.inspect import read_content

if TYPE_CHECKING:
    from torch import Tensor

    from ia3.sites import Site

    Vectors = dict[Site, Tensor]


def compare(
    adapters: Annotated[list[str], typer.Argument(help="Two adapters or more: folders or hub repositories.")],
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("compare.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare adapters by the cosine and the distance of what they add to the base, in all and block by block."""
    from rich.console import Console

    from ia3.runs.likeness import draw_likeness, likeness

    if len(adapters) < 2:
        raise ValueError("There is one adapter, and nothing to compare it with: name at least two.")
    if output.suffix.lower() != ".png":
        raise ValueError(f"The picture {output} must end in .png.")
    with Console(stderr=True).status("Comparing"):
        names = _short(adapters)
        vectors = [sites_of(read_content(adapter)) for adapter in adapters]
        pairs = {
            (names[a], names[b]): likeness(vectors[a], vectors[b]) for a, b in combinations(range(len(adapters)), 2)
        }
        draw_likeness(names, pairs, output)
    if as_json:
        listed = [{"adapters": pair, **found.summary()} for pair, found in pairs.items()]
        typer.echo(json.dumps({"pairs": listed, "picture": str(output)}, ensure_ascii=False))
    else:
        _print(pairs, output)


def _short(adapters: list[str]) -> list[str]:
    """The folders' own names, or the whole where these are the same, as in runs/a/adapter and runs/b/adapter."""
    parts = [Path(adapter).parts for adapter in adapters]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return adapters


def _print(pairs: dict[tuple[str, str], Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("adapters", title="Likeness of l − 1", title_justify="left", box=None, pad_edge=False)
    for column in ("cosine", "distance", "least alike block"):
        table.add_column(column, justify="right")
    for (one, other), found in pairs.items():
        block, cosine = min(found.blocks.items(), key=lambda item: item[1])
        table.add_row(
            Text(f"{one}, {other}"), f"{found.cosine:.3f}", f"{found.distance:.3f}", f"{block} ({cosine:.3f})"
        )
    Console().print(table, f"\npicture: {output}", highlight=False)
