"""What to train on what: the recipe, from a file or from keywords, every key and value checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import InstanceOf, TypeAdapter, ValidationError

from ia3.data.records import decode_text
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Examples
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

# Recipes that a name stands for; what is given beside the name overrides them.
RECIPES: dict[str, dict[str, Any]] = {
    # Liu et al. 2022, sections 3.2 to 3.4.
    "t-few": {
        "answer_by": "rank",
        "batch_size": 8,
        "learning_rate": 3e-3,
        "objective": "t-few",
        "optimizer": "adafactor",
        "steps": 1000,
        "warmup_steps": 60,
    },
}
# How a recipe's file names data that it was not given by name.
IN_MEMORY = "in memory: "


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train on what. In a file and in `train` the fields of `settings` stand beside the others.

    Args:
        model: the base model: a hub name, a folder or a bundled model.
        data: what `load_examples` reads, or examples.
        test_data: held-out data; otherwise `test_size` of the data.
        test_size: the part of the data that is held out.
        test_limit: evaluate on at most this many examples, the first of the held-out ones.
        split_seed: decides what is held out, apart from the run's seed, so that runs with several are compared on
            the same examples.
        task: what to learn; by default label words for a seq2seq model, instructions for a causal one, the
            classes of texts for an encoder.
        text_column: the column with the text.
        label_column: the column with the label, the answer or the tags.
        merge_labels: read spellings of a label that differ in case, white space or Unicode form alone as one, the most
            frequent; of texts with one label each.
        template: the text around the columns, as in `"Review: {text} Sentiment?"`; instead of `text_column`.
        system: the system message of each conversation, in instruction tuning.
        target_modules: the modules to adapt; by default those of the model's family.
        feedforward_modules: those of them whose input is multiplied.
        output: the run's folder; by default a new one in `runs/`.
        limit: train on at most this many examples, drawn at random, each label among them where there is room.
        settings: how to train.

    Raises:
        ValueError: a limit below 1, or both a template and a text column.
    """

    model: str
    data: str | InstanceOf[Examples]
    test_data: str | InstanceOf[Examples] | None = None
    test_size: float = 0.1
    test_limit: int | None = None
    split_seed: int = 42
    task: TaskKind | None = None
    text_column: str = "text"
    label_column: str = "label"
    merge_labels: bool = True
    template: str | None = None
    system: str | None = None
    target_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    output: Path | None = None
    limit: int | None = None
    settings: TrainSettings

    def __post_init__(self) -> None:
        for name, purpose in (("limit", "train on"), ("test_limit", "evaluate on")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1 example to {purpose}.")
        if self.test_data is not None and self.test_size != 0.1:
            raise ValueError(f"There are test_data, so test_size {self.test_size} has no use: leave one of them out.")
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

    def content(self) -> dict[str, Any]:
        """The recipe as its file holds it: what `make_recipe` takes, what is None left out."""
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = asdict(own.pop("settings"))
        if self.template is not None:
            del own["text_column"]
        for name in ("data", "test_data"):
            if isinstance(own[name], Examples):
                own[name] = f"{IN_MEMORY}{own[name].source}"
        del own["output"]  # doing it again must not replace the run that this is the recipe of
        own["task"] = None if self.task is None else self.task.value
        settings["trackers"] = list(settings["trackers"])
        if settings["steps"] is not None:
            del settings["epochs"]
        return {name: value for name, value in (own | settings).items() if value is not None}


_SETTINGS = tuple(field.name for field in fields(TrainSettings))
_KEYS = (*(field.name for field in fields(Recipe) if field.name != "settings"), *_SETTINGS)


# Keys that stand for one thing, so that a value over one takes the other away.
_EITHER = (("epochs", "steps"), ("template", "text_column"))


def override(content: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with other values over it."""
    merged = {**content, **over}
    for pair in _EITHER:
        for one, other in (pair, pair[::-1]):
            if one in over and other not in over:
                merged.pop(other, None)
    return merged


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe's YAML file, or one of `RECIPES` by its name; keys and values are not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, or not one key and one value a line.
    """
    if str(path) in RECIPES:
        return dict(RECIPES[str(path)])
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no recipe {path}: expected a YAML file with lines such as `epochs: 3`, or one of the names "
            f"{list(RECIPES)}."
        )
    try:
        content = yaml.load(decode_text(path.read_bytes(), str(path)), _LoaderOfDistinctKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is no recipe: expected one key and its value a line, such as `epochs: 3`.")
    return without_a_heads_way(content)


def without_a_heads_way(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content without a way of answering where a head answers: every run's file had one once."""
    heads = [kind.value for kind in TaskKind if not kind.writes]
    extra = content.get("task") in heads and content.get("answer_by") == "generation"
    return {key: value for key, value in content.items() if not (extra and key == "answer_by")}


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
    if content.get("epochs") is not None and content.get("steps") is not None:
        raise ValueError(f"{source or 'A recipe'} has both epochs and steps: leave one of them out.")
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
