"""`ia3 evaluate`: how often a saved adapter is right on labelled text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.labelling import answer, load_labeller

if TYPE_CHECKING:
    from ia3.training.data import Examples

_METHODS = {False: "the likeliest label", True: "written answers, exact match"}


def evaluate(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.")],
    data: Annotated[str, typer.Option(help="Labelled text: a CSV, JSON lines or parquet file, or a hub data set.")],
    text_column: Annotated[
        str | None, typer.Option(help="The column with the text.", show_default="as in training")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column with the label.", show_default="as in training")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model write its answer, not choose among the labels.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure an adapter on labelled text: accuracy with its interval, macro-F1 and what it confuses."""
    from dataclasses import replace

    from rich.console import Console

    from ia3.training.task import load_task_examples

    progress = Console(stderr=True)
    labeller = load_labeller(adapter, progress, text_column=text_column)
    examples = load_task_examples(data, labeller.template, label_column or labeller.label_column)
    progress.print(examples.describe(), markup=False, highlight=False)
    if labeller.labels:
        _expect_known(examples, labeller.labels)
    else:
        labeller = replace(labeller, labels=examples.labels)
    answers = answer(labeller, examples.texts, progress, generate=generate, batch_size=batch_size)
    result = Result(
        labels=labeller.labels,
        truth=[row.label for row in examples],
        predictions=[each.label for each in answers],
        method=_METHODS[generate],
    )
    if as_json:
        typer.echo(json.dumps({"adapter": adapter, "data": examples.source, **result.summary()}, ensure_ascii=False))
    else:
        _print(result)


def _expect_known(examples: Examples, labels: Sequence[str]) -> None:
    unknown = sorted({row.label for row in examples} - set(labels))
    if unknown:
        near = difflib.get_close_matches(unknown[0], labels, n=1)
        hint = f" Did you mean {near[0]!r} for {unknown[0]!r}?" if near else ""
        raise ValueError(
            f"{examples.source} has the labels {unknown}, and the adapter knows {list(labels)}.{hint} Correct the "
            "labels, or name the right --label-column."
        )


@dataclass(frozen=True)
class Result:
    """What an adapter answered to labelled texts, and `method`, how it was asked."""

    labels: Sequence[str]
    truth: Sequence[str]
    predictions: Sequence[str]
    method: str

    def summary(self) -> dict[str, Any]:
        """The figures as JSON writes them."""
        from ia3.training.metrics import (
            confusion_matrix,
            count_correct,
            f1_scores,
            majority_baseline,
            wilson_interval,
        )

        correct, total = count_correct(self.truth, self.predictions), len(self.truth)
        confusion = confusion_matrix(self.truth, self.predictions, self.labels)
        f1 = f1_scores(confusion, self.labels)
        return {
            "accuracy": correct / total,
            "accuracy_interval_95": list(wilson_interval(correct, total)),
            "confusion": confusion,  # a row a true label, a column a prediction, the last for no label
            "correct": correct,
            "examples": total,
            "f1": f1,
            "labels": list(self.labels),
            "macro_f1": sum(f1.values()) / len(f1),
            "majority_baseline": majority_baseline(self.truth),
            "method": self.method,
        }


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    found = result.summary()
    low, high = found["accuracy_interval_95"]
    table = Table(show_header=False, box=None, pad_edge=False, title="Result", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "accuracy", f"{found['accuracy']:.1%} of {found['examples']:,} (95 % interval {low:.1%} to {high:.1%})"
    )
    table.add_row("majority class", f"{found['majority_baseline']:.1%}")
    table.add_row("macro-F1", f"{found['macro_f1']:.3f}")
    table.add_row("asked for", result.method)
    Console().print(table, "", _confusion_table(found), highlight=False)


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
