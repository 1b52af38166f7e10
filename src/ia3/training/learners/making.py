"""The learner of a task's kind, and which settings go with which kind."""

from __future__ import annotations

from typing import Any

from ia3.training.learner import Learner
from ia3.training.learners.classes import SequenceClasses
from ia3.training.learners.instructions import Instructions
from ia3.training.learners.tags import TokenClasses
from ia3.training.learners.words import Words
from ia3.training.settings import TrainSettings
from ia3.training.task import Task, TaskKind

_LEARNERS: dict[TaskKind, type[Learner[Any]]] = {
    TaskKind.LABEL_WORDS: Words,
    TaskKind.GENERATION: Words,
    TaskKind.INSTRUCTIONS: Instructions,
    TaskKind.SEQUENCE_CLASSIFICATION: SequenceClasses,
    TaskKind.TOKEN_CLASSIFICATION: TokenClasses,
}
_WORDS = (TaskKind.LABEL_WORDS,)
_TEXTS_WITH_LABELS = (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION)
_WRITTEN = (TaskKind.LABEL_WORDS, TaskKind.GENERATION)
_LABELS = (*_TEXTS_WITH_LABELS, TaskKind.TOKEN_CLASSIFICATION)


def make_learner(model: Any, tokenizer: Any, task: Task, settings: TrainSettings) -> Learner[Any]:
    """The learner for a task.

    Raises:
        ValueError: a setting that this kind of task has no use for.
    """
    check_settings(settings, task.kind)
    return _LEARNERS[task.kind](model, tokenizer, task, settings)


def check_settings(settings: TrainSettings, kind: TaskKind) -> None:
    """Refuse what would be ignored.

    Raises:
        ValueError: a setting that this kind of task has no use for.
    """
    for given, setting, kinds in (
        (settings.objective == "t-few", "objective: t-few", _WORDS),
        (settings.answer_by == "rank", "answer_by: rank", _WORDS),
        (settings.balance, "balance", _TEXTS_WITH_LABELS),
        (settings.best_by == "macro_f1", "best_by: macro_f1", _LABELS),
        (settings.packing, "packing", (TaskKind.INSTRUCTIONS,)),
        (settings.max_label_length is not None, "max_label_length", _WRITTEN),
        # A head is trained in the base's precision, where most of its small steps would be lost.
        (settings.precision == "bf16", "precision: bf16", tuple(kind for kind in TaskKind if kind.writes)),
    ):
        if given and kind not in kinds:
            raise ValueError(
                f"The setting {setting!r} is for {' and '.join(kinds)}, and this task is {kind}: leave it out."
            )
