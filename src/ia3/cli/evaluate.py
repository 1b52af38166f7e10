"""`ia3 evaluate`: how often a saved adapter is right on labelled text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ia3.cli.flags import Adapter, AnswerBy, AsJson, BatchSize, TextColumn, TrustRemoteCode, print_json
from ia3.cli.labelling import answer, load_labeller
from ia3.cli.names import FlagConsole
from ia3.errors import MissingColumnError, listed, shorten
from ia3.inference.labelling import Labeller, Overrides, answered_by
from ia3.runs.screen import Screen
from ia3.runs.tables import NONE, Column, facts, print_table
from ia3.tasks.entities import tag_scores
from ia3.tasks.labels import match_spellings
from ia3.tasks.metrics import describe, figures_of, without_empty_other

if TYPE_CHECKING:
    from ia3.tasks.examples import Examples
    from ia3.tasks.task import Task


def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help="Labelled text: a CSV, JSON lines or parquet file, or a hub data set.")],
    text_column: TextColumn = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column with the label.", show_default="as in training")
    ] = None,
    answer_by: AnswerBy = None,
    batch_size: BatchSize = 32,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure an adapter on data with answers: accuracy with its interval, macro-F1 and what it confuses."""
    from ia3.data.loading import load_examples, read_for
    from ia3.tasks.examples import match_labels
    from ia3.tasks.task import TaskKind, load_task
    from ia3.tasks.template import Template

    progress = FlagConsole()
    saved = load_task(adapter)
    wording = saved.template if saved is not None else Template.of_column("text")
    wording = wording if text_column is None else wording.with_column(text_column)
    own_answers = saved.label_column if saved is not None else "label"
    answers = own_answers if label_column is None else label_column
    records = read_for(data, wording, answers if saved is None or saved.kind.has_answers else None)
    labeller = load_labeller(adapter, progress, Overrides(text_column=text_column), trusted=trust_remote_code)
    task = labeller.task
    # Data alone tell the labels of an adapter that came without a task.
    kind = TaskKind.LABEL_WORDS if task.kind is TaskKind.GENERATION and not task.base_model else task.kind
    said = {*(task.template.fields if text_column is None else ()), *([own_answers] if label_column is None else ())}
    with _naming_who_asks(adapter, said):
        examples = load_examples(
            records,
            template=task.template,
            label_column=answers,
            kind=kind,
            merge_labels=kind is not task.kind,
        )
    if kind is task.kind:
        examples = match_labels(examples, task.labels, "the adapter's")
    progress.print(examples.describe(), markup=False, highlight=False)
    if kind is not task.kind:
        task = replace(task, kind=kind, labels=examples.labels)
    elif kind.has_labels:
        _expect_known(examples, task, adapter)
    task = answered_by(task, answer_by)
    labeller = replace(labeller, task=task)
    if kind.has_answers:
        figures = _figures(labeller, examples, progress, batch_size)
    else:
        figures = _losses(labeller, examples, batch_size)
    if kind is TaskKind.LABEL_WORDS and not task.ranks:
        ranking = replace(labeller, task=task.answered_by("rank"))
        figures["accuracy_by_rank"] = _figures(ranking, examples, progress, batch_size)["accuracy"]
    if as_json:
        print_json({"adapter": adapter, "data": examples.source, **figures})
    elif kind.has_answers:
        print_figures(figures)
    else:
        loss = f"loss {figures['loss']:.3f} (perplexity {figures['perplexity']:.4g})"
        typer.echo(f"{loss} of each token of {len(examples):,} texts")


def _losses(labeller: Labeller, examples: Examples, batch_size: int) -> dict[str, Any]:
    """What is told of texts without answers: the mean loss of their tokens, and e to its power."""
    from ia3.runs.settings import TrainSettings
    from ia3.training.learners.making import make_learner

    settings = TrainSettings(evaluation_batch_size=batch_size)
    learner = make_learner(labeller.model, labeller.tokenizer, labeller.task, settings)
    loss = learner.measure(learner.tokenise(examples), lambda rows: None).loss
    return {"examples": len(examples), "loss": loss, "method": labeller.task.method, "perplexity": math.exp(loss)}


def _figures(labeller: Labeller, examples: Examples, progress: Console, batch_size: int) -> dict[str, Any]:
    """Compare texts with texts, or word by word where the answers are tags."""
    from ia3.tasks.task import TaskKind

    task = labeller.task
    answers = answer(labeller, examples, progress, batch_size=batch_size)
    references = [example.label for example in examples]
    if task.kind is not TaskKind.TOKEN_CLASSIFICATION:
        found = figures_of(references, [each.label for each in answers], task.labels)
        return {"method": task.method, **found}
    # A word that was cut off has no tag and is left out, as while training.
    pairs = [
        [(right, found) for right, found in zip(tags.split(" "), answer.tags or (), strict=True) if found is not None]
        for tags, answer in zip(references, answers, strict=True)
    ]
    rights, founds = ([[pair[side] for pair in text] for text in pairs] for side in (0, 1))
    left_out = sum(found is None for answer in answers for found in answer.tags or ())
    scores = tag_scores(rights, founds, task.labels, words_left_out=left_out)
    flat = [[tag for text in texts for tag in text] for texts in (rights, founds)]
    return {"method": task.method, **figures_of(flat[0], flat[1], task.labels), **scores}


@contextmanager
def _naming_who_asks(adapter: str, columns: set[str]) -> Iterator[None]:
    """Say of a column that data lack that it is the adapter that reads it, where nobody else named it."""
    try:
        yield
    except MissingColumnError as error:
        if error.column not in columns:
            raise
        raise MissingColumnError(f"{error} {adapter} was trained with that column.", error.column) from error


def _expect_known(examples: Examples, task: Task, adapter: str) -> None:
    from ia3.tasks.task import TaskKind

    words = task.kind is TaskKind.TOKEN_CLASSIFICATION
    occurring = {label for row in examples for label in (row.label.split() if words else [row.label])}
    unknown = sorted(occurring - set(task.labels))
    if unknown:
        alike = match_spellings(unknown[:1], task.labels).values()
        near = [*alike] or difflib.get_close_matches(unknown[0], task.labels, n=1)
        hint = f" Did you mean {shorten(near[0])} for {shorten(unknown[0])}?" if near else ""
        raise ValueError(
            f"{examples.source} has the labels [{listed(unknown)}], and {adapter} knows [{listed(task.labels)}]."
            f"{hint} Correct the labels, or name the right --label-column."
        )


def print_figures(figures: dict[str, Any]) -> None:
    """Print an evaluation's figures, and with labels what is confused with what."""
    console = Screen()
    console.print(facts("Result", describe(figures)), highlight=False)
    labels, f1 = figures.get("labels"), figures.get("f1", {})
    if not labels:
        return
    counts, names = without_empty_other(figures["confusion"], labels)
    columns = [Column("true, predicted →", labels, text=True)]
    for place, name in enumerate(names):
        cells = [Text(f"{row[place]:,}", style="bold" if number == place else "") for number, row in enumerate(counts)]
        columns.append(Column(name, cells, 1))
    columns.append(Column("F1", [f"{f1[label]:.3f}" if label in f1 else NONE for label in labels]))
    print_table(console, columns, "Confusion")
