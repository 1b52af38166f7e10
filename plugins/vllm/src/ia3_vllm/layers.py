"""vLLM's LoRA layers that multiply too: a slot's vectors are rows of a table, and each token takes its own row.

A token under a LoRA adapter or under none has a row of ones, a token under an (IA)³ adapter zeros as its LoRA matrices,
so that a batch may hold all three.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.lora.utils as registry
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from ia3_vllm.reading import Scales, Served
from ia3_vllm.slices import Shard, even, grouped_heads


class Scaled:
    """Mixed into a linear layer with LoRA: multiplies its input and output by the rows of the tokens' slots."""

    def make_tables(self: Any, slots: int, dtype: torch.dtype, always: bool) -> None:
        """Allocate the rows, `[1 + slots, width]` of the activations' dtype, the first of them the base's.

        `always` computes products that no slot needs too, as graphs must that are captured or compiled once.
        """
        self.always = always
        self.served = served_by(self.base_layer)
        self.in_use: dict[str, set[int]] = {"input": set(), "output": set(), "lora": set()}
        widths = {"output": sum(shard.width for shard in self.served.output)}
        widths["input"] = self.served.input.width if self.served.input else 0
        self.tables = {
            side: torch.ones(1 + slots, width, dtype=dtype, device=self.device)
            for side, width in widths.items()
            if width
        }

    def reset_lora(self: Any, index: int) -> None:
        super().reset_lora(index)  # type: ignore[misc]
        self.release(index)
        for table in self.tables.values():
            table[index + 1] = 1

    def release(self: Any, index: int) -> None:
        """Nothing needs a slot any more."""
        for slots in self.in_use.values():
            slots.discard(index)

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
        self.in_use["lora"].add(index)

    def set_scales(self: Any, index: int, scales: Scales) -> None:
        """Put an adapter's vectors into a slot that was reset."""
        for side, vector in scales._asdict().items():
            if vector is not None:
                self.tables[side][index + 1].copy_(vector, non_blocking=True)
                self.in_use[side].add(index)

    def apply(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        scaled: Tensor = self._scaled("output", super().apply(self._scaled("input", x), bias))  # type: ignore[misc]
        return scaled

    def _apply_lora_to_output(self: Any, x: Tensor, output: Tensor) -> Tensor:
        needed = self.always or self.in_use["lora"]
        with_lora: Tensor = super()._apply_lora_to_output(x, output) if needed else output  # type: ignore[misc]
        return with_lora

    def _scaled(self: Any, side: str, activation: Tensor) -> Tensor:
        """The activation `[…, tokens, width]` times its tokens' rows."""
        table = self.tables.get(side)
        if table is None or not (self.always or self.in_use[side]):
            return activation
        flat = activation.reshape(-1, activation.shape[-1])
        # The index is -1 for the base; where a batch is padded, what it says of the padding may be anything.
        rows = (self.punica_wrapper._token_lora_indices[: flat.shape[0]] + 1).clamp(0, table.shape[0] - 1)
        product: Tensor = flat * table.index_select(0, rows).to(flat.dtype)
        return product.view(activation.shape)


def served_by(layer: Any) -> Served:
    """What a rank's layer can multiply, by vLLM's class of it."""
    ranks, rank = layer.tp_size, layer.tp_rank
    own_input = None
    if isinstance(layer, QKVParallelLinear):
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.head_size, layer.v_head_size)
        output = grouped_heads(*heads, ranks, rank)
    elif isinstance(layer, MergedColumnParallelLinear):
        output = tuple(even(size, ranks, rank) for size in layer.output_sizes)
    elif isinstance(layer, ColumnParallelLinear):
        output = (even(layer.output_size, ranks, rank),)
    else:
        output = (Shard(layer.output_size, layer.output_size),)
        own_input = even(layer.input_size, *((ranks, rank) if isinstance(layer, RowParallelLinear) else (1, 0)))
    if layer.skip_bias_add and layer.bias is not None:
        output = ()
    return Served(output, own_input)


def install() -> None:
    """Put a class that also multiplies in the place of each of vLLM's linear layers with LoRA."""
    registry._all_lora_classes = tuple(
        type(kind.__name__, (Scaled, kind), {})
        if issubclass(kind, BaseLinearLayerWithLoRA) and not issubclass(kind, Scaled)
        else kind
        for kind in registry._all_lora_classes
    )
