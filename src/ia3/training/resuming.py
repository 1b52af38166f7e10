"""Going on with what was interrupted, whatever it was."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ia3.runs.run import SWEEP_RECIPES_NAME, Run
from ia3.tasks.examples import Examples
from ia3.training.sweep import Sweep, resume_sweep
from ia3.training.train import resume_run


def resume(
    folder: str | Path,
    *,
    data: Examples | None = None,
    test_data: Examples | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> Run | Sweep:
    """Go on with an interrupted run or sweep, to the numbers that it would have had.

    It may have been interrupted, killed or stopped by a full disk. Nobody else may be working in its folder.

    Args:
        folder: the run's or the sweep's folder.
        data: the training data, where they were given in memory.
        test_data: the held-out data, likewise.
        console: where the progress goes; standard error by default.
        trust_remote_code: run code that comes with the model, whatever the run began with.

    Returns:
        What `ia3.train` or `ia3.sweep` would have returned.

    Raises:
        FileNotFoundError: no run or sweep in the folder.
        ValueError: nothing to go on with, a damaged file, or data that are not those of the run.
        BlockingIOError: another process, or another thread of this one, works in the folder.
    """
    what = resume_sweep if (Path(folder) / SWEEP_RECIPES_NAME).is_file() else resume_run
    return what(folder, data=data, test_data=test_data, console=console, trust_remote_code=trust_remote_code)
