"""An adapter's tensors as PEFT names them: read from a file and written to one, apart from any model."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ia3.config import IA3Config
from ia3.files import fetch, write_atomically
from ia3.sites import SAVED_COPIES, VECTORS, matches_name

PREFIX = "base_model.model."
"""What PEFT puts before each module path."""
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

Tensors = dict[str, torch.Tensor]


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
        ValueError: a file that is truncated, or a pickle that holds more than tensors.
    """
    path = fetch(model_id, SAFETENSORS_NAME, subfolder=subfolder, **hub) or fetch(
        model_id, PICKLE_NAME, subfolder=subfolder, **hub
    )
    if path is None:
        where = f"{model_id}/{subfolder}" if subfolder else model_id
        raise FileNotFoundError(f"No {SAFETENSORS_NAME} or {PICKLE_NAME} in {where}.")
    return renamed(read_tensors(path, device or "cpu"), key_mapping)


def saved_modules_in(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> set[str]:
    """Paths of modules that a file holds in full only because PEFT matches their names without a dot boundary.

    For PEFT, `norm` in modules_to_save also means `input_layernorm`, and its file holds that module too.
    """
    paths = set()
    for key in tensors:
        parts = key.removeprefix(PREFIX).split(".")
        if parts[-1] != VECTORS:
            modules = [".".join(parts[:length]) for length in range(1, len(parts))]
            paths |= {path for path in modules if path.endswith(tuple(names)) and not matches_name(path, names)}
    return paths


def read_tensors(path: Path, device: str | torch.device = "cpu") -> Tensors:
    """Read a safetensors file, or a pickle that holds nothing but tensors; see `load_peft_weights`."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            loaded: Tensors = load_file(path, device=str(device))
        else:
            loaded = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle that holds more than tensors, which could run code: ask its author for a "
            "safetensors file."
        ) from error
    except Exception as error:  # damaged bytes make torch.load raise almost anything
        raise _damaged(path, error) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise ValueError(f"{path} holds no dictionary of tensors: it isn't an adapter's file.")
    return loaded


def read_in_parts(path: Path) -> tuple[bytes, bytearray]:
    """A safetensors file read once: its header with the length before it, and its data, neither of them checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is shorter than it says.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise _damaged(path, "its header is longer than the file")
        header, data = file.read(length), bytearray(size - 8 - length)
        if len(header) < length or file.readinto(data) < len(data):
            raise _damaged(path, "it became shorter while it was read")
    return prefix + header, data


def parse_tensors(content: bytes, path: Path) -> Tensors:
    """The tensors of a safetensors file's content, in the order of its data.

    Raises:
        ValueError: the content is damaged; `path` says where it came from.
    """
    from safetensors.torch import load

    try:
        tensors: Tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except Exception as error:  # safetensors raises an exception of its own
        raise _damaged(path, error) from error
    return {key: tensors[key] for key in sorted(tensors, key=lambda key: header[key]["data_offsets"])}


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is truncated or damaged ({why}): copy or download it again.")


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
        keys = [plain_key(key, adapter_name) for key in tensors]
        twice = sorted({key for key in keys if keys.count(key) > 1})
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
