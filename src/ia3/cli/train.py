"""`ia3 train`: a base model and labelled text in, an adapter, its figures and a picture out."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.training.data import Examples
    from ia3.training.loop import Run, TrainSettings


def train(
    model: Annotated[str, typer.Option(help="The base model: a hub name, a folder or bundled:flan-t5-small-titler.")],
    data: Annotated[str, typer.Option(help="Labelled text: a CSV, JSON lines or parquet file, or a hub data set.")],
    test_data: Annotated[str | None, typer.Option(help="Held-out text; otherwise --test-size of the data.")] = None,
    test_size: Annotated[float, typer.Option(help="The part of the data that is held out.")] = 0.1,
    text_column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column with the label.")] = "label",
    output: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one in runs/.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training text.")] = 3,
    lr: Annotated[float, typer.Option(help="The learning rate of the first step; falls to 0.")] = 8e-3,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Where longer texts are cut, in tokens.")] = 128,
    dropout: Annotated[bool, typer.Option(help="Train with the base model's dropout.")] = True,
    seed: Annotated[int, typer.Option(help="Decides the split, the order and the dropout.")] = 42,
    limit: Annotated[int | None, typer.Option(help="Train on at most this many examples, drawn at random.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a model on labelled text; save the adapter, its figures and a picture."""
    from rich.console import Console

    from ia3.training.data import load_examples, split_examples
    from ia3.training.loop import TrainSettings

    settings = TrainSettings(
        epochs=epochs, learning_rate=lr, batch_size=batch_size, max_length=max_length, dropout=dropout, seed=seed
    )
    columns = {"text_column": text_column, "label_column": label_column}
    examples = load_examples(data, **columns)
    if test_data is None:
        training, test = split_examples(examples, test_size, seed)
    else:
        training, test = examples, load_examples(test_data, **columns)
    training = _draw(training, limit, seed)

    progress = Console(stderr=True)
    progress.print(examples.describe(), markup=False, highlight=False)
    _warn_of_overlap(training, test, progress)
    run, _, picture = fine_tune(model, training, test, settings, output or _new_folder(data), progress)
    print_result(run, picture, as_json=as_json)


def fine_tune(
    model_name: str, training: Examples, test: Examples, settings: TrainSettings, output: Path, progress: Console
) -> tuple[Run, Any, Path]:
    """Load a base model, attach an adapter, train and save it, and draw the picture.

    Returns:
        The run, the trained model and the picture's path.
    """
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils.logging import disable_progress_bar

    from ia3.bundled import load_model
    from ia3.config import IA3Config, TaskType
    from ia3.inference.predict import load_tokenizer
    from ia3.model import get_peft_model
    from ia3.training import loop
    from ia3.training.data import count_truncated
    from ia3.training.report import PICTURE_NAME, draw_report

    disable_progress_bar()
    tokenizer = load_tokenizer(model_name)
    base = load_model(model_name, AutoModelForSeq2SeqLM)
    model = get_peft_model(base, IA3Config(task_type=TaskType.SEQ_2_SEQ_LM))
    truncated = count_truncated([*training.texts, *test.texts], tokenizer, settings.max_length)
    if truncated:
        progress.print(f"{truncated:,} texts are longer than {settings.max_length} tokens and are cut (--max-length).")
    run = loop.train(model, tokenizer, training, test, settings=settings, output_dir=output, console=progress)
    title = f"{Path(model_name).name} on {Path(training.source).name}"
    return run, model, draw_report(run, model, output / PICTURE_NAME, title=title)


def print_result(run: Run, picture: Path, *, as_json: bool, **more: Any) -> None:
    """Print the run as a table, or with `more` as one JSON object, on standard output."""
    import json

    from rich.console import Console

    from ia3.training.report import result_table

    if as_json:
        paths = {"adapter": str(run.adapter_dir), "picture": str(picture)}
        typer.echo(json.dumps({**run.summary(), **paths, **more}, ensure_ascii=False))
    else:
        Console().print(result_table(run, picture))


def _draw(examples: Examples, limit: int | None, seed: int) -> Examples:
    if limit is None or limit >= len(examples):
        return examples
    if limit < 1:
        raise ValueError(f"--limit is {limit}: expected at least 1 example to train on.")
    return replace(examples, rows=tuple(random.Random(seed).sample(examples.rows, limit)))


def _warn_of_overlap(training: Examples, test: Examples, progress: Console) -> None:
    overlap = len(set(training.texts) & set(test.texts))
    if overlap:
        progress.print(f"{overlap:,} held-out texts also occur in training: the accuracy will flatter.", style="yellow")


def _new_folder(data: str) -> Path:
    name = re.sub(r"\W+", "-", Path(data).stem).strip("-") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
