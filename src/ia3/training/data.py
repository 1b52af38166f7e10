"""Texts with their answers, from records: labels, free text, the tags of words, the last turn of a conversation.

A source gives `Examples`: rows in the source's order, the labels in theirs, and what was odd about them.
Empty rows are dropped and counted. Duplicates are counted and kept, since published row counts include them,
and `split_examples` never puts one text on both sides. Spellings of a label that differ in case or white space alone
become one label.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

from ia3.training.labels import (
    describe_spellings,
    doubt_classes,
    label_key,
    match_spellings,
    merge_spellings,
    quote_labels,
    spellings_apart,
)
from ia3.training.reading import MESSAGES_COLUMN, Reading, recognise, with_unread
from ia3.training.records import TWEETS, Records, as_text, read_records, require_columns
from ia3.training.task import TaskKind
from ia3.training.template import Template

_ROLES = ("system", "user", "assistant")

# How many times as frequent as the rarest class the most frequent one may be without a remark.
_IMBALANCE = 5


@dataclass(frozen=True)
class Example:
    """One text and its label, or the last message of a conversation and the answer to it.

    Args:
        text: what is read, or the user's last message.
        label: the label; the answer; or for the words of a text, one tag each with a blank between.
        turns: the messages before the text as (role, content), the system's among them.
    """

    text: str
    label: str
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Texts with their answers and where they come from.

    Args:
        rows: the examples in order.
        labels: the classes or tags in their source's order, those without a row too; empty where the answers are
            free text.
        source: where the rows were read.
        duplicates: rows whose text, case and white space aside, stood in an earlier row. They are kept.
        empty: rows without a text, dropped.
        kind: what kind of task they are for.
        reading: which columns they were read from; None of examples made in memory.
        remarks: how they were read, a line each.
    """

    rows: tuple[Example, ...]
    labels: tuple[str, ...]
    source: str
    duplicates: int
    empty: int
    kind: TaskKind = TaskKind.LABEL_WORDS
    reading: Reading | None = None
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return _part(self, self.rows[index])
        return self.rows[index]

    @property
    def texts(self) -> list[str]:
        """The texts in order."""
        return [row.text for row in self.rows]

    def describe(self) -> str:
        """A line on rows, rows of each class or words of each tag, and what was odd; then a line a remark."""
        parts = [f"{self.source}: {len(self.rows):,} rows{self._counts()}"]
        if self.kind in ONE_LABEL_A_TEXT and (remark := _imbalance(self.rows)):
            parts.append(remark)
        if self.duplicates:
            parts.append(f"{self.duplicates:,} duplicate{'s' * (self.duplicates > 1)} kept")
        if self.kind.has_labels and (conflicts := conflicts_of(self.rows).texts):
            parts.append(f"{conflicts:,} text{'s' * (conflicts > 1)} with different labels")
        if self.empty:
            parts.append(f"{self.empty:,} empty row{'s' * (self.empty > 1)} dropped")
        return "\n".join(["; ".join(parts), *self.remarks, *self._doubts()])

    def _doubts(self) -> list[str]:
        """What the answers themselves tell: labels that may be one or none, texts with many answers."""
        doubts = []
        if self.kind.has_labels and (apart := spellings_apart(self._answers())):
            groups = ", ".join(quote_labels(group) for group in apart)
            doubts.append(f"These differ in case, blanks or Unicode form alone, and stay apart: {groups}.")
        if self.kind in ONE_LABEL_A_TEXT and not self._named_classes and (doubt := doubt_classes(self._answers())):
            doubts.append(f"Are these labels? {doubt[:1].upper()}{doubt[1:]}.")
        if not self.kind.has_labels and (most := conflicts_of(self)).answers >= _MANY_ANSWERS:
            doubts.append(f"{most.answers:,} different answers to the same text, {most.text[:60]!r}{self._left_out()}.")
        if self.reading is not None and (unread := self.reading.describe_unread(len(self.rows))):
            doubts.append(unread)
        return doubts

    def _answers(self) -> list[str]:
        tagged = self.kind is TaskKind.TOKEN_CLASSIFICATION
        return [label for row in self.rows for label in (row.label.split() if tagged else [row.label])]

    @property
    def _named_classes(self) -> bool:
        return self.reading is not None and self.reading.class_names

    def _left_out(self) -> str:
        others = self.reading.others if self.reading is not None else ()
        return f"; not read: {', '.join(map(repr, others))}" if others else ""

    def _counts(self) -> str:
        if not self.kind.has_labels:
            return ""
        tagged = self.kind is TaskKind.TOKEN_CLASSIFICATION
        counts = Counter(self._answers())
        classes = ", ".join(f"{counts[label]:,} {label}" for label in self.labels)
        return f" of {counts.total():,} words ({classes})" if tagged else f" ({classes})"

    def digest(self) -> str:
        """The SHA-256 of the rows in order, in hexadecimal: equal for equal texts, labels and turns alone."""
        digest = hashlib.sha256()
        for row in self.rows:
            # Escaped to ASCII, so that no text, lone surrogates among them, is without bytes.
            digest.update(json.dumps([row.text, row.label, row.turns], separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()


ONE_LABEL_A_TEXT = (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION)
# So many different answers to one text are said, where answers are free text and two may be as right.
_MANY_ANSWERS = 3


def load_examples(
    source: str | Path,
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
            or the tweets are read, columns of any names hold their texts and labels.
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
    line_column = wording.fields[0] if len(wording.fields) == 1 else "text"
    records = read_records(source, line_column=line_column, line_label=label_column, split=split)
    remarks = []
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
    labels = _labels(rows, records.classes.get(label_column), kind)
    examples = Examples(rows, labels, records.source, _duplicates(rows), empty, kind, reading, tuple(remarks))
    return merge_labels_of(examples) if merge_labels else examples


def merge_labels_of(examples: Examples) -> Examples:
    """The examples with one spelling of each label, the most frequent one or among equals the first.

    Nothing changes where labels are the names of a `ClassLabel`, tags, whose case may mean something, or free text.
    """
    if examples.kind not in ONE_LABEL_A_TEXT or examples._named_classes:
        return examples
    merged = merge_spellings(row.label for row in examples)
    said = (
        f"Spellings of one label are merged: {describe_spellings(merged)} (--no-merge-labels, or merge_labels: false "
        "in a recipe, keeps them apart)."
    )
    return _respelled(examples, merged, said)


def match_labels(examples: Examples, known: Sequence[str], whose: str) -> Examples:
    """The examples with the known labels in place of other spellings of them.

    Args:
        examples: of texts with one label each; others stay as they are.
        known: the labels to compare with.
        whose: whose these are, for the remark, as in `"the adapter's"`.
    """
    if examples.kind not in ONE_LABEL_A_TEXT:
        return examples
    labels = {row.label for row in examples}
    matched = match_spellings((row.label for row in examples), known)
    if examples._named_classes:  # of which no two become one
        shared = Counter([*matched.values(), *labels])
        matched = {label: other for label, other in matched.items() if shared[other] == 1}
    return _respelled(examples, matched, f"Other spellings are read as {whose} labels: {describe_spellings(matched)}.")


def _respelled(examples: Examples, labels: Mapping[str, str], said: str) -> Examples:
    """The examples with other labels in place of some, and a remark; the order of labels is kept."""
    if not labels:
        return examples
    rows = tuple(replace(row, label=labels.get(row.label, row.label)) for row in examples)
    by_order = examples.labels == _labels(examples.rows, None, examples.kind)
    names = tuple(dict.fromkeys(labels.get(label, label) for label in examples.labels))
    ordered = _labels(rows, None, examples.kind) if by_order else names
    return replace(examples, rows=rows, labels=ordered, remarks=(*examples.remarks, said))


def _without_label_column(records: Records, label_column: str) -> list[str]:
    """A remark on a column of labels beside conversations, which hold their answers.

    Raises:
        ValueError: the column was asked for.
    """
    if label_column != "label":
        raise ValueError(
            f"{records.source} has conversations in {MESSAGES_COLUMN!r}, whose last messages are the answers, and "
            f"label_column={label_column!r} asks for others: leave label_column out, or name the texts' column, too."
        )
    if "label" not in records.columns:
        return []
    return [f"The column 'label' is not read: the answers are the last messages in {MESSAGES_COLUMN!r}."]


def _whole(row: Example) -> str:
    """All that the model reads of a row."""
    return "\n".join([*(content for _, content in row.turns), row.text])


def split_examples(examples: Examples, test_size: float = 0.1, seed: int = 42) -> tuple[Examples, Examples]:
    """Split at random; rows with the same text, case and white space aside, stay together.

    Where each text has one label, every label stays in training, so that a rare one may be missing among the held-out.

    Args:
        examples: what to split.
        test_size: the held-out part, between 0 and 1; rounded up to whole rows.
        seed: the same seed gives the same split.

    Returns:
        The training and the held-out examples, each in shuffled order.

    Raises:
        ValueError: `test_size` is not between 0 and 1, or a part would be empty.
    """
    if not 0 < test_size < 1:
        raise ValueError(f"test_size is {test_size}; expected a fraction between 0 and 1, such as 0.1.")
    rows = list(examples.rows)
    random.Random(seed).shuffle(rows)
    groups = Counter(_what_is_read(row) for row in rows)
    room = math.ceil(len(rows) * test_size)
    held_out = set()
    for text, size in groups.items():
        if size <= room:
            held_out.add(text)
            room -= size
    if examples.kind in (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION):
        held_out -= _only_rows(rows, held_out)
    if not 0 < len(held_out) < len(groups):
        raise ValueError(
            f"{examples.source} cannot be split: test_size={test_size} holds out {len(held_out)} of its "
            f"{len(groups)} different texts. Give more rows, or another test_size."
        )
    train = [row for row in rows if _what_is_read(row) not in held_out]
    test = [row for row in rows if _what_is_read(row) in held_out]
    return _part(examples, train), _part(examples, test)


def _only_rows(rows: Sequence[Example], held_out: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The held-out texts of labels that no other text has."""
    learned = {row.label for row in rows if _what_is_read(row) not in held_out}
    return {_what_is_read(row) for row in rows if row.label not in learned}


def answers_to_texts(*parts: Sequence[Example]) -> list[str]:
    """The answers, one for each different text and answer: what was held out again tells nothing about classes."""
    return [label for _, label in dict.fromkeys((_what_is_read(row), row.label) for part in parts for row in part)]


def bundled_tweets() -> tuple[Examples, Examples]:
    """The tweets that come with the package: 3,600 to train on and 300 held out, balanced over three classes.

    Any first N training rows are balanced too. From zeroshot/twitter-financial-news-sentiment 1.0.0 (MIT).

    Returns:
        The training and the held-out examples.
    """
    return load_examples(TWEETS, split="train"), load_examples(TWEETS, split="test")


def count_truncated(texts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """How many of `texts` have more than `max_length` tokens, special tokens included."""
    if not texts:
        return 0
    encoded = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(tokens) > max_length for tokens in encoded)


def _wording(template: Template | None, text_column: str, label_column: str, kind: TaskKind) -> Template:
    """What the model reads of a record."""
    if template is None:
        template = Template.of_column(text_column)
    elif text_column != "text":
        raise ValueError(
            f"There is a template and the text column {text_column!r}: a template names its columns itself, as in "
            f"'Review: {{{text_column}}}', so leave text_column out."
        )
    if label_column in template.fields:
        raise ValueError(
            f"The template {template.pattern!r} shows the label column {label_column!r} to the model, which would "
            "only copy it: take it out, or name another --label-column."
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


def _labels(rows: Sequence[Example], classes: tuple[str, ...] | None, kind: TaskKind) -> tuple[str, ...]:
    if not kind.has_labels:
        return ()
    if classes is not None:
        return classes
    if kind is TaskKind.TOKEN_CLASSIFICATION:
        tags = {tag for row in rows for tag in row.label.split()}
        return tuple(sorted(tags, key=lambda tag: (tag != "O", _label_order(tag))))
    return tuple(sorted({row.label for row in rows}, key=_label_order))


def _label_order(label: str) -> tuple[int, str]:
    """Sort "2" before "10", and words by the alphabet."""
    return (int(label), "") if label.isdecimal() else (-1, label)


def _part(whole: Examples, rows: Sequence[Example]) -> Examples:
    return replace(whole, rows=tuple(rows), duplicates=_duplicates(rows), empty=0, remarks=())


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()


def _what_is_read(row: Example) -> tuple[str, ...]:
    """What makes two rows the same to the model: the text and the messages before it, case and white space aside."""
    return (*(_normalised(content) for _, content in row.turns), _normalised(row.text))


def _duplicates(rows: Sequence[Example]) -> int:
    return len(rows) - len({_what_is_read(row) for row in rows})


class Conflicts(NamedTuple):
    """Texts that stand in several rows with different answers: how many, their rows, and the one with most answers."""

    texts: int
    rows: int
    text: str
    answers: int


def conflicts_of(rows: Sequence[Example]) -> Conflicts:
    """Count the texts with several answers."""
    of_text = defaultdict(list)
    for row in rows:
        of_text[_what_is_read(row)].append(row)
    answers = {text: len({row.label for row in found}) for text, found in of_text.items()}
    several = [text for text, count in answers.items() if count > 1]
    if not several:
        return Conflicts(0, 0, "", 0)
    most = max(several, key=answers.__getitem__)
    return Conflicts(len(several), sum(len(of_text[text]) for text in several), of_text[most][0].text, answers[most])


def _imbalance(rows: Sequence[Example]) -> str:
    """A remark where one class is far more frequent than another; classes without a row can't be drawn."""
    labels = {label_key(row.label): row.label for row in rows}  # spellings of one label are no rare classes
    counts = Counter(labels[label_key(row.label)] for row in rows).most_common()
    if not counts or counts[0][1] < _IMBALANCE * counts[-1][1]:
        return ""
    (most, often), (least, seldom) = counts[0], counts[-1]
    return f"{most} is {often / seldom:.3g} times as frequent as {least} (`balance` draws each label equally often)"
