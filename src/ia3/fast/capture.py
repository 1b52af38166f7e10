"""A computation recorded as CUDA graphs, one for each shape of its inputs, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ia3.adapter import Attached


@dataclass(frozen=True)
class _Recorded:
    """Where inputs of one shape are copied to, what the computation leaves, and how it is done again."""

    inputs: dict[str, Tensor]
    outputs: Any
    replay: Callable[[], None]


class Captured:
    """A function of named tensors: on a GPU recorded once a shape and replayed, elsewhere just called.

    Args:
        function: takes tensors by name and returns tensors. It may change others in place, and must not look at a
            value on the host; what it reads besides its inputs must stay where it is in memory.
        device: the model's.
        rehearsal: what to run, twice, before a shape's first call is recorded. Without any the first call of a shape
            is an ordinary one, and the second is recorded: a shape that comes once is not worth a recording.

    Example:
        >>> forward = Captured(lambda input_ids: model(input_ids).logits, model.device)
        >>> logits = forward(input_ids=batch).clone()
    """

    def __init__(
        self, function: Callable[..., Any], device: torch.device, *, rehearsal: Callable[..., Any] | None = None
    ) -> None:
        self.function, self.device, self.rehearsal = function, device, rehearsal
        self.records = device.type == "cuda"
        self.recorded: dict[Hashable, _Recorded] = {}
        self.seen: set[Hashable] = set()
        self.pool = torch.cuda.graph_pool_handle() if self.records else None

    def __call__(self, *fixed: Hashable, **inputs: Tensor) -> Any:
        """The function's outputs.

        Args:
            fixed: the function's positional arguments, which are no tensors; each choice gets graphs of its own.
            inputs: its tensors, on any device.

        Returns:
            What the function returned. On a GPU the next call of any shape overwrites these tensors.
        """
        if not self.records:
            return self.function(*fixed, **{name: tensor.to(self.device) for name, tensor in inputs.items()})
        key = (fixed, *((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items())))
        found = self.recorded.get(key)
        if found is None and self.rehearsal is None and key not in self.seen:
            self.seen.add(key)
            return self.function(*fixed, **{name: self._sent(tensor) for name, tensor in inputs.items()})
        if found is None:
            found = self.recorded[key] = self._record(fixed, inputs)
        else:
            for name, tensor in inputs.items():
                found.inputs[name].copy_(self._sent(tensor), non_blocking=True)
        found.replay()
        return found.outputs

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor on its way to the device, which nobody waits for."""
        crosses = tensor.device.type == "cpu" and self.device.type == "cuda"
        return (tensor.pin_memory() if crosses else tensor).to(self.device, non_blocking=True)

    def _record(self, fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]) -> _Recorded:
        """Record the computation after rehearsing it; the random state stays as it was."""
        held = {name: tensor.to(self.device, copy=True) for name, tensor in inputs.items()}
        random = torch.cuda.get_rng_state(self.device)
        if self.rehearsal is not None:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.rehearsal(*fixed, **held)
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the rehearsal used is free for the graph's own pool
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile, a loader that pins its batches for example.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self.function(*fixed, **held)
        torch.cuda.set_rng_state(random, self.device)
        return _Recorded(held, outputs, graph.replay)


class Standing:
    """How a model stands: its modules, where its tensors are, whose hooks it has and which adapters act.

    A recording is right as long as it holds.

    Args:
        model: any model, with adapters or without.
        baked: tensors of it that were read once; not even a change in place is heard.
    """

    def __init__(self, model: nn.Module, baked: Sequence[Tensor] = ()) -> None:
        self.model, self.acting = model, _acting(model)
        modules = list(model.modules())
        self.places = [
            (held, name, tensor.data_ptr())
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self.children = [
            (module._modules, name, child) for module in modules for name, child in module._modules.items()
        ]
        self.hooks = [(module, _count_hooks(module)) for module in modules]
        self.baked = [(tensor, _version(tensor)) for tensor in baked]

    def holds(self) -> bool:
        """Whether a recording made then would compute what the model does now."""
        if self.acting != _acting(self.model) or any(_version(tensor) != version for tensor, version in self.baked):
            return False
        if any(modules.get(name) is not child for modules, name, child in self.children):
            return False
        if any(_count_hooks(module) != count for module, count in self.hooks):
            return False
        found = ((held.get(name), place) for held, name, place in self.places)
        return all(tensor is not None and tensor.data_ptr() == place for tensor, place in found)


def _count_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; nobody counts that of an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def _acting(model: nn.Module) -> tuple[Any, ...]:
    """The adapters that act, themselves and not their names, which others may get."""
    state: Attached | None = model.__dict__.get("_ia3")
    if state is None:
        return ()
    return (state.enabled, state.merged, *(_Same(state.adapters[name]) for name in state.active))


class _Same:
    """Equal to what holds the very same object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)
