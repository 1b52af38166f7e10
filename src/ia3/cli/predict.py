"""`ia3 predict`: label words for sentences, for a file or for standard input."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ia3.cli.flags import AnswerBy, AsJson, BatchSize, TextColumn, TrustRemoteCode, expect_adapter, print_json
from ia3.cli.labelling import Overrides, answer, answering_bar, load_labeller, task_without_file
from ia3.cli.names import FlagConsole

if TYPE_CHECKING:
    from ia3.data.records import Records
    from ia3.inference.answering import Answer
    from ia3.tasks.examples import Example
    from ia3.tasks.task import Task


def predict(
    adapter: Annotated[
        str, typer.Argument(help="The adapter: a folder or a hub repository; with --adapter-column a folder of many.")
    ],
    sentences: Annotated[
        list[str] | None, typer.Argument(help="What to label; without any, --file or the lines of standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Label the rows of a .csv, .tsv, .xlsx, .jsonl, .parquet or .txt (a text a line)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the rows with predictions and probabilities: .csv, .tsv, .xlsx or .jsonl."),
    ] = None,
    text_column: TextColumn = None,
    adapter_column: Annotated[
        str | None,
        typer.Option(help="The file's column with each row's adapter; ADAPTER is then a folder of many."),
    ] = None,
    answer_by: AnswerBy = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Where longer texts are cut, in tokens.", show_default="as in training")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest written answer, in tokens.", show_default="the labels'")
    ] = None,
    batch_size: BatchSize = 32,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Label sentences, a file or standard input with a trained adapter."""
    progress = FlagConsole()
    if output is not None:
        from ia3.data.writing import check_output, check_rows, write_rows

        check_output(output, file)
    if sentences and file is not None:
        raise ValueError(f"There are both sentences and --file {file}: give one of them.")
    overrides = Overrides(text_column=text_column, max_length=max_length, max_new_tokens=max_new_tokens, way=answer_by)
    if adapter_column is None:
        expect_adapter(adapter)
    records = _read_file(file, text_column, adapter, adapter_column, progress) if file is not None else None
    if adapter_column is None:
        work = _by_one(adapter, sentences, records, overrides, progress, batch_size, trust_remote_code)
    elif records is None:
        raise ValueError("--adapter-column names a column of a --file: give the file.")
    else:
        work = _by_many(Path(adapter), adapter_column, records, overrides, progress, batch_size, trust_remote_code)
    records, tasks = work.records, work.tasks
    readers = {task: _reader(records, task) for task in set(tasks)}
    examples = [readers[task](row) for row, task in zip(records, tasks, strict=True)]
    if output is not None:
        shares = (f"probability_{label}" for task in set(tasks) for label in task.labels)
        check_rows(output, records, {"prediction", "probability", "probabilities", *shares})
    answers = _answer_filled(work, examples)
    if output is not None:
        for remark in write_rows(output, records, [_found(each) for each in answers]):
            typer.echo(remark, err=True)
    texts = [_as_given(*each) for each in zip(records, examples, tasks, strict=True)]
    _print(work, adapter, texts, answers, output, as_json=as_json)


@dataclass(frozen=True)
class _Work:
    """Rows to answer, each by its task, and by the adapter of its name where they have adapters of their own."""

    records: Records
    tasks: list[Task]
    answer: Callable[[list[int], list[Example]], list[Answer]]  # of some rows, by their places and what is read
    adapters: list[str] | None = None


def _by_one(
    adapter: str,
    sentences: list[str] | None,
    records: Records | None,
    overrides: Overrides,
    progress: Console,
    batch_size: int,
    trusted: bool,
) -> _Work:
    """The rows of a file, sentences or standard input, all by one adapter."""
    lines = [] if records is not None else sentences or _read_lines()
    labeller = load_labeller(adapter, progress, overrides, trusted)
    records = _as_records(lines, labeller.task) if records is None else records

    def answer_all(places: list[int], examples: list[Example]) -> list[Answer]:
        return answer(labeller, examples, progress, batch_size=batch_size)

    return _Work(records, [labeller.task] * len(records), answer_all)


def _by_many(
    folder: Path,
    column: str,
    records: Records,
    overrides: Overrides,
    progress: Console,
    batch_size: int,
    trusted: bool,
) -> _Work:
    """The rows of a file, each by the adapter that it names, out of a folder of adapters."""
    from ia3.tasks.columns import as_text, require_columns

    require_columns(records.source, records.columns, column, setting="adapter_column")
    names = [as_text(record.get(column), f"{records.source}, {place}: {column!r}") for place, record in records]
    if "" in names:
        place = records.rows[names.index("")][0]
        raise ValueError(
            f"{records.source}, {place} names no adapter in {column!r}, as {names.count(''):,} of {len(names):,} rows: "
            "name one in each row, or take these rows out."
        )
    with progress.status(f"Reading {folder}"):
        from ia3.inference.many import answer_each, find_adapters

        folders = find_adapters(folder, names, lambda number: f"{records.source}, {records.rows[number][0]}")
        tasks = {name: overrides.over(_saved_task(path)) for name, path in folders.items()}

    def answer_some(places: list[int], examples: list[Example]) -> list[Answer]:
        own = [names[place] for place in places]
        with answering_bar(progress, len(examples), batch_size) as beat:
            how: Any = {"batch_size": batch_size, "beat": beat, "trust_remote_code": trusted}
            return answer_each(folders, tasks, examples, own, **how)

    return _Work(records, [tasks[name] for name in names], answer_some, names)


def _saved_task(folder: Path) -> Task:
    from ia3.config import PeftConfig
    from ia3.tasks.task import load_task

    def no_labels() -> NoReturn:
        raise ValueError(f"{folder} has no ia3_task.json, so its head's labels aren't known: ask it alone.")

    return load_task(folder) or task_without_file(str(PeftConfig.from_pretrained(folder).task_type), no_labels)


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


def _read_file(
    path: Path, text_column: str | None, adapter: str, adapter_column: str | None, console: Console
) -> Records:
    """The rows of a file; texts without a column's name get that which the adapter reads."""
    from ia3.data.records import read_records
    from ia3.tasks.task import load_task

    task = load_task(adapter) if text_column is None and adapter_column is None else None
    reads = task.template.required or task.template.fields if task is not None else (text_column or "text",)
    named = [adapter_column] if adapter_column is not None else []
    named += reads if len(reads) > 1 or text_column is not None else ()
    records = read_records(path, line_column=reads[0] if len(reads) == 1 else "text", named=named)
    for remark in records.remarks:
        console.print(remark, markup=False, highlight=False)
    return records


def _as_records(lines: list[str], task: Task) -> Records:
    """Sentences as rows of the one column that the template reads."""
    from ia3.data.records import Records

    fields = task.template.fields
    if len(task.template.required) > 1:
        raise ValueError(
            f"This adapter reads the columns {list(fields)}, so a sentence is not enough: give a --file with them."
        )
    rows = tuple((f"number {number}", {fields[0]: line}) for number, line in enumerate(lines, start=1))
    return Records("the sentences", fields, rows)


def _reader(records: Records, task: Task) -> Callable[[tuple[str, dict[str, Any]]], Example]:
    """What makes of a row what the model reads of it; of a text whose words get tags the cell may be a list."""
    from ia3.data.conversations import format_to_answer, read_to_answer
    from ia3.data.loading import words_of
    from ia3.tasks.columns import require_columns
    from ia3.tasks.examples import Example
    from ia3.tasks.task import TaskKind

    if task.kind is TaskKind.INSTRUCTIONS:
        how = format_to_answer(records, task.template)
        return lambda row: read_to_answer(row[1], f"{records.source}, {row[0]}", how)
    if task.kind is not TaskKind.TOKEN_CLASSIFICATION:
        return lambda row: Example(task.template.render(row[1], f"{records.source}, {row[0]}"), "")
    (column,) = task.template.fields
    require_columns(records.source, records.columns, column)
    return lambda row: Example(" ".join(words_of(row[1].get(column), f"{records.source}, {row[0]}", column)), "")


def _as_given(row: tuple[str, dict[str, Any]], example: Example, task: Task) -> str:
    """The text without the template's words, where one column is all that it reads."""
    field, *more = task.template.fields
    cell = row[1].get(field, [])
    return example.text if more or isinstance(cell, list) else str(cell)


def _answer_filled(work: _Work, examples: list[Example]) -> list[Answer | None]:
    """An answer for each text; None for rows without one."""
    places = [place for place, example in enumerate(examples) if example.text]
    if not places:
        fields = sorted({field for task in set(work.tasks) for field in task.template.fields})
        raise ValueError(f"None of the {len(examples):,} rows has a text in {fields}.")
    if len(places) < len(examples):
        missing = len(examples) - len(places)
        typer.echo(f"Without text, and so without prediction: {missing:,} of {len(examples):,} rows.", err=True)
    found = dict(zip(places, work.answer(places, [examples[place] for place in places]), strict=True))
    return [found.get(place) for place in range(len(examples))]


def _found(answer: Answer | None, name: str = "prediction") -> dict[str, Any]:
    """What is put beside a row, or beside a text under another name."""
    found: dict[str, Any] = {name: answer.label if answer else None}
    if answer is not None and answer.probabilities is not None:
        found |= {"probability": answer.probability, "probabilities": answer.probabilities}
    return found


def _print(
    work: _Work, adapter: str, texts: list[str], answers: list[Answer | None], output: Path | None, *, as_json: bool
) -> None:
    pairs = [(text, found) for text, found in zip(texts, answers, strict=True) if found is not None]
    counts = _count(work.tasks, answers)
    if output is not None and as_json:
        print_json({"adapter": adapter, "output": output, "rows": len(answers), "labels": counts})
    elif as_json:
        own = [{}] * len(answers) if work.adapters is None else [{"adapter": name} for name in work.adapters]
        predictions = [
            {**name, "text": text, **_found(found, "label")}
            for text, found, name in zip(texts, answers, own, strict=True)
            if found is not None
        ]
        print_json({"adapter": adapter, "predictions": predictions})
    elif output is not None:
        if counts:
            _print_counts(counts)
        typer.echo(f"{len(pairs):,} predictions are in {output}")
    elif sys.stdout.isatty():
        _print_table(pairs)
    else:
        for text, found in pairs:
            typer.echo("\t".join(_on_one_line(cell) for cell in (found.label, *_share(found, "{:.4f}"), text)))


def _count(tasks: list[Task], answers: list[Answer | None]) -> Counter[str]:
    """How often each label or tag was given; of free text there is nothing to count."""
    from ia3.tasks.task import TaskKind

    counts: Counter[str] = Counter()
    for task, found in zip(tasks, answers, strict=True):
        if found is not None and task.kind.has_labels:
            counts.update(found.label.split() if task.kind is TaskKind.TOKEN_CLASSIFICATION else [found.label])
    return counts


def _on_one_line(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") if {"\n", "\t"} & set(cell) else cell


def _share(found: Answer, pattern: str) -> list[str]:
    return [] if found.probability is None else [pattern.format(found.probability)]


def _print_counts(counts: Counter[str]) -> None:
    table = Table("label", title="Predictions", title_justify="left", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    for label, count in counts.most_common():
        table.add_row(label, f"{count:,}", f"{count / counts.total():.1%}")
    Console().print(table, "", highlight=False)


def _print_table(pairs: list[tuple[str, Answer]]) -> None:
    table = Table("label", box=None, pad_edge=False)
    ranked = any(found.probability is not None for _, found in pairs)
    if ranked:
        table.add_column("probability", justify="right")
    table.add_column("text", overflow="fold")
    for text, found in pairs:
        table.add_row(Text(found.label), *_share(found, "{:.1%}"), Text(text))
    Console().print(table, highlight=False)
