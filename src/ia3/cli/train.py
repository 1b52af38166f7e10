"""`ia3 train`: a base model and labelled text in, an adapter, its figures and a picture out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand

from ia3.cli.flags import AsJson, TrustRemoteCode, print_json
from ia3.cli.names import FlagConsole, numbers, with_settings
from ia3.launched import first_prints
from ia3.runs.screen import Screen

if TYPE_CHECKING:
    from ia3.runs.look import Looked
    from ia3.runs.recipe import Recipe
    from ia3.runs.run import Run

_INTERRUPTED = 130

FoundT = TypeVar("FoundT")


def train() -> TyperCommand:
    """Fine-tune a model on your data; save the adapter, its figures and a picture."""
    return with_settings(_command, train, several="template")


# A default of None is "not given": the recipe's value, or what the help shows, then holds.
def _command(
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    seeds: Annotated[
        str | None, typer.Option(rich_help_panel="Steps", help="Train once with each: numbers with commas between.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    given: Any = None,
) -> None:
    with first_prints():
        _train(resume, seeds, given, as_json=as_json, trusted=trust_remote_code)


def _train(resume: Path | None, seeds: str | None, given: dict[str, Any], *, as_json: bool, trusted: bool) -> None:
    progress = FlagConsole()
    if resume is not None:
        beside = [*given, *([] if seeds is None else ["seeds"])]
        if beside:
            names = ", ".join(f"`{name}`" for name in beside)
            raise ValueError(f"`resume` goes on with the run's own recipe, so these can't be given beside it: {names}.")
        run = _run(resume, {}, progress, trusted=trusted)
    else:
        from ia3.runs.look import look_before
        from ia3.runs.recipe import naming_its_recipe

        recipes = _recipes(given, seeds)
        looked = look_before(*recipes)
        with naming_its_recipe(given):
            if len(recipes) > 1:
                _train_each(recipes, looked, progress, as_json=as_json, trusted=trusted)
                return
            run = _run(recipes[0], looked, progress, trusted=trusted)
    print_result(run, as_json=as_json)
    if not as_json:
        typer.echo(f'\nUse it: ia3 predict {run.adapter_dir} "…"')


def _recipes(given: dict[str, Any], seeds: str | None) -> list[Recipe]:
    """The recipe; one for each of several templates and seeds, in folders of one folder."""
    from dataclasses import replace

    from ia3.runs.recipe import make_recipe
    from ia3.runs.run import new_folder

    if seeds is not None and "seed" in given:
        raise ValueError("There are both `seed` and `seeds`: give one of them.")
    templates, chances = given.pop("template", []), [] if seeds is None else numbers("seeds", seeds, int)
    for name, values in (("template", templates), ("seeds", chances)):
        if twice := sorted({str(value) for value in values if values.count(value) > 1}):
            raise ValueError(
                f"`{name}` holds {', '.join(twice)} more than once, which would be one run: give each once."
            )
    choices: list[dict[str, Any]] = [
        {**each, **more}
        for each in ([{"template": template} for template in templates] or [{}])
        for more in ([{"seed": seed} for seed in chances] or [{}])
    ]
    made = [make_recipe({**given, **choice}) for choice in choices]
    if len(made) == 1:
        return made
    folder = made[0].output or new_folder(made[0].source)
    places = [f"template-{templates.index(each.template) + 1}-" if len(templates) > 1 else "" for each in made]
    return [replace(each, output=folder / f"{place}seed-{each.seed}") for each, place in zip(made, places, strict=True)]


def _run(recipe: Recipe | Path, looked: Looked, progress: Console, *, trusted: bool) -> Run:
    """Train by a recipe, or go on in a folder."""

    def run() -> Run:
        from ia3.training.train import resume_run, run_recipe

        if isinstance(recipe, Path):
            return resume_run(recipe, console=progress, trust_remote_code=trusted)
        return run_recipe(recipe, progress, looked=looked, trust_remote_code=trusted)

    return run_visibly(run, progress)


def _train_each(recipes: list[Recipe], looked: Looked, progress: Console, *, as_json: bool, trusted: bool) -> None:
    """Train one after the other, then say how much the runs differ. The same command goes on after an interruption."""
    from ia3.runs.comparison import quartiles_of

    results, failed = [], []
    for number, recipe in enumerate(recipes, start=1):
        progress.print(f"\nRun {number} of {len(recipes)}: {recipe.output}", style="bold", highlight=False)
        from ia3.training.train import begun, finished_result

        try:
            if (done := finished_result(recipe)) is not None:
                progress.print("Done before.", highlight=False)
            else:
                former = recipe.output if begun(recipe) else None
                done = _run(former or recipe, {} if former else looked, progress, trusted=trusted).summary()
            results.append(done)
        except typer.Exit:
            progress.print("The same command again goes on with this run and then the others.", highlight=False)
            raise
        except FloatingPointError as error:
            progress.print(str(error), style="red", markup=False, highlight=False)
            failed.append(str(recipe.output))
    if not results:
        raise FloatingPointError(f"None of the {len(recipes)} runs came to an end: lower the learning rate.")
    folder = str(recipes[0].output.parent) if recipes[0].output is not None else ""
    found = quartiles_of([result["accuracy"] for result in results])
    methods = {result["method"] for result in results}
    how = f" by {methods.pop()}" if len(methods) == 1 else ""
    if as_json:
        print_json({"folder": folder, "accuracy": found.summary(), "failed": failed, "runs": results})
        return
    Screen().print(
        f"\naccuracy of {len(results)} runs{how}: median {found.median:.1%}, quartiles {found.lower:.1%} and "
        f"{found.upper:.1%}, from {found.lowest:.1%} to {found.highest:.1%}\nCompare them: ia3 runs {folder}",
        highlight=False,
        markup=False,
    )
    if failed:
        Screen().print(f"Without an end, and not counted: {', '.join(failed)}", highlight=False, markup=False)


def run_visibly(train: Callable[[], FoundT], progress: Console) -> FoundT:
    """Train with progress on a console; Ctrl-C ends the command and says how to go on."""
    with progress.status("Starting"):
        from transformers.utils.logging import disable_progress_bar

        from ia3.training.loop import Interrupted
    disable_progress_bar()
    try:
        return train()
    except Interrupted as interrupted:
        progress.print(f"\n{interrupted}", style="yellow", markup=False, highlight=False)
        raise typer.Exit(_INTERRUPTED) from None


def print_result(run: Run, *, as_json: bool, **more: Any) -> None:
    """Print the run as a table, or with `more` as one JSON object, on standard output."""
    from ia3.runs.report import result_table
    from ia3.runs.run import PICTURE_NAME

    picture = run.output_dir / PICTURE_NAME
    if as_json:
        print_json({**run.summary(), "adapter": run.adapter_dir, "picture": picture, **more})
    else:
        Screen().print(result_table(run, picture))
