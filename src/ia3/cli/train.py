"""`ia3 train`: a base model and labelled text in, an adapter, its figures and a picture out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.names import module_names

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.training.loop import Run
    from ia3.training.recipe import Recipe

_INTERRUPTED = 130


# A default of None is "not given": the recipe's value, or what the help shows, then holds.
def train(
    model: Annotated[
        str | None, typer.Option(help="The base model: a hub name, a folder or bundled:flan-t5-small-titler.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled text: a CSV, JSON lines or parquet file, or a hub data set.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with any of these settings; flags override.")] = None,
    test_data: Annotated[str | None, typer.Option(help="Held-out text; otherwise --test-size of the data.")] = None,
    test_size: Annotated[
        float | None, typer.Option(help="The part of the data that is held out.", show_default="0.1")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="The column with the text.", show_default="text")] = None,
    label_column: Annotated[str | None, typer.Option(help="The column with the label.", show_default="label")] = None,
    template: Annotated[
        str | None, typer.Option(help='What the model reads, columns in braces: "Review: {text} Sentiment?".')
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="The modules to adapt: names with commas between, or a pattern.")
    ] = None,
    feedforward_modules: Annotated[
        str | None, typer.Option(help="Those of them whose input is multiplied, not the output.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one in runs/.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training text.", show_default="3")] = None,
    lr: Annotated[
        float | None, typer.Option(help="The learning rate of the first step; falls to 0.", show_default="0.008")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.", show_default="8")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Where longer texts are cut, in tokens.", show_default="128")
    ] = None,
    dropout: Annotated[
        bool | None, typer.Option("--dropout/--no-dropout", help="Train with the base's dropout.", show_default="on")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides the split, the order and the dropout.", show_default="42")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Train on at most this many examples, drawn at random.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a model on labelled text; save the adapter, its figures and a picture."""
    given = {
        "model": model,
        "data": data,
        "test_data": test_data,
        "test_size": test_size,
        "text_column": text_column,
        "label_column": label_column,
        "template": template,
        "target_modules": module_names(target_modules),
        "feedforward_modules": module_names(feedforward_modules),
        "output": output,
        "epochs": epochs,
        "learning_rate": lr,
        "batch_size": batch_size,
        "max_length": max_length,
        "dropout": dropout,
        "seed": seed,
        "limit": limit,
    }
    from rich.console import Console

    progress = Console(stderr=True)
    with progress.status("Starting"):
        checked = _read(recipe, {name: value for name, value in given.items() if value is not None})
    run = run_visibly(checked, progress)
    print_result(run, as_json=as_json)
    if not as_json:
        typer.echo(f'\nUse it: ia3 predict {run.adapter_dir} "…"')


def _read(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe with the flags over it."""
    from ia3.training.recipe import make_recipe, read_recipe

    content = {**(read_recipe(path) if path is not None else {}), **flags}
    return make_recipe(content, path)


def run_visibly(recipe: Recipe, progress: Console) -> Run:
    """Train with progress on a console; Ctrl-C ends the command and says what is left."""
    from transformers.utils.logging import disable_progress_bar

    from ia3.training.recipe import Interrupted, run_recipe

    disable_progress_bar()
    try:
        return run_recipe(recipe, progress)
    except Interrupted as interrupted:
        progress.print(f"\n{interrupted}", style="yellow", markup=False, highlight=False)
        raise typer.Exit(_INTERRUPTED) from None


def print_result(run: Run, *, as_json: bool, **more: Any) -> None:
    """Print the run as a table, or with `more` as one JSON object, on standard output."""
    import json

    from rich.console import Console

    from ia3.training.report import PICTURE_NAME, result_table

    picture = run.output_dir / PICTURE_NAME
    if as_json:
        paths = {"adapter": str(run.adapter_dir), "picture": str(picture)}
        typer.echo(json.dumps({**run.summary(), **paths, **more}, ensure_ascii=False))
    else:
        Console().print(result_table(run, picture))
