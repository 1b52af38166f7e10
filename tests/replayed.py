"""A stand-in for CUDA graphs on a CPU: what was started while recording is started again, without the Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ia3.fast.capture import GraphedCallable


class Tape(TorchDispatchMode):
    """The operations in their order, each with its tensors: a replay reads and writes the same places in memory."""

    LOOKS = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.LOOKS:
            raise RuntimeError(f"{func} looks at a value on the host, which can't be recorded.")
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Put back what was changed in place: recording computes nothing."""
        for tensor, before in reversed(self.before):
            tensor.copy_(before)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            read = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            made = _tensors(result)
            if any(tensor.untyped_storage().data_ptr() in read for tensor in made):
                continue  # a view
            for place, tensor in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                place.copy_(tensor)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def recording() -> Iterator[list[GraphedCallable]]:
    """Let all that is captured in here be recorded and replayed; gives what was recorded."""
    recorded: list[GraphedCallable] = []
    make = GraphedCallable.__init__

    def init(self: GraphedCallable, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.captures = True

    def capture(
        self: GraphedCallable, fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]
    ) -> tuple[Any, Callable[[], None]]:
        with Tape() as tape:
            outputs = self.function(*fixed, **inputs)
        tape.undo()
        recorded.append(self)
        return outputs, tape.replay

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedCallable, "__init__", init)
        patch.setattr(GraphedCallable, "_capture", capture)
        yield recorded
