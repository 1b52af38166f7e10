"""PEFT's files: an adapter's tensors to a dictionary, to disk, and back, everything checked first."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import DataParallel
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parallel import DistributedDataParallel

from ia3.adapter import device_at, keep_every_channel, saved_copies, site_vectors, vectors
from ia3.config import IA3Config
from ia3.files import fetch, write_atomically
from ia3.sites import SAVED_COPIES, VECTORS, Site, logger, matches_name
from ia3.state import Adapter, attached, find_attached, get_adapter
from ia3.swap import Swapped

PREFIX = "base_model.model."
"""What PEFT puts before each module path."""
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

Tensors = dict[str, torch.Tensor]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> Tensors:
    """An adapter's tensors under PEFT's names, without the adapter's own name.

    Args:
        model: a model that carries the adapter.
        state_dict: take the values from this dictionary of the model's own names instead of the model, as
            distributed training gathers it.
        adapter_name: which adapter.
        unwrap_compiled: accepted for PEFT's sake: what `torch.compile`, DDP, DataParallel and FSDP put around the
            model is always taken off.
        save_embedding_layers: whether to add the embeddings; "auto" adds them where the vocabulary was
            resized since the base was loaded from disk.

    Returns:
        Vectors of the shapes in `Site.shape` and the modules trained in full, on their devices; the keys begin
        with `base_model.model.` where the model is a `PeftModel`.

    Raises:
        ValueError: no such adapter, or a `state_dict` without its tensors.
    """
    whole, model = model, unwrapped(model)
    adapter = get_adapter(model, adapter_name)
    if state_dict is None and any(_is_fsdp(module) for module in whole.modules()):
        state_dict = whole.state_dict()  # FSDP's own way to the tensors that it holds in one flat piece
    held = own_keys(model, adapter)
    own = tensors_of(model, adapter) if state_dict is None else state_dict
    lacking = [key for key in held if key not in own]
    if lacking:
        raise ValueError(
            f"state_dict lacks {len(lacking)} of the adapter's tensors (such as {lacking[0]}): pass the model's own "
            "state_dict(), or leave it out."
        )
    tensors = {_plain_key(key, adapter_name): _gathered(own[key].detach()) for key in held}
    tensors |= {site.key: site.widen(tensors[site.key]) for site in adapter.layout.sites}
    if save_embedding_layers is True or (save_embedding_layers == "auto" and _was_resized(model)):
        for path, embedding in embeddings(model):
            tensors.setdefault(f"{path}.weight", _gathered(embedding.weight.detach()))
    prefix = PREFIX if isinstance(model, Swapped) else ""
    return {prefix + key: tensor for key, tensor in tensors.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile`, DDP, DataParallel and FSDP put around it."""
    while find_attached(model) is None:
        inner = model.__dict__.get("_orig_mod") or model._modules.get("_orig_mod")
        inner = inner or model._modules.get("_fsdp_wrapped_module")
        if inner is None and isinstance(model, DataParallel | DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
    return model


def _is_fsdp(module: nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules


def own_keys(model: nn.Module, adapter: Adapter) -> list[str]:
    """The names in the model's own `state_dict()` of what the adapter trains."""
    keys = [f"{site.key}.{adapter.name}" for site in adapter.layout.sites]
    return keys + [key.replace("_fsdp_wrapped_module.", "") for key in _own_copies(model, adapter)]


def get_base_model_state_dict(model: nn.Module) -> Tensors:
    """The base model's tensors under its own names, without any adapter's.

    What `merge_adapter` folded into the weights is in them.
    """
    return {key: tensor for key, tensor in unwrapped(model).state_dict().items() if not is_adapters(key)}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Load tensors into the base model and leave the adapters as they are.

    Args:
        model: a model that carries adapters.
        state_dict: under the base's own names, as `get_base_model_state_dict` gives them.
        strict: refuse missing and unknown names.

    Returns:
        The missing and the unknown names.

    Raises:
        RuntimeError: these, where `strict`, or another shape.
        ValueError: adapters are merged into the weights, which unmerging would put in the place of the new ones.
    """
    model = unwrapped(model)
    if attached(model).merged:
        raise ValueError(f"{list(attached(model).merged)} are merged into the weights: unmerge_adapter() first.")
    known = get_base_model_state_dict(model)
    missing = [key for key in known if key not in state_dict]
    unknown = [key for key in state_dict if key not in known]
    if strict and (missing or unknown):
        raise RuntimeError(
            f"The tensors don't fit the base {type(model).__name__}: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}. strict=False loads the others."
        )
    model.load_state_dict({key: value for key, value in state_dict.items() if key in known}, strict=False)
    return _IncompatibleKeys(missing, unknown)


def is_adapters(key: str) -> bool:
    """Whether a name in a model's `state_dict()` is an adapter's."""
    return f".{VECTORS}." in f".{key}" or f".{SAVED_COPIES}." in f".{key}"


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Load an adapter's tensors, all or nothing.

    Args:
        model: a model that carries the adapter.
        peft_model_state_dict: names as `get_peft_model_state_dict` gives them, with or without the prefix.
        adapter_name: the adapter that takes the values.
        ignore_mismatched_sizes: leave out tensors of another shape, saying which, instead of refusing.
        low_cpu_mem_usage: accepted for PEFT's sake; vectors without memory are filled either way.

    Returns:
        Two empty lists: a missing or unknown key is an error.

    Raises:
        ValueError: unknown, missing or repeated keys, another shape or side, numbers that are not finite, a
            merged adapter. Nothing has changed then.
    """
    model = unwrapped(model)
    adapter = get_adapter(model, adapter_name)
    if adapter_name in attached(model).merged:
        raise ValueError(f"{adapter_name!r} is merged, so new values wouldn't act: call unmerge_adapter() first.")
    tensors = plain_tensors(peft_model_state_dict, adapter_name)
    sites = {site.key: site for site in adapter.layout.sites}
    targets = _plain_targets(model, adapter, tensors)
    _check_keys(model, tensors, sites, targets)
    mismatched = _mismatches(model, tensors, sites, targets)
    if mismatched and not ignore_mismatched_sizes:
        raise _doesnt_fit(mismatched)
    for problem in mismatched.values():
        logger.warning("Left out: %s", problem)
    held = dict(zip(sites, vectors(model, adapter), strict=True)) | targets
    check_finite({key: tensor.to(held[key].dtype) for key, tensor in tensors.items()})

    fitting = {key: tensor for key, tensor in tensors.items() if key not in mismatched}
    if any(not sites[key].fits(tensor) for key, tensor in fitting.items() if key in sites):
        keep_every_channel(model, adapter)
    with torch.no_grad():
        for site, vector in site_vectors(model, adapter):
            if site.key in fitting:
                _fill(model, site, adapter.name, vector, site.narrow(fitting[site.key]))
        for key, target in targets.items():
            if key not in fitting:
                continue
            if target.is_meta:
                _give_memory(model, adapter, key, fitting[key])
            else:
                target.copy_(_like(target, fitting[key]))
    return _IncompatibleKeys([], [])


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


def plain_tensors(tensors: Mapping[str, torch.Tensor], adapter_name: str = "default") -> Tensors:
    """Tensors under the names of their sites and modules, without PEFT's prefix and the adapter's name.

    Raises:
        ValueError: one comes with and without the prefix.
    """
    plain = {_plain_key(key, adapter_name): tensor for key, tensor in tensors.items()}
    if len(plain) < len(tensors):
        keys = [_plain_key(key, adapter_name) for key in tensors]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"{len(twice)} tensors come twice, with and without a prefix (such as {twice[0]}).")
    return plain


def check_vectors(model: nn.Module, tensors: Tensors, sites: Mapping[str, Site]) -> None:
    """Refuse tensors that are not these sites' vectors alone, as `set_peft_model_state_dict` does.

    Args:
        model: the base, which the errors name.
        tensors: by plain name, see `plain_tensors`.
        sites: by key.

    Raises:
        ValueError: unknown or missing keys, another shape or side.
    """
    _check_keys(model, tensors, sites, {})
    mismatched = _mismatches(model, tensors, sites, {})
    if mismatched:
        raise _doesnt_fit(mismatched)


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


def own_tensors(model: nn.Module, adapters: Iterable[Adapter]) -> Tensors:
    """What the adapters train, under the model's own names, as `load_state_dict` takes it."""
    tensors: Tensors = {}
    for adapter in adapters:
        own = tensors_of(model, adapter)
        tensors.update({key: _gathered(tensor).cpu().contiguous() for key, tensor in own.items()})
    return tensors


def tensors_of(model: nn.Module, adapter: Adapter) -> Tensors:
    """What the adapter trains, as it is held, under the model's own names."""
    vectors = {f"{site.key}.{adapter.name}": vector.detach() for site, vector in site_vectors(model, adapter)}
    return vectors | _own_copies(model, adapter)


def _own_copies(model: nn.Module, adapter: Adapter) -> Tensors:
    return {
        f"{path}.{SAVED_COPIES}.{adapter.name}.{name}": tensor
        for path, copy in saved_copies(model, adapter)
        for name, tensor in copy.state_dict().items()
    }


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in full; every process must take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _pickled(tensors: Tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def embeddings(model: nn.Module) -> list[tuple[str, Any]]:
    """The input and output embeddings with their paths, those of the base where an adapter trains them in full."""
    wanted = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # a model without words
            wanted.append(getattr(model, getter)())
    found = [path for path, module in model.named_modules() if any(module is w for w in wanted)]
    return [(own, model.get_submodule(own)) for own in (path.partition(f".{SAVED_COPIES}.")[0] for path in found)]


def _was_resized(model: nn.Module) -> bool:
    """Whether the vocabulary differs from the base's on disk, as far as can be told without the network."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size is not None and saved_vocabulary(model) not in (None, size)


def saved_vocabulary(model: nn.Module) -> int | None:
    """The size of the vocabulary of the base on disk; None where it can't be told without the network."""
    from huggingface_hub import try_to_load_from_cache

    name = getattr(model, "name_or_path", None)
    if not name:
        return None
    path: Any = Path(name) / "config.json"
    if not path.is_file():
        try:
            path = try_to_load_from_cache(name, "config.json")
        except ValueError:  # not a repository's name
            return None
    if not isinstance(path, str | Path):
        return None
    size: int | None = json.loads(Path(path).read_text(encoding="utf-8")).get("vocab_size")
    return size


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


def with_names_of_today(model: nn.Module, tensors: Tensors) -> Tensors:
    """Tensors of modules that the model hasn't, under the names that transformers says they have now."""
    tensors = renamed(tensors, getattr(model, "_checkpoint_conversion_mapping", None))
    modules = {path for path, _ in model.named_modules()}
    lost = [key for key in tensors if key.removeprefix(PREFIX).rpartition(".")[0] not in modules]
    if not lost or not hasattr(model, "base_model_prefix"):
        return tensors
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    new = dict(tensors)
    for key in lost:
        path, _, last = key.removeprefix(PREFIX).rpartition(".")
        name = "weight" if last == VECTORS else last  # the rules are made for weights
        path = rename_source_key(f"{path}.{name}", known, [])[0].rpartition(".")[0]
        if path in modules:
            new[f"{PREFIX}{path}.{last}"] = new.pop(key)
    return new


def _plain_key(key: str, adapter_name: str) -> str:
    """A key without PEFT's prefix and without the adapter's name."""
    plain = key.removeprefix(PREFIX)
    if plain.endswith(f".{VECTORS}.{adapter_name}"):
        return plain.removesuffix(f".{adapter_name}")
    return plain.replace(f".{SAVED_COPIES}.{adapter_name}.", ".")


def _plain_targets(model: nn.Module, adapter: Adapter, tensors: Tensors) -> Tensors:
    """What the keys other than vectors may fill: modules trained in full, and embeddings saved as they are."""
    targets = {_plain_key(key, adapter.name): tensor for key, tensor in _own_copies(model, adapter).items()}
    for path, embedding in embeddings(model):
        if f"{path}.weight" in tensors and f"{path}.weight" not in targets:
            targets[f"{path}.weight"] = embedding.weight.data
    return targets


def _check_keys(model: nn.Module, tensors: Tensors, sites: Mapping[str, Site], targets: Mapping[str, Any]) -> None:
    expected = [*sites, *targets]
    unknown = [key for key in tensors if key not in sites and key not in targets]
    missing = [key for key in expected if key not in tensors]
    if not unknown and not missing:
        return
    parts = []
    for title, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            parts.append(f"{len(keys)} {title} (such as {', '.join(keys[:2])})")
    raise ValueError(
        f"This adapter's {len(tensors)} tensors don't fit {type(model).__name__}, which expects "
        f"{len(expected)}: {'; '.join(parts)}. Was it made for another base model or another configuration?"
    )


def _mismatches(model: nn.Module, tensors: Tensors, sites: Mapping[str, Site], targets: Tensors) -> dict[str, str]:
    """What is wrong with the tensors' shapes, by key."""
    words = frozenset(path for path, _ in embeddings(model)) if targets else frozenset()
    problems = {key: _mismatch(key, tensor, sites.get(key), targets.get(key), words) for key, tensor in tensors.items()}
    return {key: problem for key, problem in problems.items() if problem}


def _doesnt_fit(mismatched: Mapping[str, str]) -> ValueError:
    return ValueError("This adapter doesn't fit the model: " + " ".join(list(mismatched.values())[:3]))


def _why_other_size(key: str, in_file: tuple[int, ...], in_model: tuple[int, ...], words: frozenset[str]) -> str:
    """What to do about a module trained in full, or an embedding, of another size."""
    if key.rpartition(".")[0] in words:
        return " If the vocabulary was resized, call model.resize_token_embeddings first."
    if len(in_file) == len(in_model) and in_file[1:] == in_model[1:]:
        return (
            f" The adapter was trained for {in_file[0]} classes and this model has {in_model[0]}: load the base with "
            f"num_labels={in_file[0]}, or let AutoPeftModelFor….from_pretrained do so."
        )
    return " It was made for another base model."


def _mismatch(
    key: str, tensor: torch.Tensor, site: Site | None, target: torch.Tensor | None, words: frozenset[str]
) -> str:
    """What is wrong with a tensor's shape; empty where nothing is."""
    expected = site.shape if site is not None else tuple(target.shape) if target is not None else ()
    if tuple(tensor.shape) == expected:
        return ""
    text = f"{key} has the shape {tuple(tensor.shape)} in the file and {expected} in the model."
    if site is not None and len(site.shape) == 2 and tensor.dim() == 2:
        in_file = "input" if tensor.shape[0] == 1 else "output"
        if in_file != site.side:
            return text + (
                f" The file's vector multiplies the module's {in_file}, the configuration's its {site.side}: "
                "check feedforward_modules."
            )
    if site is None:
        return text + _why_other_size(key, tuple(tensor.shape), expected, words)
    return text + " It was made for another base model."


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


def _fill(model: nn.Module, site: Site, name: str, vector: nn.Parameter, value: torch.Tensor) -> None:
    """Copy a value into a vector; one without memory gets it where the vectors of its module belong."""
    if vector.is_meta:
        device = device_at(model, site)
        device = value.device if device.type == "meta" else device  # nor has the base
        filled = nn.Parameter(value.to(device, vector.dtype), requires_grad=vector.requires_grad)
        setattr(attached(model).placement.container(site.path), name, filled)
    else:
        vector.copy_(_like(vector, value))


def _give_memory(model: nn.Module, adapter: Adapter, key: str, value: torch.Tensor) -> None:
    """Put a value in the place of a copy's tensor that has no memory, since the base has none either.

    Raises:
        ValueError: it is of the base's own embeddings.
    """
    for path, copy in saved_copies(model, adapter):
        if key.startswith(f"{path}."):
            owner_path, _, name = key.removeprefix(f"{path}.").rpartition(".")
            owner = copy.get_submodule(owner_path)
            if name in owner._parameters:
                former: Any = owner._parameters[name]
                filled = nn.Parameter(value.to(former.dtype), requires_grad=former.requires_grad)
                owner._parameters[name] = filled
            else:
                owner._buffers[name] = value
            return
    raise ValueError(
        f"The adapter's file holds {key}, and the base has no memory for it: load the base's weights first."
    )


def _like(vector: Any, value: torch.Tensor) -> torch.Tensor:
    """The value, sharded as the vector is."""
    if not hasattr(vector, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(vector.device), vector.device_mesh, vector.placements)
