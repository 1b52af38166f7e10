from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_causal
import tiny_seq2seq
from ia3.fast.generate import Decoder
from ia3.inference.answering import Answer, Answerer, Answerers
from ia3.inference.complete import _settings, complete
from ia3.inference.predict import predict
from ia3.inference.rank import rank
from ia3.tasks.task import AnswerBy, Task, TaskKind
from ia3.tasks.template import Template
from replayed import recording

EXAMPLES = tiny_seq2seq.examples(7)
TEXTS = EXAMPLES.texts


def task_of(kind: TaskKind, answer_by: AnswerBy = "rank") -> Task:
    labels = tiny_seq2seq.LABELS if kind.has_labels else ()
    template = Template.of_column("text")
    return Task(kind=kind, template=template, labels=labels, max_length=64, max_new_tokens=4, answer_by=answer_by)


@pytest.fixture
def words() -> tuple[Any, Any]:
    return tiny_seq2seq.adapted(), tiny_seq2seq.tokenizer()


def test_label_words_are_ranked_or_written(words: Any) -> None:
    task = task_of(TaskKind.LABEL_WORDS)
    ranked = rank(*words, TEXTS, task.labels, max_length=64)
    found = Answerer(*words, task, batch_size=3)(EXAMPLES.rows)
    assert [answer.label for answer in found] == [ranking.label for ranking in ranked]
    assert found[0].probabilities == pytest.approx(ranked[0].probabilities, abs=1e-6)
    written = Answerer(*words, task_of(TaskKind.LABEL_WORDS, "generation"), batch_size=3)(EXAMPLES.rows)
    assert written == [Answer(word) for word in predict(*words, TEXTS, max_length=64, max_new_tokens=4)]


def test_one_answerer_serves_many_calls(words: Any) -> None:
    for way in ("rank", "generation"):
        answerer = Answerer(*words, task_of(TaskKind.LABEL_WORDS, way), batch_size=2)
        parts = [answer for part in (slice(0, 3), slice(3, 5), slice(5, 7)) for answer in answerer(EXAMPLES.rows[part])]
        assert [part.label for part in parts] == [each.label for each in answerer(EXAMPLES.rows)]


def test_the_answerers_of_the_last_tasks_are_kept(words: Any) -> None:
    """What each of thousands of tasks has recorded would fill a GPU."""
    answerers = Answerers(*words, batch_size=2)
    tasks = [replace(task_of(TaskKind.GENERATION, "generation"), max_new_tokens=most) for most in range(1, 40)]
    first, second = map(answerers.for_task, tasks[:2])
    assert (first.task, first.batch_size, first.model) == (tasks[0], 2, words[0])
    for task in tasks[2:16]:
        answerers.for_task(task)
    assert answerers.for_task(tasks[0]) is first
    answerers.for_task(tasks[16])
    assert answerers.for_task(tasks[0]) is first
    assert answerers.for_task(tasks[1]) is not second  # which was not used for longest
    for task in tasks:
        answerers.for_task(task)
    assert len(answerers) == 16


def test_instructions_are_completed(tiny: Any) -> None:
    tokenizer = tiny_causal.tokenizer()
    model = tiny("llama", vocab_size=len(tiny_causal.WORDS))
    examples = tiny_causal.examples(5)
    texts = [example.text for example in examples]
    found = Answerer(model, tokenizer, task_of(TaskKind.INSTRUCTIONS), batch_size=3)(examples)
    assert found == [Answer(text) for text in complete(model, tokenizer, texts, max_length=64, max_new_tokens=4)]


def test_answers_of_a_recorded_generation(tiny: Any, words: Any) -> None:
    """What `compile_generate` makes on a GPU, called here, in place of the models' own."""
    model, tokenizer = tiny("llama", vocab_size=len(tiny_causal.WORDS)), tiny_causal.tokenizer()
    texts = [example.text for example in tiny_causal.examples(7)]
    decoder = Decoder(model, **_settings(model, tokenizer, 5))
    with recording():
        found = complete(model, tokenizer, texts, max_new_tokens=5, batch_size=2, generate=decoder)
    assert found == complete(model, tokenizer, texts, max_new_tokens=5)
    with recording():
        decoder = Decoder(words[0], max_new_tokens=5)
        found = predict(*words, TEXTS, max_new_tokens=5, batch_size=2, generate=decoder)
    assert found == predict(*words, TEXTS, max_new_tokens=5)
    assert decoder.sessions


@pytest.mark.parametrize(
    ("way", "reason", "line"),
    [
        ("rank", None, "The labels are scored by captured CUDA graphs."),
        ("generation", None, "The answers are written by captured CUDA graphs."),
        ("rank", "it is old", "The labels are scored the ordinary way, since it is old."),
    ],
)
def test_the_path_in_a_line(words: Any, way: AnswerBy, reason: str | None, line: str) -> None:
    answerer = Answerer(*words, task_of(TaskKind.LABEL_WORDS, way))
    assert answerer.describe_path() is None  # on a CPU there is but one way
    made: Any = answerer.scorer or answerer.generate
    made.reason = reason
    answerer.model = SimpleNamespace(device=torch.device("cuda"))
    assert answerer.describe_path() == line
