"""The file beside an adapter: each kind of task comes back, and what is not understood is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ia3.config import TaskType
from ia3.tasks.task import Task, TaskKind, load_task, save_task
from ia3.tasks.template import Template

TASK = Task(
    template=Template("Review: {text} {{ok}}"),
    labels=("gut", "schlecht – ja"),
    max_length=64,
    max_new_tokens=5,
    base_model="some/base",
    label_column="tone",
)
TEXT = Template.of_column("text")
TASKS = {
    TaskKind.LABEL_WORDS: TASK,
    TaskKind.GENERATION: Task(kind=TaskKind.GENERATION, template=TEXT, max_length=512, max_new_tokens=128),
    TaskKind.LANGUAGE_MODELLING: Task(
        kind=TaskKind.LANGUAGE_MODELLING, template=TEXT, max_length=512, max_new_tokens=128
    ),
    TaskKind.INSTRUCTIONS: Task(
        kind=TaskKind.INSTRUCTIONS, template=TEXT, max_length=512, max_new_tokens=128, system="Sei kurz – bitte."
    ),
    TaskKind.SEQUENCE_CLASSIFICATION: Task(
        kind=TaskKind.SEQUENCE_CLASSIFICATION, template=TEXT, labels=("yes", "no"), max_length=64
    ),
    TaskKind.TOKEN_CLASSIFICATION: Task(
        kind=TaskKind.TOKEN_CLASSIFICATION, template=TEXT, labels=("O", "B-PER"), max_length=64, label_column="tags"
    ),
}


@pytest.mark.parametrize("kind", TaskKind)
def test_each_kind_comes_back(kind: TaskKind, tmp_path: Path) -> None:
    path = save_task(tmp_path / "adapter", TASKS[kind])
    assert path.name == "ia3_task.json"
    assert load_task(tmp_path / "adapter") == TASKS[kind]
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == sorted(content)
    assert ("labels" in content, "generation" in content, "system" in content) == (
        kind in (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.TOKEN_CLASSIFICATION),
        kind not in (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.TOKEN_CLASSIFICATION),
        kind is TaskKind.INSTRUCTIONS,
    )


def test_the_file_of_label_words(tmp_path: Path) -> None:
    assert json.loads(save_task(tmp_path, TASK).read_text(encoding="utf-8")) == {
        "answer_by": "rank",
        "base_model": "some/base",
        "generation": {"max_new_tokens": 5},
        "label_column": "tone",
        "labels": ["gut", "schlecht – ja"],
        "max_length": 64,
        "template": "Review: {text} {{ok}}",
        "type": "label-words",
    }


def test_what_each_kind_is_to_the_configuration() -> None:
    assert {kind.value: kind.task_type for kind in TaskKind} == {
        "label-words": TaskType.SEQ_2_SEQ_LM,
        "generation": TaskType.SEQ_2_SEQ_LM,
        "language-modelling": TaskType.CAUSAL_LM,
        "instructions": TaskType.CAUSAL_LM,
        "sequence-classification": TaskType.SEQ_CLS,
        "token-classification": TaskType.TOKEN_CLS,
    }


def test_an_adapter_of_peft_has_no_task(tmp_path: Path) -> None:
    assert load_task(tmp_path) is None


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("label-words", {"type": "chat"}, r"describes no task of the types \['label-words', .*upgrade ia3"),
        ("label-words", {"loudness": 3}, r"doesn't know: \['loudness'\]"),
        ("label-words", {"generation": {"max_new_tokens": 3, "beams": 2}}, r"doesn't know: \['beams'\]"),
        ("label-words", {"labels": []}, "expected a list of two words or more"),
        ("label-words", {"labels": [1, 2]}, "expected a list of two words or more"),
        ("label-words", {"labels": ["a"]}, "expected a list of two words or more"),
        ("sequence-classification", {"labels": ["a", "b", "a"]}, "none of them twice or blank"),
        ("label-words", {"labels": ["a", " "]}, "none of them twice or blank"),
        ("label-words", {"label_column": ""}, "label_column is '', expected a column's name"),
        ("label-words", {"template": 7}, "template is 7, expected a text"),
        ("label-words", {"template": "text"}, "shows no column"),
        ("label-words", {"max_length": 0}, "max_length is 0, expected a positive whole number"),
        ("label-words", {"max_length": True}, "max_length is True, expected a positive whole number"),
        ("label-words", {"generation": {}}, "max_new_tokens is None, expected a positive whole number"),
        ("label-words", {"system": "Be short."}, r"doesn't know: \['system'\]"),
        ("generation", {"labels": ["a"]}, r"doesn't know: \['labels'\]"),
        ("generation", {"generation": {}}, "max_new_tokens is None, expected a positive whole number"),
        ("sequence-classification", {"generation": {"max_new_tokens": 3}}, r"doesn't know: \['generation'\]"),
        ("token-classification", {"labels": None}, "labels is None, expected a list of words"),
        ("label-words", {"answer_by": "guess"}, r"answer_by is 'guess', expected one of \['rank', 'generation'\]"),
        ("generation", {"answer_by": "rank"}, r"fields that this version of ia3 doesn't know: \['answer_by'\]"),
        ("instructions", {"precision": "fp8"}, r"precision is 'fp8', expected one of \['fp32', 'bf16'\]"),
        ("instructions", {"quantize": "int4"}, r"quantize is 'int4', expected one of \['int8', 'nf4'\]"),
    ],
)
def test_what_is_not_understood_is_refused(kind: str, change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = save_task(tmp_path, TASKS[TaskKind(kind)])
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))
    with pytest.raises(ValueError, match=said):
        load_task(tmp_path)


def test_a_file_of_before_ranks_in_its_bases_precision(tmp_path: Path) -> None:
    path = save_task(tmp_path, replace(TASK, answer_by="generation", precision="bf16", quantize="nf4"))
    assert load_task(tmp_path) == replace(TASK, answer_by="generation", precision="bf16", quantize="nf4")
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps({key: content[key] for key in content if key not in ("answer_by", "precision", "quantize")})
    )
    assert load_task(tmp_path) == replace(TASK, answer_by="rank", precision=None)


@pytest.mark.parametrize(
    ("kind", "rank", "generation"),
    [
        (TaskKind.LABEL_WORDS, "the likeliest label", "written answers, exact match"),
        (TaskKind.GENERATION, None, "written answers, exact match"),
        (TaskKind.INSTRUCTIONS, None, "written answers, exact match"),
        (TaskKind.SEQUENCE_CLASSIFICATION, None, None),
        (TaskKind.TOKEN_CLASSIFICATION, None, None),
    ],
)
def test_ways_to_answer_that_a_kind_has(kind: TaskKind, rank: str | None, generation: str | None) -> None:
    for way, method in (("rank", rank), ("generation", generation)):
        if method is not None:
            assert TASKS[kind].answered_by(way).method == method
            continue
        with pytest.raises(ValueError, match=f"Answers by {way} are for .*, and this task is {kind}, which has one"):
            TASKS[kind].answered_by(way)
    with pytest.raises(ValueError, match=r"Answers are by 'guessing': expected one of \['rank', 'generation'\]"):
        TASKS[kind].answered_by("guessing")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{"])
def test_bytes_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ia3_task.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_task(tmp_path)


def test_a_list_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "ia3_task.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a JSON object"):
        load_task(tmp_path)
