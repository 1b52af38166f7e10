"""`ia3 combine`: one adapter out of several of one base model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.inspect import Content, read_content

if TYPE_CHECKING:
    from torch import Tensor

    from ia3.sites import Site


def combine(
    adapters: Annotated[list[str], typer.Argument(help="The adapters: folders or hub repositories.")],
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Combine adapters of one base model; `--type task_arithmetic --weights -1` negates one."""
    from rich.console import Console

    from ia3 import arithmetic

    if output.exists():
        raise ValueError(f"{output} exists already, and a combination replaces nothing: name a new folder.")
    progress = Console(stderr=True)
    with progress.status("Combining"):
        contents = [read_content(adapter) for adapter in adapters]
        _expect_one_base(contents)
        factors = _numbers(weights, len(contents))
        chosen: Any = rule
        values = arithmetic.combine([sites_of(content) for content in contents], factors, chosen, density=density)
        has_task = _write(output, contents, values)
    if not has_task:
        progress.print(
            "The adapters were trained for different tasks, so the combination has none: ia3 predict lets it write.",
            style="yellow",
        )
    distance = max(float((vector - 1).abs().mean()) for vector in values.values())
    if as_json:
        summary = {
            "adapters": adapters,
            "output": str(output),
            "type": rule,
            "vectors": len(values),
            "weights": factors,
        }
        typer.echo(json.dumps(summary, ensure_ascii=False))
    else:
        typer.echo(f"{len(values)} vectors are in {output}; the furthest is {distance:.3f} from one on average.")


def sites_of(content: Content) -> dict[Site, Tensor]:
    """An adapter's vectors by site, as its file holds them."""
    from ia3.sites import Site

    return {
        Site(path, "input" if vector.shape[0] == 1 else "output", tuple(vector.shape)): vector
        for path, vector in content.vectors.items()
    }


def _expect_one_base(contents: list[Content]) -> None:
    bases = {content.config.base_model_name_or_path for content in contents}
    if len(bases) > 1:
        raise ValueError(
            f"The adapters belong to different base models, {sorted(map(str, bases))}: combine those of one."
        )
    sides: dict[str, set[bool]] = {}
    for content in contents:
        for path, vector in content.vectors.items():
            sides.setdefault(path, set()).add(vector.shape[0] == 1)
    both = sorted(path for path, used in sides.items() if len(used) > 1)
    if both:
        raise ValueError(
            f"The adapters multiply both the input and the output of {both[0]}, and a file holds one vector a module."
        )
    whole = [content.adapter for content in contents if content.others]
    if len(whole) > 1:
        raise ValueError(f"{whole} all train modules in full, which have no combination: at most one may.")


def _numbers(weights: str | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        return [float(part) for part in weights.split(",")]
    except ValueError:
        raise ValueError(f"--weights is {weights!r}: expected numbers with commas between, such as 0.5,0.5.") from None


def _write(output: Path, contents: list[Content], values: dict[Site, Tensor]) -> bool:
    """Write the combination as PEFT's files; whether it has a task."""
    from copy import deepcopy
    from dataclasses import replace

    from ia3.card import write_card
    from ia3.tasks.task import save_task
    from ia3.tensors import PREFIX, SAFETENSORS_NAME, write_tensors

    with_modules = next((content for content in contents if content.others), contents[0])
    config: Any = deepcopy(with_modules.config)
    config.exclude_modules = None
    # Patterns, because a path listed as a name would also match longer paths that end with it.
    config.target_modules = "|".join(re.escape(site.path) for site in values)
    inputs = [re.escape(site.path) for site in values if site.side == "input"]
    config.feedforward_modules = "|".join(inputs) or set()
    tensors = {f"{PREFIX}{site.key}": vector for site, vector in values.items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in with_modules.others.items()}
    output.mkdir(parents=True)
    write_tensors(output / SAFETENSORS_NAME, tensors)
    config.save_pretrained(output)
    write_card(output, config)
    tasks = [content.task for content in contents if content.task is not None]
    if len({*tasks}) > 1:  # how they are asked need not be the same, and is then the usual way
        tasks = [replace(task, answer_by="rank", precision=None) for task in tasks]
    if len(tasks) < len(contents) or len({*tasks}) > 1:
        return False
    save_task(output, tasks[0])
    return True
