"""A computation captured as CUDA graphs, one for each shape of its inputs, and replayed."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any, Literal
from weakref import WeakMethod

import torch
from torch import Tensor

from ia3.fast.ops.launch import compile_kernels, on_device
from ia3.fast.tables import read_by_graph

# Where one input ends and the next begins: kernels read whole lines of memory.
_ALIGNED = 256
# A process captures one graph at a time.
_alone = threading.Lock()


class StaticInputs:
    """Tensors next to each other in one piece of a device's memory, which one transfer fills.

    Args:
        inputs: what has their shapes and kinds, by name.
        device: where they are.
    """

    def __init__(self, inputs: Mapping[str, Tensor], device: torch.device) -> None:
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in inputs.items()}
        self.size, self.places = 0, {}
        for name, size in sizes.items():
            self.places[name] = (self.size, size)
            self.size += math.ceil(size / _ALIGNED) * _ALIGNED
        self.memory = torch.empty(self.size, dtype=torch.uint8, device=device)
        self.tensors = {name: self._part(self.memory, name, tensor) for name, tensor in inputs.items()}
        self.fill(inputs)

    def _part(self, memory: Tensor, name: str, like: Tensor) -> Tensor:
        place, size = self.places[name]
        return memory[place : place + size].view(like.dtype).view(like.shape)

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy other tensors of the same shapes and kinds there; nobody waits for those that are on a CPU."""
        if not inputs:
            return
        if any(tensor.device.type != "cpu" for tensor in inputs.values()):
            for name, tensor in inputs.items():
                self.tensors[name].copy_(tensor, non_blocking=True)
            return
        # Fresh each time: the last call's may still be on its way.
        sent = torch.empty(self.size, dtype=torch.uint8, device="cpu", pin_memory=self.memory.is_cuda)
        for name, tensor in inputs.items():
            self._part(sent, name, tensor).copy_(tensor)
        self.memory.copy_(sent, non_blocking=True)


@dataclass(frozen=True)
class _Graph:
    """A recorded computation of inputs of one shape.

    Args:
        inputs: where they are copied to.
        outputs: what the computation leaves.
        tables: what it reads besides, and nobody else need keep.
        replay: does it again.
        size: its bytes.
    """

    inputs: StaticInputs
    outputs: Any
    tables: Sequence[Tensor]
    replay: Callable[[], None]
    size: int


class GraphedCallable:
    """A function of named tensors: on a GPU captured once a shape and replayed, elsewhere just called.

    Args:
        function: takes tensors by name and returns tensors. It may change others in place, and must not look at a
            value on the host; what it reads besides its inputs must stay where it is in memory. A method's object is
            not kept alive: whoever has the graphs as well would keep them until garbage is collected.
        device: the model's.
        warm_up: what to run before a shape's first call is captured, more than once. Without any the first call of a
            shape is an ordinary one, and the second is captured: a shape that comes once is not worth a graph.
        repeatable: whether the function itself may run more than once on its first inputs, so that its kernels are
            compiled side by side; a warm-up may.

    Example:
        >>> forward = GraphedCallable(lambda input_ids: model(input_ids).logits, model.device)
        >>> logits = forward(input_ids=batch).clone()
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        warm_up: Callable[..., Any] | None = None,
        repeatable: bool = False,
    ) -> None:
        self.function, self.device, self.repeatable = _without_its_object(function), device, repeatable
        self.warm_up = None if warm_up is None else _without_its_object(warm_up)
        self.captures = device.type == "cuda"
        self.graphs: dict[Hashable, _Graph] = {}  # those that were used last are the last
        self.seen: set[Hashable] = set()
        self.compiled: set[Hashable] = set()
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None

    def __call__(self, *fixed: Hashable, **inputs: Tensor) -> Any:
        """The function's outputs.

        Args:
            fixed: the function's positional arguments, which are no tensors; each choice gets graphs of its own.
            inputs: its tensors, on any device.

        Returns:
            What the function returned. On a GPU the next call of any shape overwrites these tensors.
        """
        if not self.captures:
            return self.function(*fixed, **{name: tensor.to(self.device) for name, tensor in inputs.items()})
        with on_device(self.device):
            return self._replayed(fixed, inputs)

    def _replayed(self, fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]) -> Any:
        """By the graph of their shape, captured where there is none; without a warm-up the first call is ordinary."""
        key = _shape_of(fixed, inputs)
        found = self.graphs.pop(key, None)
        if found is None and self.warm_up is None and key not in self.seen:
            self.seen.add(key)
            sent = StaticInputs(inputs, self.device).tensors
            if self.repeatable:
                self._compile(self.function, fixed, sent)
            return self.function(*fixed, **sent)
        if found is None:
            found = self._recorded(fixed, inputs)
            self._make_room(found.size)
        else:
            found.inputs.fill(inputs)
        self.graphs[key] = found
        found.replay()
        return found.outputs

    def is_recorded(self, *fixed: Hashable, **inputs: Tensor) -> bool:
        """Whether a call with these would replay a graph, and run no Python of the function."""
        return self.captures and _shape_of(fixed, inputs) in self.graphs

    def _recorded(self, fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]) -> _Graph:
        before = _memory_in_use(self.device)
        static = StaticInputs(inputs, self.device)
        with read_by_graph() as tables:
            outputs, replay = self._capture(fixed, static.tensors)
        return _Graph(static, outputs, [*tables.values()], replay, _memory_in_use(self.device) - before)

    def _make_room(self, size: int) -> None:
        """Let go of the graphs that were not used for longest, where they take too much memory beside another."""
        most, taken = _room_for_graphs(self.device), size + sum(graph.size for graph in self.graphs.values())
        while taken > most and self.graphs:
            taken -= self.graphs.pop(next(iter(self.graphs))).size

    def _compile(self, function: Callable[..., Any], fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]) -> None:
        """Side by side; inputs of other sizes need the same kernels, or one more, which is compiled on the way."""
        if fixed not in self.compiled:
            compile_kernels(partial(function, *fixed, **inputs), self.device)
            self.compiled.add(fixed)

    def _capture(self, fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]) -> tuple[Any, Callable[[], None]]:
        """The outputs, and what computes them: captured after a warm-up; the random state stays as it was."""
        random = torch.cuda.get_rng_state(self.device)
        if self.warm_up is not None:
            stream = _stream_for("warm-ups", self.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._compile(self.warm_up, fixed, inputs)
                self.warm_up(*fixed, **inputs)
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up used is free for the graph's own pool
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own choice is one stream a process, of the device that was the current one at the first capture.
        stream = _stream_for("captures", self.device)
        # Other threads may go on meanwhile, a loader that pins its batches for example.
        with _alone, _uncollected(), torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
            outputs = self.function(*fixed, **inputs)
        torch.cuda.set_rng_state(random, self.device)
        return outputs, graph.replay


def _memory_in_use(device: torch.device) -> int:
    """Bytes in use, by the driver for its graphs, too; what torch keeps ready, such as a pool's, serves all graphs."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + torch.cuda.memory_allocated(device)


@cache
def _stream_for(use: Literal["captures", "warm-ups"], device: torch.device) -> torch.cuda.Stream:
    """One of a device for all, since PyTorch keeps a workspace of tens of MiB for each stream that products ran on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _room_for_graphs(device: torch.device) -> int:
    """The most bytes that one computation's graphs may take of a device."""
    return torch.cuda.mem_get_info(device)[1] // 16 if device.type == "cuda" else 0


def _without_its_object(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a method, and keeps nothing alive that the method's object holds; others as they are."""
    if not isinstance(function, MethodType):
        return function
    method = WeakMethod(function)

    def call(*fixed: Hashable, **inputs: Tensor) -> Any:
        bound = method()
        assert bound is not None, "the object whose method this is must be kept"
        return bound(*fixed, **inputs)

    return call


def _shape_of(fixed: tuple[Hashable, ...], inputs: Mapping[str, Tensor]) -> Hashable:
    """What has a graph of its own."""
    return (fixed, *((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items())))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without collecting garbage: an old graph in it, destroyed while another is captured, ends the capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
