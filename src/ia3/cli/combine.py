"""`ia3 combine`: one adapter out of several of one base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ia3.cli.flags import Adapters, AsJson, print_json
from ia3.cli.names import numbers
from ia3.runs.screen import Screen


def combine(
    adapters: Adapters,
    output: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    weights: Annotated[
        str | None, typer.Option(help="One number an adapter, with commas between.", show_default="1 each")
    ] = None,
    rule: Annotated[
        str, typer.Option("--type", help="mean, task_arithmetic, ties, product, or sum, which is PEFT's.")
    ] = "mean",
    density: Annotated[
        float | None, typer.Option(help="For ties: the share of an adapter's numbers that is kept.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Combine adapters of one base model; `--type task_arithmetic --weights -1` negates one."""
    factors = [1.0] * len(adapters) if weights is None else numbers("weights", weights, float)
    progress = Screen(stderr=True)
    with progress.status("Combining"):
        from ia3.runs.adapters import combine_adapters

        chosen: Any = rule
        made = combine_adapters(adapters, output, factors, chosen, density)
    if made.task is None:
        progress.print(
            "The adapters were trained for different tasks, so the combination has none: ia3 predict lets it write.",
            style="yellow",
        )
    count = len(made.vectors)
    if as_json:
        print_json({"adapters": adapters, "output": output, "type": rule, "vectors": count, "weights": factors})
    else:
        distance = max(float((vector - 1).abs().mean()) for vector in made.vectors.values())
        typer.echo(f"{count} vectors are in {output}; the furthest is {distance:.3f} from one on average.")
