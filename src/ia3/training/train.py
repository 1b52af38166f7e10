"""A whole training from a recipe: data, model and settings in, a run folder with an adapter out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from ia3.files import write_atomically
from ia3.inference.loading import Base
from ia3.runs.look import Looked, look_before
from ia3.runs.recipe import IN_MEMORY, Recipe, make_recipe, read_recipe, resolve
from ia3.runs.report import complete_cards, draw_report, write_report
from ia3.runs.run import (
    ADAPTER_FOLDER,
    BEST_FOLDER,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    PICTURE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    RESULT_NAME,
    STATE_NAME,
    Run,
    new_folder,
    write_json,
)
from ia3.runs.schemas import Environment, FinishedResult, read_written
from ia3.tasks.examples import Examples
from ia3.tasks.task import TASK_NAME
from ia3.training.learners.making import settings_of
from ia3.training.loop import Training
from ia3.training.plan import prepare
from ia3.training.state import describe_environment


def train(
    model: str | Path,
    data: str | Path | Examples,
    *,
    console: Console | None = None,
    trust_remote_code: bool = False,
    **recipe: Any,
) -> Run:
    """Fine-tune a model on examples: what `ia3 train` does, with the same defaults.

    Args:
        model: the base model: a hub name, a folder or a bundled model.
        data: a file, a data set on the hub, or examples.
        console: where the progress goes; standard error by default.
        trust_remote_code: run code that comes with the model; no recipe and no run says so for you.
        recipe: the fields of `Recipe`, such as `epochs=3`; or `recipe="t-few"`, or a YAML file, which the other
            fields override.

    Returns:
        The run; its adapter is in `run.adapter_dir`.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: an unknown or wrong field of the recipe, data that can't be trained on.
        Interrupted: Ctrl-C or SIGTERM; `resume` goes on.

    Example:
        >>> run = ia3.train("google/flan-t5-small", "reviews.csv", epochs=3)
        >>> run.final.accuracy
    """
    made = make_recipe({**recipe, "model": model, "data": data})
    return run_recipe(made, console or Console(stderr=True), trust_remote_code=trust_remote_code)


def resume(
    folder: str | Path,
    *,
    data: Examples | None = None,
    test_data: Examples | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Go on with an interrupted run, to the numbers that it would have had.

    Args:
        folder: the run's folder.
        data: the training data, where the run was given them in memory.
        test_data: the held-out data, likewise.
        console: where the progress goes; standard error by default.
        trust_remote_code: run code that comes with the model, whatever the run began with.

    Raises:
        FileNotFoundError: no run in the folder.
        ValueError: nothing to go on with, or data that are not those of the run.
    """
    folder = Path(folder)
    if not (folder / RECIPE_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no run, since it has no {RECIPE_NAME}: name a run's folder.")
    if not (folder / STATE_NAME).is_file():
        begun = "its training is complete" if (folder / RESULT_NAME).is_file() else "it ended before its first save"
        raise ValueError(f"There is nothing in {folder} to go on from: {begun}. Begin anew by `ia3 train`.")
    content = read_recipe(folder / RECIPE_NAME)
    for name, given in (("data", data), ("test_data", test_data)):
        if given is not None:
            content[name] = given
        elif str(content.get(name, "")).startswith(IN_MEMORY):
            raise ValueError(f"The run in {folder} had its {name} in memory: give them again, ia3.resume(…, {name}=…).")
    recipe = replace(make_recipe(content, folder / RECIPE_NAME), output=folder)
    console = console or Console(stderr=True)
    return run_recipe(recipe, console, resuming=True, trust_remote_code=trust_remote_code)


def run_recipe(
    recipe: Recipe,
    console: Console,
    *,
    resuming: bool = False,
    looked: Looked | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Read the data, load the model, attach an adapter, train, and leave a whole run folder; errors are `train`'s.

    Args:
        recipe: a checked recipe.
        console: where the progress goes, and what is odd about the data.
        resuming: go on with the run in the recipe's folder.
        looked: what `look_before` has read of this recipe.
        trust_remote_code: run code that comes with the model.
    """
    looked = look_before(recipe) if looked is None else looked
    folder = recipe.output
    if folder is not None and not resuming and begun(recipe) and not (folder / RESULT_NAME).is_file():
        raise ValueError(
            f"{folder} holds an unfinished run: go on with it by `ia3 train --resume {folder}`, or name another output."
        )
    base = Base(recipe.model, trust_remote_code=trust_remote_code)
    [(recipe, plan)] = prepare(base, recipe.task or base.kind, [recipe], console, looked)
    environment = describe_environment(recipe, plan)
    if resuming and folder is not None:
        _check_environment(folder, environment, console)
        training = Training(plan, resume=folder / STATE_NAME)
    else:
        training = Training(plan)
        folder = claim(folder, recipe.source)
        begin_folder(folder, recipe, environment)
    console.print(training.describe_path(), highlight=False)
    in_memory = [f"{name}=…" for name in ("data", "test_data") if isinstance(getattr(recipe, name), Examples)]
    again = f"ia3.resume({str(folder)!r}, {', '.join(in_memory)})" if in_memory else f"ia3 train --resume {folder}"
    run = training.run(folder, console, resumed_by=again)
    title = f"{Path(recipe.model).name} on {Path(recipe.source).name}"
    draw_report(run, plan.learner.model, folder / PICTURE_NAME, title=title)
    write_report(run, title)
    complete_cards(run, recipe.source, named=isinstance(recipe.data, str))
    (folder / STATE_NAME).unlink(missing_ok=True)
    return run


def claim(output: Path | None, source: str) -> Path:
    """The folder that a run or a sweep begins in, all else being right: made now, a new one unless one was named."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        return output
    wanted = new_folder(source)
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with suppress(FileExistsError):  # another run that began in the same second
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("there is always a next number")


def begun(recipe: Recipe) -> bool:
    """Whether the recipe's folder holds an unfinished run, which is then this recipe's, or `resume` refuses it."""
    return recipe.output is not None and (recipe.output / STATE_NAME).is_file()


def finished_result(recipe: Recipe) -> dict[str, Any] | None:
    """The figures of the finished run in the recipe's folder; None where there is none.

    Raises:
        ValueError: it is another recipe's.
    """
    folder = recipe.output
    if folder is None or begun(recipe) or not (folder / RESULT_NAME).is_file():
        return None
    former = make_recipe(read_recipe(folder / RECIPE_NAME), folder / RECIPE_NAME)
    read, result = read_written(folder / RESULT_NAME, FinishedResult)
    kind = read.task
    recipe = resolve(settings_of(recipe, kind), kind, read.train_examples, len(read.labels))
    if replace(former, task=None).content() != replace(recipe, task=None).content():
        raise ValueError(f"{folder} holds the run of another recipe: name another output, or remove it.")
    del result["predictions"]
    return result


def begin_folder(output: Path, recipe: Recipe, environment: Mapping[str, Any]) -> None:
    """The folder with recipe and environment, and nothing of an earlier, finished run."""
    for name in (STATE_NAME, RESULT_NAME, METRICS_NAME, REPORT_NAME, PICTURE_NAME):
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER_FOLDER, BEST_FOLDER):
        if (output / name / TASK_NAME).is_file():  # an adapter that a run left
            shutil.rmtree(output / name)
    text = yaml.safe_dump(recipe.content(), allow_unicode=True, sort_keys=True)
    write_atomically(output / RECIPE_NAME, text.encode())
    write_json(output / ENVIRONMENT_NAME, environment)


def _check_environment(output: Path, environment: Mapping[str, Any], console: Console) -> None:
    """Refuse other data; say what else differs from when the run began."""
    _, began = read_written(output / ENVIRONMENT_NAME, Environment)
    keys = {*environment["recipe"], *began["recipe"]} - {"data", "test_data"}  # they have digests
    changed = sorted(key for key in keys if environment["recipe"].get(key) != began["recipe"].get(key))
    if changed:
        raise ValueError(
            f"{output / RECIPE_NAME} says other {', '.join(changed)} than when the run began: put them back, or begin "
            "another run."
        )
    if environment["base_model"] != began["base_model"]:
        raise ValueError(
            f"The weights of {environment['recipe']['model']} are not those that the run in {output} began with: put "
            "them back, or begin another run."
        )
    for name, data in environment["data"].items():
        if data["sha256"] != began["data"][name]["sha256"]:
            raise ValueError(
                f"The {name} data are not those that the run in {output} began with ({data['rows']:,} rows now, "
                f"{began['data'][name]['rows']:,} then): put {began['data'][name]['source']} back as it was, or begin "
                "anew a run of an ia3 that held out other rows of the same data."
            )
    others = [name for name in ("device", "threads", "versions") if environment[name] != began[name]]
    if others:
        console.print(f"Other {', '.join(others)} than when the run began: its numbers may differ.", style="yellow")
