"""An adapter ready to answer: its base model, its task, and what is asked for otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ia3.errors import naming
from ia3.tasks.task import Task, TaskKind, load_task
from ia3.tasks.template import Template


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What is asked for instead of what an adapter's task says; None is not asked for."""

    text_column: str | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    way: str | None = None

    def over(self, task: Task) -> Task:
        """The task with what is asked for, which it has to have a use for."""
        if self.text_column is not None:
            task = replace(task, template=task.template.with_column(self.text_column))
        if self.max_length is not None:
            task = replace(task, max_length=self.max_length)
        task = answered_by(task, self.way)
        if self.max_new_tokens is None:
            return task
        if not task.kind.writes:
            raise ValueError(f"This adapter's task is {task.kind}, which writes nothing: leave `max_new_tokens` out.")
        if task.ranks:
            raise ValueError(
                "The labels are ranked here and nothing is written: leave `max_new_tokens` out, or add "
                "`answer_by='generation'`."
            )
        return replace(task, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """A base model with its adapter, its tokenizer, and the task: what the model reads and how it answers."""

    model: Any
    tokenizer: Any
    task: Task


def load_labeller(adapter: str, overrides: Overrides, *, trust_remote_code: bool = False) -> Labeller:
    """Load an adapter with its base model, in its training's precision, and its task; what is given overrides it.

    Args:
        adapter: a folder or a hub repository.
        overrides: what is asked for otherwise.
        trust_remote_code: run code that comes with the base, which the adapter names.

    Raises:
        FileNotFoundError, ValueError, ImportError: what `load_adapter` and `load_task` raise, or an override that the
            task has no use for.
    """
    from transformers.utils.logging import disable_progress_bar

    from ia3.inference.classify import class_labels
    from ia3.inference.loading import DTYPES, load_adapter
    from ia3.inference.rank import tokenise_labels

    disable_progress_bar()
    saved = load_task(adapter)
    task = None if saved is None else overrides.over(saved)
    precision, quantize = (None, None) if task is None else (task.precision, task.quantize)
    dtype = None if precision is None else DTYPES[precision]
    trusted = trust_remote_code
    model, tokenizer = load_adapter(adapter, dtype=dtype, quantize=quantize, trust_remote_code=trusted)
    if task is None:
        task_type = model.peft_config[model.active_adapter].task_type
        task = overrides.over(task_without_file(task_type, lambda: class_labels(model)))
    if task.kind is TaskKind.LABEL_WORDS:
        with naming(adapter):
            tokenise_labels(task.labels, tokenizer)  # refuses what can't be told apart
    return Labeller(model=model, tokenizer=tokenizer, task=task)


def task_without_file(task_type: str, labels: Callable[[], tuple[str, ...]]) -> Task:
    """The task of an adapter that PEFT saved: it reads the text alone, and writes its answer or has a head."""
    kinds = {kind.task_type.value: kind for kind in TaskKind}  # the last of a type: free text, for a seq2seq model
    kind = kinds[task_type]
    return Task(
        kind=kind,
        template=Template.of_column("text"),
        labels=labels() if kind.has_labels else (),
        max_length=128,
        max_new_tokens=16 if kind.writes else None,
    )


def answered_by(task: Task, way: str | None) -> Task:
    """The task, answered as is asked for, which has to be a way for it."""
    try:
        return task if way is None else task.answered_by(way)
    except ValueError as error:
        raise ValueError(f"`answer_by`: {error}") from error
