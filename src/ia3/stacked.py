"""One module under many sets of its tensors at once: the heads of adapters, of which a batch has one an example."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Skeleton:
    """A copy of a module, whose tensors are those of whoever calls it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # While it is called it holds the caller's tensors, which another thread may not see.
        self._lock = threading.Lock()

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor, *, training: bool) -> Tensor:
        """What it makes of each row of `x` `[rows, …]` with that row's tensors, `[rows, *shape]` by name."""
        with self._lock:
            self._module.train(training)
            own = vmap(lambda held, row: functional_call(self._module, held, (row,)), randomness="different")
            found: Tensor = own(dict(tensors), x)
        return found


class Stack(NamedTuple):
    """Some examples of a batch, whose heads have the same shapes.

    Args:
        places: which examples, `[rows]`.
        tensors: the heads' by name, `[rows, *shape]`.
    """

    places: Tensor
    tensors: Mapping[str, Tensor]


class StackedHead(NamedTuple):
    """A module trained in full by many adapters, in a batch that mixes them.

    Args:
        skeleton: the module.
        stacks: the examples by the shapes of their heads, which differ in the number of classes.
    """

    skeleton: Skeleton
    stacks: Sequence[Stack]

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        """Each example through its own head.

        Args:
            x: `[examples, rows an example, …]`.
            training: whether dropout drops.

        Returns:
            `[examples · rows an example, …, classes]`; classes that an example's head lacks are minus infinity.
        """
        found = [self._run(stack, x, training) for stack in self.stacks]
        if len(found) == 1:  # every example, in its order
            return found[0].flatten(0, 1)
        widest = max(each.shape[-1] for each in found)
        whole = found[0].new_full((*x.shape[:2], *found[0].shape[2:-1], widest), -torch.inf)
        for stack, each in zip(self.stacks, found, strict=True):
            whole[stack.places, ..., : each.shape[-1]] = each
        return whole.flatten(0, 1)

    def _run(self, stack: Stack, x: Tensor, training: bool) -> Tensor:
        own = x if len(self.stacks) == 1 else x[stack.places]
        dtype = next(each.dtype for each in stack.tensors.values() if each.is_floating_point())
        if torch.is_autocast_enabled(x.device.type):
            return self.skeleton(stack.tensors, own, training=training)
        return self.skeleton(stack.tensors, own.to(dtype), training=training).to(x.dtype)


def stack_by_shape(heads: Sequence[Mapping[str, Tensor]]) -> list[Stack]:
    """The heads of a batch's examples, those of equal shapes and types together.

    Args:
        heads: one an example, tensors by name.
    """
    alike: dict[Any, list[int]] = {}
    for place, head in enumerate(heads):
        alike.setdefault(tuple((each.shape, each.dtype) for each in head.values()), []).append(place)
    return [
        Stack(
            torch.tensor(places, device=next(iter(heads[places[0]].values())).device),
            {name: torch.stack([heads[place][name] for place in places]) for name in heads[places[0]]},
        )
        for places in alike.values()
    ]
