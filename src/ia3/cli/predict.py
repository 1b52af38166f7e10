"""`ia3 predict`: label words for sentences, for a file or for standard input."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.labelling import Labeller, answer, load_labeller
from ia3.cli.names import ANSWER_BY_HELP

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.data.records import Records
    from ia3.inference.answering import Answer
    from ia3.tasks.examples import Example
    from ia3.tasks.task import Task

_OUTPUTS = (".csv", ".jsonl")


def predict(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a hub repository.")],
    sentences: Annotated[
        list[str] | None, typer.Argument(help="What to label; without any, --file or the lines of standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Label the rows of a .csv, .jsonl, .parquet or .txt (a text a line).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the rows with predictions and probabilities: .csv or .jsonl.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="The file's column with the text, if not as in training.")
    ] = None,
    way: Annotated[str | None, typer.Option("--answer-by", help=ANSWER_BY_HELP, show_default="as in training")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Where longer texts are cut, in tokens.", show_default="as in training")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest written answer, in tokens.", show_default="the labels'")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences at once.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Label sentences, a file or standard input with a trained adapter."""
    from rich.console import Console

    progress = Console(stderr=True)
    if output is not None:
        _check_output(file, output)
    if sentences and file is not None:
        raise ValueError(f"There are both sentences and --file {file}: give one of them.")
    records = _read_file(file, text_column) if file is not None else None
    lines = None if records is not None else sentences or _read_lines()
    labeller = load_labeller(
        adapter, progress, text_column=text_column, max_length=max_length, max_new_tokens=max_new_tokens, way=way
    )
    if records is None:
        assert lines is not None
        records = _as_records(lines, labeller)
    elif file is not None and file.suffix.lower() == ".txt" and text_column is None:
        records = _as_records([record["text"] for _, record in records], labeller)
    examples = _examples(records, labeller)
    _check_columns(records, labeller, output)
    answers = _answer_filled(labeller, examples, progress, batch_size=batch_size)
    if output is not None:
        _write(output, records, answers)
    texts = _as_given(records, [example.text for example in examples], labeller)
    _print(labeller.task, adapter, texts, answers, output, as_json=as_json)


def _read_lines() -> list[str]:
    """The lines of standard input that are not blank."""
    if sys.stdin.isatty():
        raise ValueError('There is nothing to label: give sentences, as in `ia3 predict ADAPTER "Sales rose."`.')
    try:
        lines = [line.strip() for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ValueError(f"Standard input is not UTF-8 ({error}): convert it, or give a --file in UTF-8.") from error
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError("Standard input holds no text: expected one sentence a line.")
    if len(texts) < len(lines):
        typer.echo(f"Blank lines left out: {len(lines) - len(texts)}.", err=True)
    return texts


def _read_file(path: Path, text_column: str | None) -> Records:
    from ia3.data.records import read_records

    return read_records(path, line_column=text_column or "text")


def _as_records(lines: list[str], labeller: Labeller) -> Records:
    """Sentences as rows of the one column that the template reads."""
    from ia3.data.records import Records

    fields = labeller.task.template.fields
    if len(labeller.task.template.required) > 1:
        raise ValueError(
            f"This adapter reads the columns {list(fields)}, so a sentence is not enough: give a --file with them."
        )
    rows = tuple((f"number {number}", {fields[0]: line}) for number, line in enumerate(lines, start=1))
    return Records("the sentences", fields, rows)


def _examples(records: Records, labeller: Labeller) -> list[Example]:
    """What the model reads of each row; of a text whose words get tags the cell may be a list."""
    from ia3.data.conversations import format_to_answer, read_to_answer
    from ia3.data.loading import words_of
    from ia3.tasks.columns import require_columns
    from ia3.tasks.examples import Example
    from ia3.tasks.task import TaskKind

    template = labeller.task.template
    places = [(f"{records.source}, {place}", record) for place, record in records]
    if labeller.task.kind is TaskKind.INSTRUCTIONS:
        how = format_to_answer(records, template)
        return [read_to_answer(record, place, how) for place, record in places]
    if labeller.task.kind is not TaskKind.TOKEN_CLASSIFICATION:
        return [Example(template.render(record, place), "") for place, record in places]
    (column,) = template.fields
    require_columns(records.source, records.columns, column)
    return [Example(" ".join(words_of(record.get(column), place, column)), "") for place, record in places]


def _as_given(records: Records, texts: list[str], labeller: Labeller) -> list[str]:
    """The texts without the template's words, where one column is all that it reads."""
    field, *more = labeller.task.template.fields
    if more or any(isinstance(record.get(field, []), list) for _, record in records):
        return texts
    return [str(record[field]) for _, record in records]


def _check_output(file: Path | None, output: Path) -> None:
    """Refuse, before any work, an output that can't be written."""
    if output.suffix.lower() not in _OUTPUTS:
        raise ValueError(f"The output {output} is of no known kind: expected one that ends in {' or '.join(_OUTPUTS)}.")
    if file is not None and file.exists() and output.exists() and output.samefile(file):
        raise ValueError(f"The output {output} is the input: it would be overwritten. Name another file.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"The output {output} can't be written: expected a file name in a folder that exists.")


def _check_columns(records: Records, labeller: Labeller, output: Path | None) -> None:
    own = {"prediction", "probability", "probabilities", *(f"probability_{label}" for label in labeller.task.labels)}
    taken = sorted(own & set(records.columns))
    if output is not None and taken:
        raise ValueError(
            f"{records.source} has columns named {taken} already, where the output puts its own: rename them."
        )


def _answer_filled(labeller: Labeller, examples: list[Example], progress: Console, **how: Any) -> list[Answer | None]:
    """An answer for each text; None for rows without one."""
    filled = [example for example in examples if example.text]
    if not filled:
        raise ValueError(f"None of the {len(examples):,} rows has a text in {list(labeller.task.template.fields)}.")
    if len(filled) < len(examples):
        missing = len(examples) - len(filled)
        typer.echo(f"Without text, and so without prediction: {missing:,} of {len(examples):,} rows.", err=True)
    found = iter(answer(labeller, filled, progress, **how))
    return [next(found) if example.text else None for example in examples]


def _write(path: Path, records: Records, answers: list[Answer | None]) -> None:
    from ia3.files import write_atomically

    write = _as_csv if path.suffix.lower() == ".csv" else _as_jsonl
    write_atomically(path, write(records, answers).encode())


def _as_jsonl(records: Records, answers: list[Answer | None]) -> str:
    lines = []
    for (_, record), found in zip(records, answers, strict=True):
        line = {**record, "prediction": found.label if found else None}
        if found is not None and found.probabilities is not None:
            line |= {"probability": found.probability, "probabilities": found.probabilities}
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return "".join(lines)


def _as_csv(records: Records, answers: list[Answer | None]) -> str:
    import csv
    import io

    labels = next((tuple(found.probabilities) for found in answers if found and found.probabilities), ())
    shares = ["probability", *(f"probability_{label}" for label in labels)] if labels else []
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*records.columns, "prediction", *shares])
    for (_, record), found in zip(records, answers, strict=True):
        cells = [record.get(column) for column in records.columns]
        probabilities = (found.probabilities or {}) if found else {}
        own = (
            [found.probability, *(probabilities[label] for label in labels)] if found and labels else [""] * len(shares)
        )
        writer.writerow([*cells, found.label if found else "", *own])
    return text.getvalue()


def _print(
    task: Task, adapter: str, texts: list[str], answers: list[Answer | None], output: Path | None, *, as_json: bool
) -> None:
    pairs = [(text, found) for text, found in zip(texts, answers, strict=True) if found is not None]
    counts = _count(task, [found.label for _, found in pairs])
    if output is not None and as_json:
        content = {"adapter": adapter, "output": str(output), "rows": len(answers), "labels": dict(counts)}
        typer.echo(json.dumps(content, ensure_ascii=False))
    elif as_json:
        predictions = [_as_object(text, found) for text, found in pairs]
        typer.echo(json.dumps({"adapter": adapter, "predictions": predictions}, ensure_ascii=False))
    elif output is not None:
        if counts:
            _print_counts(counts)
        typer.echo(f"{len(pairs):,} predictions are in {output}")
    elif sys.stdout.isatty():
        _print_table(pairs)
    else:
        for text, found in pairs:
            typer.echo("\t".join(_on_one_line(cell) for cell in (found.label, *_share(found), text)))


def _count(task: Task, answers: list[str]) -> Counter[str]:
    """How often each label or tag was given; of free text there is nothing to count."""
    from ia3.tasks.task import TaskKind

    if task.kind is TaskKind.TOKEN_CLASSIFICATION:
        return Counter(tag for answer in answers for tag in answer.split())
    return Counter(answers) if task.kind.has_labels else Counter()


def _on_one_line(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") if {"\n", "\t"} & set(cell) else cell


def _as_object(text: str, found: Answer) -> dict[str, Any]:
    content: dict[str, Any] = {"text": text, "label": found.label}
    if found.probabilities is not None:
        content |= {"probability": found.probability, "probabilities": found.probabilities}
    return content


def _share(found: Answer) -> list[str]:
    return [] if found.probability is None else [f"{found.probability:.4f}"]


def _print_counts(counts: Counter[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("label", title="Predictions", title_justify="left", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    for label, count in counts.most_common():
        table.add_row(label, f"{count:,}", f"{count / counts.total():.1%}")
    Console().print(table, "", highlight=False)


def _print_table(pairs: list[tuple[str, Answer]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("label", box=None, pad_edge=False)
    ranked = any(found.probability is not None for _, found in pairs)
    if ranked:
        table.add_column("probability", justify="right")
    table.add_column("text", overflow="fold")
    for text, found in pairs:
        share = [f"{found.probability:.1%}"] if found.probability is not None else []
        table.add_row(Text(found.label), *share, Text(text))
    Console().print(table, highlight=False)
