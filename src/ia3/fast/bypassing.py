"""What goes unheard where a model's modules are not called, and its loss is computed by hand."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import nn

from ia3.sites import VECTORS, Site
from ia3.swap import SavedModule

_OWN_HOOKS = ("scale_input", "scale_output", "_take_adapter_names", "_forget_adapter_names")


def unheard(model: Any, classes: Sequence[str]) -> str | None:
    """The first thing that a computation by hand over the model's weights would leave out; None where there is none.

    Args:
        model: any model.
        classes: the names of the classes of transformers whose forward is written by hand.
    """
    written = next((base for base in type(model).__mro__ if _is_written(base, classes)), None)
    if written is None or type(model).forward is not vars(written)["forward"]:
        return f"a {type(model).__name__} has a forward of its own"
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if f".{VECTORS}." not in name}
    if len(dtypes) > 1:
        return f"its weights are of several kinds: {', '.join(sorted(map(str, dtypes)))}"
    return next((reason for path, module in model.named_modules() if (reason := _of(path, module))), None)


def other_site(sites: Sequence[Site], expected: Container[tuple[str, str]]) -> str | None:
    """The first site that is not written by hand, or is a part of one that is; None where there is none."""
    other = next((site for site in sites if (site.path, site.side) not in expected or site.intervals), None)
    if other is None:
        return None
    return f"the {other.side} of {other.path} is adapted, where it expects keys, values and feed-forward alone"


def _is_written(base: type, classes: Sequence[str]) -> bool:
    return base.__name__ in classes and base.__module__.startswith("transformers.") and "forward" in vars(base)


def _of(path: str, module: nn.Module) -> str | None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    if any(getattr(hook, "__name__", "") not in _OWN_HOOKS for hook in hooks):
        return f"{path or 'the model'} carries another's hook"
    if "forward" in module.__dict__:
        return f"the forward of {path or 'the model'} was replaced"
    if isinstance(module, SavedModule):
        return f"{path} is trained in full"
    if getattr(module, "gradient_checkpointing", False):
        return f"{path or 'the model'} checkpoints its gradients"
    if not isinstance(module, nn.Linear):
        return None
    kind = type(module.weight).__name__
    return None if kind == "Parameter" else f"the weight of {path} is a {kind}"
