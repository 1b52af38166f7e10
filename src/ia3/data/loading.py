"""Texts with their answers, from records: labels, free text, the tags of words, the last turn of a conversation.

A source gives `Examples`: rows in the source's order, the labels in theirs, and what was odd about them.
Empty rows are dropped and counted. Duplicates are counted and kept, since published row counts include them,
and `split_examples` never puts one text on both sides. Spellings of a label that differ in case or white space alone
become one label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ia3.data.columns import ColumnRows, shared
from ia3.data.conversations import Format, Learnable, find_format, holds_lists, missing_answer, read_to_learn
from ia3.data.reading import with_unread
from ia3.data.records import TWEETS, Records, read_records
from ia3.errors import SettingError, shorten
from ia3.tasks.columns import as_text
from ia3.tasks.example import Example, ExampleRows
from ia3.tasks.examples import (
    Examples,
    Reading,
    count_duplicates,
    merge_labels_of,
    ordered_labels,
)
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template


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
    Where the answers are free text, known formats are read by their columns, and a remark says which: the rows of
    Alpaca and of Dolly (`instruction`, below it `input` or `context` where there is one, and the answer in `output`
    or `response`), and `prompt` with `completion`. For instructions a cell may also be a list of messages,
    `{"role": …, "content": …}` or `{"from": …, "value": …}`, such as a whole conversation in `messages` or
    `conversations`, or in the text column that is named; a column `system` is its system message. A conversation is
    read up to its last answer.

    Args:
        source: `"bundled:tweets"`; `"financial_phrasebank"`, its all-agree part from the hub; PhraseBank's
            own `.zip` or a `.txt` of `sentence@label` lines; a `.csv`, `.jsonl` or `.json` (one object a
            line, or one list) or `.parquet` file; any other name is a data set on the hub. Where PhraseBank
            or the tweets are read, columns of any names hold their texts and labels. Or records, as `read_for` reads
            them.
        template: the text around the columns; instead of `text_column`.
        text_column: the column with the text.
        label_column: the column with the label, the completion or the tags, unread where the texts alone are learned.
            Numbers of a `ClassLabel` become their names.
        kind: what the label is: one of a closed set, free text, one tag a word, or none. White space around a text or
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
            another number of tags than words, a conversation without an answer to a user's message or with more
            than texts in it, columns of several formats, or conversations and a label column.
    """
    wording = _wording(template, text_column, label_column, kind)
    answers = label_column if kind.has_answers else None
    records = source if isinstance(source, Records) else read_for(source, wording, answers, split)
    chats, known = kind is TaskKind.INSTRUCTIONS, None
    if kind.has_answers and not kind.has_labels:
        known = find_format(records, template, text_column, label_column, chats=chats)
    system = chats and holds_lists(records, wording.fields[0])
    how = known or Format("", wording, label_column if kind.has_answers else None, reads_system=system)
    how.require(records.source, records.columns)
    tagged = kind is TaskKind.TOKEN_CLASSIFICATION
    columns = None if chats or tagged else _read_columns(records, how, kind)
    said: list[str] = [] if known is None else known.describe(records.columns)
    if columns is not None:
        rows = ExampleRows(*columns)
        whole, places = columns[0], [place for place, text in enumerate(rows.texts) if text]
        rows = rows if len(places) == len(rows) else rows.take(places)
    else:
        read = read_to_learn if chats else _read_tagged_words if tagged else partial(_read_text, kind=kind)
        found = [read(record, f"{records.source}, {place}", how) for place, record in records]
        whole = ["" if each.example is None else _whole(each.example) for each in found]
        rows = ExampleRows.of(each.example for each in found if each.example is not None)
        said += _oddities(found)
    empty = len(records) - len(rows) + records.blank
    if not rows:
        what = "labelled texts" if kind.has_answers else "texts"
        raise ValueError(f"{records.source} has no rows with a text ({empty} empty); expected {what}.")
    label_column = how.answer or label_column
    # The questions that are asked afterwards come in a column of texts.
    asked = wording if known is not None and how.answer is None else how.template
    reading = Reading(asked, label_column, how.columns(records.columns), label_column in records.classes)
    reading = with_unread(reading, records, whole)
    labels = ordered_labels(rows, records.classes.get(label_column), kind)
    remarks = (*records.remarks, *said)
    examples = Examples(rows, labels, records.source, count_duplicates(rows), empty, kind, reading, remarks)
    return merge_labels_of(examples) if merge_labels else examples


def read_for(source: str | Path, wording: Template, label_column: str | None, split: str | None = None) -> Records:
    """Read rows for the texts and answers that are asked for, which columns without a name are called by."""
    line_column = wording.fields[0] if len(wording.fields) == 1 else "text"
    named = [column for column in (*wording.fields, label_column) if column not in ("text", "label", None)]
    return read_records(source, line_column=line_column, line_label=label_column, named=named, split=split)


def _oddities(found: Sequence[Learnable]) -> list[str]:
    """Lines on what conversations have beside questions and answers."""
    counts = {
        "Conversations that go on after their last answer, where they are cut": sum(each.is_cut for each in found),
        "Messages of the assistant that answer no user's, so that they are not learned": sum(
            each.unasked for each in found
        ),
    }
    return [f"{what}: {count:,}." for what, count in counts.items() if count]


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
            f"There is a template and the text column {shorten(text_column)}: a template names its columns itself, as "
            f"in 'Review: {{{text_column:.50}}}', so leave `text_column` out."
        )
    if label_column in template.fields:
        raise SettingError(
            f"The template {shorten(template.pattern)} shows the label column {shorten(label_column)} to the model, "
            "which would only copy it: take it out, or name another `label_column`."
        )
    if kind is TaskKind.TOKEN_CLASSIFICATION and not template.is_one_column:
        raise ValueError(
            f"The template {shorten(template.pattern)} has more than the words of one column, and only these have "
            f"tags: expected one column alone, such as '{{{template.fields[0]:.50}}}'."
        )
    return template


def _read_columns(records: Records, how: Format, kind: TaskKind) -> tuple[list[str], list[str]] | None:
    """The texts, empty of a row without any, and the answers, column by column as `_read_text` reads row by row.

    None where a row has something that can't be read, or may not: reading row by row says what and where.
    """
    if not isinstance(records.rows, ColumnRows):
        return None
    try:
        cells = [_texts_in(records.column(field)) for field in how.template.fields]
        labels = [""] * len(records) if how.answer is None else _texts_in(records.column(how.answer))
    except ValueError:
        return None
    texts = cells[0] if how.template.is_one_column else [how.template.fill(row) for row in zip(*cells, strict=True)]
    missing = {label for label in {*labels} if _is_missing(label, kind)} if how.answer is not None else set()
    if missing and any(text and label in missing for text, label in zip(texts, labels, strict=True)):
        return None
    return texts, labels


def _texts_in(cells: list[Any]) -> list[str]:
    return shared([cell.strip() if type(cell) is str else as_text(cell, "") for cell in cells])


def _is_missing(label: str, kind: TaskKind) -> bool:
    """Tables of classes write a gap as NaN; as free text it may be a word."""
    return not label or (kind.has_labels and label.casefold() == "nan")


def _read_text(record: Mapping[str, Any], place: str, how: Format, kind: TaskKind) -> Learnable:
    how.require(place, record)
    text = how.template.render(record, place)
    if not text:
        return Learnable(None)
    if how.answer is None:
        return Learnable(Example(text, ""))
    noun = "label" if kind.has_labels else "completion"
    label = as_text(record[how.answer], f"{place}: the {noun}")
    if _is_missing(label, kind):
        raise missing_answer(text, place, noun)
    return Learnable(Example(text, label))


def _read_tagged_words(record: Mapping[str, Any], place: str, how: Format) -> Learnable:
    how.require(place, record)
    words, tags = (words_of(record[column], place, column) for column in how.wanted)
    if not words:
        return Learnable(None)
    if len(words) != len(tags):
        raise ValueError(
            f"{place} has {len(words)} words and {len(tags)} tags ({' '.join(words)[:60]!r}): expected one tag a word. "
            "Correct the row, or remove it."
        )
    return Learnable(Example(" ".join(words), " ".join(tags)))


def words_of(cell: Any, place: str, column: str) -> list[str]:
    """The words or tags of a cell."""
    if not isinstance(cell, list):
        return as_text(cell, f"{place}: {column!r}").split()
    pieces = [as_text(piece, f"{place}: number {number} of {column!r}") for number, piece in enumerate(cell, start=1)]
    for number, piece in enumerate(pieces, start=1):
        if len(piece.split()) != 1:
            raise ValueError(
                f"{place}: number {number} of {column!r} is {shorten(piece)}, expected one word without white space: "
                "take it out with its counterpart, or join its parts, as by '_'."
            )
    return pieces
