"""Texts with their answers, from records: labels, free text, the tags of words, the last turn of a conversation.

A source gives `Examples`: rows in the source's order, the labels in theirs, and what was odd about them.
Empty rows are dropped and counted. Duplicates are counted and kept, since published row counts include them,
and `split_examples` never puts one text on both sides. Spellings of a label that differ in case or white space alone
become one label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ia3.data.reading import recognise, with_unread
from ia3.data.records import TWEETS, Records, read_records
from ia3.errors import SettingError
from ia3.tasks.columns import as_text, require_columns
from ia3.tasks.examples import (
    MESSAGES_COLUMN,
    Example,
    Examples,
    Reading,
    count_duplicates,
    merge_labels_of,
    ordered_labels,
)
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

_ROLES = ("system", "user", "assistant")


def load_examples(
    source: str | Path | Records,
    *,
    template: Template | None = None,
    text_column: str = "text",
    label_column: str = "label",
    kind: TaskKind = TaskKind.LABEL_WORDS,
    split: str | None = None,
    merge_labels: bool = True,
) -> Examples:
    """Read texts with their answers, as the model will see them.

    For token classification a cell holds a list of words, or of their tags, or a text that is split at white space.
    For instructions without text and label columns, the conversations of a column `messages` are read: lists of
    `{"role": …, "content": …}` whose last answer is the one to learn. Where the answers are free text, the rows of
    Alpaca and of Dolly are known by their columns: `instruction`, below it `input` or `context` where there is one, and
    the answer in `output` or `response`.

    Args:
        source: `"bundled:tweets"`; `"financial_phrasebank"`, its all-agree part from the hub; PhraseBank's
            own `.zip` or a `.txt` of `sentence@label` lines; a `.csv`, `.jsonl` or `.json` (one object a
            line, or one list) or `.parquet` file; any other name is a data set on the hub. Where PhraseBank
            or the tweets are read, columns of any names hold their texts and labels. Or records, as `read_for` reads
            them.
        template: the text around the columns; instead of `text_column`.
        text_column: the column with the text.
        label_column: the column with the label, the completion or the tags. Numbers of a `ClassLabel` become
            their names.
        kind: what the label is: one of a closed set, free text, or one tag a word. White space around a text or
            a completion is dropped, inside it is kept.
        split: which split of a data set; by default `"train"`.
        merge_labels: read the spellings of a label that differ in case, white space or Unicode form alone as one, the
            most frequent; of texts with one label each. The names of a `ClassLabel` and tags stay as they are.

    Returns:
        The rows that have a text.

    Raises:
        FileNotFoundError: no such file or data set, or the hub cannot be reached.
        ValueError: nothing in the file, a missing column, a row without label, an encoding that cannot be
            read, a line without `@`, a `split` of a source that has none, a template that shows the label,
            another number of tags than words, a conversation that doesn't end in a user's message and its
            answer, or conversations and a label column.
    """
    wording = _wording(template, text_column, label_column, kind)
    records = source if isinstance(source, Records) else read_for(source, wording, label_column, split)
    remarks = [*records.remarks]
    if kind is TaskKind.INSTRUCTIONS and _holds_conversations(records, wording, label_column):
        remarks += _without_label_column(records, label_column)
        reading = Reading(wording, label_column, (MESSAGES_COLUMN,))
        read: _RowReader = _read_conversation
    else:
        known = recognise(records.columns, text_column, label_column)
        if known is not None and template is None and not kind.has_labels:
            wording, label_column, said = known
            remarks.append(said)
        class_names = label_column in records.classes
        reading = Reading(wording, label_column, (*wording.fields, label_column), class_names)
        read = _row_reader(records, reading, kind)
    found = [read(record, f"{records.source}, {place}") for place, record in records]
    rows = tuple(row for row in found if row is not None)
    empty = len(found) - len(rows) + records.blank
    if not rows:
        raise ValueError(f"{records.source} has no rows with a text ({empty} empty); expected labelled texts.")
    reading = with_unread(reading, records, ["" if row is None else _whole(row) for row in found])
    labels = ordered_labels(rows, records.classes.get(label_column), kind)
    examples = Examples(rows, labels, records.source, count_duplicates(rows), empty, kind, reading, tuple(remarks))
    return merge_labels_of(examples) if merge_labels else examples


def read_for(source: str | Path, wording: Template, label_column: str, split: str | None = None) -> Records:
    """Read rows for the texts and labels that are asked for, which columns without a name are called by."""
    line_column = wording.fields[0] if len(wording.fields) == 1 else "text"
    named = [column for column in (*wording.fields, label_column) if column not in ("text", "label")]
    return read_records(source, line_column=line_column, line_label=label_column, named=named, split=split)


def _without_label_column(records: Records, label_column: str) -> list[str]:
    """A remark on a column of labels beside conversations, which hold their answers.

    Raises:
        ValueError: the column was asked for.
    """
    if label_column != "label":
        raise ValueError(
            f"{records.source} has conversations in {MESSAGES_COLUMN!r}, whose last messages are the answers, and "
            f"`label_column={label_column!r}` asks for others: leave `label_column` out, or name the texts' column, "
            "too."
        )
    if "label" not in records.columns:
        return []
    return [f"The column 'label' is not read: the answers are the last messages in {MESSAGES_COLUMN!r}."]


def _whole(row: Example) -> str:
    """All that the model reads of a row."""
    return "\n".join([*(content for _, content in row.turns), row.text])


def bundled_tweets() -> tuple[Examples, Examples]:
    """The tweets that come with the package: 3,600 to train on and 300 held out, balanced over three classes.

    Any first N training rows are balanced too. From zeroshot/twitter-financial-news-sentiment 1.0.0 (MIT).

    Returns:
        The training and the held-out examples.
    """
    return load_examples(TWEETS, split="train"), load_examples(TWEETS, split="test")


def _wording(template: Template | None, text_column: str, label_column: str, kind: TaskKind) -> Template:
    """What the model reads of a record."""
    if template is None:
        template = Template.of_column(text_column)
    elif text_column != "text":
        raise SettingError(
            f"There is a template and the text column {text_column!r}: a template names its columns itself, as in "
            f"'Review: {{{text_column}}}', so leave `text_column` out."
        )
    if label_column in template.fields:
        raise SettingError(
            f"The template {template.pattern!r} shows the label column {label_column!r} to the model, which would "
            "only copy it: take it out, or name another `label_column`."
        )
    if kind is TaskKind.TOKEN_CLASSIFICATION and template != Template.of_column(template.fields[0]):
        raise ValueError(
            f"The template {template.pattern!r} has more than the words of one column, and only these have tags: "
            f"expected one column alone, such as '{{{template.fields[0]}}}'."
        )
    return template


# What makes an example of a record and its place, None of one without a text.
_RowReader = Callable[[Mapping[str, Any], str], Example | None]


def _row_reader(records: Records, reading: Reading, kind: TaskKind) -> _RowReader:
    template, label_column = reading.template, reading.label_column
    require_columns(records.source, records.columns, *template.required, label_column)
    if kind is TaskKind.TOKEN_CLASSIFICATION:
        return lambda record, place: _read_tagged_words(record, place, template.fields[0], label_column)
    return lambda record, place: _read_text(record, place, template, label_column, kind)


def _holds_conversations(records: Records, template: Template, label_column: str) -> bool:
    # A text column that was named and isn't there is a mistake, not a wish for conversations.
    named = template != Template.of_column("text")
    has_pairs = {"text", label_column} <= set(records.columns)
    return MESSAGES_COLUMN in records.columns and not named and not has_pairs


def _read_text(
    record: Mapping[str, Any], place: str, template: Template, label_column: str, kind: TaskKind
) -> Example | None:
    require_columns(place, record, label_column)
    text = template.render(record, place)
    if not text:
        return None
    label = as_text(record[label_column], f"{place}: the {_answer_noun(kind)}")
    # Tables of classes write a gap as NaN; as free text it may be a word.
    if not label or (kind.has_labels and label.casefold() == "nan"):
        raise _missing_answer(text, place, kind)
    return Example(text, label)


def _answer_noun(kind: TaskKind) -> str:
    return "label" if kind.has_labels else "completion"


def _missing_answer(text: str, place: str, kind: TaskKind) -> ValueError:
    return ValueError(
        f"{place}: the text has no {_answer_noun(kind)} ({text[:60]!r}); every row needs one. "
        "Give it one, or remove the row."
    )


def _read_tagged_words(record: Mapping[str, Any], place: str, column: str, label_column: str) -> Example | None:
    require_columns(place, record, column, label_column)
    words = words_of(record[column], place, column)
    if not words:
        return None
    tags = words_of(record[label_column], place, label_column)
    if len(words) != len(tags):
        raise ValueError(
            f"{place} has {len(words)} words and {len(tags)} tags ({' '.join(words)[:60]!r}): expected one tag a word. "
            "Correct the row, or remove it."
        )
    return Example(" ".join(words), " ".join(tags))


def words_of(cell: Any, place: str, column: str) -> list[str]:
    """The words or tags of a cell."""
    if not isinstance(cell, list):
        return as_text(cell, f"{place}: {column!r}").split()
    pieces = [as_text(piece, f"{place}: number {number} of {column!r}") for number, piece in enumerate(cell, start=1)]
    for number, piece in enumerate(pieces, start=1):
        if len(piece.split()) != 1:
            raise ValueError(
                f"{place}: number {number} of {column!r} is {piece!r}, expected one word without white space: take it "
                "out with its counterpart, or join its parts, as by '_'."
            )
    return pieces


def conversation_to_answer(record: Mapping[str, Any], place: str) -> Example:
    """The last question of a conversation with what stands before it; an answer behind it is left out.

    Args:
        record: the row; its column `messages` holds the conversation.
        place: where the row was read, for the error.

    Raises:
        ValueError: a conversation of another shape.
    """
    messages = list(record.get(MESSAGES_COLUMN) or ())
    if not messages or not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
        messages.append({"role": "assistant", "content": "…"})
    example = _read_conversation({MESSAGES_COLUMN: messages}, place)
    return Example("", "") if example is None else replace(example, label="")


def _read_conversation(record: Mapping[str, Any], place: str) -> Example | None:
    require_columns(place, record, MESSAGES_COLUMN)
    if not record[MESSAGES_COLUMN]:
        return None
    messages = _messages(record[MESSAGES_COLUMN], place)
    roles = [role for role, _ in messages]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError(
            f"{place}: the conversation ends in {' and '.join(roles[-2:])}, expected a user's message and the "
            "assistant's answer to it: take off what comes after the last answer, or remove the row."
        )
    *turns, (_, text), (_, answer) = messages
    if not text:
        return None
    if not answer:
        raise _missing_answer(text, place, TaskKind.INSTRUCTIONS)
    return Example(text, answer, tuple(turns))


def _messages(cell: Any, place: str) -> list[tuple[str, str]]:
    """The messages of a conversation as (role, content)."""
    if not isinstance(cell, list):
        raise ValueError(
            f"{place}: {MESSAGES_COLUMN!r} is a {type(cell).__name__}, expected a list of objects with role and "
            "content."
        )
    return [_message(each, f"{place}: message {number}") for number, each in enumerate(cell, start=1)]


def _message(message: Any, place: str) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"{place} is {message!r:.80}, expected an object with role and content.")
    if message["role"] not in _ROLES:
        raise ValueError(f"{place} has the role {message['role']!r}, expected one of {', '.join(_ROLES)}.")
    # A table has a column for what any of its messages has, empty in the others.
    unread = sorted(key for key, value in message.items() if key not in ("role", "content") and value)
    if unread:
        raise ValueError(f"{place} has {unread}, which can't be learned: expected role and content alone.")
    return message["role"], as_text(message["content"], f"{place}: the content")
