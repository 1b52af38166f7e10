"""What all users of a fused loss share: batches from anywhere, and gradients of whatever else is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_step import batches, optimiser_of, train_as_usual, vectors_of
from test_t5 import adapted, batch_of
from torch import Tensor, nn

import ia3
from builders import models_own
from ia3 import IA3Config, get_peft_model
from ia3.adapter import get_adapter, site_vectors
from ia3.fast import families
from ia3.fast.capture import GraphedCallable, StaticInputs
from ia3.fast.graphed import GraphedLoss, _OwnForward, fetched, unsupported_reason
from replayed import recording


class LossByTheModel:
    """A fused loss that is the model's own forward over a packed batch; the head's copy has gradients of its own."""

    def __init__(self, model: Any, layout: Any, *, recompute: bool = False, frozen: Any = None) -> None:
        self.model, self.layout, self.baked = next(model.modules()), layout, []
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        adapter = get_adapter(self.model, "default")
        self.names = [f"model.{names[id(vector)]}" for _, vector in site_vectors(self.model, adapter)]
        self.shapes = [site.trained_shape for site in layout.sites]

    def __call__(self, packed: Any, table: Tensor) -> Tensor:
        spans = packed.spans(1)
        ids = spans.pad(packed.tokens[:, None])[..., 0].masked_fill(~spans.mask, 0)
        parts = [part.view(shape) for part, shape in zip(self.layout.split(table[0]), self.shapes, strict=True)]
        batch = {"input_ids": ids, "attention_mask": spans.mask.long(), "labels": packed.labels}
        named = dict(zip(self.names, parts, strict=True))
        return torch.func.functional_call(_OwnForward(self.model), named, (), batch).loss[None]


@pytest.fixture
def trains_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = replace(families._T5, loss=LossByTheModel, why_not=lambda *_: None, trains_others=True)
    monkeypatch.setitem(families._FAMILIES, "t5", stub)


def with_head(tiny: Any, randomise: Any) -> Any:
    config = IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"])
    return randomise(get_peft_model(tiny("t5", dropout_rate=0.0), config)).train()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.usefixtures("trains_heads")
def test_an_own_loop_trains_a_head_too(tiny, randomise) -> None:
    model, batch = with_head(tiny, randomise), batch_of()
    models_own(model, **batch).loss.mul(3).backward()
    wanted = gradients(model)
    assert any("lm_head" in name for name in wanted)
    output = model(**batch)
    assert type(output.loss.grad_fn).__name__ == "_WithGradientBackward"
    (3 * output.loss).backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("trains_heads")
def test_logits_that_a_changed_head_would_make_are_refused(tiny, randomise) -> None:
    model = with_head(tiny, randomise)
    outputs = [model(**batch_of()) for _ in range(2)]
    assert outputs[0].logits is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lm_head" in name:
                parameter.add_(1)
    with pytest.raises(RuntimeError, match="read logits before"):
        _ = outputs[1].logits


@pytest.mark.usefixtures("trains_heads")
@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_step_trains_a_head_too(tiny, randomise, norm) -> None:
    usual = with_head(tiny, randomise)
    compiled = copy.deepcopy(usual)
    expected = train_as_usual(usual, batches()[:6], norm=norm)
    step = ia3.compile_step(compiled, *optimiser_of(compiled), max_gradient_norm=norm)
    assert (step.path, step.reason) == ("laid out", None)
    before = vectors_of(compiled)
    assert [float(step(batch)) for batch in batches()[:6]] == pytest.approx(expected, rel=1e-4)
    for name, trained in vectors_of(usual).items():
        torch.testing.assert_close(vectors_of(compiled)[name], trained, rtol=1e-3, atol=1e-4)
        assert not torch.equal(before[name], trained)
    assert all(parameter.grad is None for parameter in compiled.parameters())


@pytest.mark.usefixtures("trains_heads")
def test_another_gradient_of_the_head_is_a_difference(tiny, randomise, monkeypatch) -> None:
    """Though the loss is the same."""
    call: Callable[..., Tensor] = LossByTheModel.__call__

    def without_the_heads(self: Any, packed: Any, table: Tensor) -> Tensor:
        head = self.model.lm_head.modules_to_save["default"]
        frozen = nn.Parameter(head.weight.detach(), requires_grad=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(head._parameters, "weight", frozen)
            return call(self, packed, table)

    monkeypatch.setattr(LossByTheModel, "__call__", without_the_heads)
    model = with_head(tiny, randomise)
    trained = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    loss = GraphedLoss(model, others=trained)
    assert "differs from the model's own forward by 0.0e+00" in (
        loss.difference(batch_of(), loss.pack(batch_of())) or ""
    )


def test_what_else_is_trained_is_named(tiny, randomise) -> None:
    model = with_head(tiny, randomise)
    model.lm_head.requires_grad_(False)
    model.encoder.final_layer_norm.weight.requires_grad_()
    assert "trained" in (unsupported_reason(model) or "")


# Batches


def test_a_batch_that_is_elsewhere_comes_as_it_was() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int32)}
    found = fetched(batch)
    assert all(found[name] is tensor for name, tensor in batch.items())


def test_one_transfer_for_all_of_a_batch(monkeypatch) -> None:
    """By tensors that say they are elsewhere."""
    fetches = []
    batch = {
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": torch.tensor([[True, True, False], [True, False, False]]),
        "labels": torch.tensor([[1], [-100]], dtype=torch.int32),
    }

    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

        def cpu(self) -> Tensor:
            fetches.append(self.shape)
            return self.as_subclass(Tensor)

    found = fetched({name: tensor.as_subclass(Elsewhere) for name, tensor in batch.items()})
    assert fetches == [torch.Size([14])]
    for name, tensor in batch.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor.long())


def test_inputs_of_a_graph_lie_in_one_piece() -> None:
    inputs = {
        "tokens": torch.arange(5),
        "starts": torch.tensor([0, 2, 5], dtype=torch.int32),
        "rates": torch.tensor([[0.5], [0.25]], dtype=torch.float64),
        "labels": torch.empty(2, 0, dtype=torch.long),
        "one": torch.tensor(True),
    }
    static = StaticInputs(inputs, torch.device("cpu"))
    places = [tensor.data_ptr() for tensor in static.tensors.values() if tensor.numel()]
    assert all(torch.equal(static.tensors[name], tensor) for name, tensor in inputs.items())
    others = {name: tensor.clone().zero_() for name, tensor in inputs.items()}
    static.fill(others)
    assert all(torch.equal(static.tensors[name], tensor) for name, tensor in others.items())
    assert [tensor.data_ptr() for tensor in static.tensors.values() if tensor.numel()] == places
    assert all((place - places[0]) % 256 == 0 for place in places)


def test_a_loss_that_is_replayed_is_the_models_own(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated").eval()
    with recording() as recorded:
        loss = GraphedLoss(model)
        loss.captures = True
        computation = loss.graphed()
        for rows, source in ((5, 19), (3, 17), (4, 30), (5, 19)):
            batch = batch_of(rows, source)
            found, _, gradient = loss.run(computation, loss.pack(batch))
            own = models_own(model, **batch).loss
            torch.testing.assert_close(found, own.detach(), rtol=1e-9, atol=0)
            expected = loss.layout.flatten(torch.autograd.grad(own, loss.vectors))
            torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    assert recorded
    assert isinstance(recorded[0], GraphedCallable)
