"""Choices scored by the fused forward have the model's own log-probabilities, under whichever vectors."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from test_t5 import FORMS, adapted, batch_of

from ia3 import IA3Config
from ia3.fast.compare import difference
from ia3.fast.scores import ChoiceScores, _numbers, unsupported_reason
from ia3.mixing import acting_flat, make_rows
from ia3.rows import acting
from ia3.sites import Layout
from ia3.state import attached
from ia3.tasks.losses import choice_log_probabilities
from replayed import recording

CHOICES = torch.tensor([[5, 1, -100], [7, 9, 1], [4, -100, -100]])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(rows: int, source: int) -> dict[str, torch.Tensor]:
    batch = batch_of(rows, source)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def layout_of(model: Any) -> Layout:
    return attached(model).adapters["default"].layout


def vectors_of(layout: Layout, count: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(count)
    return (1 + torch.randn(count, layout.size, dtype=torch.float64, generator=chance) / 3).to(DEVICE)


def expected(model: Any, layout: Layout, vectors: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """By the model's own forward, with one input a row of vectors."""
    shared = CHOICES.expand(len(vectors), -1, -1).to(DEVICE)
    names = [str(number) for number in range(len(vectors))]
    with acting(make_rows(model, names, layout, vectors)):
        on_device = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        return choice_log_probabilities(model, shared, **on_device).detach()


@pytest.mark.parametrize("form", FORMS)
def test_the_models_log_probabilities(tiny, randomise, form) -> None:
    model = adapted(tiny, randomise, form).eval().to(DEVICE)
    layout = layout_of(model)
    assert unsupported_reason(model, layout) is None
    score = ChoiceScores(model, CHOICES, layout)
    for rows, source in ((5, 19), (3, 19), (4, 30), (5, 19)):
        inputs = inputs_of(rows, source)
        on_device = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        own = choice_log_probabilities(model, CHOICES.expand(rows, -1, -1).to(DEVICE), **on_device).detach()
        found = score(**inputs, flat=acting_flat(model)[1])  # type: ignore[index]
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-10)
        with torch.no_grad():  # the vectors of the moment count
            for name, parameter in model.named_parameters():
                if ".ia3_l." in name:
                    parameter.mul_(1.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recorded", [False, True])
def test_each_answer_has_its_own_vectors(tiny, randomise, form, recorded) -> None:
    """Recorded batches are filled up to one of few shapes, in which former vectors stand where there are no answers."""
    model = adapted(tiny, randomise, form).eval().to(DEVICE)
    layout = layout_of(model)
    with recording() if recorded else torch.no_grad():
        score = ChoiceScores(model, CHOICES, layout)
        for rows, source in ((5, 19), (3, 19), (3, 19), (5, 19), (1, 30)):
            vectors, inputs = vectors_of(layout, rows), inputs_of(rows, source)
            own = expected(model, layout, vectors, inputs)
            torch.testing.assert_close(score(**inputs, flat=vectors), own, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("sites", [{}, {"target_modules": "all-linear"}], ids=["default", "all-linear"])
def test_answers_that_read_one_input(tiny, randomise, form, recorded, sites, encoded) -> None:
    model = adapted(tiny, randomise, form, **sites).eval().to(DEVICE)
    layout = layout_of(model)
    with recording() if recorded else torch.no_grad():
        score = ChoiceScores(model, CHOICES, layout)
        for readers, source in (([4], 19), ([3, 1, 5], 19), ([1, 2, 4], 19), ([3, 1, 5], 19)):
            vectors, inputs = vectors_of(layout, sum(readers)), inputs_of(len(readers), source)
            # Of one input's answers the encoder's vectors are those of the first.
            before = accumulate(readers[:-1], initial=0)
            first = [place for place, count in zip(before, readers, strict=True) for _ in range(count)]
            for site, part in zip(layout.sites, layout.split(vectors), strict=True):
                if site.path.startswith("encoder."):
                    part.copy_(part[first])
            counts = torch.tensor(readers)
            own = expected(
                model, layout, vectors, {name: tensor.repeat_interleave(counts, 0) for name, tensor in inputs.items()}
            )
            encoded.clear()
            found = score(**inputs, flat=vectors, readers=readers)
            torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-10)
            if not recorded:
                # On a GPU a shape is read twice, to record it, and filled up; what is recorded is read no more.
                tokens = int(inputs["attention_mask"].sum())
                if DEVICE == "cpu":
                    assert encoded == [tokens]
                else:
                    assert {*encoded} <= {-(-tokens // 64) * 64}
            alike = score(**inputs, flat=vectors[:1], readers=readers)
            torch.testing.assert_close(alike[0], found[0])
            assert (alike - found).abs().max() > 1e-3


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each run of the encoder read."""
    from ia3.fast.fused import FusedLoss

    counts: list[int] = []
    read = FusedLoss.read_source
    monkeypatch.setattr(
        FusedLoss,
        "read_source",
        lambda self, run, packed, source: counts.append(source.total_tokens) or read(self, run, packed, source),
    )
    return counts


def test_the_base_has_no_vectors(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5").eval()

    def scored() -> torch.Tensor:
        layout, flat = acting_flat(model)  # type: ignore[misc]
        assert unsupported_reason(model, layout) is None
        return ChoiceScores(model, CHOICES, layout)(**inputs_of(3, 19), flat=flat)

    adapters = scored()
    with model.disable_adapter():
        base = scored()
    model = model.unload()
    assert torch.equal(scored(), base)
    assert (adapters - base).abs().max() > 1e-3
    own = choice_log_probabilities(model, CHOICES.expand(3, -1, -1), **inputs_of(3, 19)).detach()
    torch.testing.assert_close(base, own, rtol=1e-9, atol=1e-10)


def test_it_stands_aside(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5")
    model.add_adapter("other", IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["q"], feedforward_modules=["q"]))
    layout = attached(model).adapters["other"].layout
    assert "q is adapted, where the block has no vector" in (unsupported_reason(model, layout) or "")


def test_a_label_of_which_a_model_is_sure_is_compared_as_a_probability(tiny, randomise) -> None:
    """Its log-probability is no more exact than the logits are, of which it is a small difference."""
    model = adapted(tiny, randomise, "t5", dtype=torch.float32)
    own = torch.tensor([[-1.3e-3, -8e-6]])

    def reason(apart: float) -> str | None:
        near, far = _numbers(own), _numbers(own - apart)
        return difference(model, lambda: far, lambda moved: near, dtype=torch.float32)

    assert reason(3e-6) is None
    assert reason(1e-3) is not None
