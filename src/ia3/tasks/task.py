"""What an adapter was trained to do, in `ia3_task.json` beside it: template, labels, lengths, how it is asked.

PEFT ignores the file; `ia3 predict` reads it, answers as training measured, and needs no flags.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from ia3.config import TaskType
from ia3.documents import fits, read_json, wrong_field
from ia3.errors import SettingError, listed, shorten
from ia3.files import fetch, write_atomically
from ia3.tasks.template import Template

TASK_NAME = "ia3_task.json"

# Beyond these no model reads, answers or chooses; a file that says more would only fill memory.
MOST_TOKENS = 10_000_000
MOST_NEW_TOKENS = 100_000
_MOST_LABELS = 100_000
_LONGEST_LABEL = 10_000

# How a label word is answered: the likeliest of the labels, or what the model writes.
AnswerBy = Literal["rank", "generation"]
Precision = Literal["fp32", "bf16"]
# What the base model's linear layers may be held in.
Quantisation = Literal["int8", "nf4"]


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
        if not self.writes:
            return TaskType.SEQ_CLS if self is TaskKind.SEQUENCE_CLASSIFICATION else TaskType.TOKEN_CLS
        seq2seq = self in (TaskKind.LABEL_WORDS, TaskKind.GENERATION)
        return TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM

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
        quantize: what the base model's linear layers were held in, in training and for answers; None for numbers of
            that precision.

    Raises:
        ValueError: a length, a label or a number of labels that no memory is meant for.
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
    quantize: Quantisation | None = None

    def __post_init__(self) -> None:
        for name, most in (("max_length", MOST_TOKENS), ("max_new_tokens", MOST_NEW_TOKENS)):
            if (getattr(self, name) or 0) > most:
                raise SettingError(f"{name} is {shorten(getattr(self, name))}, expected at most {most:,} tokens.")
        if len(self.labels) > _MOST_LABELS:
            raise SettingError(f"There are {len(self.labels):,} labels, expected at most {_MOST_LABELS:,}.")
        longest = max(self.labels, key=len, default="")
        if len(longest) > _LONGEST_LABEL:
            raise SettingError(
                f"The label {shorten(longest)} has {len(longest):,} characters, expected at most {_LONGEST_LABEL:,}: "
                "free text is a task of its own (`task='generation'`)."
            )

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
            raise ValueError(f"Answers are by {shorten(way)}: expected one of {list(get_args(AnswerBy))}.")
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
        "answer_by": task.answer_by,
        "base_model": task.base_model,
        "generation": {"max_new_tokens": task.max_new_tokens},
        "label_column": task.label_column,
        "labels": list(task.labels),
        "max_length": task.max_length,
        "template": task.template.pattern,
        "type": task.kind.value,
    }
    content = {key: content[key] for key in content.keys() & _keys_of(task.kind)}
    optional = {"precision": task.precision, "quantize": task.quantize, "system": task.system}
    content |= {key: value for key, value in optional.items() if value is not None}
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
    return _task_of(read_json(path), str(path))


# The fields that need no closer look than their type.
_TYPES: dict[str, Any] = {
    "answer_by": AnswerBy,
    "base_model": str | None,
    "generation": dict[str, Any],
    "label_column": str,
    "precision": Precision | None,
    "quantize": Quantisation | None,
    "system": str | None,
}


def _task_of(content: dict[str, Any], source: str) -> Task:
    kinds = [kind.value for kind in TaskKind]
    if content.get("type") not in kinds:
        raise ValueError(f"{source} describes no task of the types {kinds}: upgrade ia3, or remove the file.")
    if (wrong := wrong_field(content, _TYPES)) is not None:
        raise ValueError(f"{source}: {wrong}")
    kind = TaskKind(content["type"])
    generation = content.get("generation", {})
    unknown = sorted({*content} - _keys_of(kind)) + sorted({*generation} - {"max_new_tokens"})
    if unknown:
        raise ValueError(
            f"{source} has fields that this version of ia3 doesn't know: [{listed(unknown)}]. Upgrade ia3."
        )

    def checked(name: str, value: Any, is_right: Callable[[Any], bool], expected: str) -> Any:
        if not is_right(value):
            raise ValueError(f"{source}: {name} is {shorten(value)}, expected {expected}.")
        return value

    def positive(name: str, value: Any) -> Any:
        return checked(name, value, lambda found: type(found) is int and found > 0, "a positive whole number")

    template = checked("template", content.get("template"), _is_text, "a text such as '{text}'")
    least = 1 if kind is TaskKind.TOKEN_CLASSIFICATION else 2
    words = f"a list of {'words' if least == 1 else 'two words or more'}, none of them twice or blank"
    labels = checked("labels", content.get("labels"), _are_words(least), words) if kind.has_labels else ()
    checked("label_column", content.get("label_column", "label"), lambda found: bool(found.strip()), "a column's name")
    try:
        return Task(
            kind=kind,
            template=Template(template),
            labels=tuple(labels),
            max_length=positive("max_length", content.get("max_length")),
            max_new_tokens=positive("generation.max_new_tokens", generation.get("max_new_tokens"))
            if kind.writes
            else None,
            base_model=content.get("base_model"),
            label_column=content.get("label_column", "label"),
            system=content.get("system"),
            answer_by=content.get("answer_by", "rank"),
            precision=content.get("precision"),
            quantize=content.get("quantize"),
        )
    except SettingError as error:
        raise ValueError(f"{source}: {error}") from error


def _keys_of(kind: TaskKind) -> set[str]:
    of_some = {
        "answer_by": kind is TaskKind.LABEL_WORDS,
        "generation": kind.writes,
        "labels": kind.has_labels,
        "system": kind is TaskKind.INSTRUCTIONS,
    }
    always = {"base_model", "label_column", "max_length", "precision", "quantize", "template", "type"}
    return always | {key for key, is_there in of_some.items() if is_there}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_words(least: int) -> Callable[[Any], bool]:
    return lambda value: (
        fits(value, list[str]) and len({*value}) == len(value) >= least and all(word.strip() for word in value)
    )
