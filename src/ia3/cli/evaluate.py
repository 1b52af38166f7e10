"""`ia3 evaluate`: how often a saved adapter is right on labelled text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.labelling import Labeller, answer, answer_by, load_labeller
from ia3.cli.names import ANSWER_BY_HELP

if TYPE_CHECKING:
    from ia3.inference.answering import Answer
    from ia3.tasks.examples import Examples
    from ia3.tasks.task import Task


def evaluate(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.")],
    data: Annotated[str, typer.Option(help="Labelled text: a CSV, JSON lines or parquet file, or a hub data set.")],
    text_column: Annotated[
        str | None, typer.Option(help="The column with the text.", show_default="as in training")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column with the label.", show_default="as in training")
    ] = None,
    way: Annotated[str | None, typer.Option("--answer-by", help=ANSWER_BY_HELP, show_default="as in training")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure an adapter on data with answers: accuracy with its interval, macro-F1 and what it confuses."""
    from dataclasses import replace

    from rich.console import Console

    from ia3.data.loading import load_examples
    from ia3.tasks.examples import match_labels
    from ia3.tasks.task import TaskKind

    progress = Console(stderr=True)
    labeller = load_labeller(adapter, progress, text_column=text_column)
    task = labeller.task
    # Data alone tell the labels of an adapter that came without a task.
    kind = TaskKind.LABEL_WORDS if task.kind is TaskKind.GENERATION and not task.base_model else task.kind
    examples = load_examples(
        data,
        template=task.template,
        label_column=label_column or task.label_column,
        kind=kind,
        merge_labels=kind is not task.kind,
    )
    if kind is task.kind:
        examples = match_labels(examples, task.labels, "the adapter's")
    progress.print(examples.describe(), markup=False, highlight=False)
    if kind is not task.kind:
        task = replace(task, kind=kind, labels=examples.labels)
    elif kind.has_labels:
        _expect_known(examples, task)
    task = answer_by(task, way)
    labeller = replace(labeller, task=task)
    if not kind.has_answers:
        _tell_loss(labeller, examples, {"adapter": adapter, "data": examples.source}, batch_size, as_json=as_json)
        return
    result = _result(task, examples, answer(labeller, examples, progress, batch_size=batch_size))
    if kind is TaskKind.LABEL_WORDS and not task.ranks:
        ranking = replace(labeller, task=task.answered_by("rank"))
        ranked = _result(ranking.task, examples, answer(ranking, examples, progress, batch_size=batch_size))
        result = replace(result, scores={"accuracy_by_rank": ranked.summary()["accuracy"]})
    if as_json:
        typer.echo(json.dumps({"adapter": adapter, "data": examples.source, **result.summary()}, ensure_ascii=False))
    else:
        _print(result)


def _tell_loss(
    labeller: Labeller, examples: Examples, source: dict[str, str], batch_size: int, *, as_json: bool
) -> None:
    """What is told of texts without answers: the mean loss of their tokens, and e to its power."""
    import math

    from ia3.runs.settings import TrainSettings
    from ia3.training.learners.making import make_learner

    settings = TrainSettings(evaluation_batch_size=batch_size)
    learner = make_learner(labeller.model, labeller.tokenizer, labeller.task, settings)
    loss = learner.measure(learner.tokenise(examples), lambda rows: None).loss
    figures = {"examples": len(examples), "loss": loss, "method": labeller.task.method, "perplexity": math.exp(loss)}
    if as_json:
        typer.echo(json.dumps({**source, **figures}, ensure_ascii=False))
    else:
        typer.echo(f"loss {loss:.3f} (perplexity {math.exp(loss):.4g}) of each token of {len(examples):,} texts")


def _result(task: Task, examples: Examples, answers: Sequence[Answer]) -> Result:
    """Compare texts with texts, or word by word where the answers are tags."""
    from ia3.tasks.entities import tag_scores
    from ia3.tasks.task import TaskKind

    references = [example.label for example in examples]
    if task.kind is not TaskKind.TOKEN_CLASSIFICATION:
        predictions = [each.label for each in answers]
        return Result(labels=task.labels, references=references, predictions=predictions, method=task.method)
    # A word that was cut off has no tag and is left out, as while training.
    pairs = [
        [(right, found) for right, found in zip(tags.split(" "), answer.tags or (), strict=True) if found is not None]
        for tags, answer in zip(references, answers, strict=True)
    ]
    rights, founds = ([[pair[side] for pair in text] for text in pairs] for side in (0, 1))
    left_out = sum(found is None for answer in answers for found in answer.tags or ())
    scores = tag_scores(rights, founds, task.labels, words_left_out=left_out)
    flat = [[tag for text in texts for tag in text] for texts in (rights, founds)]
    return Result(labels=task.labels, references=flat[0], predictions=flat[1], method=task.method, scores=scores)


def _expect_known(examples: Examples, task: Task) -> None:
    from ia3.tasks.labels import match_spellings
    from ia3.tasks.task import TaskKind

    words = task.kind is TaskKind.TOKEN_CLASSIFICATION
    occurring = {label for row in examples for label in (row.label.split() if words else [row.label])}
    unknown = sorted(occurring - set(task.labels))
    if unknown:
        alike = match_spellings(unknown[:1], task.labels).values()
        near = [*alike] or difflib.get_close_matches(unknown[0], task.labels, n=1)
        hint = f" Did you mean {near[0]!r} for {unknown[0]!r}?" if near else ""
        raise ValueError(
            f"{examples.source} has the labels {unknown}, and the adapter knows {list(task.labels)}.{hint} Correct the "
            "labels, or name the right --label-column."
        )


@dataclass(frozen=True)
class Result:
    """What an adapter answered, and `method`, how it was asked; without labels the answers are free text."""

    labels: Sequence[str]
    references: Sequence[str]
    predictions: Sequence[str]
    method: str
    scores: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The figures as JSON writes them."""
        from ia3.tasks.metrics import (
            confusion_matrix,
            count_correct,
            f1_scores,
            macro_f1,
            majority_baseline,
            wilson_interval,
        )

        correct, total = count_correct(self.references, self.predictions), len(self.references)
        figures = {
            "accuracy": correct / total,
            "accuracy_interval_95": list(wilson_interval(correct, total)),
            "correct": correct,
            "examples": total,
            "method": self.method,
            **self.scores,
        }
        if not self.labels:
            return figures
        confusion = confusion_matrix(self.references, self.predictions, self.labels)
        f1 = f1_scores(confusion, self.labels)
        return figures | {
            "confusion": confusion,  # a row a true label, a column a prediction, the last for no label
            "f1": f1,
            "labels": list(self.labels),
            "macro_f1": macro_f1(f1),
            "majority_baseline": majority_baseline(self.references),
        }


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from ia3.tasks.metrics import write_score

    found = result.summary()
    low, high = found["accuracy_interval_95"]
    table = Table(show_header=False, box=None, pad_edge=False, title="Result", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "accuracy", f"{found['accuracy']:.1%} of {found['examples']:,} (95 % interval {low:.1%} to {high:.1%})"
    )
    for name, score in result.scores.items():
        table.add_row(name.replace("_", " "), write_score(name, score))
    if result.labels:
        table.add_row("majority class", f"{found['majority_baseline']:.1%}")
        table.add_row("macro-F1", f"{found['macro_f1']:.3f}")
    table.add_row("asked for", result.method)
    Console().print(table, *(["", _confusion_table(found)] if result.labels else []), highlight=False)


def _confusion_table(found: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    counts, columns, scores = found["confusion"], [*found["labels"], "other"], found["f1"]
    if not any(row[-1] for row in counts):
        counts, columns = [row[:-1] for row in counts], columns[:-1]
    table = Table("true, predicted →", title="Confusion", title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right")
    table.add_column("F1", justify="right")
    for place, (label, row) in enumerate(zip(found["labels"], counts, strict=True)):
        cells = [Text(f"{count:,}", style="bold" if column == place else "") for column, count in enumerate(row)]
        table.add_row(Text(label), *cells, f"{scores[label]:.3f}" if label in scores else "–")
    return table
