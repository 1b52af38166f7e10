"""The block by kernels, on a GPU or in Triton's interpreter, which takes a minute for what a GPU does at once: there
a few families stand for all."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from described import FORMS, batch_for, described, is_encoder
from ia3.adapter import vectors
from ia3.fast.fused import FusedLoss
from ia3.fast.guard import own_forward
from ia3.fast.ops import attention, cross_entropy, gate, norm
from ia3.fast.ops.launch import launch as launch_it
from ia3.state import get_adapter

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
_RUNS = importlib.util.find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
pytestmark = pytest.mark.skipif(not _RUNS, reason="no GPU with Triton, nor Triton with TRITON_INTERPRET=1")
CHOSEN = list(FORMS) if CUDA else ["flan-t5", "llama", "gpt2", "bert"]
ONE = list(FORMS) if CUDA else ["flan-t5"]


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3.fast.fused.backend_for", lambda *_: "triton")


def sent(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def by_kernels(model: Any, batch: dict[str, Tensor], groups: int = 1, **how: Any) -> tuple[Tensor, Tensor]:
    """Losses and gradients of a rounded batch, with the same vectors for all groups."""
    adapter = get_adapter(model, "default")
    flat = adapter.layout.flatten([vector.detach() for vector in vectors(model, adapter)])
    table = flat.expand(groups, -1).clone().requires_grad_()
    loss = FusedLoss(model, adapter.layout, **how)
    packed = loss.round_up(loss.pack(batch), len(batch["labels"]))
    torch.manual_seed(5)
    losses = loss(type(packed)(sent(dict(packed.tensors)), *packed.fixed), table)
    (gradients,) = torch.autograd.grad(losses.sum(), table)
    return losses.detach(), gradients


def expected(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    adapter = get_adapter(model, "default")
    loss = own_forward(type(model))(model, **sent(batch)).loss
    return loss.detach(), adapter.layout.flatten(list(torch.autograd.grad(loss, vectors(model, adapter))))


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("form", CHOSEN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
def test_loss_and_gradient(form: str, dtype: torch.dtype, tolerance: float) -> None:
    if dtype is torch.bfloat16 and not CUDA:
        pytest.skip("interpreted, a cast to bfloat16 cuts off what it should round")
    batch = batch_for(form)
    loss, gradient = expected(described(form, dtype).to(DEVICE, torch.float64), batch)
    losses, gradients = by_kernels(described(form, dtype).to(DEVICE), batch)
    assert abs(losses[0] - loss) < tolerance * abs(loss)
    assert apart(gradients[0], gradient) < tolerance


@pytest.mark.parametrize("form", FORMS if CUDA else ["flan-t5", "llama", "phi3"])
def test_vectors_at_every_linear_layer(form: str) -> None:
    batch = batch_for(form)
    loss, gradient = expected(described(form, torch.float32, everywhere=True).to(DEVICE, torch.float64), batch)
    losses, gradients = by_kernels(described(form, torch.float32, everywhere=True).to(DEVICE), batch)
    assert abs(losses[0] - loss) < 1e-4 * abs(loss)
    assert apart(gradients[0], gradient) < 1e-4


@pytest.mark.parametrize("form", [form for form in ONE if not is_encoder(form)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_groups(form: str, everywhere: bool) -> None:
    model, batch = described(form, torch.float32, everywhere=everywhere).to(DEVICE), batch_for(form)
    losses, gradients = by_kernels(model, batch, groups=2)
    for group, half in enumerate((slice(0, 2), slice(2, 4))):
        loss, gradient = expected(model, {name: tensor[half] for name, tensor in batch.items()})
        assert abs(losses[group] - loss) < 1e-4 * abs(loss)
        assert apart(gradients[group], gradient) < 1e-4


# Attention dropout of models with rotary positions is PyTorch's own, which can't be computed again.
SEEDED = ["flan-t5", "umt5", "bart", "mbart", "gpt2", "opt", "bert", "distilbert"]


@pytest.mark.skipif(not CUDA, reason="interpreted it takes minutes, and each operation's dropout is tested by itself")
@pytest.mark.parametrize("form", [form for form in ONE if form in SEEDED])
def test_what_is_computed_again_drops_the_same(form: str) -> None:
    model, batch = described(form, torch.float32, rate=0.2).to(DEVICE), batch_for(form)
    kept = by_kernels(model, batch)
    again = by_kernels(model, batch, recompute=True)
    assert torch.equal(kept[0], again[0])
    assert apart(again[1], kept[1]) < 1e-5
    assert not torch.equal(kept[0], by_kernels(model.eval(), batch)[0])


@pytest.mark.parametrize("form", ["flan-t5"])
def test_without_dropping_the_kernels_are_those_of_training(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a comparison needs none of its own, and shows what training will compute."""
    launched: list[Any] = []

    def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        given = tuple(argument is None for argument in arguments)
        launched.append((kernel.function.__name__, given, *sorted(constants.items())))
        if not model.training or without:
            launch_it(kernel, grid, *arguments, **constants)

    for op in (attention, gate, norm, cross_entropy):
        monkeypatch.setattr(op, "launch", launch)
    model, batch = described(form, torch.float32, rate=0.2).to(DEVICE), batch_for(form)
    without: Any = None
    by_kernels(model.train(), batch)
    kernels, _ = sorted(launched), launched.clear()
    without = by_kernels(model.eval(), batch)
    assert sorted(launched) != kernels
    monkeypatch.setattr(FusedLoss, "run", without_dropping(FusedLoss.run))
    for training in (True, False):
        launched.clear()
        found = by_kernels(model.train(training), batch)
        assert sorted(launched) == kernels
        assert torch.equal(found[0], without[0])
        assert apart(found[1], without[1]) < 1e-6


def without_dropping(run: Any) -> Any:
    def changed(self: FusedLoss, slices: Any) -> Any:
        self.drops = False
        return run(self, slices)

    return changed
