"""Running the command in this process."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

from typer.testing import CliRunner, Result

from ia3.cli import main

DRAWING = "import typer.main, typer.rich_utils"
"""What draws the command's help and errors, next to which its own time is measured."""


def call(*arguments: str | Path | int | float, text: str | bytes | None = None) -> Result:
    """`ia3 …` with `text` on standard input, on a terminal 200 columns wide."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(main.app, [str(each) for each in arguments], input=text)


def succeed(*arguments: str | Path | int | float, text: str | None = None) -> Result:
    """As `call`, for a call that must work."""
    result = call(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result


def processor_seconds(*command: str | Path, code: int = 0) -> float:
    """What a process and its children take, whoever else is at work on the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == code
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def unwrapped(text: str) -> str:
    """Without blanks: a panel breaks long paths anywhere."""
    return "".join(text.split())


def message(result: Result) -> str:
    """What an error's panel says, on one line."""
    return " ".join(result.stderr.replace("│", " ").split())
