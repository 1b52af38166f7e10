"""What holds where a setting is left to the data: the one place of these numbers."""

from __future__ import annotations

from typing import Any

from ia3.tasks.task import TaskKind

LEFT_TO_THE_DATA = ("learning_rate", "warmup_steps", "dropout", "epochs")


def default_settings(kind: TaskKind, rows: int) -> dict[str, Any]:
    """The settings of a training that names none.

    Args:
        kind: what is learned.
        rows: how many examples there are to train on.

    Returns:
        A value for each of `LEFT_TO_THE_DATA`.
    """
    return {"learning_rate": 8e-3, "warmup_steps": 0, "dropout": True, "epochs": 3}
