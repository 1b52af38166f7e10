"""A whole training from a recipe: data, model and settings in, a run folder with an adapter out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from ia3.files import remove_temporaries, write_atomically
from ia3.inference.loading import Base
from ia3.inference.processes import ALONE, Processes, join
from ia3.runs.lock import locked
from ia3.runs.look import Looked, look_before
from ia3.runs.recipe import IN_MEMORY, Recipe, make_recipe, naming_its_recipe, read_recipe, resolve
from ia3.runs.report import complete_cards, draw_report, write_report
from ia3.runs.run import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    BEST_FOLDER,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    PICTURE_NAME,
    RECIPE_NAME,
    RESULT_NAME,
    RUN_FILES,
    STATE_NAME,
    SUMS_NAME,
    SWEEP_FILES,
    SWEEP_NAME,
    SWEEP_RECIPES_NAME,
    Run,
    check_output,
    new_folder,
    write_json,
)
from ia3.runs.schemas import Environment, FinishedResult, read_written
from ia3.runs.screen import Screen
from ia3.runs.sums import changed_files, expect_unchanged, write_sums
from ia3.tasks.examples import Examples
from ia3.tasks.task import TASK_NAME
from ia3.training.generator import generator_alone
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
        LostProcessError: of several processes another one ended; `resume` goes on from what was last saved.

    Of several processes, started by `torchrun` or `accelerate launch` or in a process group, each calls it with the
    same arguments and takes its part of every batch; the first one writes and prints.

    Example:
        >>> run = ia3.train("google/flan-t5-small", "reviews.csv", epochs=3)
        >>> run.final.accuracy
    """
    made = make_recipe({**recipe, "model": model, "data": data})
    with naming_its_recipe(recipe):
        return run_recipe(made, console or Screen(stderr=True), trust_remote_code=trust_remote_code)


def resume_run(
    folder: str | Path,
    *,
    data: Examples | None = None,
    test_data: Examples | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Go on with an interrupted run, to the numbers that it would have had; see `ia3.resume`."""
    processes = join()
    folder, console = Path(folder), processes.console(console)
    expect_begun(folder, RECIPE_NAME, "run")
    check_output(folder)
    with working_in(folder, processes):
        if not (folder / STATE_NAME).is_file():
            _expect_not_begun(folder)
            console.print("It ended before its first save, so it begins anew.", highlight=False)
        content = read_recipe(folder / RECIPE_NAME)
        recipe = replace(make_recipe(with_data(content, folder, data, test_data), folder / RECIPE_NAME), output=folder)
        expect_unchanged(folder, ENVIRONMENT_NAME)
        changed = [name for name in changed_files(folder) if name != RECIPE_NAME]  # which is compared with that
        if changed:
            console.print(
                f"{', '.join(changed)} in {folder}: damaged or missing, and written anew from {STATE_NAME}.",
                style="yellow",
                highlight=False,
            )
        base = Base(recipe.model, trust_remote_code=trust_remote_code)
        return _run(base, recipe, console, look_before(recipe), processes, is_locked=True, resuming=True)


def _expect_not_begun(folder: Path) -> None:
    """Refuse a run without a state whose training had begun, or that lacks what it needs to begin."""
    why = None
    if (folder / RESULT_NAME).is_file():
        why = "its training is complete"
    elif (folder.parent / SWEEP_RECIPES_NAME).is_file():
        why = f"it is one run of a sweep. Go on with all of them by `ia3 sweep --resume {folder.parent}`"
    elif (folder / METRICS_NAME).is_file():
        why = (
            f"{STATE_NAME} is missing. Put it back, or, as after a loss that was not finite, begin anew by `ia3 train`"
        )
    elif not (folder / ENVIRONMENT_NAME).is_file():
        why = (
            f"it has no {ENVIRONMENT_NAME}, which a run writes before {RECIPE_NAME}. Put it back, or begin by "
            f"`ia3 train --recipe {folder / RECIPE_NAME}`"
        )
    if why is not None:
        raise ValueError(f"There is nothing in {folder} to go on from: {why}.")


def run_recipe(
    recipe: Recipe, console: Console, *, looked: Looked | None = None, trust_remote_code: bool = False
) -> Run:
    """Read the data, load the model, attach an adapter, train, and leave a whole run folder; errors are `train`'s.

    Args:
        recipe: a checked recipe.
        console: where the progress goes, and what is odd about the data.
        looked: what `look_before` has read of this recipe.
        trust_remote_code: run code that comes with the model.
    """
    processes = join()
    console = processes.console(console)
    looked = look_before(recipe) if looked is None else looked
    folder = recipe.output
    base = Base(recipe.model, trust_remote_code=trust_remote_code)
    is_there = processes.of_first(lambda: folder is not None and folder.is_dir())
    if folder is None or not is_there:  # nothing is made before all that can be checked is right
        return _run(base, recipe, console, looked, processes, is_locked=False)
    with working_in(folder, processes):
        expect_ended(folder)
        return _run(base, recipe, console, looked, processes, is_locked=True)


def _run(
    base: Base,
    recipe: Recipe,
    console: Console,
    looked: Looked,
    processes: Processes,
    *,
    is_locked: bool,
    resuming: bool = False,
) -> Run:
    """Train in the recipe's folder, or go on there; one that is not locked is made once all is checked, and then is."""
    with ExitStack() as held, ExitStack() as drawing:
        drawing.enter_context(generator_alone(console))
        [(recipe, plan)] = prepare(base, recipe.task or base.kind, [recipe], console, looked)
        environment = describe_environment(recipe, plan, processes)
        processes.expect_alike(
            {"data": environment["data"], "base model": environment["base_model"], "recipe": plan.settings}
        )
        if resuming and recipe.output is not None:
            folder, state = recipe.output, recipe.output / STATE_NAME
            check_environment(folder, environment, console)
            training = Training(plan, resume=state if state.is_file() else None)
            if processes.is_first:
                (folder / SUMS_NAME).unlink(missing_ok=True)
        else:
            training = Training(plan)
            folder = processes.of_first(lambda: claim(recipe.output, recipe.source))
            if not is_locked and processes.is_first:
                held.enter_context(working_in(folder))
                expect_still_new(folder)
            if processes.is_first:
                begin_folder(folder, recipe, environment)
        if not training.draws:
            drawing.close()
        again = how_to_resume(folder, recipe)
        with saying_how(folder, again):
            return _train(training, folder, recipe, console, again)


def _train(training: Training, folder: Path, recipe: Recipe, console: Console, again: str) -> Run:
    """From where the training stands to a whole folder."""
    console.print(training.describe_path(), highlight=False)
    run = training.run(folder, console, resumed_by=again)
    if training.processes.is_first:
        _finish_folder(run, training.learner.model, recipe)
    training.processes.wait()
    return run


def _finish_folder(run: Run, model: Any, recipe: Recipe) -> None:
    """Draw and write what is told of a finished run, after which there is nothing to go on with."""
    folder = run.output_dir
    title = f"{Path(recipe.model).name} on {Path(recipe.source).name}"
    draw_report(run, model, folder / PICTURE_NAME, title=title)
    write_report(run, title)
    complete_cards(run, recipe.source, named=isinstance(recipe.data, str))
    write_sums(folder)
    (folder / STATE_NAME).unlink(missing_ok=True)


@contextmanager
def working_in(folder: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Work in a run's folder alone, without what killed processes left half written; see `locked`.

    Of several processes that train together the first one holds the lock for all.
    """
    if not processes.is_first:
        yield
        return
    with locked(folder):
        for each in (folder, folder / ADAPTER_FOLDER, folder / BEST_FOLDER):
            if each.is_dir():
                remove_temporaries(each, own={*RUN_FILES, *SWEEP_FILES, *ADAPTER_FILES})
        yield


def expect_begun(folder: Path, name: str, what: str) -> None:
    """Refuse to go on where nothing has begun, or another thing has."""
    if (folder / name).is_file():
        return
    for command, file in (("train", RECIPE_NAME), ("sweep", SWEEP_RECIPES_NAME)):
        if (folder / file).is_file():
            raise ValueError(f"{folder} holds no {what}: go on by `ia3 {command} --resume {folder}`.")
    raise FileNotFoundError(f"{folder} holds no {what}, since it has no {name}: name a {what}'s folder.")


def expect_ended(folder: Path) -> None:
    """Refuse to begin where something can be gone on with."""
    is_sweep = (folder / SWEEP_RECIPES_NAME).is_file()
    if (folder / STATE_NAME).is_file() and not (folder / (SWEEP_NAME if is_sweep else RESULT_NAME)).is_file():
        command = "sweep" if is_sweep else "train"
        raise ValueError(
            f"{folder} holds an unfinished run: go on with it by `ia3 {command} --resume {folder}`, or name another "
            "output."
        )


def expect_still_new(folder: Path) -> None:
    """Refuse a folder that was not there when all began, where another process has put something into it since."""
    if (folder / RECIPE_NAME).is_file() or (folder / SWEEP_RECIPES_NAME).is_file():
        raise ValueError(f"{folder} holds what another process has begun there meanwhile: name another output.")


def with_data(
    content: dict[str, Any], folder: Path, data: Examples | None, test_data: Examples | None
) -> dict[str, Any]:
    """A saved recipe's content with the data that it had in memory."""
    given: dict[str, Any] = {"data": data, "test_data": test_data}
    for name, examples in given.items():
        if examples is None and str(content.get(name, "")).startswith(IN_MEMORY):
            raise ValueError(f"The run in {folder} had its {name} in memory: give them again, ia3.resume(…, {name}=…).")
    return content | {name: examples for name, examples in given.items() if examples is not None}


def how_to_resume(folder: Path, recipe: Recipe, command: str = "train") -> str:
    """What goes on with a run or a sweep, as one would type it."""
    in_memory = [f"{name}=…" for name in ("data", "test_data") if isinstance(getattr(recipe, name), Examples)]
    return f"ia3.resume({str(folder)!r}, {', '.join(in_memory)})" if in_memory else f"ia3 {command} --resume {folder}"


@contextmanager
def saying_how(folder: Path, again: str) -> Iterator[None]:
    """Where a file can't be written, say what goes on from the last state.

    Raises:
        OSError: instead of one that doesn't say it.
    """
    try:
        yield
    except OSError as error:
        if not (folder / STATE_NAME).is_file():
            raise
        said = type(error)(f"{error}\nNothing is lost. Then go on: {again}")
        said.errno = error.errno
        raise said from error


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
    expect_unchanged(folder, RESULT_NAME)
    read, result = read_written(folder / RESULT_NAME, FinishedResult)
    kind = read.task
    recipe = resolve(settings_of(recipe, kind), kind, read.train_examples, len(read.labels))
    if replace(former, task=None).content() != replace(recipe, task=None).content():
        raise ValueError(f"{folder} holds the run of another recipe: name another output, or remove it.")
    del result["predictions"]
    return result


def begin_folder(output: Path, recipe: Recipe, environment: Mapping[str, Any]) -> None:
    """The folder with environment and recipe, and nothing of an earlier, finished run.

    The recipe, by which a folder is a run's, goes first and comes last: at no time is it beside what is another's.
    """
    for name in RUN_FILES:
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER_FOLDER, BEST_FOLDER):
        if (output / name / TASK_NAME).is_file():  # an adapter that a run left
            shutil.rmtree(output / name)
    write_json(output / ENVIRONMENT_NAME, environment)
    text = yaml.safe_dump(recipe.content(), allow_unicode=True, sort_keys=True)
    write_atomically(output / RECIPE_NAME, text.encode())


def check_environment(output: Path, environment: Mapping[str, Any], console: Console) -> None:
    """Refuse other data; say what else differs from when the run began."""
    _, began = read_written(output / ENVIRONMENT_NAME, Environment)
    keys = {*environment["recipe"], *began["recipe"]} - {"data", "test_data"}  # they have digests
    changed = sorted(key for key in keys if environment["recipe"].get(key) != began["recipe"].get(key))
    if changed:
        raise ValueError(
            f"{output / RECIPE_NAME} says other {', '.join(changed)} than when the run began, by {ENVIRONMENT_NAME}: "
            "put them back, or begin another run."
        )
    if environment["base_model"] != began["base_model"]:
        raise ValueError(
            f"The weights of {environment['recipe']['model']} are not those that the run in {output} began with: put "
            "them back, or begin another run."
        )
    for name, data in environment["data"].items():
        then = began["data"][name]
        if data["sha256"] != then["sha256"]:
            raise ValueError(
                f"The {name} data are not those that the run in {output} began with ({data['rows']:,} rows now, "
                f"{then['rows']:,} then): put {then['source']} back as it was, or begin "
                "anew a run of an ia3 that held out other rows of the same data."
            )
    facts = ("device", "processes", "threads", "versions")
    others = [name for name in facts if environment[name] != began.get(name, 1)]
    if others:
        console.print(f"Other {', '.join(others)} than when the run began: its numbers may differ.", style="yellow")
