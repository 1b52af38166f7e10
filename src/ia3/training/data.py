"""A run's examples: read, checked, split and drawn as its recipe says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

from rich.console import Console

from ia3.errors import listed, shorten
from ia3.runs.look import Looked, examples_of, key_of
from ia3.runs.recipe import Recipe
from ia3.tasks.example import ExampleRows, Turns
from ia3.tasks.examples import (
    ONE_LABEL_A_TEXT,
    Examples,
    answers_to_texts,
    conflicts_of,
    match_labels,
    merge_labels_of,
    split_examples,
)
from ia3.tasks.labels import why_no_classes
from ia3.tasks.task import TaskKind

# The fields of a recipe that decide what its run learns from, besides the seed where some are drawn.
_OF_DATA = (
    *("data", "test_data", "test_size", "test_limit", "split_seed", "text_column", "label_column", "merge_labels"),
    *("template", "limit"),
)


def read_data(
    recipes: Sequence[Recipe],
    kind: TaskKind,
    console: Console,
    looked: Looked | None = None,
) -> list[tuple[Examples, Examples]]:
    """The training and the held-out examples of each run, read once for those that read alike.

    What is odd about them is printed once for all runs on the same data. What `look_before` has read and is used here
    is taken out of `looked`, so that nobody holds it while training.

    Returns:
        A pair a run; equal examples are one object.

    Raises:
        FileNotFoundError, ValueError: what `load_examples` and `split_examples` raise.
        ValueError: answers that are no classes where no task is named, texts that tell their answers by a column alone
            that isn't read, merge_labels for a task without one label a text, nothing to train or to evaluate, or a
            held-out label that training never shows.
    """
    known: list[tuple[list[Any], tuple[Examples, Examples]]] = []
    found: list[tuple[Examples, Examples]] = []
    looked = {} if looked is None else looked
    for recipe in recipes:
        key = [getattr(recipe, name) for name in _OF_DATA] + [recipe.limit and recipe.seed]
        data = next((data for former, data in known if former == key), None)
        if data is None:
            said = any(former[0] == recipe.data for former, _ in known)
            where = Console(quiet=True) if said else console
            training, test = _read_one(recipe, kind, where, looked)
            check_examples(kind, training, test)
            data = (training, next((other for _, (_, other) in known if other == test), test))
            known.append((key, data))
        found.append(data)
    return found


def _read_one(recipe: Recipe, kind: TaskKind, console: Console, looked: Looked) -> tuple[Examples, Examples]:
    examples = _examples(recipe.data, recipe, kind, looked)
    held_out = None if recipe.test_data is None else _examples(recipe.test_data, recipe, kind, looked)
    if recipe.merge_labels:
        examples = merge_labels_of(examples)
        held_out = None if held_out is None else match_labels(held_out, examples.labels, "the training data's")
    elif kind not in ONE_LABEL_A_TEXT:
        raise ValueError(
            f"`merge_labels=False` is for {' and '.join(ONE_LABEL_A_TEXT)}, and this task is {kind}, where nothing is "
            "merged: leave it out."
        )
    _refuse_what_is_half_read(examples, recipe)
    _refuse_no_classes(examples, held_out, recipe)
    training, test = (
        split_examples(examples, recipe.test_size, recipe.split_seed) if held_out is None else (examples, held_out)
    )
    training, test = _draw(training, recipe.limit, recipe.seed), test[: recipe.test_limit]
    for each in [examples] if held_out is None else [examples, held_out]:
        console.print(each.describe(), markup=False, highlight=False)
    overlap = len({*_whole(training)} & {*_whole(test)})
    if overlap:
        figure = "accuracy" if kind.has_answers else "loss"
        console.print(f"{overlap:,} held-out texts also occur in training: the {figure} will flatter.", style="yellow")
    return training, test


def _whole(examples: Examples) -> Iterator[tuple[Turns, str]]:
    """What the model reads of each row."""
    return zip(examples.rows.turns or repeat(()), examples.rows.texts, strict=False)


def check_examples(kind: TaskKind, train_examples: Examples, test_examples: Examples) -> None:
    """Refuse nothing to train or to evaluate, and a held-out label that training never shows, by a ValueError."""
    for examples, purpose in ((train_examples, "train on"), (test_examples, "evaluate on")):
        if len(examples) == 0:
            raise ValueError(f"{examples.source} holds no examples to {purpose}: expected at least one.")
    if kind not in ONE_LABEL_A_TEXT:
        return
    known = {*train_examples.rows.labels}
    unseen = sorted({*test_examples.rows.labels} - known)
    if unseen:
        raise ValueError(
            f"The held-out labels [{listed(unseen, 10)}] never occur in training, which knows "
            f"[{listed(sorted(known), 10)}]: correct the labels, add training examples "
            "with them, raise `limit`, or split otherwise (`split_seed`, `test_data`)."
        )


def _examples(data: str | Examples, recipe: Recipe, kind: TaskKind, looked: Looked) -> Examples:
    """The examples with all spellings of their labels."""
    if isinstance(data, str):
        return examples_of(recipe, looked.pop(key_of(recipe, data), data), kind)
    if data.kind is not kind and not (data.kind in ONE_LABEL_A_TEXT and kind in ONE_LABEL_A_TEXT):
        raise ValueError(
            f"The examples in memory are for {data.kind}, and the task is {kind}: name the task that they are for, or "
            "read them by load_examples(…, kind=…)."
        )
    field, *more = recipe.wording.fields
    if more:
        raise ValueError(
            f"The template {shorten(recipe.template)} reads the columns [{listed([field, *more])}], and examples in "
            "memory have one text each: give a file as data, or examples whose texts are whole."
        )
    texts = [recipe.wording.render({field: text}) for text in data.rows.texts]
    rows = ExampleRows(texts, data.rows.labels, data.rows.turns)
    return replace(data, rows=rows, kind=kind)


def _refuse_what_is_half_read(examples: Examples, recipe: Recipe) -> None:
    """Refuse texts that mostly have several answers, where a column that isn't read would tell which one."""
    reading, found = examples.reading, conflicts_of(examples)
    asked_for = recipe.template is not None or isinstance(recipe.data, Examples)
    if asked_for or reading is None or not reading.unread or reading.of_conversations or 2 * found.rows < len(examples):
        return
    names = " and ".join(repr(name) for name, _ in reading.unread)
    raise ValueError(
        f"{examples.source}: without {names}, which would not be read, {found.rows:,} of {len(examples):,} rows have a "
        f"text that also has other answers, such as {found.text[:60]!r} with {found.answers:,}. {reading.remedy} To "
        f"learn without, say so: `template={reading.template.pattern!r}`."
    )


def _refuse_no_classes(examples: Examples, held_out: Examples | None, recipe: Recipe) -> None:
    """Refuse free text and measured numbers as classes, unless the task is named or the classes are."""
    named = examples.reading is not None and examples.reading.class_names
    if examples.kind not in ONE_LABEL_A_TEXT or recipe.task is not None or named:
        return
    reason = why_no_classes(answers_to_texts(examples, held_out or ()))
    if reason is None:
        return
    writer = "" if examples.kind.writes else " with a model that writes, such as a T5,"
    raise ValueError(
        f"{examples.source}: {reason}, and each would be a class of its own. Answers to write, not to choose, are "
        f"`task='generation'`{writer}; `task='{examples.kind}'` takes them as classes."
    )


def _draw(examples: Examples, limit: int | None, seed: int) -> Examples:
    if limit is None or limit >= len(examples):
        return examples
    rows = examples.rows
    drawn = random.Random(seed).sample(range(len(rows)), len(rows))
    if examples.kind not in ONE_LABEL_A_TEXT:
        return replace(examples, rows=rows.take(drawn[:limit]))
    # One of each label comes first, so that none is missing by chance where there is room for all.
    firsts = {rows.labels[drawn[place]]: place for place in reversed(range(len(drawn)))}
    order = sorted(range(len(drawn)), key=lambda place: (firsts[rows.labels[drawn[place]]] != place, place))
    return replace(examples, rows=rows.take([drawn[place] for place in order[:limit]]))
