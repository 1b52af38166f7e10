"""Choices scored by the fused forward have the model's own log-probabilities, before and after training."""

from __future__ import annotations

import pytest
import torch
from test_t5 import FORMS, adapted, batch_of

from ia3.fast.scores import ChoiceScores, unsupported_reason
from ia3.tasks.losses import choice_log_probabilities

CHOICES = torch.tensor([[5, 1, -100], [7, 9, 1], [4, -100, -100]])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("form", FORMS)
def test_the_models_log_probabilities(tiny, randomise, form) -> None:
    model = adapted(tiny, randomise, form).eval().to(DEVICE)
    assert unsupported_reason(model) is None
    score = ChoiceScores(model, CHOICES)
    for rows, source in ((5, 19), (3, 19), (4, 30), (5, 19)):
        batch = batch_of(rows, source)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        on_device = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        shared = CHOICES.expand(rows, -1, -1).to(DEVICE)
        expected = choice_log_probabilities(model, shared, **on_device).detach()
        torch.testing.assert_close(score(**inputs), expected, rtol=1e-9, atol=1e-10)
        with torch.no_grad():  # the vectors of the moment count
            for name, parameter in model.named_parameters():
                if ".ia3_l." in name:
                    parameter.mul_(1.1)


def test_it_stands_aside(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5")
    with model.disable_adapter():
        assert unsupported_reason(model) == "exactly one adapter must act, and none be merged"
    assert unsupported_reason(model.unload()) == "exactly one adapter must act, and none be merged"
