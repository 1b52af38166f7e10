"""The captured step, where there is a GPU: the numbers of the ordinary one."""

from __future__ import annotations

import copy
import io
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import batches, optimiser_of, start, vectors_of
from test_t5 import adapted

import ia3
import tiny_seq2seq
from builders import models_own

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def train_eagerly(model: Any, data: list[dict[str, Any]] | None = None, forward: Any = models_own) -> list[float]:
    optimizer, schedule = optimiser_of(model)
    losses = []
    for batch in data or batches():
        loss = forward(model, **{name: tensor.cuda() for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("several", [False, True], ids=["alone", "several"])
@pytest.mark.parametrize("form", ["t5 gated", "mt5", "llama", "qwen2"])
def test_twenty_steps(tiny, randomise, form, several) -> None:
    """Also of two processes that have the same batch, each with half of its targets: in two graphs."""
    usual, data = start(tiny, randomise, form)
    usual = usual.cuda()
    compiled = copy.deepcopy(usual)
    expected = train_eagerly(usual, data)
    optimizer, schedule = optimiser_of(compiled)
    step = ia3.compile_step(compiled, optimizer, schedule, reduce=(lambda flat: 2 * flat) if several else None)
    assert (step.path, step.reason) == ("captured", None)
    part = [torch.tensor(0.5, device="cuda")] if several else []
    losses = [step(batch, *part) for batch in data]
    assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-5)
    for name, vector in vectors_of(usual).items():
        torch.testing.assert_close(vectors_of(compiled)[name], vector, rtol=1e-4, atol=1e-5)
    assert float(schedule.get_last_lr()[0]) == 0.0


@pytest.mark.parametrize("form", ["t5 gated", "mt5", "llama"])
def test_twenty_steps_of_an_own_loop(tiny, randomise, form) -> None:
    usual, data = start(tiny, randomise, form)
    usual = usual.cuda().train()
    other = copy.deepcopy(usual)
    for module in (*usual.modules(), *other.modules()):
        for name in ("p", "dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    usual.config.dropout_rate = other.config.dropout_rate = 0.0
    expected = train_eagerly(usual, data)
    assert train_eagerly(other, data, lambda model, **batch: model(**batch)) == pytest.approx(expected, rel=1e-5)
    for name, vector in vectors_of(usual).items():
        torch.testing.assert_close(vectors_of(other)[name], vector, rtol=1e-4, atol=1e-5)
    output = other(**{name: tensor.cuda() for name, tensor in data[0].items()})
    assert "_WithGradient" in type(output.loss.grad_fn).__name__
    own = models_own(other, **{name: tensor.cuda() for name, tensor in data[0].items()})
    torch.testing.assert_close(output.logits, own.logits)


@pytest.mark.parametrize("form", ["mt5", "llama", "qwen2"])
def test_bf16_is_near(tiny, randomise, form) -> None:
    usual, data = start(tiny, randomise, form)
    usual = usual.cuda()
    expected = train_eagerly(copy.deepcopy(usual), data)
    half = usual.to(torch.bfloat16)
    for name, parameter in half.named_parameters():
        if ".ia3_l." in name:
            parameter.data = parameter.data.float()
    optimizer, schedule = optimiser_of(half)
    step = ia3.compile_step(half, optimizer, schedule)
    losses = [float(step(batch)) for batch in data]
    assert losses == pytest.approx(expected, rel=0.03 if form == "mt5" else 0.003)


def test_full_batches_of_one_length_need_no_gathering(tiny, randomise) -> None:
    """What fills a block exactly is one of its shapes, recorded beside the padded ones."""
    usual, _ = start(tiny, randomise, "llama")
    usual = usual.cuda()
    ids = torch.randint(2, 60, (2, 64), generator=torch.Generator().manual_seed(0))
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    short = {name: tensor[:, :50] for name, tensor in full.items()}
    data = [full, short] * 5
    compiled = copy.deepcopy(usual)
    step = ia3.compile_step(compiled, *optimiser_of(compiled))
    assert [float(step(batch)) for batch in data] == pytest.approx(train_eagerly(usual, data), rel=1e-5)


def test_dropout_has_a_seed_that_capturing_leaves_alone(tiny, randomise) -> None:
    start = adapted(tiny, randomise, "t5 gated", torch.float32).cuda().train()

    def losses_of(seed: int) -> list[float]:
        model = copy.deepcopy(start)
        step = ia3.compile_step(model, *optimiser_of(model))
        torch.manual_seed(seed)
        return [float(step(batch)) for batch in batches()]

    assert losses_of(1) == losses_of(1)
    assert losses_of(1) != losses_of(2)

    def eager_losses_of(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return train_eagerly(copy.deepcopy(start))

    captured, eager = (torch.tensor([run(seed) for seed in range(10)]) for run in (losses_of, eager_losses_of))
    spread = (captured.var(dim=0) + eager.var(dim=0)).div(10).sqrt()
    apart = (captured.mean(dim=0) - eager.mean(dim=0)) / spread
    assert float(apart.abs().max()) < 4.5
    assert float(apart.mean().abs()) < 2.5  # steps of one run are related


@pytest.fixture
def rich_console() -> Any:
    """The command line's packages, which a machine with a GPU may lack."""
    for name in ("accelerate", "matplotlib", "pydantic", "rich", "yaml"):
        pytest.importorskip(name)
    from rich.console import Console

    return Console(file=io.StringIO(), width=120)


def test_a_run_on_the_gpu_says_so_and_resumes_to_the_same_numbers(rich_console: Any, tmp_path: Path) -> None:
    from ia3.training.learners.words import Words
    from ia3.training.loop import Interrupted
    from ia3.training.resuming import resume
    from ia3.training.train import train

    base = str(tiny_seq2seq.save_base(tmp_path / "base"))
    data = str(tiny_seq2seq.write_csv(tmp_path / "data.csv", 40))
    whole = train(base, data, output=tmp_path / "whole", epochs=3, console=rich_console)
    assert "captured as a CUDA graph." in rich_console.file.getvalue()

    calls = 0
    measure = Words.measure

    def interrupted(self: Any, rows: Any, beat: Any, *others: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return measure(self, rows, beat, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Words, "measure", interrupted)
        with pytest.raises(Interrupted):
            train(base, data, output=tmp_path / "parts", epochs=3, console=rich_console)
    resumed = resume(tmp_path / "parts", console=rich_console)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)
    assert resumed.final.predictions == whole.final.predictions
