"""`ia3 quickstart`: train, evaluate, save, reload and predict, with what comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ia3.cli.flags import AsJson
from ia3.runs.screen import Screen

_SENTENCES = (
    "Shares jump 12% after the company raises its full-year outlook",
    "Retailer cuts its dividend as sales fall for the third quarter in a row",
    "The board will meet on Thursday to set the date of the annual meeting",
)


# How many tweets it may learn, and what it reaches by them on the 300 held out: one seed each, see
# benchmarks/results/quickstart_sizes.txt.
SIZES = {3600: 0.813, 1800: 0.78, 900: 0.753, 450: 0.697}
# So long a training may be expected to take. Twice as many tweets take twice as long.
_SECONDS = 225.0
_STEPS_TIMED = 8
# Chosen on training tweets by benchmarks/quickstart_search.py; benchmarks/results has the figures.
_SETTINGS = {"epochs": 2, "learning_rate": 2e-2, "batch_size": 8, "dropout": False}


def quickstart(
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("ia3-quickstart"),
    seed: Annotated[int, typer.Option(help="Decides the order of the tweets.")] = 42,
    limit: Annotated[
        int | None, typer.Option(min=3, help="Learn so many tweets instead, and evaluate on as few.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Teach the bundled model the sentiment of up to 3,600 bundled tweets, in minutes on any machine, no download."""
    from ia3.bundled import TITLER
    from ia3.cli.labelling import answer, load_labeller
    from ia3.cli.train import print_result, run_visibly
    from ia3.inference.labelling import Overrides
    from ia3.runs.recipe import make_recipe
    from ia3.tasks.examples import Example
    from ia3.training.train import run_recipe

    progress = Screen(stderr=True)
    progress.print(f"{TITLER} learns to tell the sentiment of tweets about shares.", highlight=False)
    given = {
        **{"model": TITLER, "data": "bundled:tweets", "test_data": "bundled:tweets:test", "test_limit": limit},
        **{"output": output, "seed": seed, **_SETTINGS},
    }
    tweets = limit or _fitting(given, progress)
    run = run_visibly(lambda: run_recipe(make_recipe({**given, "limit": tweets}), progress), progress)
    known = {"known_accuracy": SIZES[tweets]} if limit is None else {}

    labeller = load_labeller(str(run.adapter_dir), progress, Overrides(), trusted=False)
    sentences = [Example(text, "") for text in _SENTENCES]
    found = answer(labeller, sentences, progress, batch_size=len(_SENTENCES))
    pairs = zip(_SENTENCES, found, strict=True)
    answers = [{"text": text, "label": each.label, "probability": each.probability} for text, each in pairs]
    print_result(run, as_json=as_json, predictions=answers, **known)
    if not as_json:
        if limit is None:
            every = SIZES[max(SIZES)]
            said = f"\nIt learned {tweets:,} of {max(SIZES):,} tweets, for which {SIZES[tweets]:.1%} is known"
            typer.echo(f"{said}." if tweets == max(SIZES) else f"{said}; all of them give {every:.1%}.")
        typer.echo("\nThe adapter, loaded from disk, says:")
        for each in answers:
            typer.echo(f"  {each['label']:<9} {each['probability']:>5.1%}  {each['text']}")
        typer.echo(f'\nYour turn: ia3 predict {run.adapter_dir} "…"')


def _fitting(given: dict[str, Any], progress: Console) -> int:
    """As many tweets as this machine learns in the time, by its first steps."""
    from ia3.inference.loading import Base
    from ia3.runs.recipe import make_recipe
    from ia3.training.loop import Training
    from ia3.training.plan import prepare

    base = Base(given["model"])
    recipe = make_recipe({**given, "limit": min(SIZES)})
    with progress.status("Measuring this machine"):
        [(_, plan)] = prepare(base, base.kind, [recipe], Console(quiet=True))
        seconds = Training(plan).time_steps(_STEPS_TIMED)
    tweets, expected = choose_size(seconds)
    progress.print(
        f"A step takes {seconds:.2g} s here, so it learns {tweets:,} of the {max(SIZES):,} tweets, in about "
        f"{expected:.0f} s (--limit takes another number).",
        highlight=False,
    )
    return tweets


def choose_size(seconds: float) -> tuple[int, float]:
    """The largest of `SIZES` whose training fits into the time, or the least; and how long it takes.

    Args:
        seconds: of a step.
    """
    a_tweet = seconds * _SETTINGS["epochs"] / _SETTINGS["batch_size"]
    tweets = next((each for each in SIZES if each * a_tweet <= _SECONDS), min(SIZES))
    return tweets, tweets * a_tweet
