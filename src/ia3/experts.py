"""Experts that are no modules: one module holds the matrices of all of them, `[experts, …, …]`, as parameters.

A vector multiplies an expert's intermediate, so such a module has one vector an expert, `[experts, width]`, on the
input of its second matrix. The module is found by its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ia3.config import IA3Config

SECOND = "down_proj"
# What stands before it: gate and up in one, or up alone.
_FIRST = ("gate_up_proj", "up_proj")
# The experts of one linear layer, in a module of their own: `weight [experts, out, in]`.
_PARALLEL = ("weight", "num_experts", "input_size", "output_size")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Experts:
    """What an experts module holds.

    Args:
        count: the number of experts.
        width: channels of an expert's intermediate.
        hidden: channels of what comes out.
        second: the name of the parameter with the second matrices.
        transposed: whether these are `[experts, width, hidden]` instead of `[experts, hidden, width]`.
        others: names of its other matrices.
        is_told: whether the module or its shapes say so; otherwise it is as in `nn.Linear`, which another width would
            contradict in the first forward.
    """

    count: int
    width: int
    hidden: int
    second: str
    transposed: bool
    others: tuple[str, ...] = ()
    is_told: bool = True

    def over_weight(self, scale: Tensor) -> Tensor:
        """A scale of the intermediate, `[experts · width]`, shaped to multiply the second matrices."""
        scale = scale.view(self.count, self.width)
        return scale[:, :, None] if self.transposed else scale[:, None, :]


def find_experts(module: Any) -> Experts | None:
    """What the module holds; None where it isn't an experts module."""
    held = getattr(module, "_parameters", None)
    stacks = (
        {name: each for name, each in held.items() if each is not None and not is_lazy(each) and each.dim() == 3}
        if held
        else {}
    )
    if SECOND in stacks:
        first = next((name for name in _FIRST if name in stacks), None)
        if first is not None:
            told = _is_transposed(module, stacks[first], stacks[SECOND])
            count, *widths = stacks[SECOND].shape
            width, hidden = widths if told else reversed(widths)
            others = tuple(name for name in stacks if name != SECOND)
            return Experts(count, width, hidden, SECOND, bool(told), others, told is not None or width != hidden)
    elif list(stacks) == ["weight"] and all(hasattr(module, name) for name in _PARALLEL):
        count, hidden, width = stacks["weight"].shape
        return Experts(count, width, hidden, "weight", False)
    return None


def acts_in_front(module: nn.Module) -> bool:
    """Whether it is clear without a word that a vector belongs to the module's input: whole experts have no other."""
    experts = find_experts(module)
    return experts is not None and experts.second == SECOND


def _is_transposed(module: nn.Module, first: Tensor, second: Tensor) -> bool | None:
    """Whether the second matrices are `[experts, width, hidden]`; None where their shapes don't tell."""
    if isinstance(told := getattr(module, "is_transposed", None), bool):
        return told
    _, a, b = second.shape
    is_plain = tuple(first.shape[1:]) in ((2 * b, a), (b, a))
    is_transposed = tuple(first.shape[1:]) in ((b, 2 * a), (b, a))
    return None if is_plain == is_transposed else is_transposed


def unsupported_reason(module: nn.Module, experts: Experts) -> str | None:
    """Why an experts module can't carry vectors; None where it can."""
    weight = module._parameters[experts.second]
    assert weight is not None
    if weight.dtype not in _FLOATING:
        return (
            f"its {experts.second} is {weight.dtype}, which kernels of its own multiply by: load the base with its "
            "experts dequantised"
        )
    if getattr(module, "_is_expert_parallel", False) and getattr(module, "num_experts", None) != experts.count:
        return "its experts are split over processes (expert parallelism): load the base without"
    return None


def way_of(module: nn.Module) -> str | None:
    """Which of transformers' functions computes an experts module; None for a module outside of their interface."""
    if not hasattr(type(module), "_apply_gate") or not hasattr(module, "is_transposed"):
        return None
    way: str | None = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return way


def computes_in_a_loop(module: nn.Module) -> bool:
    """Whether a module computes its experts one after the other, those that the values choose."""
    return find_experts(module) is not None and way_of(module) == "eager"


# Names


def name_modules(config: IA3Config, modules: Mapping[str, nn.Module], match: Callable[..., set[str]]) -> IA3Config:
    """The configuration with experts modules by their own names, where it names their second matrices.

    `down_proj` then means those of the experts, too, and a file says so.

    Args:
        config: the configuration.
        modules: the model's modules by path.
        match: `sites.matching`.

    Raises:
        ValueError: another of their matrices is named, which has no activation that a vector could multiply.
    """
    found = {path: experts for path, module in modules.items() if (experts := find_experts(module)) is not None}
    if not found:
        return config
    excluded = match(config.exclude_modules, found)
    for path, experts in ((path, experts) for path, experts in found.items() if path not in excluded):
        for field in ("target_modules", "feedforward_modules"):
            first = sorted(match(getattr(config, field), [f"{path}.{name}" for name in experts.others]))
            if first:
                raise ValueError(
                    f"{field} names {first[0]}, a parameter that holds the matrices of all experts: a vector of "
                    f"experts multiplies what goes into {experts.second}. Name {experts.second} or "
                    f"{path.rpartition('.')[2]!r} (in feedforward_modules, too, where that is given), or exclude "
                    f"{path.rpartition('.')[2]!r}."
                )
    seconds = {f"{path}.{experts.second}": path for path, experts in found.items()}
    fields = ("target_modules", "feedforward_modules", "exclude_modules")
    named = {field: _with_owners(getattr(config, field), seconds, modules, match) for field in fields}
    return replace(config, **named)


def _with_owners(names: Any, seconds: Mapping[str, str], modules: Mapping[str, nn.Module], match: Any) -> Any:
    """Names or an expression that mean the modules of the parameters that they mean."""
    if isinstance(names, str) and names != "all-linear":
        owners = [seconds[path] for path in seconds if path in match(names, seconds)]
        return "|".join([f"(?:{names})", *(re.escape(path) for path in owners)]) if owners else names
    if not isinstance(names, set):
        return names
    new: set[str] = set()
    for name in names:
        meant = {seconds[path] for path in match({name}, seconds)}
        new |= _shortest(meant, modules, match)
        if not meant or match({name}, modules):
            new.add(name)
    return new


def _shortest(paths: set[str], modules: Iterable[str], match: Any) -> set[str]:
    """The names of the modules where these mean no others, else their paths."""
    ends = {path.rpartition(".")[2] for path in paths}
    return ends if match(ends, modules) == paths else paths


# Acting


class ScaledWeight:
    """Stands for second matrices while their module computes: whoever multiplies by them has the input scaled first.

    It is no tensor, so that code which does something else with the matrices than to multiply by them is an error
    instead of a vector that nothing reads.

    Args:
        weight: the matrices, of all experts or of one.
        scale: what the input `[…, width]` is multiplied by, from its number of tokens.
        one: the same for one expert by its number; None where a single expert's rows can't be told apart.
    """

    def __init__(
        self, weight: Tensor, scale: Callable[[int], Tensor], one: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.weight, self.scale, self.one = weight, scale, one

    def _with(self, weight: Tensor) -> ScaledWeight:
        return ScaledWeight(weight, self.scale, self.one)

    def __getitem__(self, expert: Any) -> ScaledWeight:
        if self.one is None:
            raise TypeError(_cant_follow("chooses one expert, in a batch that mixes adapters"))
        scale = self.one(expert)
        return ScaledWeight(self.weight[expert], lambda _: scale)

    def transpose(self, first: int, second: int) -> ScaledWeight:
        if {first % self.weight.dim(), second % self.weight.dim()} != {self.weight.dim() - 2, self.weight.dim() - 1}:
            raise TypeError(_cant_follow("transposes them"))
        return self._with(self.weight.transpose(first, second))

    def to(self, *args: Any, **kwargs: Any) -> ScaledWeight:
        return self._with(self.weight.to(*args, **kwargs))

    def float(self) -> ScaledWeight:
        return self._with(self.weight.float())

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __getattr__(self, name: str) -> Any:
        raise TypeError(_cant_follow(f"asks for their {name}"))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in _PRODUCTS or len(args) < 2 or isinstance(args[0], cls) or not isinstance(args[1], cls):
            raise TypeError(_cant_follow(f"calls {name} with them"))
        x, its = args[0], args[1]
        scale = its.scale(x.shape[-2])
        if x.shape[-1] != scale.shape[-1]:
            raise TypeError(_cant_follow(f"multiplies {x.shape[-1]} channels by them, not {scale.shape[-1]}"))
        return function(x * scale.to(x.dtype), its.weight, *args[2:], **(kwargs or {}))


# Functions of (input, matrices) whose input's last dimension is the width.
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")


def _cant_follow(what: str) -> str:
    return (
        f"This module's forward {what}: ia3 multiplies what goes into its experts' second matrices, and can't follow. "
        "Call model.set_experts_implementation('grouped_mm') or another of 'batched_mm' and 'eager', or merge the "
        "adapter."
    )
