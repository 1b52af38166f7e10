"""The learner of a task's kind, and which settings go with which kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from ia3.runs.settings import TrainSettings
from ia3.tasks.task import Task, TaskKind
from ia3.training.learner import Learner
from ia3.training.learners.heads import SequenceClasses, TokenClasses
from ia3.training.learners.instructions import Instructions, Texts
from ia3.training.learners.words import Words

_LEARNERS: dict[TaskKind, type[Learner[Any]]] = {
    TaskKind.LABEL_WORDS: Words,
    TaskKind.GENERATION: Words,
    TaskKind.LANGUAGE_MODELLING: Texts,
    TaskKind.INSTRUCTIONS: Instructions,
    TaskKind.SEQUENCE_CLASSIFICATION: SequenceClasses,
    TaskKind.TOKEN_CLASSIFICATION: TokenClasses,
}
_WORDS = (TaskKind.LABEL_WORDS,)
_TEXTS_WITH_LABELS = (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION)
_WRITTEN = (TaskKind.LABEL_WORDS, TaskKind.GENERATION)
_ALL_WRITTEN = tuple(kind for kind in TaskKind if kind.writes)
_LABELS = (*_TEXTS_WITH_LABELS, TaskKind.TOKEN_CLASSIFICATION)

SettingsT = TypeVar("SettingsT", bound=TrainSettings)


def make_learner(model: Any, tokenizer: Any, task: Task, settings: TrainSettings) -> Learner[Any]:
    """The learner for a task.

    Raises:
        ValueError: a setting that this kind of task has no use for.
    """
    return _LEARNERS[task.kind](model, tokenizer, task, settings_of(settings, task.kind))


def settings_of(settings: SettingsT, kind: TaskKind) -> SettingsT:
    """The settings for a kind of task, with its own way of answering where none was named.

    Raises:
        ValueError: a setting that this kind of task has no use for.
    """
    for given, setting, kinds in (
        (settings.objective == "t-few", "objective='t-few'", _WORDS),
        (settings.answer_by == "rank", "answer_by='rank'", _WORDS),
        (settings.answer_by == "generation", "answer_by='generation'", _ALL_WRITTEN),
        (settings.balance, "balance", _TEXTS_WITH_LABELS),
        (settings.best_by == "macro_f1", "best_by='macro_f1'", _LABELS),
        (settings.packing, "packing", (TaskKind.INSTRUCTIONS, TaskKind.LANGUAGE_MODELLING)),
        (settings.train_on == "last", "train_on='last'", (TaskKind.INSTRUCTIONS,)),
        (settings.best_by == "accuracy", "best_by='accuracy'", tuple(kind for kind in TaskKind if kind.has_answers)),
        (settings.max_label_length is not None, "max_label_length", _WRITTEN),
        # A head is trained in the base's precision, where most of its small steps would be lost.
        (settings.precision == "bf16", "precision='bf16'", _ALL_WRITTEN),
        (settings.quantize is not None, f"quantize={settings.quantize!r}", _ALL_WRITTEN),
    ):
        if given and kind not in kinds:
            raise ValueError(
                f"The setting `{setting}` is for {' and '.join(kinds)}, and this task is {kind}: leave it out."
            )
    return replace(settings, answer_by=settings.answer_by or kind.answer_by)
