"""`ia3 sweep`: many trainings in one batch, ranked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.names import ANSWER_BY_HELP, module_names

if TYPE_CHECKING:
    from ia3.training.sweep import Sweep

_INTERRUPTED = 130
# The groups of `--help`.
_DATA, _SAME = "Data", "For all runs"
_FLAGS = {"lr": "learning_rate"}
# A value of these may hold a comma.
_WHOLE = ("template", "data")


# A default of None is "not given": the recipe's value, or what the help shows, then holds.
def sweep(
    model: Annotated[str, typer.Argument(help="The base model: a hub name, a folder or bundled:flan-t5-small-titler.")],
    data: Annotated[
        str | None,
        typer.Argument(help="What to learn from: a CSV, JSON lines or parquet file, or a hub data set."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="What to try, as in learning_rate=3e-3,8e-3; of several every combination.",
            show_default="four learning rates",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The sweep's folder; by default a new one in runs/.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A YAML file with any settings of ia3 train, for all runs; flags override.")
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(rich_help_panel=_DATA, help="Held-out data; otherwise --test-size of the data.")
    ] = None,
    test_size: Annotated[
        float | None,
        typer.Option(rich_help_panel=_DATA, help="The part of the data that is held out.", show_default="0.1"),
    ] = None,
    test_limit: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="Evaluate on at most this many examples.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(rich_help_panel=_DATA, help="The column with the text.", show_default="text")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(rich_help_panel=_DATA, help="The column with the label or answer.", show_default="label"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_DATA, help='What the model reads, columns in braces: "Review: {text} Sentiment?"'
        ),
    ] = None,
    merge_labels: Annotated[
        bool | None,
        typer.Option(
            "--merge-labels/--no-merge-labels",
            rich_help_panel=_DATA,
            help="Read spellings of a label that differ in case or blanks as one.",
            show_default="on",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="Train on at most this many examples, drawn at random.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(rich_help_panel=_DATA, help="Where longer texts are cut, in tokens.", show_default="128"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SAME, help="label-words, generation or instructions.", show_default="the model's"
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SAME, help="The modules to adapt: names with commas between, or a pattern."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(rich_help_panel=_SAME, help="Passes over the training data.", show_default="3")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(rich_help_panel=_SAME, help="How many steps to train for, instead of --epochs.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(rich_help_panel=_SAME, help="The highest learning rate.", show_default="0.008")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(rich_help_panel=_SAME, help="Examples a run and step.", show_default="8")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(rich_help_panel=_SAME, help="The base model's: fp32 or bf16.", show_default="fp32")
    ] = None,
    dropout: Annotated[
        bool | None,
        typer.Option(
            "--dropout/--no-dropout", rich_help_panel=_SAME, help="Train with the base's dropout.", show_default="on"
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(rich_help_panel=_SAME, help="Evaluate after so many steps.", show_default="each epoch"),
    ] = None,
    answer_by: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SAME, help=f"How labels are answered. {ANSWER_BY_HELP}", show_default="rank"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_SAME, help="End a run after so many evaluations that are no better.", show_default="never"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=_SAME, help="Decides the order and the dropout.", show_default="42")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train many adapters in one batch, one for each choice of settings; rank them and keep the best."""
    from rich.console import Console

    given = {
        "data": data,
        "recipe": recipe,
        "merge_labels": merge_labels,
        "output": output,
        "test_data": test_data,
        "test_size": test_size,
        "test_limit": test_limit,
        "text_column": text_column,
        "label_column": label_column,
        "template": template,
        "limit": limit,
        "max_length": max_length,
        "task": task,
        "target_modules": module_names(target_modules),
        "epochs": epochs,
        "steps": steps,
        "learning_rate": lr,
        "batch_size": batch_size,
        "precision": precision,
        "dropout": dropout,
        "evaluate_every": evaluate_every,
        "answer_by": answer_by,
        "patience": patience,
        "seed": seed,
    }
    grid = parse_grid(over) if over else None
    found = _sweep(model, grid, {name: value for name, value in given.items() if value is not None})
    if as_json:
        _print_json(found)
        return
    from ia3.training.sweep import PICTURE_NAME, ranking_table

    console = Console()
    console.print("", ranking_table(found), "", highlight=False)
    typer.echo(f"asked for: {found.best.task.method}")
    typer.echo(f"training: {found.seconds:.0f} s for {len(found.runs) + len(found.failed)} runs together")
    if found.advice is not None:
        typer.echo(f"advice: {found.advice}")
    typer.echo(f"best adapter: {found.best_dir}\npicture: {found.output_dir / PICTURE_NAME}")
    typer.echo(f'\nUse it: ia3 predict {found.best_dir} "…"')


def parse_grid(over: Sequence[str]) -> dict[str, list[str]]:
    """`key=value,value`, one a flag, as a grid; a key's values may be in several flags.

    Raises:
        ValueError: no key, or no value.
    """
    grid: dict[str, list[str]] = {}
    for each in over:
        key, _, values = (part.strip() for part in each.partition("="))
        found = [values] if key in _WHOLE else [value.strip() for value in values.split(",")]
        if not key or not all(found):
            raise ValueError(f"--over {each!r}: expected a setting and its values, such as learning_rate=3e-3,8e-3.")
        key = key.replace("-", "_")
        grid.setdefault(_FLAGS.get(key, key), []).extend(found)
    return grid


def _sweep(model: str, grid: dict[str, list[str]] | None, given: dict[str, Any]) -> Sweep:
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    progress = Console(stderr=True)
    with progress.status("Starting"):
        from ia3.training.sweep import sweep
    disable_progress_bar()
    try:
        return sweep(model, over=grid, console=progress, **given)
    except KeyboardInterrupt:
        progress.print("\nInterrupted. A sweep doesn't go on later: begin it anew.", style="yellow", highlight=False)
        raise typer.Exit(_INTERRUPTED) from None


def _print_json(found: Sweep) -> None:
    import json

    from ia3.training.sweep import PICTURE_NAME

    paths = {"folder": str(found.output_dir), "picture": str(found.output_dir / PICTURE_NAME)}
    typer.echo(json.dumps({**found.summary(), **paths}, ensure_ascii=False))
