"""What goes unheard where a model's modules are not called, and its loss is computed by hand."""

from __future__ import annotations

from typing import Any

from torch import nn

_OWN_HOOKS = ("scale_input", "scale_output", "_take_adapter_names", "_forget_adapter_names")


def unheard(model: Any) -> str | None:
    """The first thing that a computation by hand over the model's weights would leave out; None where there is none."""
    return next((reason for path, module in model.named_modules() if (reason := _of(path, module))), None)


def _of(path: str, module: nn.Module) -> str | None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    if any(getattr(hook, "__name__", "") not in _OWN_HOOKS for hook in hooks):
        return f"{path or 'the model'} carries another's hook"
    if "forward" in module.__dict__:
        return f"the forward of {path or 'the model'} was replaced"
    if getattr(module, "gradient_checkpointing", False):
        return f"{path or 'the model'} checkpoints its gradients"
    if not isinstance(module, nn.Linear):
        return None
    kind = type(module.weight).__name__
    return None if kind == "Parameter" else f"the weight of {path} is a {kind}"
