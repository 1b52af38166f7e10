"""A training on examples at hand, without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ia3.runs.run import STATE_NAME, Run
from ia3.tasks.examples import Examples
from ia3.training.learner import Learner
from ia3.training.loop import Training
from ia3.training.plan import RunPlan


def fit(
    learner: Learner[Any],
    training: Examples,
    test: Examples,
    folder: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Train into a folder, or go on with what was interrupted there."""
    began = Training(RunPlan(learner, training, test), resume=folder / STATE_NAME if resume else None)
    return began.run(folder, console or Console(quiet=True))
