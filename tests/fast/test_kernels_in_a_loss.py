"""A whole loss by kernels is the loss in plain PyTorch and float64, gradients included.

As in `test_kernels.py` on a GPU or in Triton's interpreter, which takes a minute for what a GPU does at once: there one
form of each.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from test_kernels import CUDA, DEVICE, draw, near
from test_llama import adapted_causal, texts_of
from test_t5 import adapted, batch_of
from torch import Tensor

from ia3.adapter import attached
from ia3.fast import llama
from ia3.fast.packing import pack, round_up
from ia3.fast.t5 import T5Loss


def forms(every: list[str], interpreted: str) -> pytest.MarkDecorator:
    """Each form with one group and with two; interpreted, one of them with two."""
    cases = [(form, groups) for form in every for groups in (1, 2)]
    return pytest.mark.parametrize(("form", "groups"), cases if CUDA else [(interpreted, 2)])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@forms(["t5", "t5 gated", "mt5"], interpreted="t5 gated")
def test_a_whole_loss(tiny: Any, randomise: Any, monkeypatch: Any, form: str, groups: int) -> None:
    exact = adapted(tiny, randomise, form, torch.float64).to(DEVICE)
    model = copy.deepcopy(exact).to(torch.float32)
    layout = attached(exact).adapters["default"].layout
    packed = round_up(pack(batch_of(rows=4)), 4, 0)
    packed = dataclasses.replace(packed, **{name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()})
    table = 1 + 0.3 * draw(groups, layout.size)

    def found(model: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        table = table.detach().requires_grad_()
        losses = T5Loss(model, layout)(packed, table)
        return losses, *torch.autograd.grad(losses.sum(), table)

    expected = found(exact, table)
    monkeypatch.setattr("ia3.fast.t5.has_kernels", lambda *_: True)
    for x, y in zip(found(model, table.float()), expected, strict=True):
        near(x, y, torch.float32)


@forms(["llama", "llama without groups", "qwen2"], interpreted="qwen2")
def test_a_whole_causal_loss(tiny: Any, randomise: Any, monkeypatch: Any, form: str, groups: int) -> None:
    exact = adapted_causal(tiny, randomise, form, torch.float64).to(DEVICE)
    model = copy.deepcopy(exact).to(torch.float32)
    layout = attached(exact).adapters["default"].layout
    texts = llama.round_up(llama.pack(texts_of(rows=4)), 4, 0)
    texts = dataclasses.replace(texts, **{name: tensor.to(DEVICE) for name, tensor in texts.tensors.items()})
    table = 1 + 0.3 * draw(groups, layout.size)

    def found(model: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        table = table.detach().requires_grad_()
        losses = llama.LlamaLoss(model, layout)(texts, table)
        return losses, *torch.autograd.grad(losses.sum(), table)

    expected = found(exact, table)
    monkeypatch.setattr("ia3.fast.llama.has_kernels", lambda *_: True)
    for x, y in zip(found(model, table.float()), expected, strict=True):
        near(x, y, torch.float32)


@forms(["t5", "mt5"], interpreted="mt5")
def test_whole_choices(tiny: Any, randomise: Any, monkeypatch: Any, form: str, groups: int) -> None:
    exact = adapted(tiny, randomise, form, torch.float64).to(DEVICE).eval()
    model = copy.deepcopy(exact).to(torch.float32)
    layout = attached(exact).adapters["default"].layout
    packed = round_up(pack(batch_of(rows=4)), 6, 0)
    packed = dataclasses.replace(packed, **{name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()})
    table = 1 + 0.3 * draw(groups, layout.size)
    choices = torch.tensor([[5, 1, -100], [7, 9, 1], [4, -100, -100]], device=DEVICE)
    with torch.no_grad():
        expected = T5Loss(exact, layout).log_probabilities(packed, choices, table)
        monkeypatch.setattr("ia3.fast.t5.has_kernels", lambda *_: True)
        found = T5Loss(model, layout).log_probabilities(packed, choices, table.float())
    near(found[:4], expected[:4], torch.float32)


@pytest.mark.skipif(not CUDA, reason="its five passes take Triton's interpreter more than a minute")
def test_recomputing_has_the_same_dropout(tiny: Any, randomise: Any, monkeypatch: Any) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32).to(DEVICE).train()
    layout = attached(model).adapters["default"].layout
    packed = round_up(pack(batch_of(rows=4)), 4, 0)
    packed = dataclasses.replace(packed, **{name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()})
    table = (1 + 0.3 * draw(1, layout.size)).float().requires_grad_()
    monkeypatch.setattr("ia3.fast.t5.has_kernels", lambda *_: True)

    def found(recompute: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        losses = T5Loss(model, layout, recompute=recompute)(packed, table)
        return losses.detach(), *torch.autograd.grad(losses.sum(), table)

    for x, y in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
