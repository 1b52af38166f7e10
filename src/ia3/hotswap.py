"""Putting a saved adapter's values in the place of an attached one's, under the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ia3.checkpoint import set_peft_model_state_dict, unwrapped
from ia3.config import PeftConfig
from ia3.errors import naming
from ia3.loading import read_weights
from ia3.state import get_adapter


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **hub: Any,
) -> None:
    """Copy a saved adapter's vectors and modules into those of an attached one, in place.

    The tensors stay the same objects, so a model made by `torch.compile` stays valid and an optimizer goes on.

    Args:
        model: a model that carries the adapter.
        model_name_or_path: the saved adapter, a directory or a hub repository.
        adapter_name: the attached adapter, which keeps its name and configuration.
        torch_device: where the file's tensors are read to; the CPU by default.
        hub: `subfolder` and arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such adapter here, an adapter of another method, or one with other sites, another side or
            other modules trained in full; nothing has changed then.
    """
    model = unwrapped(model)
    get_adapter(model, adapter_name)
    with naming(model_name_or_path):
        PeftConfig.from_pretrained(model_name_or_path, **hub)  # that it is an IA3 adapter
        tensors = read_weights(model, model_name_or_path, torch_device, None, hub)
        set_peft_model_state_dict(model, tensors, adapter_name)
