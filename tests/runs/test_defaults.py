"""What a training takes that names nothing: small data are passed over more often, what is said holds."""

from __future__ import annotations

from typing import Any

import pytest

from ia3.runs import defaults
from ia3.runs.recipe import Recipe, resolve
from ia3.tasks.task import TaskKind

WORDS, HEAD, CHAT = TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.INSTRUCTIONS
TAGS = TaskKind.TOKEN_CLASSIFICATION


# As it is for users, read before other tests train less.
LEAST_STEPS = defaults.least_steps


@pytest.fixture(autouse=True)
def least_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "least_steps", LEAST_STEPS)


def resolved(kind: TaskKind, rows: int, labels: int, **given: Any) -> tuple[Any, ...]:
    found = resolve(Recipe(model="m", data="d.csv", **given), kind, rows, labels)
    return found.learning_rate, found.epochs, found.steps, found.dropout


@pytest.mark.parametrize(
    ("kind", "rows", "labels", "expected"),
    [
        (WORDS, 60, 3, (0.04, None, 500, False)),
        (WORDS, 1333, 3, (0.04, 3, None, False)),  # 167 batches of 8 thrice are 501 steps
        (WORDS, 1000, 77, (0.04, None, 1001, False)),
        (WORDS, 10_000, 77, (0.04, 3, None, False)),
        (HEAD, 60, 3, (0.02, None, 500, False)),
        (HEAD, 10_000, 77, (0.008, 3, None, False)),
        (TAGS, 60, 9, (0.02, None, 500, False)),
        (CHAT, 100, 0, (0.008, None, 200, False)),
        (CHAT, 10_000, 0, (0.008, 3, None, False)),
    ],
)
def test_the_rule(kind: TaskKind, rows: int, labels: int, expected: tuple[Any, ...]) -> None:
    assert resolved(kind, rows, labels) == expected


@pytest.mark.parametrize(
    ("kind", "labels", "rate"),
    [(WORDS, 3, 0.02), (WORDS, 77, 0.02), (HEAD, 3, 0.01), (HEAD, 77, 0.008), (CHAT, 0, 0.008)],
)
def test_vectors_at_every_linear_layer_have_lower_rates(kind: TaskKind, labels: int, rate: float) -> None:
    assert resolved(kind, 10_000, labels, target_modules="all-linear") == (rate, 3, None, False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"epochs": 2}, (0.04, 2, None, False)),
        ({"steps": 30}, (0.04, None, 30, False)),
        ({"learning_rate": 1e-3, "dropout": True}, (1e-3, None, 500, True)),
        ({"batch_size": 2}, (0.04, None, 500, False)),
        ({"batch_size": 1, "epochs": None}, (0.04, None, 500, False)),
    ],
)
def test_what_is_said_holds(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert resolved(WORDS, 60, 3, **given) == expected


def test_steps_are_counted_as_the_batches_are() -> None:
    assert resolved(WORDS, 1333, 3, gradient_accumulation=2)[1:3] == (None, 500)
    assert resolved(WORDS, 400, 3, batch_size=2)[1:3] == (3, None)


def test_settings_like_peft() -> None:
    from ia3.runs.recipe import make_recipe

    found = resolve(make_recipe({"model": "m", "data": "d.csv", "recipe": "peft"}), WORDS, 60, 3)
    assert (found.learning_rate, found.epochs, found.steps, found.dropout) == (8e-3, 3, None, True)
