"""A whole training from a few names: model, data and settings in, a run folder with an adapter out."""

from __future__ import annotations

import difflib
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import InstanceOf, TypeAdapter, ValidationError
from rich.console import Console

from ia3.config import IA3Config, TaskType
from ia3.inference.predict import load_base, load_tokenizer
from ia3.model import get_peft_model
from ia3.training import loop
from ia3.training.collate import measure_labels
from ia3.training.data import Examples, _decode, count_truncated, split_examples
from ia3.training.loop import Run, TrainSettings
from ia3.training.report import PICTURE_NAME, draw_report
from ia3.training.task import Task, Template, load_task_examples, save_task

INTERRUPTED_FOLDER = "interrupted"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by hand; the message says where the adapter of that moment is."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train on what. In a file and in `train` the fields of `settings` stand beside the others.

    Args:
        model: the base model: a hub name, a folder or a bundled model.
        data: labelled text: what `load_examples` reads, or examples.
        test_data: held-out text; otherwise `test_size` of the data.
        test_size: the part of the data that is held out.
        text_column: the column with the text.
        label_column: the column with the label.
        template: the text around the columns, as in `"Review: {text} Sentiment?"`; instead of `text_column`.
        target_modules: the modules to adapt; by default those of the model's family.
        feedforward_modules: those of them whose input is multiplied.
        output: the run's folder; by default a new one in `runs/`.
        limit: train on at most this many examples, drawn at random.
        settings: how to train.

    Raises:
        ValueError: a limit below 1, or both a template and a text column.
    """

    model: str
    data: str | InstanceOf[Examples]
    test_data: str | InstanceOf[Examples] | None = None
    test_size: float = 0.1
    text_column: str = "text"
    label_column: str = "label"
    template: str | None = None
    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    output: Path | None = None
    limit: int | None = None
    settings: TrainSettings

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}: expected at least 1 example to train on.")
        if self.template is not None and self.text_column != "text":
            raise ValueError(
                f"There is a template and the text column {self.text_column!r}: a template names its columns "
                f"itself, as in 'Review: {{{self.text_column}}}', so leave text_column out."
            )

    @property
    def source(self) -> str:
        """Where the data come from."""
        return self.data if isinstance(self.data, str) else self.data.source

    @property
    def wording(self) -> Template:
        """What the model reads of each record."""
        return Template.of_column(self.text_column) if self.template is None else Template(self.template)


_SETTINGS = tuple(field.name for field in fields(TrainSettings))
_KEYS = (*(field.name for field in fields(Recipe) if field.name != "settings"), *_SETTINGS)


def train(model: str, data: str | Path | Examples, *, console: Console | None = None, **recipe: Any) -> Run:
    """Fine-tune a seq2seq model on labelled text: what `ia3 train` does, with the same defaults.

    Args:
        model: the base model: a hub name, a folder or a bundled model.
        data: labelled text: a file, a data set on the hub, or examples.
        console: where the progress goes; standard error by default.
        recipe: the fields of `Recipe` and of `TrainSettings`, such as `epochs=3`.

    Returns:
        The run; its adapter is in `run.adapter_dir`.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: an unknown or wrong field of the recipe, data that can't be trained on.

    Example:
        >>> run = ia3.train("google/flan-t5-small", "reviews.csv", epochs=3)
        >>> run.final.accuracy
    """
    data = str(data) if isinstance(data, Path) else data
    return run_recipe(make_recipe({**recipe, "model": model, "data": data}), console or Console(stderr=True))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe's YAML file, its keys and values unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, or not one key and one value a line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}: expected a YAML file with lines such as `epochs: 3`.")
    try:
        content = yaml.load(_decode(path.read_bytes(), str(path)), _LoaderOfDistinctKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is no recipe: expected one key and its value a line, such as `epochs: 3`.")
    return content


class _LoaderOfDistinctKeys(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's loader keeps the last of equal keys in silence; this one refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"the keys {twice} stand there more than once; keep one of each.")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def make_recipe(content: Mapping[str, Any], source: str | Path | None = None) -> Recipe:
    """Check a recipe's keys and values.

    Args:
        content: the fields of `Recipe` and, beside them, of `TrainSettings`.
        source: the file that they come from, for the error.

    Raises:
        ValueError: an unknown key, a missing one, a value of another type or out of range.
    """
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"{source or 'A recipe'} has no key {key!r}. {_nearest(key)}")
    nested = {key: value for key, value in content.items() if key not in _SETTINGS}
    settings = {key: value for key, value in content.items() if key in _SETTINGS}
    try:
        return TypeAdapter(Recipe).validate_python({**nested, "settings": settings})
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise ValueError(problems if source is None else f"{source}: {problems}") from error


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, _KEYS, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(sorted(_KEYS))}."


def _explain(problem: Any) -> str:
    """One of pydantic's errors as a sentence."""
    place = [str(part) for part in problem["loc"] if part != "settings"]
    if problem["type"] == "missing":
        return f"there is no {place[0]}: name it in the recipe, or by --{place[0]}."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{place[0]} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}."


def run_recipe(recipe: Recipe, console: Console) -> Run:
    """Read the data, load the model, attach an adapter, train, and leave adapter, task and picture.

    Args:
        recipe: a checked recipe.
        console: where the progress goes, and what is odd about the data.

    Raises:
        FileNotFoundError, ValueError: as `train`.
        Interrupted: Ctrl-C while training; the adapter of that moment is in the run's folder `interrupted`.
    """
    training, test = _read_data(recipe, console)
    labels = _labels_in(training)
    settings = recipe.settings
    with console.status(f"Loading {recipe.model}"):
        tokenizer = load_tokenizer(recipe.model)
        lengths = measure_labels(labels, tokenizer, max_label_length=settings.max_label_length)
        base = load_base(recipe.model)
        config = IA3Config(
            task_type=TaskType.SEQ_2_SEQ_LM,
            target_modules=recipe.target_modules,
            feedforward_modules=recipe.feedforward_modules,
        )
        model = get_peft_model(base, config)
    _warn_of_truncation(
        count_truncated([*training.texts, *test.texts], tokenizer, settings.max_length), recipe, console
    )
    output = recipe.output or _new_folder(recipe.source)
    task = Task(
        template=recipe.wording,
        labels=labels,
        max_length=settings.max_length,
        max_new_tokens=max(lengths.values()),
        base_model=recipe.model,
        label_column=recipe.label_column,
    )
    try:
        run = loop.train(model, tokenizer, training, test, settings=settings, output_dir=output, console=console)
    except KeyboardInterrupt as error:
        folder = output / INTERRUPTED_FOLDER
        model.save_pretrained(folder)
        save_task(folder, task)
        raise Interrupted(
            f"Interrupted: the adapter as it was is in {folder}; try it by `ia3 evaluate {folder} --data …`. "
            "The same command begins anew."
        ) from error
    save_task(run.adapter_dir, task)
    title = f"{Path(recipe.model).name} on {Path(recipe.source).name}"
    draw_report(run, model, output / PICTURE_NAME, title=title)
    return run


def _read_data(recipe: Recipe, console: Console) -> tuple[Examples, Examples]:
    """The training and the held-out examples; what is odd about them is printed."""
    examples = _examples(recipe.data, recipe)
    if recipe.test_data is None:
        training, test = split_examples(examples, recipe.test_size, recipe.settings.seed)
    else:
        training, test = examples, _examples(recipe.test_data, recipe)
    training = _draw(training, recipe.limit, recipe.settings.seed)
    console.print(examples.describe(), markup=False, highlight=False)
    overlap = len(set(training.texts) & set(test.texts))
    if overlap:
        console.print(f"{overlap:,} held-out texts also occur in training: the accuracy will flatter.", style="yellow")
    return training, test


def _examples(data: str | Examples, recipe: Recipe) -> Examples:
    if isinstance(data, str):
        return load_task_examples(data, recipe.wording, recipe.label_column)
    field, *more = recipe.wording.fields
    if more:
        raise ValueError(
            f"The template {recipe.template!r} reads the columns {[field, *more]}, and examples in memory have one "
            "text each: give a file as data, or examples whose texts are whole."
        )
    rows = tuple(replace(row, text=recipe.wording.render({field: row.text})) for row in data)
    return replace(data, rows=rows)


def _draw(examples: Examples, limit: int | None, seed: int) -> Examples:
    if limit is None or limit >= len(examples):
        return examples
    return replace(examples, rows=tuple(random.Random(seed).sample(examples.rows, limit)))


def _labels_in(training: Examples) -> tuple[str, ...]:
    """The labels that training shows, in their source's order."""
    occurring = {row.label for row in training}
    found = tuple(label for label in training.labels if label in occurring)
    if len(found) < 2:
        raise ValueError(
            f"All {len(training):,} training examples of {training.source} have the label {found[0]!r}, so there is "
            "nothing to tell apart: give examples of at least two labels."
        )
    return found


def _warn_of_truncation(count: int, recipe: Recipe, console: Console) -> None:
    if count:
        wanted = recipe.settings.max_length
        console.print(f"{count:,} texts are longer than {wanted} tokens and are cut (--max-length).")


def _new_folder(source: str) -> Path:
    name = re.sub(r"\W+", "-", Path(source).stem).strip("-") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
