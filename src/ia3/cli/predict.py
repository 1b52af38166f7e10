"""`ia3 predict`: label words for sentences, from arguments or from standard input."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def predict(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.")],
    sentences: Annotated[
        list[str] | None, typer.Argument(help="What to label; without any, the lines of standard input.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Where longer sentences are cut, in tokens.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences at once.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Label sentences with a trained adapter: one line each, the label, a tab and the sentence."""
    texts = sentences or _read_lines()
    from transformers.utils.logging import disable_progress_bar

    from ia3.inference import predict as inference

    disable_progress_bar()
    model, tokenizer = inference.load_adapter(adapter)
    words = inference.predict(
        model, tokenizer, texts, max_length=max_length, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    if as_json:
        pairs = [{"text": text, "label": word} for text, word in zip(texts, words, strict=True)]
        typer.echo(json.dumps({"adapter": adapter, "predictions": pairs}, ensure_ascii=False))
    else:
        for text, word in zip(texts, words, strict=True):
            typer.echo(f"{word}\t{text}")


def _read_lines() -> list[str]:
    """The lines of standard input that are not blank."""
    if sys.stdin.isatty():
        raise ValueError('There is nothing to label: give sentences, as in `ia3 predict ADAPTER "Sales rose."`.')
    lines = [line.strip() for line in sys.stdin]
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError("Standard input holds no text: expected one sentence a line.")
    if len(texts) < len(lines):
        typer.echo(f"{len(lines) - len(texts)} blank lines are left out.", err=True)
    return texts
