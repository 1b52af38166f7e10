"""`ia3 quickstart`: train, evaluate, save, reload and predict, with what comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SENTENCES = (
    "Shares jump 12% after the company raises its full-year outlook",
    "Retailer cuts its dividend as sales fall for the third quarter in a row",
    "The board will meet on Thursday to set the date of the annual meeting",
)


def quickstart(
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("ia3-quickstart"),
    seed: Annotated[int, typer.Option(help="Decides the order of the tweets.")] = 42,
    limit: Annotated[int | None, typer.Option(min=3, help="Train on this many tweets, evaluate on as few.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Teach the bundled model the sentiment of 3,600 bundled tweets: some minutes on two cores, no download."""
    from rich.console import Console

    from ia3.bundled import TITLER
    from ia3.cli.labelling import Overrides, answer, load_labeller
    from ia3.cli.train import print_result, run_visibly
    from ia3.runs.recipe import Recipe
    from ia3.tasks.examples import Example
    from ia3.training.train import run_recipe

    progress = Console(stderr=True)
    progress.print(f"{TITLER} learns to tell the sentiment of tweets about shares.", highlight=False)
    # Chosen on training tweets by benchmarks/quickstart_search.py; benchmarks/results has the figures.
    recipe = Recipe(
        model=TITLER,
        data="bundled:tweets",
        test_data="bundled:tweets:test",
        test_limit=limit,
        output=output,
        limit=limit,
        epochs=2,
        learning_rate=2e-2,
        dropout=False,
        seed=seed,
    )
    run = run_visibly(lambda: run_recipe(recipe, progress), progress)

    labeller = load_labeller(str(run.adapter_dir), progress, Overrides())
    sentences = [Example(text, "") for text in _SENTENCES]
    found = answer(labeller, sentences, progress, batch_size=len(_SENTENCES))
    answers = [
        {"text": text, "label": each.label, "probability": each.probability}
        for text, each in zip(_SENTENCES, found, strict=True)
    ]
    print_result(run, as_json=as_json, predictions=answers)
    if not as_json:
        typer.echo("\nThe adapter, loaded from disk, says:")
        for each in answers:
            typer.echo(f"  {each['label']:<9} {each['probability']:>5.1%}  {each['text']}")
        typer.echo(f'\nYour turn: ia3 predict {run.adapter_dir} "…"')
