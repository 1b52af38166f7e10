"""What holds where a setting is left to the data: the one place of these numbers.

Chosen by `benchmarks/defaults.py`, with vectors at every linear layer by `evidence_table.py` and
`quickstart_search.py`; docs/learning-rate.md and docs/choosing.md have the figures.
"""

from __future__ import annotations

import math
from typing import Any

from ia3.tasks.task import TaskKind

LEFT_TO_THE_DATA = ("learning_rate", "warmup_steps", "dropout", "epochs", "steps")

_EPOCHS = 3
# Few rows are passed over more often, up to so many steps, or so many a label where labels are many.
_LEAST_STEPS, _STEPS_A_LABEL = 500, 13
_LEAST_STEPS_OF_A_CAUSAL_MODEL = 200
# From so many labels on, a head's own weights need a lower rate.
_MANY_LABELS = 20


def default_settings(
    kind: TaskKind, rows: int, labels: int, rows_a_step: int, *, all_linear: bool = False
) -> dict[str, Any]:
    """The settings of a training that names none.

    Args:
        kind: what is learned.
        rows: how many examples there are to train on.
        labels: how many different labels they have; 0 where answers are free text.
        rows_a_step: how many examples a step takes.
        all_linear: whether every linear layer has a vector, which together move a model further a step.

    Returns:
        A value for each of `LEFT_TO_THE_DATA`; None of `epochs` or of `steps`.
    """
    least = least_steps(kind, labels)
    few = _EPOCHS * math.ceil(rows / rows_a_step) < least
    return {
        "learning_rate": _learning_rate(kind, labels, all_linear=all_linear),
        "warmup_steps": 0,
        "dropout": False,
        "epochs": None if few else _EPOCHS,
        "steps": least if few else None,
    }


def _learning_rate(kind: TaskKind, labels: int, *, all_linear: bool) -> float:
    if kind in (TaskKind.LABEL_WORDS, TaskKind.GENERATION):
        return 2e-2 if all_linear else 4e-2
    if 0 < labels < _MANY_LABELS:
        return 1e-2 if all_linear else 2e-2
    return 8e-3


def least_steps(kind: TaskKind, labels: int) -> int:
    """How many steps a training has at least, however few its rows."""
    if kind in (TaskKind.INSTRUCTIONS, TaskKind.LANGUAGE_MODELLING):
        return _LEAST_STEPS_OF_A_CAUSAL_MODEL
    return max(_LEAST_STEPS, _STEPS_A_LABEL * labels)
