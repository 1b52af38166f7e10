from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from ia3.runs.settings import TrainSettings
from ia3.training.optimise import decay_vectors, linear_schedule, make_optimizer, trainable_parameters

STEPS = 20


def parameters() -> dict[str, Parameter]:
    torch.manual_seed(0)
    shapes = {"block.k.ia3_l.default": (6, 1), "block.wo.ia3_l.default": (1, 5), "head.modules_to_save.default": (3, 4)}
    return {name: Parameter(1 + torch.randn(shape, dtype=torch.float64) / 5) for name, shape in shapes.items()}


def gradients(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(trainable: dict[str, Parameter], settings: TrainSettings) -> None:
    optimizer = make_optimizer(trainable, settings)
    schedule = LambdaLR(optimizer, linear_schedule(settings, STEPS))
    for step in range(STEPS):
        for parameter in trainable.values():
            parameter.grad = gradients(step, parameter.shape)
        decay_vectors(trainable, optimizer.param_groups[0]["lr"], settings.weight_decay)
        optimizer.step()
        schedule.step()


def rate_at(step: int, peak: float, warmup: int) -> float:
    return peak * step / warmup if step < warmup else peak * (STEPS - step) / (STEPS - warmup)


def train_with_torch(own: list[Parameter], make: Any, peak: float, warmup: int) -> None:
    optimizer = make(own)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, peak, warmup)
        for parameter in own:
            parameter.grad = gradients(step, parameter.shape)
        optimizer.step()


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_vectors_decay_to_one_as_adamw_decays_weights_to_zero(warmup: int, decay: float) -> None:
    ours = parameters()
    train(ours, TrainSettings(learning_rate=0.05, warmup_steps=warmup, weight_decay=decay))
    for name, start in parameters().items():
        origin = 1.0 if ".ia3_l." in name else 0.0
        distance = Parameter(start.detach() - origin)
        train_with_torch([distance], lambda p: torch.optim.AdamW(p, weight_decay=decay), 0.05, warmup)
        torch.testing.assert_close(ours[name].detach(), distance.detach() + origin, rtol=1e-12, atol=1e-12)


def test_adafactor_is_torchs_with_statistics_of_each_tensor() -> None:
    ours = parameters()
    train(ours, TrainSettings(learning_rate=0.003, warmup_steps=5, optimizer="adafactor"))
    for name, start in parameters().items():
        alone = Parameter(start.detach().clone())
        # torch's takes the smaller of the rate and 1 / √step, which is the rate here.
        train_with_torch([alone], lambda p: torch.optim.Adafactor(p, weight_decay=0.0), 0.003, 5)
        torch.testing.assert_close(ours[name].detach(), alone.detach(), rtol=1e-6, atol=1e-7)


def test_without_decay_a_vector_of_ones_stays() -> None:
    ones = {"k.ia3_l.default": Parameter(torch.ones(4, 1))}
    decay_vectors(ones, 0.1, 0.5)
    assert torch.equal(ones["k.ia3_l.default"], torch.ones(4, 1))


def test_a_warm_up_must_end_before_the_training() -> None:
    settings = TrainSettings(warmup_steps=20)
    with pytest.raises(ValueError, match="`warmup_steps` is 20 and the training has 20 steps"):
        linear_schedule(settings, STEPS)


def test_nothing_trainable() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        trainable_parameters(torch.nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("warmup", [0, 1, 7, 19])
def test_rates_are_transformers_to_the_bit(warmup: int) -> None:
    settings = TrainSettings(learning_rate=0.3, warmup_steps=warmup)
    optimizers = [make_optimizer(parameters(), settings) for _ in range(2)]
    ours = LambdaLR(optimizers[0], linear_schedule(settings, STEPS))
    theirs = get_linear_schedule_with_warmup(optimizers[1], warmup, STEPS)
    for step in range(STEPS):
        rate = settings.learning_rate * linear_schedule(settings, STEPS)(step)
        assert rate == ours.get_last_lr()[0] == theirs.get_last_lr()[0]
        for optimizer, schedule in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            schedule.step()
