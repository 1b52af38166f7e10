"""What an adapter was trained to do, in `ia3_task.json` beside it: template, labels, lengths, how it is asked.

PEFT ignores the file; `ia3 predict` reads it, answers as training measured, and needs no flags.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from ia3.config import TaskType
from ia3.files import fetch, write_atomically
from ia3.tasks.template import Template

TASK_NAME = "ia3_task.json"

# How a label word is answered: the likeliest of the labels, or what the model writes.
AnswerBy = Literal["rank", "generation"]
Precision = Literal["fp32", "bf16"]


class TaskKind(StrEnum):
    """The kinds of tasks, by their names in recipes and files."""

    LABEL_WORDS = "label-words"
    GENERATION = "generation"
    LANGUAGE_MODELLING = "language-modelling"
    INSTRUCTIONS = "instructions"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"

    @property
    def task_type(self) -> TaskType:
        """What the adapter's configuration calls it."""
        return _TASK_TYPES[self]

    @property
    def has_labels(self) -> bool:
        """Whether the answers are of a closed set, against free text."""
        return self not in (TaskKind.GENERATION, TaskKind.LANGUAGE_MODELLING, TaskKind.INSTRUCTIONS)

    @property
    def has_answers(self) -> bool:
        """Whether there is a right answer to each text, against texts alone, of which every token is learned."""
        return self is not TaskKind.LANGUAGE_MODELLING

    @property
    def answer_by(self) -> AnswerBy | None:
        """How it is answered where nothing else is asked for; None where a head does."""
        return "rank" if self is TaskKind.LABEL_WORDS else "generation" if self.writes else None

    @property
    def writes(self) -> bool:
        """Whether the model writes its answers, against choosing a class by a head of its own."""
        return self not in (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.TOKEN_CLASSIFICATION)


_TASK_TYPES = {
    TaskKind.LABEL_WORDS: TaskType.SEQ_2_SEQ_LM,
    TaskKind.GENERATION: TaskType.SEQ_2_SEQ_LM,
    TaskKind.LANGUAGE_MODELLING: TaskType.CAUSAL_LM,
    TaskKind.INSTRUCTIONS: TaskType.CAUSAL_LM,
    TaskKind.SEQUENCE_CLASSIFICATION: TaskType.SEQ_CLS,
    TaskKind.TOKEN_CLASSIFICATION: TaskType.TOKEN_CLS,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the model reads and how it answers.

    Args:
        kind: label words or free text from a seq2seq model, texts or completions from a causal one, classes of texts
            or of their words from a head.
        template: what the model reads; in instruction tuning the user's message.
        labels: the label words in the order of their source, which is the order of a head's classes; empty
            where the answers are free text.
        max_length: where longer inputs are cut, in tokens; in instruction tuning the completion counts too.
        max_new_tokens: the longest answer that is generated, in tokens; every label fits into it. None where
            nothing is generated.
        base_model: the base model's name.
        label_column: the column that held the labels or the completions.
        system: the system message before the user's, in instruction tuning with a chat template.
        answer_by: how label words are answered, in training's evaluations and afterwards: `rank`, the likeliest of
            the labels, or `generation`. The other kinds have one way each, and don't look at it.
        precision: the base model's numbers in training, in which it is loaded for answers too; None for those of
            its file.
    """

    kind: TaskKind = TaskKind.LABEL_WORDS
    template: Template
    labels: tuple[str, ...] = ()
    max_length: int
    max_new_tokens: int | None = None
    base_model: str | None = None
    label_column: str = "label"
    system: str | None = None
    answer_by: AnswerBy = "rank"
    precision: Precision | None = None

    @property
    def ranks(self) -> bool:
        """Whether its answers are the likeliest of the labels by the scores of their words."""
        return self.kind is TaskKind.LABEL_WORDS and self.answer_by == "rank"

    @property
    def method(self) -> str:
        """How its answers are found, in words: what an accuracy means."""
        return method_of(self.kind, self.answer_by)

    def answered_by(self, way: str) -> Task:
        """The same task, answered another way.

        Raises:
            ValueError: no such way, or none for this kind of task.
        """
        if way not in get_args(AnswerBy):
            raise ValueError(f"Answers are by {way!r}: expected one of {list(get_args(AnswerBy))}.")
        if self.kind is TaskKind.LABEL_WORDS:
            return replace(self, answer_by=way)  # type: ignore[arg-type]
        if way != self.kind.answer_by:
            raise ValueError(
                f"Answers by {way} are for {TaskKind.LABEL_WORDS}, and this task is {self.kind}, which has one way to "
                f"answer, {self.method}: leave it out."
            )
        return self


def method_of(kind: TaskKind, answer_by: AnswerBy) -> str:
    """How answers to a kind of task are found, in words; `answer_by` is that of label words."""
    if kind is TaskKind.SEQUENCE_CLASSIFICATION:
        return "the head's likeliest label"
    if kind is TaskKind.TOKEN_CLASSIFICATION:
        return "the head's likeliest tag of each word"
    if not kind.has_answers:
        return "the loss of each token"
    ranked = kind is TaskKind.LABEL_WORDS and answer_by == "rank"
    return "the likeliest label" if ranked else "written answers, exact match"


def save_task(directory: str | Path, task: Task) -> Path:
    """Write `ia3_task.json` into an adapter's directory, atomically.

    Returns:
        The file's path.
    """
    content: dict[str, Any] = {
        "base_model": task.base_model,
        "label_column": task.label_column,
        "max_length": task.max_length,
        "template": task.template.pattern,
        "type": task.kind.value,
    }
    if task.kind.has_labels:
        content["labels"] = list(task.labels)
    if task.kind.writes:
        content["generation"] = {"max_new_tokens": task.max_new_tokens}
    if task.kind is TaskKind.LABEL_WORDS:
        content["answer_by"] = task.answer_by
    if task.precision is not None:
        content["precision"] = task.precision
    if task.system is not None:
        content["system"] = task.system
    path = Path(directory) / TASK_NAME
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
    return path


def load_task(adapter: str | Path, **hub: Any) -> Task | None:
    """Read the task of a saved adapter.

    Args:
        adapter: a directory or a hub repository.
        hub: arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The task; None where the adapter has none, as when PEFT saved it.

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: the file is damaged, or says something that this version doesn't know.
    """
    path = fetch(adapter, TASK_NAME, optional=True, **hub)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Copy it again, or remove it and pass flags.") from error
    return _task_of(content, str(path))


def _task_of(content: Any, source: str) -> Task:
    kinds = [kind.value for kind in TaskKind]
    if not isinstance(content, dict) or content.get("type") not in kinds:
        raise ValueError(f"{source} describes no task of the types {kinds}: upgrade ia3, or remove the file.")
    kind = TaskKind(content["type"])
    generation = content.get("generation", {})
    unknown = sorted({*content} - _keys_of(kind)) + sorted({*generation} - {"max_new_tokens"})
    if unknown:
        raise ValueError(f"{source} has fields that this version of ia3 doesn't know: {unknown}. Upgrade ia3.")
    if not isinstance(content.get("template"), str):
        raise ValueError(f"{source}: template is {content.get('template')!r}, expected a text such as '{{text}}'.")
    new_tokens = generation.get("max_new_tokens")
    return Task(
        kind=kind,
        template=Template(content["template"]),
        labels=_labels_of(content.get("labels"), source) if kind.has_labels else (),
        max_length=_positive(content.get("max_length"), "max_length", source),
        max_new_tokens=_positive(new_tokens, "generation.max_new_tokens", source) if kind.writes else None,
        base_model=content.get("base_model"),
        label_column=str(content.get("label_column", "label")),
        system=content.get("system"),
        answer_by=_one_of(AnswerBy, content.get("answer_by", "rank"), "answer_by", source),
        precision=None
        if content.get("precision") is None
        else _one_of(Precision, content["precision"], "precision", source),
    )


def _keys_of(kind: TaskKind) -> set[str]:
    keys = {"base_model", "label_column", "max_length", "precision", "template", "type"}
    if kind is TaskKind.LABEL_WORDS:
        keys.add("answer_by")
    if kind.has_labels:
        keys.add("labels")
    if kind.writes:
        keys.add("generation")
    if kind is TaskKind.INSTRUCTIONS:
        keys.add("system")
    return keys


def _labels_of(labels: Any, source: str) -> tuple[str, ...]:
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{source}: labels is {labels!r}, expected a list of words.")
    return tuple(labels)


def _one_of(choices: Any, value: Any, name: str, source: str) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{source}: {name} is {value!r}, expected one of {list(get_args(choices))}.")
    return value


def _positive(value: Any, name: str, source: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{source}: {name} is {value!r}, expected a positive whole number.")
    return value
