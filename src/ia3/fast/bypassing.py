"""What goes unheard where a model's modules are not called, and its loss is computed by hand."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Container, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from ia3.sites import VECTORS, Site
from ia3.swap import SavedModule

NOT_ALONE = "exactly one adapter must act, and none be merged"
# Where an adapted model's forward keeps the class that it stands before.
OLD_CLASS = "_ia3_old_class"
# Where a module keeps those that a forward and its backward call.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN_HOOKS = (
    *("scale_input", "scale_output", "keep_in_place", "stop_listening"),
    *("_take_adapter_names", "_forget_adapter_names"),
)


def unheard(model: Any, classes: Sequence[str]) -> str | None:
    """The first thing that a computation by hand over the model's weights would leave out; None where there is none.

    Args:
        model: any model.
        classes: the names of the classes of transformers whose forward is written by hand.
    """
    written = next((base for base in type(model).__mro__ if _is_written(base, classes)), None)
    if written is None or own_forward(type(model)) is not vars(written)["forward"]:
        return f"a {type(model).__name__} has a forward of its own"
    other = next((path for path, module in model.named_modules() if not _is_known(type(module), written)), None)
    if other is not None:
        return f"{other or 'the model'} is a {type(model.get_submodule(other)).__name__} with a forward from elsewhere"
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if f".{VECTORS}." not in name}
    if len(dtypes) > 1:
        return f"its weights are of several kinds: {', '.join(sorted(map(str, dtypes)))}"
    return next((reason for path, module in model.named_modules() if (reason := _of(path, module))), None)


def own_forward(cls: type[nn.Module]) -> Any:
    """The class's forward before an adapted model's stood before it."""
    old = getattr(cls.forward, OLD_CLASS, None)
    return cls.forward if old is None else old.forward


# Attentions of transformers that compute the same.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def unlike(model: Any, expected: Mapping[str, Any], act: str) -> str | None:
    """The first attribute of a module that is not what a computation by hand takes for it; None where there is none.

    Args:
        model: any model of transformers.
        expected: by name, of the modules that have it; `dropout` is any module's rate.
        act: the activation's name in transformers.
    """
    from transformers.activations import ACT2FN

    if model.config._attn_implementation not in _ATTENTIONS:
        return f"its attention is {model.config._attn_implementation!r}"
    for path, module in model.named_modules():
        own = vars(module)
        if isinstance(module, nn.Dropout):
            own = {"dropout": module.p}
        for name, value in expected.items():
            if own.get(name, value) != value:
                return f"{name} of {path} is {own[name]}, and the configuration says {value}"
        if path.rsplit(".", 1)[-1] in ("act", "act_fn") and type(module) is not type(ACT2FN[act]):
            return f"{path} is a {type(module).__name__}, and the configuration says {act}"
    return None


def other_site(sites: Sequence[Site], expected: Container[tuple[str, str]]) -> str | None:
    """The first site that is not written by hand, or is a part of one that is; None where there is none."""
    other = next((site for site in sites if (site.path, site.side) not in expected or site.intervals), None)
    if other is None:
        return None
    return f"the {other.side} of {other.path} is adapted, where it expects keys, values and feed-forward alone"


def _is_written(base: type, classes: Sequence[str]) -> bool:
    """Whether a class is itself one of these; an adapted model's class has their name, too."""
    own = "forward" in vars(base) and not hasattr(vars(base)["forward"], OLD_CLASS)
    return own and base.__name__ in classes and base.__module__.startswith("transformers.")


def _is_known(cls: type[nn.Module], written: type) -> bool:
    """Whether a module's class and its forward are torch's, this package's, or those beside the model's class."""
    homes = ("torch.nn.modules.", "transformers.activations", "ia3.", written.__module__)
    if not f"{cls.__module__}.".startswith(homes):
        return False
    code = getattr(own_forward(cls), "__code__", None)
    # A class that was patched has a forward from another file, whatever module it names.
    return code is not None and code.co_filename.startswith(_sources())


@cache
def _sources() -> tuple[str, ...]:
    """The folders of the packages whose forwards are known."""
    specs = [importlib.util.find_spec(name) for name in ("torch", "transformers", "ia3")]
    return tuple(f"{folder}{os.sep}" for spec in specs if spec for folder in spec.submodule_search_locations or ())


def _of(path: str, module: nn.Module) -> str | None:
    hooks = [hook for kind in HOOKS for hook in vars(module)[kind].values()]
    if any(getattr(hook, "__name__", "") not in _OWN_HOOKS for hook in hooks):
        return f"{path or 'the model'} carries another's hook"
    if "forward" in module.__dict__:
        return f"the forward of {path or 'the model'} was replaced"
    if hasattr(module, "parametrizations"):
        return f"{path} is parametrised"
    if isinstance(module, SavedModule):
        return f"{path} is trained in full"
    if getattr(module, "gradient_checkpointing", False):
        return f"{path or 'the model'} checkpoints its gradients"
    if not isinstance(module, nn.Linear):
        return None
    kind = type(module.weight).__name__
    return None if kind == "Parameter" else f"the weight of {path} is a {kind}"
