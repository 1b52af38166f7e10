"""What is looked at before anything that takes long is imported or loaded: folder, model's name, data, columns."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from pathlib import Path

from ia3.bundled import TITLER, resolve_model
from ia3.data.loading import load_examples, read_for
from ia3.data.records import Records
from ia3.errors import SettingError
from ia3.files import BUNDLED
from ia3.runs.recipe import Recipe
from ia3.runs.run import check_output
from ia3.tasks.task import TaskKind

# The rows that tell whether the columns can be read.
_FEW = 20
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Looked = dict[tuple[str, ...], Records]
"""What was read, by its name and how it was read."""


def look_before(*recipes: Recipe) -> Looked:
    """Find what is plainly wrong with recipes in a moment, and read their data.

    Returns:
        The records, for `read_data`.

    Raises:
        FileNotFoundError, ValueError: an output that can't be written, no such model or data, or no such columns.
    """
    looked: Looked = {}
    for recipe in recipes:
        check_output(recipe.output or Path("runs"))
        expect_folder_or_hub(recipe.model, "model", "config.json")
        for name in (recipe.data, recipe.test_data):
            if isinstance(name, str) and (key := key_of(recipe, name)) not in looked:
                looked[key] = read_for(name, recipe.wording, recipe.label_column)
                _expect_columns(looked[key], recipe)
    return looked


def key_of(recipe: Recipe, name: str) -> tuple[str, ...]:
    """What decides how data are read."""
    return (name, *recipe.wording.fields, recipe.label_column)


def _expect_columns(records: Records, recipe: Recipe) -> None:
    """Refuse columns that no kind of task that may be meant can be read from."""
    few = replace(records, rows=records.rows[:_FEW])
    wrong = None
    for kind in [recipe.task] if recipe.task is not None else _kinds(recipe.model):
        try:
            load_examples(
                few,
                template=None if recipe.template is None else recipe.wording,
                text_column=recipe.text_column,
                label_column=recipe.label_column,
                kind=kind,
                merge_labels=False,
            )
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
    path = Path(model) / "config.json"
    written = path.read_bytes() if path.is_file() else b"{}"
    if model.startswith(BUNDLED) or json.loads(written).get("is_encoder_decoder"):
        return [TaskKind.LABEL_WORDS]
    return list(TaskKind)


def expect_folder_or_hub(name: str, what: str, holds: str) -> None:
    """Refuse a name that can neither be a folder's nor a hub repository's.

    Args:
        name: the name.
        what: what it is of, for the error.
        holds: the file that makes a folder one.

    Raises:
        FileNotFoundError: there is no such folder, or it holds something else.
        ValueError: there is no such bundled model.
    """
    path = Path(name)
    if name.startswith(BUNDLED) and name != TITLER:
        resolve_model(name)
    if name == TITLER or path.is_file() or (path / holds).is_file():
        return
    if path.is_dir():
        raise FileNotFoundError(f"No {holds} in {name}: the folder holds no {what}.")
    beside = [each.name for each in path.parent.iterdir() if (each / holds).is_file()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near or not (_ON_THE_HUB.fullmatch(name) or name.endswith(".gguf")):
        meant = f" Did you mean {path.with_name(near[0])}?" if near else f" Expected a folder, or a {what} on the hub."
        raise FileNotFoundError(f"There is no {what} {name!r}.{meant}")
