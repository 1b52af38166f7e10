"""Products in fp8: exact where fp8 is, near where it isn't, and training goes on as without."""

from __future__ import annotations

import copy
import importlib.util
import os
from typing import Any

import pytest
import torch
from test_block_by_kernels import apart, by_kernels
from test_llama import texts_of
from test_step import causal_batches, optimiser_of, vectors_of
from test_t5 import batch_of
from torch import Tensor

import ia3
from ia3 import IA3Config, get_peft_model
from ia3.fast import linear as linear_module
from ia3.fast.graphed import GraphedLoss
from ia3.fast.linear import Bf16x3Linear, Fp8Linear, FrozenLinear, OneDnnLinear, frozen_linear
from ia3.fast.ops.quantise import MAX_FP8, quantise_rows

RUNS = importlib.util.find_spec("triton") is not None and (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float64
GATED = {"feed_forward_proj": "gated-gelu", "d_ff": 32, "dropout_rate": 0.0}


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch) -> None:
    monkeypatch.setattr(Fp8Linear, "many_rows", 1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def fp8_of(x: Tensor) -> Tensor:
    """What is left of x in fp8."""
    rounded, scales = quantise_rows(x)
    return rounded.to(scales.dtype).double() * scales.double()


def test_rows_are_rounded_to_fp8s_steps() -> None:
    torch.manual_seed(0)
    x = draw(7, 48) * torch.logspace(-6, 6, 7, device=DEVICE)[:, None].to(DTYPE)
    rounded, scales = quantise_rows(x)
    assert rounded.dtype is torch.float8_e4m3fn
    assert torch.equal(rounded.float().abs().amax(1), torch.full((7,), MAX_FP8, device=DEVICE))
    # Three bits behind the leading one, and steps of 2⁻⁹ below 2⁻⁶.
    step = (x.double().abs() * 2**-4).maximum(2**-10 * scales.double())
    assert bool(((fp8_of(x) - x.double()).abs() <= 1.001 * step).all())


def test_a_row_of_zeros_stays_one() -> None:
    rounded, _ = quantise_rows(torch.zeros(2, 16, device=DEVICE, dtype=DTYPE))
    assert not rounded.float().any()


def test_what_fp8_holds_is_multiplied_exactly() -> None:
    chance = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-8, 9, (rows, 32), generator=chance).to(DEVICE, DTYPE) for rows in (5, 16))
    x[:, 0] = weight[:, 1] = MAX_FP8  # so that all scales are 1
    x[:, 1] = weight[:, 0] = 0
    exact = x.double() @ weight.double().t()
    tolerance = 0 if DEVICE == "cpu" else 2**-7  # a GPU's sums are in bfloat16, and shorter inside
    torch.testing.assert_close(Fp8Linear(weight)(x).double(), exact, rtol=tolerance, atol=1000 * tolerance)


def test_few_rows_stay_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(Fp8Linear, "many_rows", 6)
    x, weight = draw(6, 32), draw(16, 32)
    assert torch.equal(Fp8Linear(weight)(x[:5]), FrozenLinear(weight)(x[:5]))
    assert not torch.equal(Fp8Linear(weight)(x), FrozenLinear(weight)(x))


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_and_its_gradient_are_near(bias) -> None:
    torch.manual_seed(0)
    x, weight, grad = draw(40, 64).requires_grad_(), draw(48, 64), draw(40, 48)
    weight *= torch.logspace(-2, 2, 48, device=DEVICE)[:, None].to(DTYPE)
    plain, eighth = (frozen_linear(weight, draw(48) if bias else None, frozen=frozen) for frozen in (None, "fp8"))
    eighth.bias = plain.bias
    assert (type(plain), type(eighth)) == (FrozenLinear, Fp8Linear)
    wanted, found = plain(x), eighth(x)
    assert 1e-3 < float((found - wanted).norm() / wanted.norm()) < 0.05
    (d_wanted,), (d_found,) = (torch.autograd.grad(y, x, grad) for y in (wanted, found))
    assert 1e-3 < float((d_found - d_wanted).norm() / d_wanted.norm()) < 0.05
    # Exactly the closed form.
    s = quantise_rows(weight)[1].double()
    closed = fp8_of((grad.double() * s.t()).to(torch.float64 if DEVICE == "cpu" else torch.float32))
    closed = closed @ (fp8_of(weight) / s)
    tolerance = 1e-12 if DEVICE == "cpu" else 0.02
    assert float((d_found.double() - closed).norm() / closed.norm()) < tolerance


def model_of(tiny: Any, randomise: Any, family: str) -> Any:
    if family == "t5":
        model = tiny("t5", dtype=torch.float32, **GATED)
    else:
        model = tiny(family, dtype=torch.float32, intermediate_size=32)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    model = randomise(get_peft_model(model, IA3Config(task_type=task))).train()
    return model if DEVICE == "cpu" else model.to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
def test_training_goes_as_without(tiny, randomise, family, recompute) -> None:
    plain = model_of(tiny, randomise, family)
    eighth = copy.deepcopy(plain)
    data = [batch_of() for _ in range(20)] if family == "t5" else causal_batches()
    losses = []
    for model, frozen in ((plain, None), (eighth, "fp8")):
        step = ia3.compile_step(model, *optimiser_of(model), recompute=recompute, frozen=frozen)
        losses.append([float(step(batch)) for batch in data])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    if family == "t5":
        assert losses[1][-1] < losses[1][0]
    for name, vector in vectors_of(plain).items():
        assert float((vectors_of(eighth)[name] - vector).abs().max()) < 0.4


def test_long_texts_are_compared_in_eight_bits(tiny, randomise, monkeypatch) -> None:
    monkeypatch.setattr("ia3.fast.compare._TOKENS", 4)
    monkeypatch.setattr("ia3.fast.compare._LEAST", 2)
    monkeypatch.setattr(Fp8Linear, "many_rows", 10)
    rounded, rounds = [], Fp8Linear.rounds
    monkeypatch.setattr(Fp8Linear, "rounds", lambda self, rows: rounded.append(rows) or rounds(self, rows))
    model = model_of(tiny, randomise, "llama")
    loss = GraphedLoss(model, frozen="fp8")
    ids = torch.randint(2, 60, (2, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss.difference(batch, loss.pack(batch))
    assert 10 <= min(rounded) <= max(rounded) < ids.numel()  # a GPU's twenty are laid in 64 places


@pytest.mark.skipif(not RUNS, reason="no GPU with Triton, nor Triton with TRITON_INTERPRET=1")
@pytest.mark.parametrize(("family", "recompute"), [("t5", False), ("t5", True), ("llama", False)])
def test_what_kernels_round_where_it_is_made(tiny, randomise, family, recompute, monkeypatch) -> None:
    """A norm and a gate by kernels, rounded in them, beside the same in PyTorch."""
    model, batch = model_of(tiny, randomise, family), batch_of() if family == "t5" else texts_of()
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr("ia3.fast.fused.backend_for", lambda *_, by=backend: by)
        found.append(by_kernels(model, batch, frozen="fp8", recompute=recompute))
    (wanted, d_wanted), (loss, d_loss) = found
    _, unrounded = by_kernels(model, batch, recompute=recompute)
    assert not torch.equal(loss, wanted)
    torch.testing.assert_close(loss, wanted, rtol=0.01, atol=0)
    # Each rounds some numbers the other way, the interpreter, which doesn't carry, more; none is farther off.
    assert apart(d_loss, unrounded) < 1.7 * apart(d_wanted, unrounded)


def test_a_changed_weight_is_an_error(tiny, randomise) -> None:
    for family, path in (("t5", "encoder.block.0.layer.0.SelfAttention.q"), ("llama", "model.layers.0.mlp.down_proj")):
        model = model_of(tiny, randomise, family)
        step = ia3.compile_step(model, optimiser_of(model)[0], frozen="fp8")
        batch = batch_of() if family == "t5" else texts_of()
        step(batch)
        with torch.no_grad():
            model.get_submodule(path).weight.mul_(2)
        with pytest.raises(RuntimeError, match="make the step again"):
            step(batch)


def test_what_can_not_be_in_fp8(tiny, randomise) -> None:
    model = randomise(get_peft_model(tiny("t5", d_ff=24), IA3Config(task_type="SEQ_2_SEQ_LM"))).to(DEVICE, DTYPE)
    optimizer = optimiser_of(model)[0]
    with pytest.raises(ValueError, match=r"multiples of 16; a frozen weight here is \[24, 16\]"):
        ia3.compile_step(model, optimizer, frozen="fp8")
    with pytest.raises(ValueError, match="frozen is 'int4': expected 'fp8'"):
        ia3.compile_step(model, optimizer, frozen="int4")  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"frozen is the fast step's, and this takes the ordinary one, since .*SGD"):
        ia3.compile_step(model, torch.optim.SGD(trained, lr=0.1), frozen="fp8")
    if DEVICE == "cuda":
        model = model_of(tiny, randomise, "t5").float()
        with pytest.raises(ValueError, match=r"in fp8 give bfloat16, and the model is torch\.float32"):
            ia3.compile_step(model, optimiser_of(model)[0], frozen="fp8")


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize(("out", "inner"), [(3072, 1024), (1024, 2816)])
def test_fp32_by_units_for_bf16_is_fp32(out, inner) -> None:
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    x, weight, grad = (torch.randn(*shape, device="cuda") for shape in ((1024, inner), (out, inner), (1024, out)))
    x.requires_grad_()
    split, plain = frozen_linear(weight), FrozenLinear(weight)
    assert type(split) is Bf16x3Linear
    exact = x.double() @ weight.double().t(), grad.double() @ weight.double()
    errors = []
    for product in (split, plain):
        y = product(x)
        (dx,) = torch.autograd.grad(y, x, grad)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip((y, dx), exact, strict=True)])
    torch.set_float32_matmul_precision(before)
    print(errors)
    assert all(one < 3 * other for one, other in zip(*errors, strict=True))
    assert torch.equal(split(x[:100]), plain(x[:100]))


@pytest.mark.skipif(DEVICE == "cuda" or not torch.backends.mkldnn.is_available(), reason="of a CPU with oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_fp32_by_onednn(monkeypatch, bias, transposed) -> None:
    monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda: True)
    torch.manual_seed(0)
    x, grad = torch.randn(37, 96, requires_grad=True), torch.randn(37, 80)
    weight = torch.randn(96, 80).t() if transposed else torch.randn(80, 96)  # a Conv1D's is [in, out]
    linear = frozen_linear(weight, torch.randn(80) if bias else None)
    assert type(linear) is OneDnnLinear
    y = linear(x)
    exact = x.detach().double() @ weight.double().t() + (linear.bias.double() if bias else 0.0)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(found.double(), grad.double() @ weight.double(), rtol=1e-5, atol=1e-4)
    weight.mul_(2)  # which is read where it is
    torch.testing.assert_close(linear(x) - (linear.bias if bias else 0), 2 * (y - (linear.bias if bias else 0)))


def test_other_precisions_are_not_onednns(monkeypatch) -> None:
    monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda: True)
    assert type(frozen_linear(torch.randn(4, 4, dtype=torch.float64))) is FrozenLinear
    assert type(frozen_linear(torch.randn(4, 4, dtype=torch.bfloat16))) is FrozenLinear


@pytest.mark.parametrize(("maker", "slow"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)])
def test_mkl_is_slow_on_others_processors(monkeypatch, maker, slow) -> None:
    monkeypatch.setattr(linear_module, "_processor", lambda: maker)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert linear_module._mkl_is_slow.__wrapped__() is slow
