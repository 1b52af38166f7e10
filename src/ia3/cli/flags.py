"""Flags of several commands, each declared once, and what --json prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ia3.files import expect_folder_or_hub

_AS_IN_TRAINING = "as in training"


def expect_adapter(value: str | Path | Sequence[str]) -> Any:
    """The value as it came; refuses what can be no adapter, and points from a run's folder to the adapter in it.

    Raises:
        FileNotFoundError, ValueError: no such folder or name of a repository, a folder with adapters below it, or an
            adapter that is not what its training left.
    """
    for folder in [Path(value)] if isinstance(value, str | Path) else map(Path, value):
        if folder.is_dir() and not (folder / "adapter_config.json").is_file():
            inside = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
            if inside:
                raise ValueError(f"{folder} is no adapter but a folder with {', '.join(inside)}: name {inside[0]}.")
        expect_folder_or_hub(str(folder), "adapter", "adapter_config.json")
        from ia3.runs.sums import expect_adapter_unchanged

        expect_adapter_unchanged(folder)
    return value


Adapter = Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.", callback=expect_adapter)]
Adapters = Annotated[
    list[str], typer.Argument(help="The adapters: folders or hub repositories.", callback=expect_adapter)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at once.")]
TextColumn = Annotated[str | None, typer.Option(help="The column with the text.", show_default=_AS_IN_TRAINING)]
AnswerBy = Annotated[
    str | None,
    typer.Option(help="rank: the likeliest label; generation: what the model writes.", show_default=_AS_IN_TRAINING),
]


def print_json(content: Any) -> None:
    """Print one JSON object on standard output; what JSON doesn't know, such as a path, is written as text."""
    typer.echo(json.dumps(content, ensure_ascii=False, default=str))
