"""`ia3 sweep`: many trainings in one batch, ranked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ia3.cli.flags import AsJson, TrustRemoteCode, print_json
from ia3.cli.names import FlagConsole, with_settings
from ia3.cli.train import run_visibly
from ia3.errors import shorten
from ia3.launched import first_prints
from ia3.runs.screen import Screen

if TYPE_CHECKING:
    from ia3.training.sweep import Sweep

# A value of these may hold a comma.
_WHOLE = ("template", "data")


def sweep() -> TyperCommand:
    """Train many adapters in one batch, one for each choice of settings; rank them and keep the best."""
    from ia3.runs.grid import NOT_SWEPT

    return with_settings(_command, sweep, without=NOT_SWEPT)


def _command(
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="What to try, as in learning_rate=3e-3,8e-3; of several every combination.",
            show_default="five learning rates",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted sweep in this folder.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    given: Any = None,
) -> None:
    with first_prints():
        _sweep(over, resume, given, as_json=as_json, trusted=trust_remote_code)


def _sweep(over: list[str] | None, resume: Path | None, given: dict[str, Any], *, as_json: bool, trusted: bool) -> None:
    if resume is None:
        found = _begin(over, given, trusted=trusted)
    else:
        found = _go_on(resume, [*given, *(["over"] if over else [])], trusted=trusted)
    from ia3.runs.run import SWEEP_PICTURE_NAME
    from ia3.training.sweep import ranking_table

    picture = found.output_dir / SWEEP_PICTURE_NAME
    if as_json:
        print_json({**found.summary(), "folder": found.output_dir, "picture": picture})
        return
    Screen().print("", ranking_table(found), "", highlight=False)
    typer.echo(f"asked for: {found.best.task.method}")
    typer.echo(f"training: {found.seconds:.0f} s for {len(found.runs) + len(found.failed)} runs together")
    if found.advice is not None:
        typer.echo(f"advice: {found.advice}")
    typer.echo(f"best adapter: {found.best_dir}\npicture: {picture}")
    typer.echo(f'\nUse it: ia3 predict {found.best_dir} "…"')


def _begin(over: Sequence[str] | None, given: dict[str, Any], *, trusted: bool) -> Sweep:
    grid = parse_grid(over) if over else None
    from ia3.runs.grid import make_recipes
    from ia3.runs.look import look_before
    from ia3.runs.recipe import naming_its_recipe

    progress = FlagConsole()

    def run() -> Sweep:
        from ia3.training.sweep import run_sweep

        return run_sweep(recipes, keys, progress, looked, trust_remote_code=trusted)

    with naming_its_recipe(given):
        recipes, keys = make_recipes(given, grid)
        looked = look_before(*recipes)
        return run_visibly(run, progress)


def _go_on(folder: Path, beside: Sequence[str], *, trusted: bool) -> Sweep:
    if beside:
        names = ", ".join(f"`{name}`" for name in beside)
        raise ValueError(f"`resume` goes on with the sweep's own recipes, so these can't be given beside it: {names}.")
    progress = FlagConsole()

    def run() -> Sweep:
        from ia3.training.sweep import resume_sweep

        return resume_sweep(folder, console=progress, trust_remote_code=trusted)

    return run_visibly(run, progress)


def parse_grid(over: Sequence[str]) -> dict[str, list[str]]:
    """`key=value,value`, one a flag, as a grid; a key's values may be in several flags, none may be missing."""
    from ia3.runs.settings import full_name

    grid: dict[str, list[str]] = {}
    for each in over:
        key, _, values = (part.strip() for part in each.partition("="))
        found = [values] if key in _WHOLE else [value.strip() for value in values.split(",")]
        if not key or not all(found):
            raise ValueError(
                f"--over {shorten(each)}: expected a setting and its values, such as learning_rate=3e-3,8e-3."
            )
        grid.setdefault(full_name(key.replace("-", "_")), []).extend(found)
    return grid
