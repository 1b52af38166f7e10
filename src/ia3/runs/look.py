"""What is looked at before anything that takes long is imported or loaded: folder, model's name, data, columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ia3.bundled import expect_bundled
from ia3.data.loading import load_examples, read_for
from ia3.data.records import Records
from ia3.documents import read_json
from ia3.errors import SettingError
from ia3.files import BUNDLED, expect_folder_or_hub
from ia3.runs.recipe import Recipe
from ia3.runs.run import check_output
from ia3.tasks.examples import Examples
from ia3.tasks.task import TaskKind

# What a model may be meant for where no task is named.
_DEFAULTS = [kind for kind in TaskKind if kind.has_answers]
# The rows that tell whether the columns can be read.
_FEW = 20

Looked = dict[tuple[str, ...], Records]
"""What was read, by its name and how it was read."""


def look_before(*recipes: Recipe) -> Looked:
    """Find what is plainly wrong with recipes in a moment, and read their data.

    Returns:
        The records, for `read_data`, which takes them out.

    Raises:
        FileNotFoundError, ValueError: an output that can't be written, no such model or data, or no such columns.
    """
    looked: Looked = {}
    for recipe in recipes:
        check_output(recipe.output or Path("runs"))
        if recipe.model.startswith(BUNDLED):
            expect_bundled(recipe.model)
        else:
            expect_folder_or_hub(recipe.model, "model", "config.json")
        for name in (recipe.data, recipe.test_data):
            if isinstance(name, str) and (key := key_of(recipe, name)) not in looked:
                has_answers = recipe.task is None or recipe.task.has_answers
                looked[key] = read_for(name, recipe.wording, recipe.label_column if has_answers else None)
                _expect_columns(looked[key], recipe)
    return looked


def key_of(recipe: Recipe, name: str) -> tuple[str, ...]:
    """What decides how data are read."""
    return (name, *recipe.wording.fields, recipe.label_column)


def examples_of(recipe: Recipe, data: str | Records, kind: TaskKind) -> Examples:
    """Data's examples as a recipe says, with all spellings of their labels."""
    return load_examples(
        data,
        template=None if recipe.template is None else recipe.wording,
        text_column=recipe.text_column,
        label_column=recipe.label_column,
        kind=kind,
        merge_labels=False,
    )


def _expect_columns(records: Records, recipe: Recipe) -> None:
    """Refuse columns that no kind of task that may be meant can be read from."""
    few = replace(records, rows=records.rows[:_FEW])
    wrong = None
    for kind in [recipe.task] if recipe.task is not None else _kinds(recipe.model):
        try:
            examples_of(recipe, few, kind)
        except SettingError as error:
            wrong = wrong or error
        except ValueError:  # about a row: the whole reading tells
            return
        else:
            return
    if wrong is not None:
        raise wrong


def _kinds(model: str) -> list[TaskKind]:
    """What a model may be meant for, as far as its folder tells."""
    if model.startswith(BUNDLED):
        return [TaskKind.LABEL_WORDS]
    try:
        written = read_json(Path(model) / "config.json", finite=False)
    except (OSError, ValueError):  # of the hub, or damaged, which its loading tells
        return _DEFAULTS
    return [TaskKind.LABEL_WORDS] if written.get("is_encoder_decoder") is True else _DEFAULTS
