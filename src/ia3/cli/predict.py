"""`ia3 predict`: label words for sentences, for a file or for standard input."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ia3.cli.flags import AnswerBy, AsJson, BatchSize, TextColumn, TrustRemoteCode, expect_adapter, print_json
from ia3.cli.labelling import answering_bar
from ia3.cli.names import FlagConsole
from ia3.launched import launched_processes, launched_rank
from ia3.runs.screen import Screen

if TYPE_CHECKING:
    from ia3.data.records import Records
    from ia3.inference.answering import Answer
    from ia3.inference.work import Work


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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --output that ended early; its answers so far are kept.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Label sentences, a file or standard input with a trained adapter."""
    if output is not None:
        from ia3.data.writing import check_output

        check_output(output, file)
    elif resume:
        raise ValueError("--resume goes on with an --output: give one.")
    if sentences and file is not None:
        raise ValueError(f"There are both sentences and --file {file}: give one of them.")
    if adapter_column is None:
        expect_adapter(adapter)
    elif file is None:
        raise ValueError("--adapter-column names a column of a --file: give the file.")
    from ia3.data.questions import read_questions

    if launched_processes() > 1 and (file is None or output is None):
        raise ValueError("Several processes share the rows of a --file, into an --output: give both.")
    source = sentences or _read_lines() if file is None else read_questions(file, adapter, text_column, adapter_column)
    for remark in () if isinstance(source, list) else source.remarks:
        FlagConsole().print(remark, markup=False, highlight=False)
    asked: dict[str, Any] = {
        **{"text_column": text_column, "adapter_column": adapter_column, "answer_by": answer_by},
        **{"max_length": max_length, "max_new_tokens": max_new_tokens, "batch_size": batch_size},
        "trust_remote_code": trust_remote_code,
    }
    if output is not None:
        asked |= {"resume": resume}
        _write(adapter, source, output, asked, as_json=as_json)
    else:
        _print(adapter, source, asked, as_json=as_json)


def _write(adapter: str, source: Records | list[str], output: Path, asked: dict[str, Any], *, as_json: bool) -> None:
    """Rows with their answers into a file."""
    from ia3.inference.label_file import label_file

    with answering_bar(FlagConsole(), asked["batch_size"]) as bar:
        found = label_file(adapter, source, output, **asked, tell=bar.telling())
    if launched_rank():  # the first process speaks for all
        return
    for remark in found.remarks:
        typer.echo(remark, err=True)
    if as_json:
        print_json({"adapter": adapter, "output": output, "rows": found.rows, "labels": found.labels})
        return
    if found.labels:
        _print_counts(Counter(found.labels))
    typer.echo(f"{found.answered:,} predictions are in {output}")


def _print(adapter: str, source: Records | list[str], asked: dict[str, Any], *, as_json: bool) -> None:
    """Answers as they come; those of several models in the order of the rows, once all are there."""
    with answering_bar(FlagConsole(), asked["batch_size"]) as bar:
        from ia3.inference.work import answer_in_order, count_filled, work_of

        tell = bar.telling()
        work = work_of(adapter, source, **asked, tell=tell)
        filled = count_filled(work, tell)
        if as_json or not sys.stdout.isatty():  # where a bar is in nobody's way
            tell.begin(filled)
        started = False
        for places, answers in answer_in_order(work, tell):
            pairs = [(place, found) for place, found in zip(places, answers, strict=True) if found is not None]
            if as_json:
                head = f'{{"adapter": {json.dumps(adapter, ensure_ascii=False)}, "predictions": ['
                typer.echo(", " if started else head, nl=False)
                typer.echo(", ".join(_as_json(work, *pair) for pair in pairs), nl=False)
            else:
                _print_pairs([(work.questions.as_given(place), found) for place, found in pairs])
            started = True
        if as_json:
            typer.echo("]}")


def _as_json(work: Work, place: int, found: Answer) -> str:
    from ia3.inference.label_file import found_of

    own = {} if work.adapters is None else {"adapter": work.adapters[place]}
    content = {**own, "text": work.questions.as_given(place), **found_of(found, "label")}
    return json.dumps(content, ensure_ascii=False, default=str)


def _print_pairs(pairs: list[tuple[str, Answer]]) -> None:
    if sys.stdout.isatty():
        _print_table(pairs)
        return
    for text, found in pairs:
        typer.echo("\t".join(_on_one_line(cell) for cell in (found.label, *_share(found, "{:.4f}"), text)))


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
    Screen().print(table, "", highlight=False)


def _print_table(pairs: list[tuple[str, Answer]]) -> None:
    table = Table("label", box=None, pad_edge=False)
    ranked = any(found.probability is not None for _, found in pairs)
    if ranked:
        table.add_column("probability", justify="right")
    table.add_column("text", overflow="fold")
    for text, found in pairs:
        table.add_row(Text(found.label), *_share(found, "{:.1%}"), Text(text))
    Screen().print(table, highlight=False)
