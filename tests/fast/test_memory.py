"""What is let go of gives its memory back at once: it is part of no circle, which would wait for garbage collection."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoding import NAMES, batch_of, served
from test_generation import lively
from test_scores import CHOICES, inputs_of, layout_of, vectors_of
from test_slots import let_in, made, mixed, requests
from test_step import batches, optimiser_of
from test_sweep_step import RATES, adapted, sweep_step
from test_sweep_step import batch_of as batch_of_groups

import ia3
from ia3.fast.capture import GraphedCallable
from ia3.fast.encoding import FusedEncoder
from ia3.fast.generate import Decoder
from ia3.fast.scores import ChoiceScores
from ia3.fast.sweep import SweepStep
from ia3.mixing import gather_flat
from replayed import recording


@pytest.fixture(autouse=True)
def _uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def slots(**_: Any) -> Any:
    found = made(mixed("t5"))
    for some in (requests(2, 0), requests(1, 1)):
        let_in(found, found.free[: len(some)], some)
    found.step()
    found.step()
    return found


def session(tiny: Any, **_: Any) -> Any:
    """Of a generation; all that follow evict it."""
    decoder = Decoder(lively(tiny("llama")), max_new_tokens=3)
    ids = torch.randint(10, 64, (2, 5))
    for _ in range(2):
        decoder(ids, torch.ones_like(ids))
    return decoder.fused.popitem()[1]


def step(tiny: Any, randomise: Any, **_: Any) -> Any:
    model = adapted(tiny, "t5", randomise).train()
    found = ia3.compile_step(model, *optimiser_of(model))
    for batch in batches()[:2]:
        found(batch)
    return found


def sweep(tiny: Any, randomise: Any, **_: Any) -> Any:
    model = adapted(tiny, "t5", randomise)
    found = sweep_step(model, "fused")
    for _ in range(2):
        found(batch_of_groups(model, [2, 1, 2], 0), RATES)
    return found


def sweep_that_is_recorded(**given: Any) -> Any:
    with recording(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepStep, "records", True)
        return sweep(**given)


def encoder(tmp_path: Path, **_: Any) -> Any:
    model = served(tmp_path, "bert")
    layout, flat = gather_flat(model, NAMES)
    found = FusedEncoder(model, layout)
    with torch.inference_mode():
        for _ in range(2):
            found(batch_of(), flat, head=True)
    return found


def choice_scores(tiny: Any, randomise: Any, **_: Any) -> Any:
    model = adapted(tiny, "t5", randomise).eval()
    layout = layout_of(model)
    found = ChoiceScores(model, CHOICES, layout)
    for _ in range(2):
        found(**inputs_of(3, 19), flat=vectors_of(layout, 3))
    return found


@pytest.mark.parametrize("make", [slots, session, step, sweep, sweep_that_is_recorded, encoder, choice_scores])
def test_what_nobody_holds_is_gone(tiny: Any, randomise: Any, tmp_path: Path, make: Callable[..., Any]) -> None:
    held = weakref.ref(make(tiny=tiny, randomise=randomise, tmp_path=tmp_path))
    assert held() is None


def test_a_function_that_is_no_method_is_kept() -> None:
    computation = GraphedCallable(lambda x: x + 1, torch.device("cpu"))
    assert int(computation(x=torch.tensor(1))) == 2
