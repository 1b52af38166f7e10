"""Who compares, scores, encodes or reads takes back nothing that another thread has drawn meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoding import NAMES, served
from test_encoding import batch_of as texts
from test_scores import CHOICES, inputs_of, layout_of, vectors_of
from test_t5 import adapted, batch_of
from torch import Tensor
from torch.nn import functional

from described import batch_for, described
from ia3.fast import compare, encoding, output
from ia3.fast.draws import DrawsApart
from ia3.fast.encoding import FusedEncoder
from ia3.fast.graphed import GraphedLoss
from ia3.fast.ops.dropout import DropoutSeeds
from ia3.fast.scores import ChoiceScores
from ia3.mixing import gather_flat

X = torch.ones(1, 2, 4, 8)
DRAWS: tuple[Callable[[], Tensor], ...] = (
    lambda: torch.rand([]),
    lambda: torch.rand_like(X),
    lambda: torch.randn(2),
    lambda: torch.randint(5, (3,)),
    lambda: torch.randint(2, 5, (3,)),
    lambda: torch.randint_like(X, 2, 9),
    lambda: torch.randperm(5),
    lambda: torch.empty(3).normal_(),
    lambda: torch.normal(torch.zeros(2), 1.0),
    lambda: torch.multinomial(torch.ones(4), 2),
    lambda: functional.dropout(X, 0.5),
    lambda: functional.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
)


def test_it_draws_what_would_be_drawn_and_moves_nothing() -> None:
    torch.manual_seed(0)
    expected = [draw() for draw in DRAWS]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with DrawsApart():
        found = [draw() for draw in DRAWS]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_that_is_given_is_drawn_from() -> None:
    with DrawsApart():
        first, second = (torch.rand(2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_other_devices_and_what_is_compiled_go_as_ever() -> None:
    flex = import_module("torch.nn.attention.flex_attention")
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        expected = functional.scaled_dot_product_attention(x, x, x)
        with DrawsApart():
            assert torch.rand(2, device="meta").shape == (2,)
            torch.testing.assert_close(flex.flex_attention(x, x, x), expected)


def test_seeds_of_what_drops_nothing_are_not_drawn() -> None:
    before = torch.get_rng_state()
    seeds = DropoutSeeds(torch.device("cpu"), 2, "triton", drops=False)
    assert [int(seed) for seed in (seeds.next(), seeds.next()) if seed is not None] == [0, 0]
    assert torch.equal(torch.get_rng_state(), before)
    DropoutSeeds(torch.device("cpu"), 2, "triton", drops=True)
    assert not torch.equal(torch.get_rng_state(), before)


def comparing(monkeypatch: pytest.MonkeyPatch, **_: Any) -> Callable[[], Any]:
    """With a model whose own forward draws."""
    model, batch = described("t5", rate=0.1).train(), batch_for("t5")
    loss, own = GraphedLoss(model), GraphedLoss._own_numbers
    monkeypatch.setattr(GraphedLoss, "_own_numbers", lambda *args: own(*args) if torch.rand([]) < 2 else None)

    def compute(_: Any = model) -> None:  # which nobody else keeps alive
        assert loss.difference(batch, loss.pack(batch)) is None

    return compute


def reading(tiny: Any, randomise: Any, **_: Any) -> Callable[[], Any]:
    model = adapted(tiny, randomise, "t5 gated").train()
    assert model.config.dropout_rate > 0
    model(**batch_of())  # which is compared

    def compute() -> None:
        state = torch.get_rng_state()
        found = model(**batch_of())
        torch.set_rng_state(state)
        _ = found.logits

    return compute


def scoring(tiny: Any, randomise: Any, **_: Any) -> Callable[[], Any]:
    model = adapted(tiny, randomise, "t5 gated").eval()
    scores, flat = ChoiceScores(model, CHOICES, layout_of(model)), vectors_of(layout_of(model), 3)
    return lambda: scores(**inputs_of(3, 19), flat=flat)


def encoding_texts(tmp_path: Path, **_: Any) -> Callable[[], Any]:
    model = served(tmp_path, "bert")
    layout, flat = gather_flat(model, NAMES)
    encoder = FusedEncoder(model, layout)
    return lambda: encoder(texts(), flat, head=True)


@pytest.mark.parametrize(
    ("start", "owner", "name"),
    [
        (comparing, compare, "_in_few_bytes"),
        (reading, output._Rest, "_own_output"),
        (scoring, ChoiceScores, "_hold"),
        (encoding_texts, encoding, "answered"),
    ],
    ids=["comparing", "reading", "scoring", "encoding"],
)
def test_what_another_thread_draws_meanwhile_is_not_drawn_again(
    tiny: Any, randomise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Any, owner: Any, name: str
) -> None:
    before, drawn = getattr(owner, name), []

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=lambda: drawn.append(float(torch.rand([]))))
        thread.start()
        thread.join()
        return before(*args, **kwargs)

    compute = start(tiny=tiny, randomise=randomise, tmp_path=tmp_path, monkeypatch=monkeypatch)
    monkeypatch.setattr(owner, name, meanwhile)
    torch.manual_seed(0)
    compute()
    after = float(torch.rand([]))
    torch.manual_seed(0)
    assert [*drawn, after] == [float(torch.rand([])) for _ in range(len(drawn) + 1)]
    assert drawn
