"""`ia3 sweep`: many trainings in one batch, ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from ia3.cli.flags import AsJson, TrustRemoteCode, print_json
from ia3.cli.names import FlagConsole, with_settings
from ia3.cli.train import run_visibly

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
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    given: Any = None,
) -> None:
    grid = parse_grid(over) if over else None
    from ia3.runs.grid import make_recipes
    from ia3.runs.look import look_before

    recipes, keys = make_recipes(given, grid)
    looked = look_before(*recipes)
    progress = FlagConsole()

    def run() -> Sweep:
        from ia3.training.sweep import run_sweep

        return run_sweep(recipes, keys, progress, looked, trust_remote_code=trust_remote_code)

    found = run_visibly(run, progress, stopped="Interrupted. A sweep doesn't go on later: begin it anew.")
    from ia3.training.sweep import PICTURE_NAME, ranking_table

    picture = found.output_dir / PICTURE_NAME
    if as_json:
        print_json({**found.summary(), "folder": found.output_dir, "picture": picture})
        return
    Console().print("", ranking_table(found), "", highlight=False)
    typer.echo(f"asked for: {found.best.task.method}")
    typer.echo(f"training: {found.seconds:.0f} s for {len(found.runs) + len(found.failed)} runs together")
    if found.advice is not None:
        typer.echo(f"advice: {found.advice}")
    typer.echo(f"best adapter: {found.best_dir}\npicture: {picture}")
    typer.echo(f'\nUse it: ia3 predict {found.best_dir} "…"')


def parse_grid(over: Sequence[str]) -> dict[str, list[str]]:
    """`key=value,value`, one a flag, as a grid; a key's values may be in several flags, none may be missing."""
    from ia3.runs.settings import full_name

    grid: dict[str, list[str]] = {}
    for each in over:
        key, _, values = (part.strip() for part in each.partition("="))
        found = [values] if key in _WHOLE else [value.strip() for value in values.split(",")]
        if not key or not all(found):
            raise ValueError(f"--over {each!r}: expected a setting and its values, such as learning_rate=3e-3,8e-3.")
        grid.setdefault(full_name(key.replace("-", "_")), []).extend(found)
    return grid
