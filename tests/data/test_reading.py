"""Columns that belong to the text: read where the format is known, otherwise said."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset

from ia3.data.conversations import format_to_answer, read_to_answer
from ia3.data.loading import load_examples
from ia3.data.records import read_records
from ia3.tasks.examples import Example, Examples
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
        for named in ({}, {"label_column": "output"}):
            found = load(tmp_path / "a.jsonl", rows, kind=TaskKind.INSTRUCTIONS, **named)
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
        assert "The column 'label' is not read: the answers are the messages in" in found.describe()
        assert [row.label for row in found] == ["ho"]

    def test_definitions_of_tools_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"line 1: 'tools' holds definitions of tools, which can't be learned"):
            load(tmp_path / "a.jsonl", [{**self.ROW, "tools": [{"name": "f"}]}], kind=TaskKind.INSTRUCTIONS)

    def test_a_column_with_the_system_message_is_read_and_said(self, tmp_path: Path) -> None:
        row = {**self.ROW, "system": "be brief", "prompt": "hi"}
        found = load(tmp_path / "a.jsonl", [row, {**row, "system": ""}], kind=TaskKind.INSTRUCTIONS)
        assert [each.turns for each in found] == [(("system", "be brief"),), ()]
        assert "'messages'; the system message is 'system' where there is one." in found.describe()
        assert "prompt" not in found.describe()
        own = [{"role": "system", "content": "be long"}, *self.ROW["messages"]]
        with pytest.raises(ValueError, match="line 1 has one system message in 'system' and another in 'messages'"):
            load(tmp_path / "a.jsonl", [{**row, "messages": own}], kind=TaskKind.INSTRUCTIONS)


# Conversations of a question with more below it and an answer; of several turns; with system messages.
PLAIN = [[("user", f"Add\n\n{n} and {n}"), ("assistant", f" {2 * n}\n\nBye" if n else "0")] for n in range(4)]
SEVERAL = [[*turns, ("user", "Why?"), ("assistant", "So"), ("user", "Then?"), ("assistant", "7")] for turns in PLAIN]
SYSTEM = [[*([("system", "Be brief")] if n % 2 else []), *turns] for n, turns in enumerate(PLAIN)]


def chat(turns: list[tuple[str, str]], who: str = "role", what: str = "content", **names: str) -> list[dict[str, Any]]:
    return [{who: names.get(role, role), what: content} for role, content in turns]


def asked_and_answered(turns: list[tuple[str, str]]) -> tuple[dict[str, str], str, str]:
    """The column of the system message, the question and the answer."""
    *system, (_, asked), (_, answer) = turns
    return {"system": system[0][1] if system else ""}, asked, answer


def alpaca(turns: list[tuple[str, str]], below: str = "input", answered: str = "output") -> dict[str, str]:
    system, asked, answer = asked_and_answered(turns)
    return {"instruction": asked.split("\n\n")[0], below: asked.split("\n\n")[1], answered: answer, **system}


def parts(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": [{"type": "text", "text": content[:2]}, {"type": "text", "text": content[2:]}]}
        for role, content in turns
    ]


SHAREGPT = {"user": "human", "assistant": "gpt"}
ROWS: dict[str, Any] = {
    "alpaca": alpaca,
    "alpaca-array": alpaca,
    "alpaca-csv": alpaca,
    "dolly": lambda turns: alpaca(turns, "context", "response"),
    "prompt-completion": lambda turns: {
        **asked_and_answered(turns)[0],
        "prompt": asked_and_answered(turns)[1],
        "completion": turns[-1][1],
    },
    "prompt-completion-messages": lambda turns: {"prompt": chat(turns[:-1]), "completion": chat(turns[-1:])},
    "messages": lambda turns: {"messages": chat(turns), "id": 7},
    "messages-array": lambda turns: {"messages": chat(turns)},
    "messages-parquet": lambda turns: {"messages": chat(turns)},
    "content-parts": lambda turns: {"messages": parts(turns)},
    "content-parts-parquet": lambda turns: {"messages": parts(turns)},
    "openai": lambda turns: {"messages": [{**each, "weight": 1} for each in chat(turns, system="developer")]},
    "sharegpt-array": lambda turns: {"id": "x", "conversations": chat(turns, "from", "value", **SHAREGPT)},
    "sharegpt-other-names": lambda turns: {
        "conversations": chat(turns[-2:] if turns[0][0] == "system" else turns, "from", "value", assistant="ChatGPT"),
        "system": turns[0][1] if turns[0][0] == "system" else None,
    },
    "sharegpt-roles": lambda turns: {"conversation": chat(turns, user="Human", assistant="model")},
    "named-list": lambda turns: {"dialog": chat(turns, "from", "value", **SHAREGPT)},
    "named-pair": lambda turns: {"question": turns[0][1], "answer": turns[1][1]},
}
NAMED = {"named-list": {"text_column": "dialog"}, "named-pair": {"text_column": "question", "label_column": "answer"}}
OF_ONE_TURN = ("alpaca", "dolly", "prompt-completion", "named-pair")


def cases() -> list[Any]:
    found = []
    for form in ROWS:
        one_turn = form.startswith(OF_ONE_TURN) and "messages" not in form
        found += [pytest.param(form, PLAIN, id=form)]
        found += [] if one_turn else [pytest.param(form, SEVERAL, id=f"{form}-several")]
        found += [] if form == "named-pair" else [pytest.param(form, SYSTEM, id=f"{form}-system")]
    return found


def write_rows(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    if form.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(path := folder / "a.parquet")
    elif form.endswith("csv"):
        with (path := folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif form.endswith("array"):
        (path := folder / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_examples(conversations: list[list[tuple[str, str]]]) -> Examples:
    rows = []
    for turns in conversations:
        *before, (_, text), (_, answer) = [(role, content.strip()) for role, content in turns]
        rows.append(Example(text, answer, tuple(before)))
    return Examples(tuple(rows), (), "", 0, 0, TaskKind.INSTRUCTIONS)


class TestFormatsOfTheSameConversations:
    @pytest.mark.parametrize(("form", "conversations"), cases())
    def test_are_the_same_examples(self, tmp_path: Path, form: str, conversations: Any) -> None:
        path = write_rows(tmp_path, form, [ROWS[form](turns) for turns in conversations])
        found = load_examples(path, kind=TaskKind.INSTRUCTIONS, **NAMED.get(form, {}))
        assert list(found) == list(as_examples(conversations))
        assert found.digest() == as_examples(conversations).digest()
        assert ("Read as" in found.describe()) == (form != "named-pair")
        assert "may belong" not in found.describe()

    @pytest.mark.parametrize(("form", "conversations"), cases())
    def test_are_the_same_questions(self, tmp_path: Path, form: str, conversations: Any) -> None:
        """Asked with their answers and without, by the template that training saves."""
        path = write_rows(tmp_path, form, [ROWS[form](turns) for turns in conversations])
        trained = load_examples(path, kind=TaskKind.INSTRUCTIONS, **NAMED.get(form, {})).reading
        assert trained is not None
        records = read_records(path)
        how = format_to_answer(records, trained.template)
        found = [read_to_answer(record, place, how) for place, record in records]
        assert found == [replace(example, label="") for example in as_examples(conversations)]
        again = load_examples(
            path, template=trained.template, label_column=trained.label_column, kind=TaskKind.INSTRUCTIONS
        )
        assert again.digest() == as_examples(conversations).digest()

    def test_columns_of_two_formats_are_refused_by_both_names(self, tmp_path: Path) -> None:
        turns = PLAIN[0]
        pair, messages = {"prompt": turns[0][1], "completion": turns[1][1]}, {"messages": chat(turns)}
        both = (
            r"prompts and completions \('prompt', 'completion'\) and conversations \('messages'\).*text_column='prompt'"
        )
        for mixed in ([pair | messages], [pair, messages]):
            path = write_rows(tmp_path, "", mixed)
            with pytest.raises(ValueError, match=both):
                load_examples(path, kind=TaskKind.INSTRUCTIONS)

    def test_one_of_two_formats_is_named(self, tmp_path: Path) -> None:
        row = {"messages": chat(PLAIN[0]), "conversations": chat(PLAIN[1]), "prompt": "p", "completion": "c"}
        path = write_rows(tmp_path, "", [row])
        for named, answer in (
            ({"text_column": "messages"}, "0"),
            ({"text_column": "conversations"}, "2\n\nBye"),
            ({"text_column": "prompt", "label_column": "completion"}, "c"),
        ):
            found = load_examples(path, kind=TaskKind.INSTRUCTIONS, **named)
            assert [each.label for each in found] == [answer]
        with pytest.raises(ValueError, match="has conversations in 'messages' and 'conversations': name one"):
            format_to_answer(read_records(path), Template("{text}"))


class TestUnusualConversations:
    def read(self, path: Path, *conversations: Any) -> Examples:
        path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations), encoding="utf-8")
        return load_examples(path, kind=TaskKind.INSTRUCTIONS)

    def test_what_follows_the_last_answer_is_left_out_and_counted(self, tmp_path: Path) -> None:
        more = [*SEVERAL[0], ("user", "And?"), ("system", "Stop")]
        found = self.read(tmp_path / "a.jsonl", chat(more), chat(SEVERAL[1]))
        assert found.digest() == as_examples(SEVERAL[:2]).digest()
        assert "Conversations that go on after their last answer, where they are cut: 1." in found.describe()

    def test_the_assistant_begins_and_the_user_speaks_twice(self, tmp_path: Path) -> None:
        turns = [("assistant", "Hello"), ("user", "a"), ("user", "b"), ("assistant", "c")]
        found = self.read(tmp_path / "a.jsonl", chat(turns))
        assert list(found) == list(as_examples([turns]))
        assert "that answer no user's, so that they are not learned: 1." in found.describe()

    def test_numbers_are_their_digits_and_an_empty_system_message_stays(self, tmp_path: Path) -> None:
        found = self.read(tmp_path / "a.jsonl", chat([("system", ""), ("user", 7), ("assistant", 3.0)]))
        assert list(found) == [Example("7", "3", (("system", ""),))]

    def test_gaps_in_a_table_are_rows_without_text(self, tmp_path: Path) -> None:
        rows = [{"messages": chat(PLAIN[0]), "system": None}, {"messages": None, "system": None}]
        path = write_rows(tmp_path, "parquet", rows)
        found = load_examples(path, kind=TaskKind.INSTRUCTIONS)
        assert (list(found), found.empty) == (list(as_examples(PLAIN[:1])), 1)


class TestTextsAlone:
    def test_need_no_label(self, tmp_path: Path) -> None:
        rows = [{"text": " one\n\ntwo ", "meta": 1}, {"text": "", "meta": 2}, {"text": 3, "meta": 3}]
        found = load(tmp_path / "a.jsonl", rows, kind=TaskKind.LANGUAGE_MODELLING)
        assert list(found) == [Example("one\n\ntwo", ""), Example("3", "")]
        assert found.describe() == f"{tmp_path / 'a.jsonl'}: 2 rows; 1 empty row dropped"

    def test_of_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one @ two\n\nthree\n", encoding="utf-8")
        found = load_examples(tmp_path / "a.txt", kind=TaskKind.LANGUAGE_MODELLING)
        assert (found.texts, found.empty) == (["one @ two", "three"], 1)

    def test_a_missing_column(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no column 'text'; its columns are 'content'"):
            load(tmp_path / "a.jsonl", [{"content": "a"}], kind=TaskKind.LANGUAGE_MODELLING)
