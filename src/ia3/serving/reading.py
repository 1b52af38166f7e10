"""What a model reads for a request: its text in its task's words, as tokens."""

from __future__ import annotations

import re
import threading
from copy import deepcopy
from functools import lru_cache
from typing import Any, NamedTuple

from ia3.config import TaskType
from ia3.errors import shorten
from ia3.inference.classify import tokenise_texts
from ia3.inference.complete import check_positions, cut_prompt, encode, has_template, prompt_text, without_template
from ia3.inference.predict import most_positions, tokenise_inputs
from ia3.serving.encoders import no_vectors_reason
from ia3.serving.registry import Version
from ia3.serving.requests import NotServed, Request
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template

_HALF = re.compile("[\ud800-\udfff]")
# Texts whose tokens are kept.
_TEXTS = 32


class Prompt(NamedTuple):
    """A request as tokens, and how they are answered. Those of one task share batches.

    Args:
        tokens: what the model reads.
        task: what is left of the adapter's task then.
        longest: the most tokens of the answer.
        room: the most tokens of any input of the adapter's task, where that is written for.
        labels: what a head chooses from.
    """

    tokens: list[int]
    task: Task
    longest: int
    room: int = 0
    labels: tuple[str, ...] = ()


class Reader:
    """Makes tokens of requests as training and `Answerer` do. Any thread may call it.

    Args:
        model: the base model.
        tokenizer: its tokenizer, of which it has a copy: a tokenizer can't be used by two threads at once.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, deepcopy(tokenizer)
        self._no_vectors = no_vectors_reason(model)
        # Many adapters may be asked about one text.
        self._tokens_of = lru_cache(maxsize=_TEXTS)(self._tokenise)
        self._lock = threading.Lock()

    def __call__(self, version: Version, request: Request) -> Prompt:
        """The tokens of a request.

        Raises:
            NotServed: a request that this version can't answer, and why.
        """
        task, text = version.task, version.render(request.text)
        self._expect_answerable(version, request)
        if not text:
            raise NotServed("The text is empty: send one.")
        if request.turns and task.kind is not TaskKind.INSTRUCTIONS:
            raise NotServed(f"The task of this model is {task.kind}, which reads no earlier messages: send one text.")
        if _HALF.search(text):
            raise NotServed("The text holds half a character (a lone surrogate): send whole ones.")
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise NotServed(f"The longest answer has {request.max_new_tokens} tokens: expected 1 or more.")
        try:
            with self._lock:
                tokens = self._tokens_of(task.kind, task.max_length, task.system, text, tuple(request.turns))
        except ValueError as error:
            raise NotServed(str(error)) from error
        if request.embeds:
            return Prompt(tokens, VECTORS, 0)
        return self._as_asked(task, tokens, request.max_new_tokens)

    def _expect_answerable(self, version: Version, request: Request) -> None:
        """Refuse what this kind of model doesn't answer."""
        if request.embeds:
            if self._no_vectors is not None:
                raise NotServed(f"This server's model gives no embeddings, since {self._no_vectors}.")
        elif request.labels and version.task.kind.writes and not version.task.labels:
            raise NotServed(f"{shorten(request.model)} writes text and has no labels: ask /v1/completions.")
        elif version.digest is None and not version.task.kind.writes:
            raise NotServed(
                "The base is an encoder, which answers nothing by itself: ask one of its adapters, which /v1/models "
                "lists, or ask /v1/embeddings for the text's vector."
            )

    def _tokenise(
        self, kind: TaskKind, most: int, system: str | None, text: str, turns: tuple[tuple[str, str], ...]
    ) -> list[int]:
        if not kind.writes:
            return tokenise_texts([text], self.model, self.tokenizer, most)[0]
        if kind.task_type is TaskType.SEQ_2_SEQ_LM:
            return tokenise_inputs(self.tokenizer, [text], most)[0]
        tokenizer = self.tokenizer if kind.has_answers else without_template(self.tokenizer)
        if turns and not has_template(tokenizer):
            raise ValueError("This model has no chat template, so it reads no earlier messages: send one text.")
        (prompt,) = encode(tokenizer, [prompt_text(tokenizer, text, turns, system)])
        if len(prompt) > most:
            prompt = cut_prompt(tokenizer, text, turns, system, room=most)
        check_positions(self.model, len(prompt) + 1)
        return prompt

    def _as_asked(self, task: Task, tokens: list[int], most: int | None) -> Prompt:
        """What is left of a task once its text is tokens: the labels, or how long answers may be."""
        if task.ranks:
            return Prompt(tokens, _bare_task(TaskKind.LABEL_WORDS, task.labels), 0)
        if not task.kind.writes:
            return Prompt(tokens, CLASSES, 0, labels=task.labels)
        longest, positions = task.max_new_tokens or 1, most_positions(self.model)
        if task.kind.task_type is TaskType.SEQ_2_SEQ_LM:
            kind = TaskKind.GENERATION
        else:
            kind = TaskKind.INSTRUCTIONS
            # An answer ends with the model's positions, too, so those with the same room share batches.
            longest = longest if positions is None else min(longest, positions - len(tokens))
        return Prompt(tokens, _bare_task(kind, longest=longest), min(longest, most or longest), task.max_length)


@lru_cache(maxsize=256)
def _bare_task(kind: TaskKind, labels: tuple[str, ...] = (), longest: int | None = None) -> Task:
    """A task that says nothing of how texts are read, since they were."""
    return Task(kind=kind, template=Template.of_column("text"), labels=labels, max_length=1, max_new_tokens=longest)


# All that heads choose shares batches, whatever their labels are, and so do texts whose vectors are asked for.
CLASSES = _bare_task(TaskKind.SEQUENCE_CLASSIFICATION, ("any",))
VECTORS = _bare_task(TaskKind.SEQUENCE_CLASSIFICATION)
