"""Texts with their answers: what they were read from, spellings of labels made one, what is held out.

Duplicates are counted and kept, since published row counts include them, and `split_examples` never puts one text on
both sides.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple, overload

from ia3.errors import listed, shorten
from ia3.tasks.example import Example as Example  # which belongs to what is public here
from ia3.tasks.example import ExampleRows
from ia3.tasks.labels import (
    describe_spellings,
    doubt_classes,
    label_key,
    match_spellings,
    merge_spellings,
    quote_labels,
    spellings_apart,
)
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

# How many times as frequent as the rarest class the most frequent one may be without a remark.
_IMBALANCE = 5

# So many different answers to one text are said, where answers are free text and two may be as right.
_MANY_ANSWERS = 3

ONE_LABEL_A_TEXT = (TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION)


@dataclass(frozen=True)
class Reading:
    """Which columns examples were read from.

    Args:
        template: what the model reads of a record.
        label_column: the column with the answer.
        columns: all that were read.
        class_names: whether the answers are names of a `ClassLabel`.
        unread: filled columns that were not read and usually belong to the text, and how many rows have them.
        others: the other columns that were not read.
        suggested: the template that reads those in `unread`, too; None where none can.
    """

    template: Template
    label_column: str
    columns: tuple[str, ...]
    class_names: bool = False
    unread: tuple[tuple[str, int], ...] = ()
    others: tuple[str, ...] = ()
    suggested: Template | None = None

    @property
    def of_conversations(self) -> bool:
        """Whether the questions and answers are messages of conversations in a column of their own."""
        return not {*self.template.fields} & {*self.columns}

    @property
    def remedy(self) -> str:
        """What reads the unread columns, too."""
        if self.suggested is not None:
            which = "both" if len(self.suggested.fields) == 2 else "all"
            return f"`template={self.suggested.pattern!r}` reads {which}."
        if self.of_conversations:
            return f"Of {self.columns[0]!r} the messages alone are read: write into them what belongs there."
        return "No template shows lists: write what they hold into a column of text."


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Texts with their answers and where they come from.

    Args:
        rows: the examples in order; any sequence is kept as columns.
        labels: the classes or tags in their source's order, those without a row too; empty where the answers are
            free text.
        source: where the rows were read.
        duplicates: rows whose text, case and white space aside, stood in an earlier row. They are kept.
        empty: rows without a text, dropped.
        kind: what kind of task they are for.
        reading: which columns they were read from; None of examples made in memory.
        remarks: how they were read, a line each.
    """

    rows: ExampleRows
    labels: tuple[str, ...]
    source: str
    duplicates: int
    empty: int
    kind: TaskKind = TaskKind.LABEL_WORDS
    reading: Reading | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", ExampleRows.of(self.rows))

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
        return [*self.rows.texts]

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
            others = listed(self.reading.others) if self.reading is not None else ""
            left_out = f"; not read: {others}" if others else ""
            doubts.append(f"{most.answers:,} different answers to the same text, {most.text[:60]!r}{left_out}.")
        if self.reading is not None and (unread := self.reading.unread):
            columns = " and ".join(
                f"{shorten(name)} ({count:,} of {len(self.rows):,} rows)" for name, count in unread[:5]
            )
            are = "Columns are" if len(unread) > 1 else "A column is"
            doubts.append(f"{are} not read that may belong to the text: {columns}. {self.reading.remedy}")
        return doubts

    def _answers(self) -> list[str]:
        tagged = self.kind is TaskKind.TOKEN_CLASSIFICATION
        return [tag for tags in self.rows.labels for tag in tags.split()] if tagged else [*self.rows.labels]

    @property
    def _named_classes(self) -> bool:
        return self.reading is not None and self.reading.class_names

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
        rows, no_turns = self.rows, repeat("[]")
        turns = no_turns if rows.turns is None else map(_as_json, rows.turns)
        for text, label, before in zip(rows.texts, rows.labels, turns, strict=False):
            digest.update(f"[{_as_json(text)},{_as_json(label)},{before}]\n".encode())
        return digest.hexdigest()


# Escaped to ASCII, so that no text, lone surrogates among them, is without bytes.
_as_json = json.JSONEncoder(separators=(",", ":")).encode


def merge_labels_of(examples: Examples) -> Examples:
    """The examples with one spelling of each label, the most frequent one or among equals the first.

    Nothing changes where labels are the names of a `ClassLabel`, tags, whose case may mean something, or free text.
    """
    if examples.kind not in ONE_LABEL_A_TEXT or examples._named_classes:
        return examples
    merged = merge_spellings(examples.rows.labels)
    said = f"Spellings of one label are merged: {describe_spellings(merged)} (`merge_labels=False` keeps them apart)."
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
    labels = {*examples.rows.labels}
    matched = match_spellings(examples.rows.labels, known)
    if examples._named_classes:  # of which no two become one
        shared = Counter([*matched.values(), *labels])
        matched = {label: other for label, other in matched.items() if shared[other] == 1}
    return _respelled(examples, matched, f"Other spellings are read as {whose} labels: {describe_spellings(matched)}.")


def _respelled(examples: Examples, labels: Mapping[str, str], said: str) -> Examples:
    """The examples with other labels in place of some, and a remark; the order of labels is kept."""
    if not labels:
        return examples
    rows = examples.rows.labelled([labels.get(label, label) for label in examples.rows.labels])
    by_order = examples.labels == ordered_labels(examples.rows, None, examples.kind)
    names = tuple(dict.fromkeys(labels.get(label, label) for label in examples.labels))
    ordered = ordered_labels(rows, None, examples.kind) if by_order else names
    return replace(examples, rows=rows, labels=ordered, remarks=(*examples.remarks, said))


def split_examples(examples: Examples, test_size: float = 0.1, seed: int = 42) -> tuple[Examples, Examples]:
    """Split at random; rows with the same text, case and white space aside, stay together.

    Where each text has one label, each label's part is held out of it, to a row, and every label stays in training, so
    that a rare one may be missing among the held-out.

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
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    assert len(examples.rows.keys) == len(order)  # known before the rows are taken, which then have them
    rows = examples.rows.take(order)
    room = math.ceil(len(rows) * test_size)
    sizes = Counter(rows.keys)
    if examples.kind in ONE_LABEL_A_TEXT:
        held_out = _stratified(rows, sizes, room)
        learned = {label for key, label in zip(rows.keys, rows.labels, strict=True) if key not in held_out}
        held_out -= {key for key, label in zip(rows.keys, rows.labels, strict=True) if label not in learned}
    else:
        held_out = _fitting(sizes, sizes, room)
    if not 0 < len(held_out) < len(sizes):
        raise ValueError(
            f"{examples.source} cannot be split: test_size={test_size} holds out {len(held_out)} of its "
            f"{len(sizes)} different texts. Give more rows, or another `test_size`."
        )
    train = [place for place, key in enumerate(rows.keys) if key not in held_out]
    test = [place for place, key in enumerate(rows.keys) if key in held_out]
    return _part(examples, rows.take(train)), _part(examples, rows.take(test))


def _fitting(texts: Iterable[int], sizes: Mapping[int, int], room: int) -> set[int]:
    """The first texts, by their keys, whose rows fit into so many together."""
    found = set()
    for text in texts:
        if sizes[text] <= room:
            found.add(text)
            room -= sizes[text]
    return found


def _stratified(rows: ExampleRows, sizes: Mapping[int, int], room: int) -> set[int]:
    """Texts of so many rows, of each label in proportion: the rows left over go to the largest remainders."""
    of_label: dict[str, list[int]] = defaultdict(list)
    for text, label in dict(zip(reversed(rows.keys), reversed(rows.labels), strict=True)).items():
        of_label[label].append(text)
    shares = {label: divmod(room * sum(sizes[text] for text in texts), len(rows)) for label, texts in of_label.items()}
    rest = room - sum(whole for whole, _ in shares.values())
    several = [label for label, texts in of_label.items() if len(texts) > 1]
    one_more = sorted(several, key=lambda label: shares[label][1], reverse=True)[:rest]
    held_out: set[int] = set()
    missed = 0
    for label in several:  # one text stays
        share = shares[label][0] + (label in one_more)
        found = _fitting(of_label[label][1:], sizes, share)
        held_out |= found
        missed += share - sum(sizes[text] for text in found)
    # Texts that stand in more rows than their label's share.
    others = (text for label in several for text in of_label[label][1:] if text not in held_out)
    return held_out | _fitting(others, sizes, missed)


def answers_to_texts(*parts: Sequence[Example]) -> list[str]:
    """The answers, one for each different text and answer: what was held out again tells nothing about classes."""
    first, *others = parts
    rows = ExampleRows.of(columns_of(first) if not any(others) else [row for part in parts for row in part])
    return [label for _, label in dict.fromkeys(zip(rows.keys, rows.labels, strict=True))]


def ordered_labels(rows: Sequence[Example], classes: tuple[str, ...] | None, kind: TaskKind) -> tuple[str, ...]:
    if not kind.has_labels:
        return ()
    if classes is not None:
        return classes
    if kind is TaskKind.TOKEN_CLASSIFICATION:
        tags = {tag for tags in {*columns_of(rows).labels} for tag in tags.split()}
        return tuple(sorted(tags, key=lambda tag: (tag != "O", _label_order(tag))))
    return tuple(sorted({*columns_of(rows).labels}, key=_label_order))


def _label_order(label: str) -> tuple[int, str]:
    """Sort "2" before "10", and words by the alphabet."""
    return (int(label), "") if label.isdecimal() else (-1, label)


def _part(whole: Examples, rows: ExampleRows) -> Examples:
    return replace(whole, rows=rows, duplicates=count_duplicates(rows), empty=0, remarks=())


def columns_of(rows: Iterable[Example]) -> ExampleRows:
    """Examples as columns; those of `Examples` and of columns are the same ones."""
    return rows.rows if isinstance(rows, Examples) else ExampleRows.of(rows)


def count_duplicates(rows: Iterable[Example]) -> int:
    keys = columns_of(rows).keys
    return len(keys) - len({*keys})


class Conflicts(NamedTuple):
    """Texts that stand in several rows with different answers: how many, their rows, and the one with most answers."""

    texts: int
    rows: int
    text: str
    answers: int


def conflicts_of(rows: Sequence[Example]) -> Conflicts:
    """Count the texts with several answers."""
    columns = columns_of(rows)
    first: dict[int, str] = {}
    others: dict[int, set[str]] = defaultdict(set)
    for key, label in zip(columns.keys, columns.labels, strict=True):
        if first.setdefault(key, label) != label:
            others[key].add(label)
    if not others:
        return Conflicts(0, 0, "", 0)
    most = max((key for key in first if key in others), key=lambda key: len(others[key]))
    count = sum(key in others for key in columns.keys)
    return Conflicts(len(others), count, columns.texts[columns.keys.index(most)], 1 + len(others[most]))


def _imbalance(rows: Sequence[Example]) -> str:
    """A remark where one class is far more frequent than another; classes without a row can't be drawn."""
    answers = columns_of(rows).labels
    in_order = reversed(dict.fromkeys(reversed(answers)))
    labels = {label_key(label): label for label in in_order}  # spellings of one label are no rare classes
    known: Counter[str] = Counter()
    for label, count in Counter(answers).items():
        known[labels[label_key(label)]] += count
    counts = known.most_common()
    if not counts or counts[0][1] < _IMBALANCE * counts[-1][1]:
        return ""
    (most, often), (least, seldom) = counts[0], counts[-1]
    return f"{most} is {often / seldom:.3g} times as frequent as {least} (`balance` draws each label equally often)"
