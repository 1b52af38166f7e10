"""Columns that belong to the text: read where the format is known, otherwise said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ia3.data.loading import load_examples
from ia3.tasks.examples import Examples
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

FREE = [TaskKind.GENERATION, TaskKind.INSTRUCTIONS]
SUMS = [{"instruction": "Add", "input": f"{n} and {n}", "output": str(2 * n)} for n in range(20)]
ALPACA = [*SUMS, {"instruction": "Name a colour.", "input": "", "output": "red"}]


def load(path: Path, rows: list[dict[str, Any]], **how: Any) -> Examples:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(path, **how)


class TestInstructionsWithMoreBelow:
    @pytest.mark.parametrize("kind", FREE)
    @pytest.mark.parametrize(
        "named", [{}, {"text_column": "instruction", "label_column": "output"}, {"label_column": "output"}]
    )
    def test_alpaca(self, tmp_path: Path, kind: TaskKind, named: dict[str, str]) -> None:
        found = load(tmp_path / "a.jsonl", ALPACA, kind=kind, **named)
        assert found.texts == [*(f"Add\n\n{n} and {n}" for n in range(20)), "Name a colour."]
        assert [row.label for row in found] == [row["output"] for row in ALPACA]
        _, said = found.describe().split("\n")
        assert said.startswith(
            "Read as Alpaca's rows: 'instruction', below it 'input' where there is one; the answer is 'ou"
        )
        assert found.reading is not None
        assert found.reading.label_column == "output"

    def test_alpaca_with_rows_without_the_key_and_a_text_made_of_all(self, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"instruction": "Add", "input": "1", "output": "2", "text": "### Add\n### 1\n### 2"},
            {"instruction": "Say hi", "output": "hi", "text": "### Say hi\n### hi"},
        ]
        found = load(tmp_path / "a.jsonl", rows, kind=TaskKind.INSTRUCTIONS)
        assert found.texts == ["Add\n\n1", "Say hi"]
        assert "not read" not in found.describe()

    def test_dolly(self, tmp_path: Path) -> None:
        rows = [{"instruction": "Who?", "context": "Ann.", "response": "She", "category": "qa"}]
        rows += [{"instruction": "Why?", "context": "", "response": "So", "category": "qa"}]
        found = load(tmp_path / "a.jsonl", rows, kind=TaskKind.INSTRUCTIONS)
        assert [(row.text, row.label) for row in found] == [("Who?\n\nAnn.", "She"), ("Why?", "So")]
        assert "Read as Dolly's rows" in found.describe()

    @pytest.mark.parametrize(
        ("columns", "named"),
        [
            (("instruction", "input", "output"), {"text_column": "input", "label_column": "output"}),
            (("instruction", "output", "label"), {"text_column": "instruction"}),
            (("instruction", "output", "text", "label"), {}),
            (("instruction", "input", "output"), {"template": Template("{instruction}"), "label_column": "output"}),
        ],
    )
    def test_what_is_named_is_read(self, tmp_path: Path, columns: tuple[str, ...], named: dict[str, Any]) -> None:
        found = load(tmp_path / "a.jsonl", [{column: column for column in columns}], kind=TaskKind.GENERATION, **named)
        template = named.get("template") or Template.of_column(named.get("text_column", "text"))
        assert found.texts == list(template.fields)
        assert [row.label for row in found] == [named.get("label_column", "label")]
        assert "Read as" not in found.describe()
        assert "instruction" in found.describe() or "instruction" in found.texts


class TestColumnsThatAreNotRead:
    @pytest.mark.parametrize(
        ("row", "text_column", "remedy"),
        [
            ({"premise": "a", "hypothesis": "b", "label": "x"}, "premise", "`template='{premise} {hypothesis}'`"),
            ({"premise": "a", "hypothesis": "b", "label": "x"}, "hypothesis", "`template='{premise} {hypothesis}'`"),
            ({"sentence1": "a", "sentence2": "b", "label": "x"}, "sentence1", "`template='{sentence1} {sentence2}'`"),
            ({"text_a": "a", "text_b": "b", "label": "x"}, "text_a", "`template='{text_a} {text_b}'`"),
            ({"text": "a", "text2": "b", "label": "x"}, "text", "`template='{text} {text2}'`"),
            ({"id": 7, "context": "a", "question": "b", "label": "x"}, "question", "`template='{context} {question}'`"),
            ({"Context": "a", "Question": "b", "label": "x"}, "Question", "`template='{Context} {Question}'`"),
            ({"system prompt": "a", "text": "b", "label": "x"}, "text", "`template='{system prompt} {text}'`"),
            ({"input": "a", "instruction": "b", "label": "x"}, "instruction", "`template='{instruction} {input}'`"),
            ({"question": "a", "choices": ["b", "c"], "label": "x"}, "question", "No template shows lists"),
            ({"text": "a", "label": "x", "messages": [{"role": "user"}]}, "text", "No template shows lists"),
        ],
    )
    @pytest.mark.parametrize("kind", [TaskKind.LABEL_WORDS, TaskKind.INSTRUCTIONS])
    def test_are_said_with_the_remedy(
        self, tmp_path: Path, row: dict[str, Any], text_column: str, remedy: str, kind: TaskKind
    ) -> None:
        said = load(tmp_path / "a.jsonl", [row], text_column=text_column, kind=kind).describe()
        assert "A column is not read that may belong to the text: " in said
        assert "(1 of 1 rows)" in said
        assert remedy in said

    @pytest.mark.parametrize("kind", [TaskKind.LABEL_WORDS, TaskKind.INSTRUCTIONS])
    @pytest.mark.parametrize(
        "more",
        [
            {"id": 3, "url": "u", "category": "c", "date": "d"},
            {"input": "", "context": None, "history": [], "question": float("nan")},
            {"input": "some"},  # stands in the text
        ],
    )
    def test_others_are_not(self, tmp_path: Path, kind: TaskKind, more: dict[str, Any]) -> None:
        rows = [{"text": "some text", "label": "x", **more}, {"text": "more", "label": "y"}]
        assert "may belong" not in load(tmp_path / "a.jsonl", rows, kind=kind).describe()

    def test_many_answers_to_one_text_are_said(self, tmp_path: Path) -> None:
        rows = [{"text": "Add", "left": n, "right": n, "label": str(2 * n)} for n in range(3)]
        said = load(tmp_path / "a.jsonl", rows, kind=TaskKind.GENERATION).describe()
        assert "3 different answers to the same text, 'Add'; not read: 'left', 'right'." in said
        assert "different answers" not in load(tmp_path / "a.jsonl", rows[:2], kind=TaskKind.GENERATION).describe()


class TestConversationsBesideOtherColumns:
    ROW: ClassVar[dict[str, Any]] = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    }

    def test_a_label_column_that_is_asked_for_is_refused(self, tmp_path: Path) -> None:
        for row in ({**self.ROW, "score": 3}, self.ROW):
            with pytest.raises(ValueError, match="`label_column='score'` asks for others: leave `label_column` out"):
                load(tmp_path / "a.jsonl", [row], label_column="score", kind=TaskKind.INSTRUCTIONS)

    def test_a_label_that_is_there_is_said(self, tmp_path: Path) -> None:
        found = load(tmp_path / "a.jsonl", [{**self.ROW, "label": 3}], kind=TaskKind.INSTRUCTIONS)
        assert "The column 'label' is not read: the answers are the last messages" in found.describe()
        assert [row.label for row in found] == ["ho"]

    def test_a_system_message_of_its_own_is_said(self, tmp_path: Path) -> None:
        found = load(
            tmp_path / "a.jsonl", [{**self.ROW, "system": "be brief", "prompt": "hi"}], kind=TaskKind.INSTRUCTIONS
        )
        assert "'system' (1 of 1 rows). Of 'messages' the messages alone are read" in found.describe()
        assert "prompt" not in found.describe()
