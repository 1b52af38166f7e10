"""The optimizer of vectors: AdamW or Adafactor, a linear schedule, decay towards the base model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from ia3.runs.settings import TrainSettings, say_long_warmup


def trainable_parameters(model: Any) -> dict[str, Parameter]:
    """The trainable parameters by name.

    Raises:
        ValueError: there are none.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "The model has no trainable parameters: attach an adapter with get_peft_model first, and load a "
            "saved one with is_trainable=True."
        )
    return trainable


def make_optimizer(trainable: dict[str, Parameter], settings: TrainSettings) -> Optimizer:
    """AdamW, or T-Few's Adafactor, whose statistics are a site's own since each site has its own parameter.

    Args:
        trainable: what `trainable_parameters` gives.
        settings: the optimizer's name, the rate and the decay, which concerns the modules trained in full here;
            `decay_vectors` does the vectors'.
    """
    vectors, full = _split(trainable)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((vectors, 0.0), (full, settings.weight_decay))
        if parameters
    ]
    if settings.optimizer == "adafactor":
        adafactor: Optimizer = Adafactor(groups, lr=settings.learning_rate, relative_step=False, scale_parameter=True)
        return adafactor
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def linear_schedule(settings: TrainSettings, total_steps: int) -> Callable[[int], float]:
    """The part of the learning rate that each step has: from 0 up over the warm-up, and down to 0 at the last step.

    Raises:
        ValueError: a warm-up that is as long as the training.
    """
    warmup = settings.warmup_steps
    if warmup >= total_steps:
        raise ValueError(say_long_warmup(warmup, total_steps))
    return lambda step: step / warmup if step < warmup else max(0.0, (total_steps - step) / (total_steps - warmup))


@torch.no_grad()
def decay_vectors(trainable: dict[str, Parameter], rate: float, weight_decay: float) -> None:
    """Move each vector by `rate * weight_decay` of its way back to one.

    AdamW's decay pulls to zero, where a vector switches its site off; one is the base model. As AdamW does,
    call it before the step (Loshchilov & Hutter 2019, algorithm 2, with l − 1 in place of the weight).
    """
    if weight_decay:
        for vector in _split(trainable)[0]:
            vector.add_(1 - vector, alpha=rate * weight_decay)


def _split(trainable: dict[str, Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """The vectors, and the parameters of modules trained in full."""
    vectors = [parameter for name, parameter in trainable.items() if ".ia3_l." in name]
    full = [parameter for name, parameter in trainable.items() if ".ia3_l." not in name]
    return vectors, full
