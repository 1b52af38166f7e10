"""Random numbers that are drawn apart, so that PyTorch's own generators, one a device, stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU = torch.device("cpu")


class DrawsApart(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What this thread draws in here it draws from copies of PyTorch's generators.

    Putting a generator's state back afterwards would take back what other threads have drawn meanwhile, a training's
    dropout for example, and they would draw it again. A GPU's kernels that take no generator, such as dropout within
    attention, are lent the device's own for as long as they are started. Other kinds of devices draw as ever.
    """

    supports_higher_order_operators = True  # flex_attention, which would be refused here

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays so."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _draws(func) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        tensors = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        device = kwargs.get("device") or next((each.device for each in tensors), _CPU)
        drawing = _with_generator(func)
        if drawing is not None and device.type in ("cpu", "cuda"):
            return drawing(*args, **{**kwargs, "generator": self._copy_for(device)})
        return self._lent(device, lambda: func(*args, **kwargs)) if device.type == "cuda" else func(*args, **kwargs)

    def _copy_for(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
            self.generators[device].set_state(_default(device).get_state())
        return self.generators[device]

    def _lent(self, device: torch.device, start: Callable[[], Any]) -> Any:
        copy, own = self._copy_for(device), _default(device)
        before = own.get_state()
        own.set_state(copy.get_state())
        try:
            return start()
        finally:
            copy.set_state(own.get_state())
            own.set_state(before)


def _default(device: torch.device) -> torch.Generator:
    """PyTorch's own."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _draws(operation: Any) -> bool:
    """Whether an operation may draw from a generator."""
    return isinstance(operation, OpOverload) and torch.Tag.nondeterministic_seeded in operation.tags


@cache
def _with_generator(operation: Any) -> Any:
    """The form of an operation that takes a generator; None where there is none, as of all that never draw on a CPU."""
    forms = [getattr(operation.overloadpacket, name) for name in operation.overloadpacket.overloads()]
    alike = (form for form in forms if _takes(form)[0] and _takes(form)[1] == _takes(operation)[1])
    return next(alike, None)


def _takes(operation: Any) -> tuple[bool, list[tuple[str, str]]]:
    """Whether an operation takes a generator, and its other arguments with their types."""
    arguments = [(each.name, str(each.type)) for each in operation._schema.arguments]
    others = [each for each in arguments if each[0] != "generator"]
    return len(others) < len(arguments), others
