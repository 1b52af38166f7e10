"""PEFT's internals in ia3's public terms, for PEFT's own tests: `peft_own_tests.py` puts this beside their copy.

A test that reads `model.base_model.model.lin0.base_layer` means the layer; here that is `model.lin0`.
"""

from __future__ import annotations

import gc
from typing import Any

from torch import nn

import ia3
from ia3.hooks import SiteVectors
from ia3.swap import SavedModule


def base_model(owner: Any) -> Any:
    """`owner.base_model`, which for PEFT is the tuner around the model."""
    return owner if isinstance(owner, ia3.PeftModel) else owner.base_model


def inner_model(owner: Any) -> Any:
    """`owner.base_model.model`, the base inside the tuner."""
    return owner if isinstance(owner, ia3.PeftModel) else owner.base_model.model


def own_layer(module: Any, name: str) -> Any:
    """`module.base_layer` or `module.original_module`: the layer itself, which no wrapper hides."""
    return getattr(module, name) if name in module.__dict__.get("_modules", {}) else module


def held(owner: Any, name: str) -> Any:
    """An attribute of PEFT's layers, such as `layer.active_adapters`: what the model's status says of the layer."""
    if name == "prefix" and isinstance(owner, ia3.PeftModel):
        return "ia3_"
    if isinstance(owner, ia3.PeftModel) or not isinstance(owner, (BaseTunerLayer, ModulesToSaveWrapper)):
        return getattr(owner, name)
    model = _model_of(owner)
    status = next(s for s in ia3.get_layer_status(model) if model.get_submodule(s.name) is owner)
    available = set(status.available_adapters)
    in_full = isinstance(owner, ModulesToSaveWrapper)
    active = [name for name in status.active_adapters if name in available or not in_full]
    inputs = {site.path for a in model._ia3.adapters.values() for site in a.layout.sites if site.side == "input"}
    return {
        "active_adapters": active,
        "active_adapter": active,
        "disable_adapters": not status.enabled,
        "merged_adapters": status.merged_adapters,
        "merged": bool(status.merged_adapters),
        "is_feedforward": status.name in inputs,
        "_all_available_adapter_names": lambda: sorted(available),
        "_adapters": available,
        "adapter_layer_names": ("ia3_l",),
        "set_adapter": model.set_adapter,
        "merge": lambda safe_merge=False: model.merge_adapter(safe_merge=safe_merge),
    }[name]


def _model_of(layer: nn.Module) -> Any:
    """The adapted model that a layer is in."""
    models = [thing for thing in gc.get_objects() if isinstance(thing, ia3.PeftModel)]
    return next(model for model in reversed(models) if any(module is layer for module in model.modules()))


def has(owner: Any, name: str) -> bool:
    """`hasattr`, which knows the prefix of PEFT's tuner."""
    return hasattr(owner, name) or (name == "prefix" and isinstance(owner, ia3.PeftModel))


def inspect_matched_modules(model: Any) -> dict[str, list[str]]:
    """What a configuration matches, by the model's own account."""
    matched = model.targeted_module_names
    return {"matched": matched, "unmatched": [path for path, _ in model.named_modules() if path not in matched]}


BufferDict = SiteVectors


class _Adapted(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, nn.Module) and isinstance(module._modules.get("ia3_l"), SiteVectors)


class BaseTunerLayer(metaclass=_Adapted):
    """A layer with a vector."""


class _TrainedInFull(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, SavedModule)


class ModulesToSaveWrapper(metaclass=_TrainedInFull):
    """A module trained in full."""


class AuxiliaryTrainingWrapper(metaclass=_TrainedInFull):
    """The same: there are no other ones."""
