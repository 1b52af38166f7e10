"""What all users of a fused loss share: batches from anywhere, and gradients of whatever else is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_step import optimiser_of, train_as_usual, vectors_of
from test_t5 import adapted, batch_of
from torch import Tensor, nn

import ia3
from builders import models_own
from described import batch_for, described
from ia3.fast import capture, graphed
from ia3.fast.capture import GraphedCallable, StaticInputs
from ia3.fast.fused import FusedLoss
from ia3.fast.graphed import Cuts, GraphedLoss, fetched, unsupported_reason
from ia3.fast.guard import NOT_ALONE
from ia3.state import sole_active_adapter
from replayed import recording

HEADED = [batch_for("bert", seed=seed) for seed in range(6)]


def with_head() -> Any:
    """A classifier, whose head is trained in full beside its encoder's vectors."""
    return described("bert", torch.float32)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def test_an_own_loop_trains_a_head_too() -> None:
    model, batch = with_head(), HEADED[0]
    models_own(model, **batch).loss.mul(3).backward()
    wanted = gradients(model)
    assert any("classifier" in name for name in wanted)
    output = model(**batch)
    assert type(output.loss.grad_fn).__name__ == "_WithGradientBackward"
    (3 * output.loss).backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_logits_that_a_changed_head_would_make_are_refused() -> None:
    model = with_head()
    outputs = [model(**HEADED[0]) for _ in range(2)]
    assert outputs[0].logits is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "classifier" in name:
                parameter.add_(1)
    with pytest.raises(RuntimeError, match="read logits before"):
        _ = outputs[1].logits


@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_step_trains_a_head_too(norm) -> None:
    usual = with_head()
    compiled = copy.deepcopy(usual)
    expected = train_as_usual(usual, HEADED, norm=norm)
    step = ia3.compile_step(compiled, *optimiser_of(compiled), max_gradient_norm=norm)
    assert (step.path, step.reason) == ("fused", None)
    before = vectors_of(compiled)
    assert [float(step(batch)) for batch in HEADED] == pytest.approx(expected, rel=1e-4)
    for name, trained in vectors_of(usual).items():
        torch.testing.assert_close(vectors_of(compiled)[name], trained, rtol=1e-3, atol=1e-4)
        assert not torch.equal(before[name], trained)
    assert all(parameter.grad is None for parameter in compiled.parameters())


def test_another_gradient_of_the_head_is_a_difference(monkeypatch) -> None:
    """Though the loss is the same."""
    call: Callable[..., Tensor] = FusedLoss.__call__

    def without_the_heads(self: Any, packed: Any, table: Tensor) -> Tensor:
        head = dict(self.model.named_modules())["classifier"].modules_to_save["default"]
        frozen = nn.Parameter(head.weight.detach(), requires_grad=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(head._parameters, "weight", frozen)
            return call(self, packed, table)

    monkeypatch.setattr(FusedLoss, "__call__", without_the_heads)
    model = with_head()
    trained = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    loss = GraphedLoss(model, others=trained)
    assert "differs from the model's own forward by 0.0e+00" in (loss.difference(HEADED[0], loss.pack(HEADED[0])) or "")


def test_what_else_is_trained_is_named() -> None:
    model = with_head()
    assert unsupported_reason(model) is None
    model.bert.encoder.layer[0].output.LayerNorm.weight.requires_grad_()
    assert "trained" in (unsupported_reason(model) or "")


def test_two_that_act_are_not_one() -> None:
    """The second, which is frozen, is no parameter that would be trained besides."""
    model = with_head()
    model.add_adapter("other", ia3.IA3Config())
    model.set_adapter("other", inference_mode=True)
    assert sole_active_adapter(model).name == "other"
    model.set_adapter(["other", "default"])
    assert sole_active_adapter(model) is None
    assert unsupported_reason(model) == NOT_ALONE


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
    batch["weights"] = torch.tensor([0.5, 1.5])
    found = fetched({name: tensor.as_subclass(Elsewhere) for name, tensor in batch.items()})
    assert found["weights"].tolist() == [0.5, 1.5]


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


def test_graphs_that_take_too_much_memory_go_the_longest_unused_first(monkeypatch) -> None:
    taken = [0]
    monkeypatch.setattr(capture, "_room_for_graphs", lambda device: 30)
    monkeypatch.setattr(capture, "_memory_in_use", lambda device: taken[0])
    ran: list[int] = []

    def function(x: Tensor) -> Tensor:
        ran.append(len(x))
        taken[0] += 10 * len(x)
        return x + 1

    with recording():
        computation = GraphedCallable(function, torch.device("cpu"), warm_up=function)

        def sizes() -> list[int]:
            return [len(graph.outputs) for graph in computation.graphs.values()]

        for rows in (1, 2, 1):
            assert torch.equal(computation(x=torch.arange(rows)), torch.arange(1, rows + 1))
        assert (ran, sizes()) == ([1, 2], [2, 1])
        computation(x=torch.arange(2))
        assert (ran, sizes()) == ([1, 2], [1, 2])
        assert torch.equal(computation(x=torch.ones(1, 1)), torch.full((1, 1), 2.0))  # in the place of the oldest
        assert (ran, sizes()) == ([1, 2, 1], [2, 1])
        assert not computation.is_recorded(x=torch.arange(1))
        computation(x=torch.arange(5))  # larger than all that may be kept
        assert sizes() == [5]
        computation(x=torch.arange(1))
        assert sizes() == [1]


def test_a_comparison_of_short_examples_loads_no_kernels_of_attention() -> None:
    gpu = torch.device("cuda", 0)
    for device, length, plain in ((gpu, 512, True), (gpu, 513, False), (torch.device("cpu"), 8, False)):
        with graphed._few_kernels(device, 4, length):
            assert torch.backends.cuda.flash_sdp_enabled() is not plain
        assert torch.backends.cuda.flash_sdp_enabled()


def test_a_flat_gradient_is_cut_into_views_of_each_shape() -> None:
    shapes = [torch.Size([3, 1]), torch.Size([1, 2]), torch.Size([1, 4, 1, 1]), torch.Size([2])]
    flat = torch.arange(11.0)
    parts = Cuts(shapes).apart(flat)
    assert [part.shape for part in parts] == shapes
    assert torch.equal(torch.cat([part.flatten() for part in parts]), flat)
    assert all(part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for part in parts)
