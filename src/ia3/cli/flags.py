"""Flags of several commands, each declared once, and what --json prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

_AS_IN_TRAINING = "as in training"

Adapter = Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.")]
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
