"""A computation recorded as CUDA graphs, one for each shape of its inputs, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        rehearsal: what to run before recording, instead of the function, where running that twice changes something.

    Example:
        >>> forward = Captured(lambda input_ids: model(input_ids).logits, model.device)
        >>> logits = forward(input_ids=batch).clone()
    """

    def __init__(
        self, function: Callable[..., Any], device: torch.device, *, rehearsal: Callable[..., Any] | None = None
    ) -> None:
        self.function, self.device, self.rehearsal = function, device, rehearsal or function
        self.records = device.type == "cuda"
        self.recorded: dict[Hashable, _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.records else None

    def __call__(self, mode: Hashable = None, **inputs: Tensor) -> Any:
        """The function's outputs.

        Args:
            mode: what else the computation depends on; each gets graphs of its own.
            inputs: tensors on any device.

        Returns:
            What the function returned. On a GPU the next call of any shape overwrites these tensors.
        """
        if not self.records:
            return self.function(**inputs)
        key = (mode, *((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items())))
        found = self.recorded.get(key)
        if found is None:
            found = self.recorded[key] = self._record(inputs)
        else:
            for name, tensor in inputs.items():
                found.inputs[name].copy_(tensor, non_blocking=True)
        found.replay()
        return found.outputs

    def _record(self, inputs: Mapping[str, Tensor]) -> _Recorded:
        """Record the computation after rehearsing it; the random state stays as it was."""
        held = {name: tensor.to(self.device, copy=True) for name, tensor in inputs.items()}
        random = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.rehearsal(**held)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the rehearsal used is free for the graph's own pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(**held)
        torch.cuda.set_rng_state(random, self.device)
        return _Recorded(held, outputs, graph.replay)
