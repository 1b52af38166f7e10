"""`ia3 train`: a base model and labelled text in, an adapter, its figures and a picture out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.names import ANSWER_BY_HELP, module_names

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.runs.recipe import Recipe
    from ia3.runs.run import Run

_INTERRUPTED = 130
# The groups of `--help`.
_DATA, _TASK, _ADAPTER = "Data", "Task", "Base model and adapter"
_STEPS, _EVALUATION = "Steps", "Evaluation"


# A default of None is "not given": the recipe's value, or what the help shows, then holds.
def train(
    model: Annotated[
        str | None, typer.Option(help="The base model: a hub name, a folder or bundled:flan-t5-small-titler.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(rich_help_panel=_DATA, help="What to learn from: a CSV, JSON or parquet file, or a hub data set."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="t-few, or a YAML file with any of these settings; flags override.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
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
    split_seed: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="Decides what is held out.", show_default="42")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_TASK,
            help="label-words, generation, instructions, sequence-classification or token-classification.",
            show_default="the model's",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(rich_help_panel=_DATA, help="The column with the text.", show_default="text")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(rich_help_panel=_DATA, help="The column with the label, answer or tags.", show_default="label"),
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
    template: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_TASK,
            help='What the model reads, columns in braces: "Review: {text} Sentiment?"; a run each.',
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(rich_help_panel=_TASK, help="The system message, in instruction tuning.")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(rich_help_panel=_ADAPTER, help="The modules to adapt: names with commas between, or a pattern."),
    ] = None,
    feedforward_modules: Annotated[
        str | None,
        typer.Option(rich_help_panel=_ADAPTER, help="Those of them whose input is multiplied, not the output."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one in runs/.")] = None,
    epochs: Annotated[
        int | None, typer.Option(rich_help_panel=_STEPS, help="Passes over the training data.", show_default="3")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(rich_help_panel=_STEPS, help="How many steps to train for, instead of --epochs.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(rich_help_panel=_STEPS, help="The highest learning rate.", show_default="0.008")
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=_STEPS, help="Over how many steps the rate rises first.", show_default="0"),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(rich_help_panel=_STEPS, help="Pulls vectors towards one, the base model.", show_default="0"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(rich_help_panel=_STEPS, help="Examples at once.", show_default="8")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(rich_help_panel=_STEPS, help="Batches a step.", show_default="1")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(rich_help_panel=_ADAPTER, help="The base model's: fp32 or bf16.", show_default="fp32")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(rich_help_panel=_DATA, help="Where longer texts are cut, in tokens.", show_default="128"),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option(
            "--balance/--no-balance", rich_help_panel=_DATA, help="Draw labels equally often.", show_default="off"
        ),
    ] = None,
    packing: Annotated[
        bool | None,
        typer.Option(
            "--packing/--no-packing", rich_help_panel=_TASK, help="Several instructions a row.", show_default="off"
        ),
    ] = None,
    dropout: Annotated[
        bool | None,
        typer.Option(
            "--dropout/--no-dropout", rich_help_panel=_STEPS, help="Train with the base's dropout.", show_default="on"
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(rich_help_panel=_EVALUATION, help="Evaluate after so many steps.", show_default="each epoch"),
    ] = None,
    answer_by: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_EVALUATION, help=f"How labels are answered. {ANSWER_BY_HELP}", show_default="rank"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_EVALUATION, help="Stop after so many evaluations that are no better.", show_default="never"
        ),
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_EVALUATION, help="Log there too, by accelerate's names: tensorboard, wandb, …"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_STEPS, help="Decides the order, the dropout, and what --limit draws.", show_default="42"
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(rich_help_panel=_STEPS, help="Train once with each: numbers with commas between.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="Train on at most this many examples, drawn at random.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a model on your data; save the adapter, its figures and a picture."""
    from rich.console import Console

    given = {
        "model": model,
        "data": data,
        "test_data": test_data,
        "test_size": test_size,
        "test_limit": test_limit,
        "split_seed": split_seed,
        "task": task,
        "text_column": text_column,
        "label_column": label_column,
        "merge_labels": merge_labels,
        "system": system,
        "target_modules": module_names(target_modules),
        "feedforward_modules": module_names(feedforward_modules),
        "output": output,
        "epochs": epochs,
        "steps": steps,
        "learning_rate": lr,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "precision": precision,
        "max_length": max_length,
        "balance": balance,
        "packing": packing,
        "dropout": dropout,
        "evaluate_every": evaluate_every,
        "answer_by": answer_by,
        "patience": patience,
        "trackers": tracker or None,
        "limit": limit,
    }
    flags = {name: value for name, value in given.items() if value is not None}
    progress = Console(stderr=True)
    if resume is not None:
        _refuse_beside_resume([*flags, *_named(recipe=recipe, template=template, seed=seed, seeds=seeds)])
        run = run_visibly(lambda: _resume(resume, progress), progress)
    else:
        with progress.status("Starting"):
            recipes = _recipes(recipe, flags, template or [], _seeds(seed, seeds))
        if len(recipes) > 1:
            _train_each(recipes, progress, as_json=as_json)
            return
        run = run_visibly(lambda: _train(recipes[0], progress), progress)
    print_result(run, as_json=as_json)
    if not as_json:
        typer.echo(f'\nUse it: ia3 predict {run.adapter_dir} "…"')


_FLAGS = {"learning_rate": "lr", "trackers": "tracker"}


def _named(**given: Any) -> list[str]:
    return [name for name, value in given.items() if value is not None and value != []]


def _refuse_beside_resume(given: list[str]) -> None:
    if given:
        flags = ", ".join(f"--{_FLAGS.get(name, name).replace('_', '-')}" for name in given)
        raise ValueError(f"--resume goes on with the run's own recipe, so these can't be given beside it: {flags}.")


def _seeds(seed: int | None, seeds: str | None) -> list[int]:
    if seeds is None:
        return [] if seed is None else [seed]
    if seed is not None:
        raise ValueError("There are both --seed and --seeds: give one of them.")
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {seeds!r}: expected whole numbers with commas between, such as 0,1,2.") from None
    _refuse_repeated("--seeds", numbers)
    return numbers


def _refuse_repeated(flag: str, values: Sequence[Any]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{flag} holds {', '.join(twice)} more than once, which would be one run: give each once.")


def _recipes(path: str | None, flags: dict[str, Any], templates: list[str], seeds: list[int]) -> list[Recipe]:
    """The recipe with the flags over it; one for each of several templates and seeds, in folders of one folder."""
    from dataclasses import replace

    from ia3.runs.recipe import make_recipe, override, read_recipe
    from ia3.training.train import new_folder

    content = read_recipe(path) if path is not None else {}
    _refuse_repeated("--template", templates)
    choices: list[dict[str, Any]] = [
        {**each, **more}
        for each in ([{"template": template} for template in templates] or [{}])
        for more in ([{"seed": seed} for seed in seeds] or [{}])
    ]
    made = [make_recipe(override(content, {**flags, **choice}), path) for choice in choices]
    if len(made) == 1:
        return made
    folder = made[0].output or new_folder(made[0].source)
    names = [_name(number, recipe, templates) for number, recipe in enumerate(made)]
    return [replace(recipe, output=folder / name) for recipe, name in zip(made, names, strict=True)]


def _name(number: int, recipe: Recipe, templates: list[str]) -> str:
    """A run's folder among several."""
    place = templates.index(recipe.template) + 1 if recipe.template in templates else 0
    parts = [f"template-{place}"] if len(templates) > 1 else []
    return "-".join([*parts, f"seed-{recipe.settings.seed}"])


def _train(recipe: Recipe, progress: Console) -> Run:
    from ia3.training.train import run_recipe

    return run_recipe(recipe, progress)


def _resume(folder: Path, progress: Console) -> Run:
    from ia3.training.train import resume

    return resume(folder, console=progress)


def _train_each(recipes: list[Recipe], progress: Console, *, as_json: bool) -> None:
    """Train one after the other, then say how much the runs differ. The same command goes on after an interruption."""
    import json

    from rich.console import Console

    from ia3.runs.comparison import quartiles_of

    results, failed = [], []
    for number, recipe in enumerate(recipes, start=1):
        progress.print(f"\nRun {number} of {len(recipes)}: {recipe.output}", style="bold", highlight=False)
        try:
            results.append(_result_of(recipe, progress))
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


def _result_of(recipe: Recipe, progress: Console) -> dict[str, Any]:
    """The figures of a run of a series, trained now, to its end now, or before."""
    from ia3.training.train import begun, finished_result

    done = finished_result(recipe)
    if done is not None:
        progress.print("Done before.", highlight=False)
        return done
    folder = recipe.output
    if folder is not None and begun(recipe):
        return run_visibly(lambda: _resume(folder, progress), progress).summary()
    return run_visibly(lambda: _train(recipe, progress), progress).summary()


def run_visibly(train: Callable[[], Run], progress: Console) -> Run:
    """Train with progress on a console; Ctrl-C ends the command and says how to go on."""
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
    import json

    from rich.console import Console

    from ia3.runs.report import result_table
    from ia3.runs.run import PICTURE_NAME

    picture = run.output_dir / PICTURE_NAME
    if as_json:
        paths = {"adapter": str(run.adapter_dir), "picture": str(picture)}
        typer.echo(json.dumps({**run.summary(), **paths, **more}, ensure_ascii=False))
    else:
        Console().print(result_table(run, picture))
