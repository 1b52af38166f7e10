"""What a model carries, as PEFT reports it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ia3.adapter import parameters
from ia3.hooks import SiteVectors
from ia3.sites import VECTORS
from ia3.state import Attached, attached, find_attached
from ia3.swap import SavedModule, Swapped

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted module: its path, which adapters it has, and which of them act, are merged, train.

    `module_type` is the layer's class, and for a module trained in full PEFT's `ModulesToSaveWrapper`.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The whole model: PEFT's fields with PEFT's meaning."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted module, in the model's order.

    Raises:
        ValueError: the model carries no adapter.
    """
    state = attached(model)
    statuses = []
    for path, module in model.named_modules():
        held: dict[str, list[nn.Parameter]] = {}
        container = module._modules.get(VECTORS)
        if isinstance(container, SiteVectors):
            kind = type(module).__name__
            held = {name: [vector] for name, vector in container.named_parameters()}
        elif isinstance(module, SavedModule):
            kind = "ModulesToSaveWrapper"
            held = {name: list(copy.parameters()) for name, copy in module.modules_to_save.items()}
        if held:
            statuses.append(
                TunerLayerStatus(
                    name=path,
                    module_type=kind,
                    enabled=state.enabled,
                    active_adapters=list(state.active),
                    merged_adapters=[name for name in state.merged if name in held],
                    requires_grad={name: _agreed([p.requires_grad for p in ps]) for name, ps in held.items()},
                    available_adapters=sorted(held),
                    devices={name: sorted({p.device.type for p in ps}) for name, ps in held.items()},
                )
            )
    return statuses


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the whole model.

    Raises:
        ValueError: the model carries no adapter.
    """
    state = attached(model)
    trainable, total = count_parameters(model)
    held = {name: list(parameters(model, adapter)) for name, adapter in state.adapters.items()}
    return TunerModelStatus(
        base_model_type=type(model).__name__,
        adapter_model_type="IA3Model",
        peft_types=dict.fromkeys(state.adapters, "IA3"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(get_layer_status(model)),
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters=sorted(state.merged),
        requires_grad={name: _agreed([p.requires_grad for p in ps]) for name, ps in held.items()},
        available_adapters=sorted(state.adapters),
        devices={name: sorted({p.device.type for p in ps}) for name, ps in held.items()},
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; two 4-bit numbers packed in a byte count as two."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _agreed(flags: list[bool]) -> bool | Irregular:
    if all(flags):
        return True
    return "irregular" if any(flags) else False


# How many adapters the first line of a printed model names.
_FEW = 8


def _line(model: nn.Module) -> str:
    """Which adapters a model has, what they do and how many numbers they hold; nothing is settled by asking."""
    state = find_attached(model)
    if state is None:
        return ""
    numbers = _count_numbers(model)
    told = [
        f"{name} ({_doing(state, name)}, {numbers[name]:,} numbers)"
        for name in sorted(state.adapters, key=lambda name: name not in state.active)[:_FEW]
    ]
    if len(state.adapters) > _FEW:
        told.append(f"{len(state.adapters) - _FEW} more")
    return f"adapters: {', '.join(told) or 'none attached'}" + ("" if state.table is None else f"; {state.table!r}")


def _doing(state: Attached, name: str) -> str:
    if name in state.merged:
        return "merged"
    if name not in state.active:
        return "inactive"
    return "active" if state.enabled else "disabled"


def _count_numbers(model: nn.Module) -> Counter[str]:
    """What each adapter holds where it lies now, also where a tool replaced modules."""
    numbers: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, SiteVectors):
            numbers.update({name: vector.numel() for name, vector in module.named_parameters()})
        elif isinstance(module, SavedModule):
            for name, copy in module.modules_to_save.items():
                numbers[name] += sum(parameter.numel() for parameter in copy.parameters())
    return numbers


class Reporting(Swapped):
    """The methods by which an adapted model says what it carries."""

    def extra_repr(self) -> str:
        """The adapters, in the first line of what torch prints of the model."""
        return "\n".join(filter(None, (_line(self), super().extra_repr())))

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts, in the weights or beside them."""
        return attached(self).enabled and bool(attached(self).active)

    @property
    def active_adapters(self) -> list[str]:
        return list(attached(self).active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, vectors included."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both counts and the share, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that carry a vector, in the model's order."""
        sites = {site.path for adapter in attached(self).adapters.values() for site in adapter.layout.sites}
        return [path for path, _ in self.named_modules() if path in sites]

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapted module."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the whole model."""
        return get_model_status(self)
