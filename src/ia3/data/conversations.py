"""Conversations of records: by which columns they are known, and their messages as (role, content)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ia3.data.records import Records
from ia3.errors import listed, shorten
from ia3.tasks.columns import as_text, require_columns
from ia3.tasks.examples import Example
from ia3.tasks.template import Template

Turn = tuple[str, str]

# What the formats call those who speak.
_ROLES = {
    name: role
    for role, names in {
        "system": ("system", "developer"),
        "user": ("user", "human", "prompter"),
        "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
    }.items()
    for name in names
}
_KEYS = (("role", "content"), ("from", "value"))
# What no chat template is given here.
_TOOLS = ("tools", "functions")
_SYSTEM = "system"


@dataclass(frozen=True)
class Format:
    """How a record holds a conversation.

    Args:
        name: what it is called.
        template: what shows the question, or the one column of a list of messages.
        answer: the column of the answer; None where the messages end in it.
        reads_system: whether a column `system` belongs to it.
    """

    name: str
    template: Template
    answer: str | None = None
    reads_system: bool = True

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that a record must have."""
        return (*self.template.required, *([] if self.answer is None else [self.answer]))

    def require(self, source: str, found: Iterable[str]) -> None:
        """Refuse a source, or a record, without a column that must be there."""
        require_columns(source, found, *self.wanted, labelled=self.answer is not None)

    def columns(self, found: Iterable[str]) -> tuple[str, ...]:
        """What is read of the columns that there are."""
        system = [_SYSTEM] if self.reads_system and _SYSTEM in found else []
        return (*self.template.fields, *([] if self.answer is None else [self.answer]), *system)

    def describe(self, found: Iterable[str]) -> list[str]:
        """How records are read, and that their answers aren't in a column `label`, in a line each."""
        asked, *below = self.template.fields
        parts = [repr(asked) + (f", below it {below[0]!r} where there is one" if below else "")]
        parts += [f"the answer is {self.answer!r}"] if self.answer else []
        parts += [f"the system message is {_SYSTEM!r} where there is one"] if _SYSTEM in self.columns(found) else []
        alone = f" The template '{{{asked}}}' would read that column alone." if below else ""
        lines = [f"Read as {self.name}: {'; '.join(parts)}.{alone}"]
        if self.answer is None and "label" in found:
            lines.append(f"The column 'label' is not read: the answers are the messages in {asked!r}.")
        return lines

    @property
    def arguments(self) -> str:
        """What names it to `load_examples`."""
        answer = f" and `label_column={self.answer!r}`" if self.answer else ""
        return f"`text_column={self.template.fields[0]!r}`{answer}"


_PAIRS = (
    Format("Alpaca's rows", Template("{instruction}{\n\ninput}"), "output"),
    Format("Dolly's rows", Template("{instruction}{\n\ncontext}"), "response"),
    Format("prompts and completions", Template("{prompt}"), "completion"),
)
CHATS = tuple(
    Format("conversations", Template.of_column(name)) for name in ("messages", "conversations", "conversation")
)


def find_format(
    records: Records, template: Template | None, text_column: str, label_column: str, *, chats: bool
) -> Format | None:
    """The format of records of instructions, where their columns tell and no others are named.

    Args:
        records: what to read.
        template: what was asked for, if anything.
        text_column: the column of the text; `text`, the default, asks for none.
        label_column: the column of the answer; `label`, the default, asks for none unless it is there.
        chats: whether conversations can be learned, against a text and its answer alone.

    Returns:
        The format; None where a text and its answer are read as named.

    Raises:
        ValueError: the columns are those of several formats, or of conversations beside a label column asked for.
    """
    columns, default = {*records.columns}, Template.of_column("text")
    asked = template if template is not None else Template.of_column(text_column)
    named, system = label_column != "label", chats

    def fits(each: Format) -> bool:
        by_column = template is None and text_column == each.template.fields[0]
        return {*each.wanted} <= columns and (asked in (default, each.template) or by_column)

    answers = {label_column} if named else {each.answer for each in _PAIRS if "label" not in columns}
    pairs = [each for each in _PAIRS if fits(each) and each.answer in answers]
    if asked == default and {"text", label_column} <= columns:
        chats = False  # a text and its answer come first
    lists = [each for each in CHATS if chats and fits(each)]
    if chats and not pairs and not lists and label_column not in columns and not named and asked.is_one_column:
        lists = [Format("conversations", asked)] if holds_lists(records, asked.fields[0]) else []
    if named and lists and not pairs:
        column = lists[0].template.fields[0]
        raise ValueError(
            f"{records.source} has conversations in {shorten(column)}, whose last messages are the answers, and "
            f"`label_column={shorten(label_column)}` asks for others: leave `label_column` out, or name the texts' "
            "column, too."
        )
    found = pairs if named else [*pairs, *lists]
    if len(found) > 1:
        both = " and ".join(f"{each.name} ({', '.join(map(repr, each.wanted))})" for each in found)
        raise ValueError(
            f"{records.source} has the columns of {both}, so it doesn't tell which to learn: name one by "
            f"{', or by '.join(each.arguments for each in found)}; rows of several formats belong into files of their "
            "own."
        )
    return replace(found[0], reads_system=system) if found else None


def format_to_answer(records: Records, template: Template) -> Format:
    """The format of records that are to be answered; an answer that they have is left out.

    Args:
        records: what to answer.
        template: what the adapter reads.

    Raises:
        ValueError: there are several columns of conversations, and none is what the adapter reads.
    """
    chats = [each for each in CHATS if {*each.wanted} <= {*records.columns}]
    if chats and not {*template.fields} & {*records.columns}:
        if len(chats) > 1:
            both = " and ".join(repr(each.template.fields[0]) for each in chats)
            raise ValueError(f"{records.source} has conversations in {both}: name one column of them by `text_column`.")
        return chats[0]
    # In training its column `system` was read, too.
    known = next((each for each in _PAIRS if each.template == template), None)
    return Format("", template, reads_system=known is not None or holds_lists(records, template.fields[0]))


def holds_lists(records: Records, column: str) -> bool:
    """Whether a column has messages instead of texts."""
    return any(isinstance(cell, list) for cell in records.column(column))


class Learnable(NamedTuple):
    """A conversation to learn.

    Args:
        example: the last question and its answer, with what stands before them; None of a row without a text.
        is_cut: whether there were messages after the last answer, which are left out.
        unasked: how many messages of the assistant answer no user's.
    """

    example: Example | None
    is_cut: bool = False
    unasked: int = 0


def read_to_learn(record: Mapping[str, Any], place: str, how: Format) -> Learnable:
    """A conversation up to its last answer.

    Raises:
        ValueError: a conversation of another shape, or without an answer.
    """
    how.require(place, record)
    turns = _turns(record, place, how)
    if not turns:
        return Learnable(None)
    if how.answer is not None:
        answer = _spoken(record[how.answer], f"{place}: the completion", "assistant")
        if not answer:
            raise missing_answer(turns[-1][1], place, "completion")
        turns += answer
    roles = [role for role, _ in turns]
    end = max((number for number, role in enumerate(roles, start=1) if role == "assistant"), default=len(roles))
    if roles[:end][-2:] != ["user", "assistant"]:
        raise ValueError(
            f"{place}: the conversation ends in {' and '.join(roles[:end][-2:])}, expected a user's message and the "
            "assistant's answer to it: correct the row, or remove it."
        )
    if not any(content for role, content in turns if role == "user"):
        return Learnable(None)
    for (_, former), (role, content) in pairwise([("", ""), *turns[:end]]):
        if role == "assistant" and not content:
            raise missing_answer(former, place, "completion")
        if role == "user" and not content:
            raise ValueError(f"{place}: a user's message is empty: give it a text, or remove the row.")
    *before, (_, text), (_, label) = turns[:end]
    unasked = sum(role == "assistant" and former != "user" for former, role in pairwise(["", *roles[:end]]))
    return Learnable(Example(text, label, tuple(before)), end < len(roles), unasked)


def read_to_answer(record: Mapping[str, Any], place: str, how: Format) -> Example:
    """The last question of a conversation with what stands before it; an answer behind it is left out.

    Args:
        record: the row.
        place: where it was read, for the error.
        how: what `format_to_answer` found.

    Returns:
        The question; an empty one of a row without any.

    Raises:
        ValueError: a conversation of another shape.
    """
    turns = _turns(record, place, how)
    if turns and turns[-1][0] == "assistant":
        del turns[-1]
    if turns and turns[-1][0] != "user":
        raise ValueError(f"{place}: the conversation ends in {turns[-1][0]}, expected a user's message to answer.")
    return Example(turns[-1][1], "", tuple(turns[:-1])) if turns else Example("", "")


def missing_answer(text: str, place: str, noun: str) -> ValueError:
    """What to raise for a text without its label or completion."""
    return ValueError(
        f"{place}: the text has no {noun} ({text[:60]!r}); every row needs one. Give it one, or remove the row."
    )


def _turns(record: Mapping[str, Any], place: str, how: Format) -> list[Turn]:
    """The messages up to the question, or of a column of lists all; none of a row without a text."""
    column, cell = how.template.fields[0], record.get(how.template.fields[0])
    if how.template.is_one_column and isinstance(cell, list):
        turns = _spoken(cell, place, "user")
    elif text := how.template.render(record, place):
        if how.answer is None and how.name:
            raise ValueError(
                f"{place}: {column!r} is a {type(cell).__name__}, expected a list of objects with role and content."
            )
        turns = [("user", text)]
    else:
        return []
    for name in _TOOLS:
        if record.get(name):
            raise ValueError(f"{place}: {name!r} holds definitions of tools, which can't be learned: take them out.")
    system = as_text(record.get(_SYSTEM), f"{place}: {_SYSTEM!r}") if how.reads_system else ""
    if system and turns:
        own = [content for role, content in turns if role == "system"]
        if own not in ([], [system]):
            raise ValueError(
                f"{place} has one system message in {_SYSTEM!r} and another in {column!r}: keep one of them."
            )
        turns = turns if own else [("system", system), *turns]
    return turns


def _spoken(cell: Any, place: str, role: str) -> list[Turn]:
    """A list of messages, or a text that a role says; empty of an empty one."""
    if isinstance(cell, list):
        return [_message(each, f"{place}: message {number}") for number, each in enumerate(cell, start=1)]
    text = as_text(cell, place)
    return [(role, text)] if text else []


def _message(message: Any, place: str) -> Turn:
    keys = next((keys for keys in _KEYS if isinstance(message, dict) and {*keys} <= {*message}), None)
    if keys is None:
        raise ValueError(
            f"{place} is {shorten(message, 80)}, expected an object with role and content, or with from and value."
        )
    who, content = (message[key] for key in keys)
    # A table has a column for what any of its messages has, empty in the others.
    unread = sorted(key for key, value in message.items() if key not in keys and value not in (None, "", [], {}))
    if unread and not (unread == ["weight"] and message["weight"] == 1):
        raise ValueError(
            f"{place} has [{listed(unread)}], which can't be learned: expected {keys[0]} and {keys[1]} alone."
        )
    role = _ROLES.get(str(who).strip().casefold())
    if role is None:
        raise ValueError(f"{place} has the role {shorten(who)}, expected one of {', '.join(_ROLES)}.")
    if content is None or content != content:
        raise ValueError(f"{place} has no content ({keys[1]!r} is {content}): give it some, or take it out.")
    return role, _text_of(content, f"{place}: the {keys[1]}")


def _text_of(content: Any, what: str) -> str:
    """A message's text, which may come in parts."""
    if not isinstance(content, list):
        return as_text(content, what)
    for number, part in enumerate(content, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'{what}, part {number} is {part!r:.60}, expected {{"type": "text", "text": …}}: nothing but text can '
                "be learned."
            )
    return "".join(part["text"] for part in content).strip()
