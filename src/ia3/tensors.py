"""An adapter's tensors as PEFT names them: read from a file and written to one, apart from any model."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ia3.config import IA3Config
from ia3.files import fetch, write_atomically
from ia3.sites import SAVED_COPIES, VECTORS, matches_name
from ia3.weights import Tensors, read_tensors

PREFIX = "base_model.model."
"""What PEFT puts before each module path."""
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> Tensors:
    """Read an adapter's tensors from a directory or the hub.

    Args:
        model_id: a directory or a hub repository.
        device: where to put them; the CPU by default.
        key_mapping: regular expressions and replacements applied to the keys without their prefix, for
            modules that were renamed since.
        subfolder: a folder inside.
        hub: arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: no adapter file.
        ValueError: what `read_tensors` refuses: a file that is truncated or too large, a pickle that holds more than
            tensors, a tensor that no adapter has.
    """
    tensors = read_tensors(find_weights(model_id, subfolder, **hub))
    return renamed({key: tensor.to(device or "cpu") for key, tensor in tensors.items()}, key_mapping)


def find_weights(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The file of an adapter's tensors; see `load_peft_weights`."""
    path = fetch(model_id, SAFETENSORS_NAME, subfolder=subfolder, **hub) or fetch(
        model_id, PICKLE_NAME, subfolder=subfolder, **hub
    )
    if path is None:
        where = f"{model_id}/{subfolder}" if subfolder else model_id
        raise FileNotFoundError(f"No {SAFETENSORS_NAME} or {PICKLE_NAME} in {where}.")
    return path


def saved_modules_in(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> set[str]:
    """Paths of modules that a file holds in full only because PEFT matches their names without a dot boundary.

    For PEFT, `norm` in modules_to_save also means `input_layernorm`, and its file holds that module too.
    """
    wanted, paths = frozenset(names), set()
    for key in tensors:
        parts = key.removeprefix(PREFIX).split(".")
        if parts[-1] != VECTORS:
            modules = [".".join(parts[:length]) for length in range(1, len(parts))]
            paths |= {path for path in modules if _ends_with(path, wanted) and not matches_name(path, wanted)}
    return paths


def _ends_with(path: str, names: Container[str]) -> bool:
    return any(path[start:] in names for start in range(len(path)))


def save_adapter(
    model_class: type, config: IA3Config, tensors: Tensors, directory: Path, safe_serialization: bool = True
) -> None:
    """Write an adapter's tensors and configuration into a directory, each file atomically, off the network.

    Args:
        model_class: the class of the model that carries it.
        config: the adapter's configuration.
        tensors: as `get_peft_model_state_dict` gives them.
        directory: where to, made if missing.
        safe_serialization: safetensors; False writes a pickle.
    """
    tensors = {
        key if key.startswith(PREFIX) else PREFIX + key: tensor.cpu().contiguous() for key, tensor in tensors.items()
    }
    if safe_serialization:
        write_tensors(directory / SAFETENSORS_NAME, tensors)
    else:
        write_atomically(directory / PICKLE_NAME, _pickled(tensors))
    (directory / (PICKLE_NAME if safe_serialization else SAFETENSORS_NAME)).unlink(missing_ok=True)
    base = getattr(model_class, "_ia3_old_class", model_class)
    auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    frozen = replace(config, inference_mode=True)
    frozen.save_pretrained(directory, auto_mapping if config.task_type is None else None)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file atomically, tensors that share memory apart."""
    from safetensors.torch import save

    apart = {key: tensor.clone() for key, tensor in tensors.items()}
    write_atomically(path, save(apart, metadata={"format": "pt"}))


def _pickled(tensors: Tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def plain_tensors(tensors: Mapping[str, torch.Tensor], adapter_name: str = "default") -> Tensors:
    """Tensors under the names of their sites and modules, without PEFT's prefix and the adapter's name.

    Raises:
        ValueError: one comes with and without the prefix.
    """
    plain = {plain_key(key, adapter_name): tensor for key, tensor in tensors.items()}
    if len(plain) < len(tensors):
        counts = Counter(plain_key(key, adapter_name) for key in tensors)
        twice = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"{len(twice)} tensors come twice, with and without a prefix (such as {twice[0]}).")
    return plain


def plain_key(key: str, adapter_name: str) -> str:
    """A key without PEFT's prefix and without the adapter's name."""
    plain = key.removeprefix(PREFIX)
    if plain.endswith(f".{VECTORS}.{adapter_name}"):
        return plain.removesuffix(f".{adapter_name}")
    return plain.replace(f".{SAVED_COPIES}.{adapter_name}.", ".")


def renamed(tensors: Tensors, key_mapping: Mapping[str, str] | None) -> Tensors:
    """Tensors under the names that their modules have now; see `load_peft_weights`."""
    if not key_mapping:
        return tensors
    new: Tensors = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        for pattern, replacement in key_mapping.items():
            plain, hits = re.subn(pattern, replacement, plain)
            if hits:
                break
        new[PREFIX + plain] = tensor
    return new


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse vectors with NaN or infinity.

    Raises:
        ValueError: there are some; it says where.
    """
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors hold NaN or infinity in the model's precision (such as {broken[0]}): the "
            "training that wrote this file had diverged. Take an earlier checkpoint."
        )
