"""Reading a saved adapter for a model: the arguments that scripts pass, its configuration, its tensors, all checked."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ia3.checkpoint import with_names_of_today
from ia3.config import IA3Config, PeftConfig
from ia3.files import HUB_ARGUMENTS
from ia3.heads import check_brought
from ia3.sites import logger
from ia3.tensors import find_weights, renamed, saved_modules_in
from ia3.weights import Tensors, limits_of, read_tensors

# What scripts pass along although it concerns the base model, which is loaded by then.
_BASE_ARGUMENTS = {"device_map", "dtype", "max_memory", "offload_dir", "offload_folder", "offload_index", "torch_dtype"}


def own_copy(config: PeftConfig) -> IA3Config:
    """A copy of the configuration.

    Raises:
        TypeError: not an `IA3Config`.
    """
    if not isinstance(config, IA3Config):
        raise TypeError(f"Expected an ia3.IA3Config, got {type(config).__module__}.{type(config).__name__}.")
    return deepcopy(config)


def read_weights(
    model: nn.Module,
    path: str | Path,
    device: str | torch.device | None,
    key_mapping: Mapping[str, str] | None,
    hub: Mapping[str, Any],
) -> Tensors:
    """A saved adapter's tensors, under the names that the model's modules have now; see `load_peft_weights`."""
    tensors = read_tensors(find_weights(path, **hub), limits_of(model))
    tensors = {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}
    return with_names_of_today(model, tensors) if key_mapping is None else renamed(tensors, key_mapping)


def fit_config(model: nn.Module, config: IA3Config, tensors: Tensors, name: str, *, trainable: bool) -> None:
    """Make a saved configuration one for this model and these tensors, in place.

    Raises:
        ValueError: the base lacks what the adapter doesn't bring; see `check_brought`.
    """
    config.inference_mode = not trainable
    if config.modules_to_save:  # modules that the file holds in full, and the configuration means by PEFT's rule alone
        more = saved_modules_in(tensors, config.modules_to_save)
        config.modules_to_save = sorted({*config.modules_to_save, *more})
    check_brought(model, config, tensors, name)


def warn_of_other_base(model: nn.Module, config: IA3Config) -> None:
    """Say so where an adapter was made for a base of another name."""
    name, wanted = model.__dict__.get("name_or_path"), config.base_model_name_or_path
    if name and wanted and Path(name).name != Path(wanted).name:
        logger.warning("The adapter was made for the base model %r; this one is %r.", wanted, name)


def refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise ValueError("ephemeral_gpu_offload is not supported: a vector is too small to be worth it.")


def loading_arguments(kwargs: dict[str, Any]) -> tuple[Any, bool, dict[str, Any]]:
    """The device, whether to leave out mismatched sizes, and the hub's arguments.

    Raises:
        TypeError: anything else.
    """
    kwargs = dict(kwargs)
    device = kwargs.pop("torch_device", None)
    ignore_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    for name in sorted(set(kwargs) & _BASE_ARGUMENTS):
        del kwargs[name]
        logger.warning("%s does nothing here: the vectors follow their layers. Pass it when loading the base.", name)
    unknown = sorted(set(kwargs) - HUB_ARGUMENTS)
    if unknown:
        raise TypeError(f"Unknown arguments {unknown}: expected torch_device or {sorted(HUB_ARGUMENTS)}.")
    return device, ignore_sizes, {key: value for key, value in kwargs.items() if value is not None}
