"""The methods: which numbers of a base are trained, and what they begin as.

Every method of a classifier trains its new head too, at the same rate. `HEAD` trains nothing else, and `FROZEN` is a
language model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import ia3
from evidence.bases import Base, MeanClassifier

FROZEN, HEAD = "frozen", "head"
IA3, IA3_LINEAR, IA3_BOTH, T_FEW = "ia3", "ia3-linear", "ia3-both", "t-few"
LORA, BITFIT, FULL = "lora", "bitfit", "full"
# Where the walk over rates begins: what each method's papers and guides take.
CUSTOMARY = {
    HEAD: 1e-2,
    IA3: 1e-2,
    IA3_LINEAR: 1e-2,
    IA3_BOTH: 1e-2,
    T_FEW: 1e-2,
    LORA: 1e-3,
    BITFIT: 1e-3,
    FULL: 1e-4,
}
WORDS = {
    FROZEN: "as it is",
    HEAD: "head alone",
    IA3: "(IA)³",
    IA3_LINEAR: "(IA)³, every linear layer",
    IA3_BOTH: "(IA)³, both sides of each",
    T_FEW: "(IA)³, T-Few's losses",
    LORA: "LoRA, rank 16",
    BITFIT: "biases and norms",
    FULL: "all weights",
}
METHODS_OF = {
    "minilm": (HEAD, IA3, IA3_LINEAR, IA3_BOTH, LORA, BITFIT, FULL),
    "titler": (FROZEN, IA3, IA3_LINEAR, IA3_BOTH, T_FEW, LORA, BITFIT, FULL),
    "smollm2": (FROZEN, IA3, IA3_LINEAR, IA3_BOTH, LORA, BITFIT, FULL),
}

Draw = Callable[[Tensor, torch.Generator], object]


@dataclass
class Trained:
    """The numbers that a method trains.

    Args:
        parameters: by name.
        drawn: how those that begin at random are filled.
    """

    parameters: dict[str, nn.Parameter]
    drawn: dict[str, Draw]

    def __post_init__(self) -> None:
        # On the CPU, so that the memory of a step is that of a step.
        self._initial = {name: each.detach().cpu().clone() for name, each in self.parameters.items()}

    @property
    def count(self) -> int:
        return sum(each.numel() for each in self.parameters.values())

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Begin again, in place, since captured steps hold the tensors."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.parameters.items():
            value = self._initial[name]
            if name in self.drawn:
                self.drawn[name](value, generator)
            parameter.copy_(value)


def adapt(base: Base, model: nn.Module, method: str) -> Trained:
    """Prepare the model, in place, for a method."""
    body: Any = model.encoder if isinstance(model, MeanClassifier) else model
    model.requires_grad_(False)
    _PREPARE[method](base, body)
    if isinstance(model, MeanClassifier):
        model.head.requires_grad_(True)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    drawn: dict[str, Draw] = {name: _draw_lora for name in parameters if ".lora_A." in name}
    if isinstance(model, MeanClassifier):
        drawn["head.weight"] = _draw_head
        nn.init.zeros_(model.head.bias)
    return Trained(parameters, drawn)


def linear_layers(body: nn.Module) -> dict[str, nn.Linear]:
    """Those of the blocks, without a language model's head."""
    return {name: each for name, each in body.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}


def _nothing(base: Base, body: Any) -> None:
    pass


def _ia3(base: Base, body: Any) -> None:
    ia3.get_peft_model(body, ia3.IA3Config(task_type=base.task_type))


def _ia3_linear(base: Base, body: Any) -> None:
    names = [*linear_layers(body)]
    closing = [name for name in names if base.closing.search(name)]
    config = ia3.IA3Config(task_type=base.task_type, target_modules=names, feedforward_modules=closing)
    ia3.get_peft_model(body, config)


def _ia3_both(base: Base, body: Any) -> None:
    """A vector at the input and one at the output of each linear layer, by plain hooks: an experiment."""
    for layer in linear_layers(body).values():
        layer.scale_input = nn.Parameter(layer.weight.new_ones(layer.in_features))
        layer.scale_output = nn.Parameter(layer.weight.new_ones(layer.out_features))
        layer.register_forward_pre_hook(lambda layer, given: (given[0] * layer.scale_input, *given[1:]))
        layer.register_forward_hook(lambda layer, given, output: output * layer.scale_output)


def _lora(base: Base, body: Any) -> None:
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=[*linear_layers(body)])
    peft.inject_adapter_in_model(config, body)
    for name, each in body.named_parameters():
        each.requires_grad_(".lora_" in name)


def _bitfit(base: Base, body: Any) -> None:
    """Biases, and the weights of norms: T5 and Llama have no biases."""
    for name, each in body.named_parameters():
        each.requires_grad_(name.endswith(".bias") or "norm" in name.lower())


def _full(base: Base, body: Any) -> None:
    body.requires_grad_(True)


_PREPARE: dict[str, Callable[[Base, Any], None]] = {
    FROZEN: _nothing,
    HEAD: _nothing,
    IA3: _ia3,
    IA3_LINEAR: _ia3_linear,
    IA3_BOTH: _ia3_both,
    T_FEW: _ia3,
    LORA: _lora,
    BITFIT: _bitfit,
    FULL: _full,
}


def _draw_lora(value: Tensor, generator: torch.Generator) -> None:
    """As PEFT fills A; B is zero."""
    nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def _draw_head(value: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(value, std=0.02, generator=generator)
