"""Many trainings in one batch: a grid of settings over one frozen base, ranked by what they reach."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from ia3.files import write_atomically
from ia3.inference.loading import Base
from ia3.inference.processes import Processes, join
from ia3.runs.grid import Over, make_recipes
from ia3.runs.look import Looked, look_before
from ia3.runs.picture import draw_curves
from ia3.runs.recipe import IN_MEMORY, Recipe, make_recipe, naming_its_recipe, read_recipe
from ia3.runs.report import complete_cards
from ia3.runs.run import (
    BEST_FOLDER,
    RECIPE_NAME,
    STATE_NAME,
    SUMS_NAME,
    SWEEP_NAME,
    SWEEP_PICTURE_NAME,
    SWEEP_RECIPES_NAME,
    Run,
    advise,
    check_output,
    write_json,
)
from ia3.runs.schemas import SweepRecipes, checked
from ia3.runs.screen import Screen
from ia3.runs.sums import write_sums
from ia3.tasks.examples import Examples
from ia3.training import sharding
from ia3.training.generator import generator_alone
from ia3.training.plan import RunPlan, prepare
from ia3.training.state import describe_environment
from ia3.training.together import Together
from ia3.training.train import (
    begin_folder,
    check_environment,
    claim,
    expect_begun,
    expect_still_new,
    how_to_resume,
    saying_how,
    with_data,
    working_in,
)

_LONGEST_NAME = 100
_IN_A_NAME = re.compile(r"[\w.+-]{1,24}")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Args:
        output_dir: its folder; each run's is in it.
        runs: the finished runs, the best first.
        settings: what each of them was given, in the same order.
        failed: what the runs were given whose losses became infinite, each with the reason.
        seconds: how long all steps took together.
    """

    output_dir: Path
    runs: list[Run]
    settings: list[dict[str, Any]]
    failed: list[tuple[dict[str, Any], str]]
    seconds: float = field(compare=False)

    @property
    def best(self) -> Run:
        """The run with the best evaluation."""
        return self.runs[0]

    @property
    def best_dir(self) -> Path:
        """Where the adapter of that evaluation is, with its task."""
        return self.output_dir / BEST_FOLDER

    @property
    def all_settings(self) -> list[dict[str, Any]]:
        """What the finished runs and then the failed ones were given."""
        return [*self.settings, *(given for given, _ in self.failed)]

    @property
    def advice(self) -> str | None:
        """What to do about the result, in a line; None where nothing stands out."""
        rates = sorted({given["learning_rate"] for given in self.all_settings if "learning_rate" in given})
        best = self.settings[0].get("learning_rate")
        edge = None
        if len(rates) > 1 and best in (rates[0], rates[-1]):
            name, factor = ("lowest", 0.5) if best == rates[0] else ("highest", 2)
            further = f"{best * factor:.3g} and {best * factor**2:.3g}"
            edge = f"The best learning rate, {best:g}, is the {name} that was tried: try {further}, too."
        return advise(self.best, edge)

    def summary(self) -> dict[str, Any]:
        """The sweep as JSON writes it."""
        return {
            "advice": self.advice,
            "best": {"adapter": str(self.best_dir), "settings": self.settings[0]},
            "failed": [{"reason": reason, "settings": given} for given, reason in self.failed],
            "method": self.best.task.method,
            "runs": [
                {
                    "accuracy": run.final.accuracy if run.final.total else None,
                    "best": run.best.summary(),
                    "folder": str(run.output_dir),
                    "loss": run.final.loss,
                    "settings": given,
                    "steps": len(run.losses),
                    "stopped_early": run.progress.stopped_early,
                }
                for run, given in zip(self.runs, self.settings, strict=True)
            ],
            "train_seconds": self.seconds,
        }


def sweep(
    model: str | Path,
    data: str | Path | Examples | None = None,
    *,
    over: Over | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
    **recipe: Any,
) -> Sweep:
    """Train many adapters at once, each with settings of its own, and rank them.

    Every step is one batch: run r's examples are its rows' group r, and its vectors row r of one table. Each run has
    its own order, schedule, clipping, decay, AdamW and end, and without dropout the numbers that `ia3.train` gives it
    alone, up to rounding. What is not in `over` is common to all.

    Args:
        model: the base model, as `ia3.train` takes it.
        data: the examples, likewise; left out where they differ.
        over: a grid, as in `{"learning_rate": [3e-3, 8e-3], "seed": [0, 1]}`, or a list of settings, one a run. By
            default a few learning rates.
        console: where the progress goes; standard error by default.
        trust_remote_code: run code that comes with the model.
        recipe: the fields of `Recipe`, as for `ia3.train`; `output` is the sweep's folder.

    Returns:
        The runs, the best first. The best adapter is in `best_dir`, each run in a folder of its own.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: what the runs can't differ in, a setting or a kind of task that can't be swept, and what
            `ia3.train` raises.
        FloatingPointError: every run's losses became infinite.

    Example:
        >>> found = ia3.sweep("google/flan-t5-small", "reviews.csv", over={"learning_rate": [3e-3, 8e-3, 2e-2]})
        >>> found.settings[0], found.best.best.accuracy
    """
    given = {**recipe, "model": model, **({} if data is None else {"data": data})}
    with naming_its_recipe(given):
        recipes, keys = make_recipes(given, over)
        console, looked = console or Screen(stderr=True), look_before(*recipes)
        return run_sweep(recipes, keys, console, looked, trust_remote_code=trust_remote_code)


def resume_sweep(
    folder: str | Path,
    *,
    data: Examples | None = None,
    test_data: Examples | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> Sweep:
    """Go on with an interrupted sweep, to the numbers that it would have had; see `ia3.resume`."""
    processes = join()
    folder, console = Path(folder), processes.console(console)
    expect_begun(folder, SWEEP_RECIPES_NAME, "sweep")
    check_output(folder)
    with working_in(folder, processes):
        if not (folder / STATE_NAME).is_file() and (folder / SWEEP_NAME).is_file():
            raise ValueError(f"There is nothing in {folder} to go on from: the sweep is complete.")
        if not (folder / STATE_NAME).is_file():
            console.print("It ended before its first save, so it begins anew.", highlight=False)
        recipes, keys = _read_recipes(folder, data, test_data)
        base = Base(recipes[0].model, trust_remote_code=trust_remote_code)
        return _sweep(base, recipes, keys, console, look_before(*recipes), processes, is_locked=True, resuming=True)


def run_sweep(
    recipes: Sequence[Recipe],
    keys: Sequence[str],
    console: Console,
    looked: Looked,
    *,
    trust_remote_code: bool = False,
) -> Sweep:
    """Train in one batch what `make_recipes` made, which differ in `keys`; errors are those of `sweep`."""
    processes = join()
    output, console = recipes[0].output, processes.console(console)
    base = Base(recipes[0].model, trust_remote_code=trust_remote_code)
    is_there = processes.of_first(lambda: output is not None and output.is_dir())
    if output is None or not is_there:  # nothing is made before all that can be checked is right
        return _sweep(base, recipes, keys, console, looked, processes, is_locked=False)
    with working_in(output, processes):
        for name, what in ((SWEEP_NAME, "sweep"), (RECIPE_NAME, "run")):
            if (output / name).is_file():
                raise ValueError(f"{output} holds a {what} already: name another output, or remove it.")
        if (output / SWEEP_RECIPES_NAME).is_file():
            raise ValueError(
                f"{output} holds an unfinished sweep: go on with it by `ia3 sweep --resume {output}`, or name another "
                "output."
            )
        return _sweep(base, recipes, keys, console, looked, processes, is_locked=True)


def _sweep(
    base: Base,
    recipes: Sequence[Recipe],
    keys: Sequence[str],
    console: Console,
    looked: Looked,
    processes: Processes,
    *,
    is_locked: bool,
    resuming: bool = False,
) -> Sweep:
    """Sweep in the recipes' folder, or go on there; one that is not locked is made once all is checked, and then is.

    Of several processes each trains runs of its own and writes their folders; the first one writes the sweep's.
    """
    rows, too_many = processes.share(range(len(recipes))), processes.count > len(recipes)
    if too_many or (sharding.is_asked_for() and not processes.alone):
        what = f"there are {processes.count} processes for {len(recipes)} runs" if too_many else "FSDP is asked for"
        raise ValueError(
            f"Each process of a sweep trains runs of its own over the whole base, and {what}: start it otherwise."
        )
    common = recipes[0]
    with ExitStack() as held, ExitStack() as drawing:
        drawing.enter_context(generator_alone(console))
        prepared = _prepare(base, recipes, console, looked)
        state = common.output / _state_name(processes.rank) if resuming and common.output is not None else None
        resume = state if state is not None and state.is_file() else None
        together = Together([plan for _, plan in prepared], rows=rows, resume=resume)
        given = [{key: getattr(each, key) for key in keys} for each, _ in prepared]
        settings = [
            {key: value.source if isinstance(value, Examples) else value for key, value in each.items()}
            for each in given
        ]
        output = processes.of_first(lambda: claim(common.output, common.source))
        if not is_locked and processes.is_first:
            held.enter_context(working_in(output))
            expect_still_new(output)
        processes.wait()
        if not resuming and processes.is_first:
            _write_recipes(output, recipes, keys)
        folders = [output / name for name in names_of(settings)]
        for (each, plan), folder in [(prepared[row], folders[row]) for row in rows]:
            folder.mkdir(exist_ok=True)
            held.enter_context(working_in(folder))
            environment = describe_environment(each, plan)
            if resume is None:
                begin_folder(folder, each, environment)
            else:
                check_environment(folder, environment, console)
        if processes.is_first:
            (output / SUMS_NAME).unlink(missing_ok=True)
        if not together.draws:
            drawing.close()
        console.print(together.describe_path(), highlight=False)
        again = how_to_resume(output, common, "sweep")
        with saying_how(output, again):
            together.run(folders, console, state=output / _state_name(processes.rank), resumed_by=again)
            together.gather()
            if not together.runs and not processes.is_first:
                raise FloatingPointError("None of the runs came to an end.")
            return processes.of_first(lambda: _finish(together, recipes, settings, output))


def _state_name(rank: int) -> str:
    """The file of a process's runs."""
    return f"{Path(STATE_NAME).stem}-{rank}{Path(STATE_NAME).suffix}" if rank else STATE_NAME


def _prepare(base: Base, recipes: Sequence[Recipe], console: Console, looked: Looked) -> list[tuple[Recipe, RunPlan]]:
    kind = recipes[0].task or base.kind
    if not kind.writes:
        raise ValueError(
            f"A sweep trains a row of vectors a run, and a task of {kind} trains a head in full, too: train these runs "
            "one after the other, each without a sweep."
        )
    return prepare(base, kind, recipes, console, looked)


def _write_recipes(output: Path, recipes: Sequence[Recipe], keys: Sequence[str]) -> None:
    content = {"differ_in": list(keys), "runs": [each.content() for each in recipes]}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=True)
    write_atomically(output / SWEEP_RECIPES_NAME, text.encode())


def _read_recipes(folder: Path, data: Examples | None, test_data: Examples | None) -> tuple[list[Recipe], list[str]]:
    """A recipe a run, and what they differ in, as `make_recipes` made them."""
    path = folder / SWEEP_RECIPES_NAME
    content = read_recipe(path)
    checked(content, SweepRecipes, str(path))
    if "data" in content["differ_in"] and any(str(each["data"]).startswith(IN_MEMORY) for each in content["runs"]):
        raise ValueError(f"The runs of {folder} had data of their own in memory, so it can't go on: begin it anew.")
    runs = [make_recipe(with_data(each, folder, data, test_data), path) for each in content["runs"]]
    return [replace(each, output=folder) for each in runs], content["differ_in"]


def names_of(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder's name a run: what it differs in from the others, such as `learning_rate-0.008-seed-1`."""
    parts: list[list[str]] = [[] for _ in settings]
    for key in settings[0]:
        values = [each[key] for each in settings]
        distinct = [value for place, value in enumerate(values) if value not in values[:place]]
        if len(distinct) == 1 and len(settings) > 1:
            continue
        short = all(_IN_A_NAME.fullmatch(str(value)) for value in distinct)
        for part, value in zip(parts, values, strict=True):
            part.append(f"{key}-{value if short else distinct.index(value) + 1}")
    names = ["-".join(part) for part in parts]
    # Data in memory may have one name for different examples.
    if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_NAME:
        return names
    return [f"run-{number}" for number in range(1, len(names) + 1)]


def _finish(together: Together, recipes: Sequence[Recipe], settings: Sequence[dict[str, Any]], output: Path) -> Sweep:
    """The runs in the order of their best evaluations; writes cards, the best adapter, the picture, `sweep.json`."""
    runs, plans = together.runs, together.plans
    failed = [(settings[number], reason) for number, reason in sorted(together.failures.items())]
    if not runs:
        # Going on from here would diverge again, so the folder is free for another try.
        states = [_state_name(rank) for rank in range(together.processes.count)]
        for name in (SWEEP_RECIPES_NAME, *states):
            (output / name).unlink(missing_ok=True)
        raise FloatingPointError(f"None of the {len(recipes)} runs came to an end. The first: {failed[0][1]}")
    order = sorted(runs, key=lambda number: plans[number].rank(runs[number].best), reverse=True)
    for number in order:
        complete_cards(runs[number], recipes[number].source, named=isinstance(recipes[number].data, str))
    found = Sweep(
        output, [runs[number] for number in order], [settings[number] for number in order], failed, together.seconds
    )
    shutil.rmtree(found.best_dir, ignore_errors=True)  # of a sweep that came to no end
    shutil.copytree(found.best.best_dir, found.best_dir)
    title = f"{len(found.runs)} runs of {Path(recipes[0].model).name} on {Path(recipes[0].source).name}"
    draw_curves(found.runs, found.settings, output / SWEEP_PICTURE_NAME, title=title)
    write_json(output / SWEEP_NAME, found.summary())
    for folder in (*together.folders, output):
        write_sums(folder)
    for rank in range(together.processes.count):
        (output / _state_name(rank)).unlink(missing_ok=True)
    return found


def ranking_table(sweep: Sweep) -> Table:
    """The runs for the terminal, the best first: what each was given, and its best evaluation."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    keys = [key for key in sweep.settings[0] if len({str(each[key]) for each in sweep.all_settings}) > 1]
    for key in keys:
        table.add_column(key, overflow="fold")
    figures: dict[str, Callable[[Run], str]] = {
        "accuracy": lambda run: f"{run.best.accuracy:.1%}",
        "95 % interval": lambda run: " to ".join(f"{100 * end:.1f}" for end in run.best.interval),
        "by rank": lambda run: f"{run.best.scores['accuracy_by_rank']:.1%}",
        "loss": lambda run: f"{run.best.loss:.3f}",
        "at step": lambda run: f"{run.best.step:,}{' (stopped)' if run.progress.stopped_early else ''}",
        "last accuracy": lambda run: f"{run.final.accuracy:.1%}",
    }
    if not any("accuracy_by_rank" in run.best.scores for run in sweep.runs):
        del figures["by rank"]
    shown = [title for title in figures if sweep.best.best.total or title in ("loss", "at step")]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for run, given in zip(sweep.runs, sweep.settings, strict=True):
        table.add_row(*(_write(given[key]) for key in keys), *(figures[title](run) for title in shown))
    for given, _ in sweep.failed:
        table.add_row(*(_write(given[key]) for key in keys), "diverged", style="red")
    return table


def _write(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)
