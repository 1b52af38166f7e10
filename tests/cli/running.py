"""Running the command in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from ia3.cli import main


def call(*arguments: str | Path | int | float, text: str | bytes | None = None) -> Result:
    """`ia3 …` with `text` on standard input, on a terminal 200 columns wide."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(main.app, [str(each) for each in arguments], input=text)


def succeed(*arguments: str | Path | int | float, text: str | None = None) -> Result:
    """As `call`, for a call that must work."""
    result = call(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result


def message(result: Result) -> str:
    """What an error's panel says, on one line."""
    return " ".join(result.stderr.replace("│", " ").split())
