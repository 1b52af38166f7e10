"""A computation recorded as CUDA graphs, one for each shape of its inputs, and replayed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ia3.fast.bypassing import HOOKS, own_forward
from ia3.fast.operations import compile_kernels
from ia3.state import find_attached


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
        rehearsal: what to run before a shape's first call is recorded, more than once. Without any the first call of a
            shape is an ordinary one, and the second is recorded: a shape that comes once is not worth a recording.
        repeatable: whether the function itself may run more than once on its first inputs, so that its kernels are
            compiled side by side; a rehearsal may.

    Example:
        >>> forward = Captured(lambda input_ids: model(input_ids).logits, model.device)
        >>> logits = forward(input_ids=batch).clone()
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        rehearsal: Callable[..., Any] | None = None,
        repeatable: bool = False,
    ) -> None:
        self.function, self.device, self.rehearsal, self.repeatable = function, device, rehearsal, repeatable
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
            sent = {name: self._sent(tensor) for name, tensor in inputs.items()}
            if self.repeatable:
                compile_kernels(partial(self.function, *fixed, **sent), self.device)
            return self.function(*fixed, **sent)
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
                compile_kernels(partial(self.rehearsal, *fixed, **held), self.device)
                self.rehearsal(*fixed, **held)
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the rehearsal used is free for the graph's own pool
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile, a loader that pins its batches for example.
        with _uncollected(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self.function(*fixed, **held)
        torch.cuda.set_rng_state(random, self.device)
        return _Recorded(held, outputs, graph.replay)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without collecting garbage: an old graph in it, destroyed while another is recorded, ends the recording."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Standing:
    """How a model stands: its configuration, its modules, their classes and forwards, where its tensors are and which
    are trained, its rates of dropout and the like, how many hooks it has and which adapters act.

    A recording is right as long as it holds.

    Args:
        model: any model, with adapters or without; it is not kept alive.
        baked: tensors of it that were read once; not even a change in place is heard.
    """

    def __init__(self, model: nn.Module, baked: Sequence[Tensor] = ()) -> None:
        self.root, self.below, self.baked = weakref.ref(model), list(model.modules())[1:], baked
        # Rates of dropout, epsilons and the like.
        self.numbers = [
            (vars(module), name)
            for module in self._modules()
            for name, value in vars(module).items()
            if isinstance(value, float)
        ]
        self.dropping = [held for held, name in self.numbers if name in ("p", "dropout", "attention_dropout")]
        self.checkpointing = [vars(each) for each in self._modules() if "gradient_checkpointing" in vars(each)]
        self.stood = self._stands(self._tensors())

    def holds(self) -> bool:
        """Whether a recording made then would compute what the model does now."""
        if self.root() is None:
            return False
        tensors = self._tensors()
        # Whoever has other kinds of tensors now has them at places that can't be asked for.
        if [type(tensor) for tensor in tensors] != self.stood[0]:
            return False
        return self._stands(tensors) == self.stood

    @property
    def in_one_mode(self) -> bool:
        """Whether all that drops is in the model's own mode."""
        model = self.root()
        return model is not None and all(held["training"] is model.training for held in self.dropping)

    def _modules(self) -> list[nn.Module]:
        model = self.root()
        assert model is not None
        return [model, *self.below]

    def _tensors(self) -> list[Tensor]:
        return [
            tensor
            for module in self._modules()
            for held in (module._parameters, module._buffers)
            for tensor in held.values()
            if tensor is not None
        ]

    def _stands(self, tensors: Sequence[Tensor]) -> list[Any]:
        modules = self._modules()
        kinds, held = [type(module) for module in modules], [vars(module) for module in modules]
        return [
            [type(tensor) for tensor in tensors],
            kinds,
            [own_forward(cls) for cls in dict.fromkeys(kinds)],
            _acting(modules[0]),
            dict(vars(getattr(modules[0], "config", object))),
            [held[0].get(name) for name in ("_loss_function", "loss_type")],
            [tuple(each["_modules"].values()) for each in held],
            ["forward" in each for each in held],
            *([len(each[kind]) for each in held] for kind in HOOKS),
            [tensor.requires_grad for tensor in tensors],
            [tensor.data_ptr() for tensor in tensors],
            [_version(tensor) for tensor in self.baked],
            [each.get(name) for each, name in self.numbers],
            [each.get("gradient_checkpointing") for each in self.checkpointing],
        ]


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; nobody counts that of an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def _acting(model: nn.Module) -> tuple[Any, ...]:
    """The adapters that act, themselves and not their names, which others may get."""
    state = find_attached(model)
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
