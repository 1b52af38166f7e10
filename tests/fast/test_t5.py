"""The hand-written loss is the model's own: to float64's rounding, whatever vectors, padding and gates."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from builders import models_own
from ia3 import IA3Config, get_peft_model
from ia3.adapter import site_vectors
from ia3.fast.batch import pack_seq2seq as pack
from ia3.fast.fused import FusedLoss
from ia3.fast.graphed import unsupported_at
from ia3.state import attached
from ia3.tasks.losses import choice_log_probabilities

WITHOUT_THE_GATE = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
FORMS = {
    "t5": ("t5", {}),
    "t5 gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "t5 with an untied head": ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", {"feed_forward_proj": "gated-gelu"}),
    "t5 with own embeddings": ("t5", {"tie_word_embeddings": False}),
}


def adapted(tiny: Any, randomise: Any, form: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    family, shape = FORMS[form]
    model = get_peft_model(tiny(family, dtype=dtype, **shape), IA3Config(task_type="SEQ_2_SEQ_LM", **config))
    if form == "t5 with own embeddings":
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight = nn.Parameter(torch.randn_like(stack.embed_tokens.weight), requires_grad=False)
    return randomise(model)


def batch_of(rows: int = 5, source: int = 19, target: int = 3) -> dict[str, torch.Tensor]:
    """A batch with padding in sources and labels."""
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 30, (rows, source), generator=chance)
    mask = torch.ones_like(ids)
    labels = torch.randint(2, 30, (rows, target), generator=chance)
    for row in range(1, rows):
        mask[row, source - 3 * row :] = 0
        labels[row, target - row % target :] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the flat gradient."""
    adapter = attached(model).adapters["default"]
    vectors = [vector for _, vector in site_vectors(model, adapter)]
    flat = adapter.layout.flatten([vector.detach() for vector in vectors]).requires_grad_()
    (loss,) = FusedLoss(model, adapter.layout)(pack(batch), flat[None])
    (gradient,) = torch.autograd.grad(loss, flat)
    return loss.detach(), gradient


def by_the_model(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = attached(model).adapters["default"]
    vectors = [vector for _, vector in site_vectors(model, adapter)]
    loss = models_own(model, **batch).loss
    return loss.detach(), adapter.layout.flatten(torch.autograd.grad(loss, vectors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [1, 3, 18])
@pytest.mark.parametrize(
    "config", [{}, WITHOUT_THE_GATE, {"target_modules": ["v"], "feedforward_modules": []}], ids=str
)
def test_loss_and_gradients_are_the_models(tiny, randomise, form, target, config) -> None:
    model = adapted(tiny, randomise, form, **config)
    batch = batch_of(target=target)
    expected = by_the_model(copy.deepcopy(model), batch)
    assert unsupported_at(model, attached(model).adapters["default"].layout) is None
    found = by_hand(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_the_model(model, batch), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_groups_have_the_losses_and_gradients_of_each_alone(tiny, randomise, form) -> None:
    model = adapted(tiny, randomise, form)
    layout = attached(model).adapters["default"].layout
    loss_of = FusedLoss(model, layout)
    batch = batch_of(rows=6)
    batch["labels"][2:4] = -100
    table = (1 + torch.randn(3, layout.size, dtype=torch.float64) / 3).requires_grad_()
    losses = loss_of(pack(batch), table)
    (gradient,) = torch.autograd.grad(losses.sum(), table)
    for group in range(3):
        part = {name: tensor[2 * group : 2 * group + 2] for name, tensor in batch.items()}
        alone = loss_of(pack(part), table[group : group + 1])
        torch.testing.assert_close(losses[group], alone[0])
        torch.testing.assert_close(gradient[group], torch.autograd.grad(alone.sum(), table)[0][group])
    assert losses[1] == 0
    with pytest.raises(ValueError, match="6 examples can't be divided into 4 equal groups"):
        loss_of(pack(batch), torch.ones(4, layout.size, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 5])
def test_choices_have_the_models_log_probabilities(tiny, randomise, form, groups) -> None:
    model = adapted(tiny, randomise, form).eval()
    adapter = attached(model).adapters["default"]
    batch = batch_of()
    choices = torch.tensor([[5, 1, -100], [7, 9, 1], [4, -100, -100], [5, 2, 1]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = choice_log_probabilities(model, choices.expand(5, -1, -1), **inputs).detach()
    vectors = adapter.layout.flatten([vector.detach() for _, vector in site_vectors(model, adapter)])
    with torch.no_grad():
        found = FusedLoss(model, adapter.layout).log_probabilities(pack(batch), choices, vectors.expand(groups, -1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_dropout_acts_in_training_alone(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated")
    batch = batch_of()
    still = by_hand(model, batch)[0]
    model.train()
    torch.manual_seed(0)
    losses = [by_hand(model, batch)[0] for _ in range(200)]
    assert len(set(losses)) > 190
    eager = [models_own(model, **batch).loss.detach() for _ in range(200)]
    assert abs(sum(losses) - sum(eager)) / 200 < 4 * torch.stack(eager).std() / 200**0.5 * 2**0.5
    assert still not in losses


def change_hook(model: Any) -> None:
    model.encoder.block[0].layer[0].SelfAttention.q.register_forward_hook(lambda *_: None)


def change_forward(model: Any) -> None:
    model.encoder.forward = model.encoder.forward


def change_dropout(model: Any) -> None:
    model.encoder.dropout.p = 0.7


def change_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()


def change_weight(model: Any) -> None:
    class Quantised(nn.Parameter):
        pass

    linear = model.encoder.block[0].layer[0].SelfAttention.q
    linear.weight = Quantised(linear.weight.data, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_hook, "SelfAttention.q carries another's hook"),
        (change_forward, "the forward of encoder was replaced"),
        (change_dropout, "dropout of encoder.dropout is 0.7, and the configuration says 0.1"),
        (change_checkpointing, "gradients|carries another's hook"),
        (change_weight, "the weight of .*SelfAttention.q is a Quantised"),
    ],
)
def test_it_stands_aside(tiny, randomise, change, said) -> None:
    model = adapted(tiny, randomise, "t5 gated")
    layout = attached(model).adapters["default"].layout
    assert unsupported_at(model, layout) is None
    change(model)
    reason = unsupported_at(model, layout)
    assert reason is not None
    assert re.search(said, reason), reason


@pytest.mark.parametrize(
    ("form", "target", "said"),
    [
        ("t5 gated", "q", r"the input of .*\.q is adapted, where the block has no vector"),
        ("t5", "wi", r"the input of .*\.wi is adapted, where the block has no vector"),
    ],
)
def test_other_sites_are_left_to_the_model(tiny, randomise, form, target, said) -> None:
    model = adapted(tiny, randomise, form, target_modules=[target], feedforward_modules=[target])
    reason = unsupported_at(model, attached(model).adapters["default"].layout)
    assert reason is not None
    assert re.search(said, reason), reason
