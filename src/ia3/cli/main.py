"""The command `ia3`: its subcommands, and errors on one screen instead of a traceback."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

try:
    import typer
    from rich.panel import Panel
    from rich.text import Text
    from typer.core import TyperGroup
except ImportError as missing:
    raise SystemExit('The command ia3 needs more than the library: pip install "ia3[train]"') from missing

from ia3.cli.combine import combine
from ia3.cli.compare import compare
from ia3.cli.evaluate import evaluate
from ia3.cli.inspect import inspect
from ia3.cli.merge import merge
from ia3.cli.names import LateCommand, in_flags
from ia3.cli.predict import predict
from ia3.cli.push import push
from ia3.cli.quickstart import quickstart
from ia3.cli.runs import runs
from ia3.cli.serve import serve
from ia3.cli.sweep import sweep
from ia3.cli.targets import targets
from ia3.cli.train import train
from ia3.errors import RefusedElsewhereError, fit_screen, printable
from ia3.launched import launched_processes, launched_rank
from ia3.runs.screen import Screen

# What the library raises for input that it cannot use, with the remedy in the message.
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
_EXIT_CODE = 2


class _ErrorsOnOneScreen(TyperGroup):
    """Print an expected error and leave with exit code 2; `--debug` shows the traceback instead."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except RefusedElsewhereError as error:  # whose reason the first process says
            raise typer.Exit(_EXIT_CODE) from error
        except _EXPECTED as error:
            if ctx.params.get("debug"):
                raise
            command: Any = self.get_command(ctx, ctx.invoked_subcommand or "")
            params = getattr(command, "made", command).params if command is not None else []
            flags = {flag for each in params for flag in (*each.opts, *each.secondary_opts)}
            said = Text(printable(in_flags(fit_screen(str(error) or type(error).__name__), flags)))
            title = "Error" if launched_processes() == 1 else f"Error in process {launched_rank()}"
            Screen(stderr=True).print(Panel(said, title=title, title_align="left", border_style="red"))
            raise typer.Exit(_EXIT_CODE) from error


app = typer.Typer(
    cls=_ErrorsOnOneScreen,
    help="Fine-tune frozen transformers by learning vectors: (IA)³.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    train,
    sweep,
    runs,
    evaluate,
    predict,
    inspect,
    compare,
    combine,
    targets,
    merge,
    push,
    serve,
    quickstart,
):
    app.command(cls=LateCommand if command in (train, sweep) else None)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ia3 {version('ia3')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the command `ia3`."""
    app()
