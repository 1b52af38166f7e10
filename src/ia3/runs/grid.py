"""What the runs of a sweep are given: a grid of settings as recipes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ia3.errors import SettingError, shorten
from ia3.runs.recipe import Recipe, make_recipe
from ia3.runs.settings import field_names, nearest

# What is tried where nothing else is asked for: from a little low to a little high, see docs/learning-rate.md.
LEARNING_RATES = (3e-3, 8e-3, 2e-2, 4e-2, 8e-2)
# What the runs of a sweep may differ in. All else is the model's or is shared by the batch.
SWEPT = (
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_gradient_norm",
    "seed",
    "epochs",
    "steps",
    "batch_size",
    "gradient_accumulation",
    "balance",
    "group_by_length",
    "evaluate_every",
    "patience",
    "limit",
    "template",
    "data",
)
# What a sweep can't do, with the reason: its settings have but the first value, and so no flag.
NOT_SWEPT = {
    "optimizer": "each row has an AdamW of its own",
    "objective": "its loss is the language model's",
    "packing": "its rows hold one example each",
    "quantize": "its products are of plain weights",
    "trackers": "its figures go to the runs' folders",
}

Over = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]


def make_recipes(given: Mapping[str, Any], over: Over | None) -> tuple[list[Recipe], list[str]]:
    """A checked recipe a run, and what they differ in.

    Args:
        given: what all have, as `make_recipe` takes it.
        over: as `sweep` takes it.

    Raises:
        ValueError: a wrong one, two that are the same, or a setting that can't differ or is given for all, too.
    """
    choices = combinations({"learning_rate": LEARNING_RATES} if over is None else over)
    keys = list(dict.fromkeys(key for choice in choices for key in choice))
    twice = sorted({*keys} & {*given})
    if twice and over is None:
        raise SettingError(
            "A sweep tries five learning rates itself: leave `learning_rate` out, or name yours in `over`."
        )
    if twice:
        raise ValueError(f"{', '.join(twice)} is given for all runs and in over: give it once.")
    recipes: list[Recipe] = []
    for choice in choices:
        recipe = make_recipe({**given, **choice})
        if recipe in recipes:
            raise ValueError(
                f"over holds {shorten(choice, 300)} more than once, which would be one run: give each once."
            )
        recipes.append(recipe)
    for name, reason in NOT_SWEPT.items():
        value = getattr(recipes[0], name)
        if value not in ("adamw", "lm", False, None, ()):
            raise SettingError(
                f"A sweep takes no `{name}={shorten(value)}`, since {reason}: leave it out, or train without a sweep."
            )
    return recipes, keys


def combinations(over: Over) -> list[dict[str, Any]]:
    """The settings of each run: every combination of a grid's values, or those of a list as they are.

    Raises:
        ValueError: nothing to try, values that are no list, or a key that runs can't differ in.
    """
    if isinstance(over, Mapping):
        for key, values in over.items():
            if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
                raise ValueError(
                    f"over: {shorten(key)} is {shorten(values)}: expected a list of the values to try, such as [0, 1]."
                )
        choices = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    else:
        choices = [dict(choice) for choice in over]
    others = sorted({key for choice in choices for key in choice} - {*SWEPT})
    for key in others:
        if key not in field_names(Recipe):
            raise ValueError(f"over: there is no setting {shorten(key)}. {nearest(key, SWEPT).replace('`', '')}")
    if others:
        raise ValueError(
            f"The runs of a sweep can't differ in {', '.join(others)}: they share a base model and its batches. They "
            f"can in {', '.join(SWEPT)}."
        )
    if not any(choices):
        raise ValueError("over is empty: name what the runs differ in, such as {'learning_rate': [3e-3, 8e-3]}.")
    return choices
