"""`ia3 compare`: how alike adapters are, as a table and a picture."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from ia3.cli.flags import Adapters, AsJson, print_json
from ia3.errors import naming
from ia3.runs.screen import Screen
from ia3.runs.tables import Column, print_table, say


def compare(
    adapters: Adapters,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("compare.png"),
    as_json: AsJson = False,
) -> None:
    """Compare adapters by the cosine and the distance of what they add to the base, in all and block by block."""
    if len(adapters) < 2:
        raise ValueError("There is one adapter, and nothing to compare it with: name at least two.")
    if output.suffix.lower() != ".png":
        raise ValueError(f"The picture {output} must end in .png.")
    with Screen(stderr=True).status("Comparing"):
        from ia3.runs.adapters import read_adapter
        from ia3.runs.likeness import draw_likeness, likeness

        names = _short(adapters)
        vectors = dict(zip(names, (read_adapter(adapter).vectors for adapter in adapters), strict=True))
        pairs = {}
        for one, other in combinations(names, 2):
            with naming(f"{one}, {other}"):
                pairs[one, other] = likeness(vectors[one], vectors[other])
        draw_likeness(names, pairs, output)
    if as_json:
        listed = [{"adapters": pair, **found.summary()} for pair, found in pairs.items()]
        print_json({"pairs": listed, "picture": output})
        return
    least = [min(found.blocks.items(), key=lambda item: item[1]) for found in pairs.values()]
    columns = [
        Column("adapters", [", ".join(pair) for pair in pairs], text=True),
        Column("cosine", [f"{found.cosine:.3f}" for found in pairs.values()]),
        Column("distance", [f"{found.distance:.3f}" for found in pairs.values()]),
        Column("least alike block", [f"{block} ({cosine:.3f})" for block, cosine in least], 1),
    ]
    console = Screen()
    print_table(console, columns, "Likeness of l − 1")
    say(console, f"\npicture: {output}")


def _short(adapters: list[str]) -> list[str]:
    """The folders' own names, or the whole where these are the same, as in runs/a/adapter and runs/b/adapter."""
    parts = [Path(adapter).parts for adapter in adapters]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return adapters
