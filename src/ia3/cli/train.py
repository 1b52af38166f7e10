"""`ia3 train`: a base model and labelled text in, an adapter, its figures and a picture out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from ia3.cli.names import FlagConsole, with_settings

if TYPE_CHECKING:
    from ia3.runs.look import Looked
    from ia3.runs.recipe import Recipe
    from ia3.runs.run import Run

_INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def train() -> TyperCommand:
    """Fine-tune a model on your data; save the adapter, its figures and a picture."""
    return with_settings(_command, train, several="template")


# A default of None is "not given": the recipe's value, or what the help shows, then holds.
def _command(
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    seeds: Annotated[
        str | None, typer.Option(rich_help_panel="Steps", help="Train once with each: numbers with commas between.")
    ] = None,
    as_json: AsJson = False,
    given: Any = None,
) -> None:
    progress = FlagConsole()
    if resume is not None:
        beside = [*given, *([] if seeds is None else ["seeds"])]
        if beside:
            names = ", ".join(f"`{name}`" for name in beside)
            raise ValueError(f"`resume` goes on with the run's own recipe, so these can't be given beside it: {names}.")
        run = run_visibly(lambda: _run(resume, {}, progress), progress)
    else:
        from ia3.runs.look import look_before

        recipes = _recipes(given, seeds)
        looked = look_before(*recipes)
        if len(recipes) > 1:
            _train_each(recipes, looked, progress, as_json=as_json)
            return
        run = run_visibly(lambda: _run(recipes[0], looked, progress), progress)
    print_result(run, as_json=as_json)
    if not as_json:
        typer.echo(f'\nUse it: ia3 predict {run.adapter_dir} "…"')


def _recipes(given: dict[str, Any], seeds: str | None) -> list[Recipe]:
    """The recipe; one for each of several templates and seeds, in folders of one folder."""
    from dataclasses import replace

    from ia3.runs.recipe import make_recipe
    from ia3.runs.run import new_folder

    templates, numbers = given.pop("template", []), _numbers(seeds, given)
    _refuse_repeated("template", templates)
    choices: list[dict[str, Any]] = [
        {**each, **more}
        for each in ([{"template": template} for template in templates] or [{}])
        for more in ([{"seed": seed} for seed in numbers] or [{}])
    ]
    made = [make_recipe({**given, **choice}) for choice in choices]
    if len(made) == 1:
        return made
    folder = made[0].output or new_folder(made[0].source)
    places = [f"template-{templates.index(each.template) + 1}-" if len(templates) > 1 else "" for each in made]
    return [replace(each, output=folder / f"{place}seed-{each.seed}") for each, place in zip(made, places, strict=True)]


def _numbers(seeds: str | None, given: dict[str, Any]) -> list[int]:
    if seeds is None:
        return []
    if "seed" in given:
        raise ValueError("There are both `seed` and `seeds`: give one of them.")
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ValueError(f"`seeds` is {seeds!r}: expected whole numbers with commas between, such as 0,1,2.") from None
    _refuse_repeated("seeds", numbers)
    return numbers


def _refuse_repeated(name: str, values: Sequence[Any]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"`{name}` holds {', '.join(twice)} more than once, which would be one run: give each once.")


def _run(recipe: Recipe | Path, looked: Looked, progress: Console) -> Run:
    """Train by a recipe, or go on in a folder."""
    from ia3.training.train import resume, run_recipe

    if isinstance(recipe, Path):
        return resume(recipe, console=progress)
    return run_recipe(recipe, progress, looked=looked)


def _train_each(recipes: list[Recipe], looked: Looked, progress: Console, *, as_json: bool) -> None:
    """Train one after the other, then say how much the runs differ. The same command goes on after an interruption."""
    from ia3.runs.comparison import quartiles_of

    results, failed = [], []
    for number, recipe in enumerate(recipes, start=1):
        progress.print(f"\nRun {number} of {len(recipes)}: {recipe.output}", style="bold", highlight=False)
        try:
            results.append(_result_of(recipe, looked, progress))
        except FloatingPointError as error:
            progress.print(str(error), style="red", markup=False, highlight=False)
            failed.append(str(recipe.output))
    if not results:
        raise FloatingPointError(f"None of the {len(recipes)} runs came to an end: lower the learning rate.")
    folder = str(recipes[0].output.parent) if recipes[0].output is not None else ""
    found = quartiles_of([result["accuracy"] for result in results])
    if as_json:
        content = {"folder": folder, "accuracy": found.summary(), "failed": failed, "runs": results}
        typer.echo(json.dumps(content, ensure_ascii=False))
        return
    Console().print(
        f"\naccuracy of {len(results)} runs{_how(results)}: median {found.median:.1%}, quartiles {found.lower:.1%} and "
        f"{found.upper:.1%}, from {found.lowest:.1%} to {found.highest:.1%}\nCompare them: ia3 runs {folder}",
        highlight=False,
        markup=False,
    )
    if failed:
        Console().print(f"Without an end, and not counted: {', '.join(failed)}", highlight=False, markup=False)


def _how(results: Sequence[dict[str, Any]]) -> str:
    """How the answers were found, unless by several ways; runs of before don't say it."""
    methods = {result.get("method") for result in results}
    return f" by {methods.pop()}" if len(methods) == 1 and None not in methods else ""


def _result_of(recipe: Recipe, looked: Looked, progress: Console) -> dict[str, Any]:
    """The figures of a run of a series, trained now, to its end now, or before."""
    from ia3.training.train import begun, finished_result

    done = finished_result(recipe)
    if done is not None:
        progress.print("Done before.", highlight=False)
        return done
    folder = recipe.output
    if folder is not None and begun(recipe):
        return run_visibly(lambda: _run(folder, {}, progress), progress).summary()
    return run_visibly(lambda: _run(recipe, looked, progress), progress).summary()


def run_visibly(train: Callable[[], Run], progress: Console) -> Run:
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
        paths = {"adapter": str(run.adapter_dir), "picture": str(picture)}
        typer.echo(json.dumps({**run.summary(), **paths, **more}, ensure_ascii=False))
    else:
        Console().print(result_table(run, picture))
