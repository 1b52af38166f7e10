"""The worker's side: reads (IA)³ adapters where vLLM reads LoRA, and puts them into vLLM's slots."""

from __future__ import annotations

from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import vllm.v1.worker.lora_model_runner_mixin as runner
from torch import nn
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, set_current_vllm_config
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import is_pp_missing_parameter

from ia3.table import read_vectors
from ia3_vllm.content import is_ours
from ia3_vllm.layers import Scaled
from ia3_vllm.reading import Scales, base_of, scales_of


class Adapter(LoRAModel):  # type: ignore[misc]
    """An (IA)³ adapter in host memory; to vLLM a LoRA adapter without matrices."""

    def __init__(self, number: int, scales: dict[str, Scales]) -> None:
        super().__init__(number, 1, {})
        self.scales = scales


class ModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]
    """vLLM's manager of slots, for adapters of both kinds."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self.vllm_config = vllm_config
        super().__init__(*args, vllm_config=vllm_config, **kwargs)

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        compilation = self.vllm_config.compilation_config
        eager = compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode == CUDAGraphMode.NONE
        for layer in self._scaled().values():
            layer.make_tables(self.lora_slots, self.vllm_config.model_config.dtype, always=not eager)

    def _scaled(self) -> dict[str, Any]:
        return {name: layer for name, layer in self.modules.items() if isinstance(layer, Scaled)}

    @cached_property
    def base(self) -> nn.Module:
        """transformers' model of the base, without memory."""
        model, quiet = self.vllm_config.model_config, copy(self.vllm_config)
        quiet.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
        with set_current_vllm_config(quiet):  # vLLM's transformers backend compiles transformers' own classes
            return base_of(model.hf_config, model.model, model.trust_remote_code)

    def read(self, number: int, folder: Path) -> Adapter:
        """An adapter from its folder.

        Raises:
            FileNotFoundError, ValueError: what `ia3` refuses, or a site that isn't served.
        """
        _, vectors = read_vectors(self.base, folder)
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None

        def rename(path: str) -> str | None:
            mapped = mapper._map_name(f"{path}.weight") if mapper is not None else f"{path}.weight"
            return mapped.removesuffix(".weight") if mapped is not None else None

        scales = scales_of(
            vectors,
            {name: layer.served for name, layer in self._scaled().items()},
            self.packed_modules_mapping,
            model_type=self.vllm_config.model_config.hf_config.model_type,
            rename=rename,
            elsewhere=lambda path: is_pp_missing_parameter(f"{path}.", self.model),
        )
        return Adapter(number, scales)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, Adapter):  # has no matrices to merge
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        newly: bool = super().activate_adapter(lora_id)  # resets all layers in the slot
        adapter = self._registered_adapters[lora_id]
        if newly and isinstance(adapter, Adapter):
            slot = self.lora_index_to_id.index(lora_id)
            for name, scales in adapter.scales.items():
                self.modules[name].set_scales(slot, scales)
        return newly

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            for layer in self._scaled().values():
                layer.release(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)


class WorkerManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's loader of adapters, which hands those that aren't LoRA to this package."""

    _manager_cls = ModelManager

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        if is_ours(folder):
            return self._adapter_manager.read(lora_request.lora_int_id, folder)
        return super()._load_adapter(lora_request)


def install() -> None:
    """Let the model runners make this manager."""
    runner.LRUCacheWorkerLoRAManager = WorkerManager
