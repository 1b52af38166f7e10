"""What to train on what: the recipe, from a file or from keywords, every key and value checked."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml  # type: ignore[import-untyped]
from pydantic import BeforeValidator, Field, InstanceOf

from ia3.data.records import decode_text
from ia3.errors import NoMatchingPeftModuleError, SettingError, fit_screen, listed, said_again, shorten
from ia3.files import expect_path, read_file
from ia3.runs.defaults import LEFT_TO_THE_DATA, default_settings
from ia3.runs.settings import (
    LARGEST,
    Flag,
    Positive,
    PositiveReal,
    Seed,
    TrainSettings,
    checked,
    field_names,
    say_long_warmup,
)
from ia3.tasks.examples import Examples
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

# Recipes that a name stands for; what is given beside the name overrides them.
RECIPES: dict[str, dict[str, Any]] = {
    # A vector for queries, what attention returns and all of the feed-forward, too: docs/choosing.md.
    "all-linear": {"target_modules": "all-linear"},
    # The guide to IA3 in PEFT's documentation.
    "peft": {"batch_size": 8, "dropout": True, "epochs": 3, "learning_rate": 8e-3, "warmup_steps": 0},
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
# A setting's name in a message.
_NAMED = re.compile(r"`(\w+)")
# The most bytes of a recipe's file.
_LIMIT = 1 << 17
_DEEPEST = 16
# How a recipe's file names data that it was not given by name.
IN_MEMORY = "in memory: "

_DATA, _TASK = Flag("Data"), Flag("Task")
_Name = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
_LEFT = Flag("Steps", unset="by the task and its data")
_RATE = Flag("Steps", also="lr", unset="by the task and its data")


@checked
class Recipe(TrainSettings):
    """What to train on what, and how.

    Raises:
        ValueError: what `TrainSettings` raises, something missing, or settings that exclude each other.
    """

    model: Annotated[_Name, Flag(None)]
    """The base model: a hub name, a folder, a GGUF file or bundled:flan-t5-small-titler."""
    data: Annotated[_Name | InstanceOf[Examples], Flag(None)]
    """What to learn from: a table in a file (CSV, JSON lines, parquet, …) or a data set on the hub."""
    test_data: Annotated[_Name | InstanceOf[Examples] | None, _DATA] = None
    """Held-out data; otherwise `test_size` of the data."""
    test_size: Annotated[float, Field(gt=0, lt=1), _DATA] = 0.1
    """The part of the data that is held out."""
    test_limit: Annotated[Positive | None, Flag("Data", unset="all")] = None
    """Evaluate on at most this many examples, the first of the held-out ones."""
    split_seed: Annotated[Seed, _DATA] = 42
    """Decides what is held out, apart from the run's `seed`, so that runs with several are compared on the same
    examples."""
    limit: Annotated[Positive | None, Flag("Data", unset="all")] = None
    """Train on at most this many examples, drawn at random, each label among them where there is room."""
    text_column: Annotated[str, _DATA] = "text"
    """The column with the text."""
    label_column: Annotated[str, _DATA] = "label"
    """The column with the label, the answer or the tags."""
    merge_labels: Annotated[bool, _DATA] = True
    """Read spellings of a label that differ in case, white space or Unicode form alone as one, the most frequent; of
    texts with one label each."""
    task: Annotated[TaskKind | None, Flag("Task", unset="the model's")] = None
    """What to learn; by default label words for a seq2seq model, instructions for a causal one, the classes of texts
    for an encoder."""
    template: Annotated[_Name | None, _TASK] = None
    """The text around the columns, as in "Review: {text} Sentiment?"; instead of `text_column`."""
    system: Annotated[str | None, _TASK] = None
    """The system message of each conversation, in instruction tuning."""
    target_modules: Annotated[list[str] | str | None, Flag("Base model and adapter", unset="the family's")] = None
    """The modules to adapt: their names, or a pattern."""
    feedforward_modules: Annotated[list[str] | str | None, Flag("Base model and adapter", unset="the family's")] = None
    """Those of them whose input is multiplied, not the output."""
    towers: Annotated[list[str] | str | None, Flag("Base model and adapter", unset="the language model")] = None
    """Which part of the model is adapted: of an encoder-decoder `decoder` alone, so that one text is read once for many
    adapters; or sub-models as the model's configuration names them."""
    output: Annotated[Path | None, Flag(None, unset="a new one in runs/")] = None
    """The folder for what is made."""
    # None leaves these to the data: runs/defaults.py.
    learning_rate: Annotated[PositiveReal | None, _RATE] = None  # type: ignore[assignment]
    warmup_steps: Annotated[int | None, Field(ge=0, le=LARGEST), _LEFT] = None  # type: ignore[assignment]
    dropout: Annotated[bool | None, _LEFT] = None  # type: ignore[assignment]
    epochs: Annotated[Positive | None, _LEFT] = None  # type: ignore[assignment]
    steps: Annotated[Positive | None, _LEFT] = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("There are both `epochs` and `steps`: leave one of them out.")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(say_long_warmup(self.warmup_steps, self.steps))
        if self.towers is not None and self.target_modules is not None:
            raise ValueError(
                "`towers` says which part of the model the default is for, and there is `target_modules`, which the "
                "recipe all-linear has: leave one of them out."
            )
        if self.test_data is not None and self.test_size != 0.1:
            raise ValueError(f"There is `test_data`, so `test_size={self.test_size}` has no use: leave one out.")
        if self.template is not None and self.text_column != "text":
            raise ValueError(
                f"There is a `template` and the text column {shorten(self.text_column)}: a template names its "
                f"columns itself, as in 'Review: {{{self.text_column:.50}}}', so leave `text_column` out."
            )
        if self.template is not None:
            Template(self.template)  # refuses one that shows nothing

    @property
    def settings(self) -> TrainSettings:
        """How to train."""
        given = {name: getattr(self, name) for name in field_names(TrainSettings)}
        return TrainSettings(**{name: value for name, value in given.items() if value is not None})

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
        own: dict[str, Any] = {name: getattr(self, name) for name in field_names(self)}
        if self.template is not None:
            del own["text_column"]
        for name in ("data", "test_data"):
            if isinstance(own[name], Examples):
                own[name] = f"{IN_MEMORY}{own[name].source}"
        del own["output"]  # doing it again must not replace the run that this is the recipe of
        own["task"] = None if self.task is None else self.task.value
        own["trackers"] = list(self.trackers)
        return {name: value for name, value in own.items() if value is not None}


def resolve(recipe: Recipe, kind: TaskKind, rows: int, labels: int) -> Recipe:
    """The recipe with a value for each setting that it leaves to the data.

    Args:
        recipe: what was asked for.
        kind: what is learned.
        rows: how many examples there are to train on.
        labels: how many different labels they have; 0 where answers are free text.
    """
    left = {name for name in LEFT_TO_THE_DATA if getattr(recipe, name) is None}
    if recipe.steps is not None or recipe.epochs is not None:
        left -= {"epochs", "steps"}
    rows_a_step = recipe.batch_size * recipe.gradient_accumulation
    all_linear = str(recipe.target_modules).lower() == "all-linear"
    defaults = default_settings(kind, rows, labels, rows_a_step, all_linear=all_linear)
    return dataclasses.replace(recipe, **{name: defaults[name] for name in left})


def describe_choice(asked: Recipe, chosen: Recipe) -> str:
    """What `resolve` chose, in words; empty where everything was asked for."""
    words = {
        "learning_rate": f"learning rate {chosen.learning_rate:g}",
        "steps": f"{chosen.steps or 0:,} steps",
        "epochs": f"{chosen.epochs} passes over the rows",
        "dropout": "dropout" if chosen.dropout else "no dropout",
    }
    found = [word for name, word in words.items() if getattr(asked, name) is None is not getattr(chosen, name)]
    return ", ".join(found)


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
    if path == "":
        raise SettingError(f"`recipe` is empty: expected a YAML file, or one of {', '.join(RECIPES)}.")
    expect_path(path, "recipe")
    path = Path(path)
    if not path.exists():
        near = difflib.get_close_matches(str(path).lower().replace("_", "-"), RECIPES, n=1)
        raise FileNotFoundError(
            f"There is no recipe {path}{f', did you mean {near[0]}?' if near else ':'} Expected a YAML file with lines "
            f"such as `epochs: 3`, or one of {', '.join(RECIPES)}."
        )
    text = decode_text(read_file(path, _LIMIT), str(path))
    try:
        content = yaml.load(text, _RecipeLoader)
    except Exception as error:  # dates, tags and numbers that are none raise almost anything
        raise ValueError(f"{path} is not YAML of a recipe: {_why(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is no recipe: expected one key and its value a line, such as `epochs: 3`.")
    return content


def _why(error: Exception) -> str:
    """What YAML's parser found; its own errors say where."""
    said = fit_screen(str(error), 600)
    return said if isinstance(error, yaml.YAMLError) else f"a value is not what its form or tag says ({said})."


class _RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's loader without what recipes have no use for: equal keys, of which it keeps the last in silence, and
    aliases, by which a few lines become as much as anybody wants."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.YAMLError(f"*{alias.anchor:.50} is an alias; write out what it stands for.")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError("lists or keys stand too deep within each other.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := sorted(key for key, count in keys.items() if count > 1):
            raise yaml.YAMLError(f"the keys [{listed(twice)}] stand there more than once; keep one of each.")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


@contextmanager
def naming_its_recipe(content: Mapping[str, Any]) -> Iterator[None]:
    """Say which recipe it is that has the settings that an error is about, where nobody gave them beside it.

    Args:
        content: what `make_recipe` was given.
    """
    try:
        yield
    except ValueError as error:
        name, message = content.get("recipe"), str(error)
        said = f"recipe {name}" in message or (str(name) not in RECIPES and str(name) in message)
        below = {} if said or not isinstance(name, str | Path) else read_recipe(name)
        named = [
            *_NAMED.findall(message),
            *(["target_modules"] if isinstance(error, NoMatchingPeftModuleError) else []),
        ]
        owned = [each for each in dict.fromkeys(named) if each in below and each not in content]
        if not owned:
            raise
        has = ", ".join(f"`{each}`" for each in owned)
        raise said_again(
            f"{message} The recipe {name} has {has}: give others beside it, or leave the recipe out.", error
        ) from error


def make_recipe(content: Mapping[str, Any], source: str | Path | None = None) -> Recipe:
    """Check a recipe's keys and values.

    Args:
        content: the fields of `Recipe`; those of the recipe named `recipe` among them, a file or one of `RECIPES`, lie
            below.
        source: the file that they come from, for the error.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: an unknown key, a missing one, a value of another type or out of range.
    """
    own = {name: value for name, value in content.items() if name != "recipe"}
    name = content.get("recipe")
    if not isinstance(name, str | Path | None):
        raise SettingError(f"`recipe` is {shorten(name)}: expected a YAML file, or one of {', '.join(RECIPES)}.")
    if name == "all-linear" and "target_modules" in own:
        raise SettingError(
            "There are both `target_modules` and the recipe all-linear, which is nothing but those: leave one of them "
            "out."
        )
    try:
        if name is None:
            return Recipe(**own)
        below, source = read_recipe(name), name
        Recipe(**{"model": "", "data": "", **below})  # what is wrong in the file
    except SettingError as error:
        if source is None:
            raise
        raise ValueError(f"{source}: {str(error).replace('`', '')}") from error
    with naming_its_recipe(content):
        return Recipe(**override(below, own))
