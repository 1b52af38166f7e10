"""PEFT's files: an adapter's tensors to a dictionary, to disk, and back, everything checked first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import DataParallel
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parallel import DistributedDataParallel

from ia3.adapter import device_at, keep_every_channel, saved_copies, site_vectors, vectors
from ia3.documents import read_json
from ia3.sites import SAVED_COPIES, VECTORS, Site, is_at_input, logger
from ia3.state import Adapter, attached, find_attached, get_adapter
from ia3.swap import Swapped
from ia3.tensors import PREFIX, check_finite, plain_key, plain_tensors, renamed
from ia3.weights import Tensors, shorten_text, why_not_plain


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
    tensors = {plain_key(key, adapter_name): _gathered(own[key].detach()) for key in held}
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
        former = [(t, t.clone()) for t in (*tensors_of(model, adapter).values(), *targets.values()) if not t.is_meta]
        try:
            _fill_all(model, adapter, fitting, targets)
        except BaseException:  # all numbers are as before, whatever came
            for tensor, before in former:
                tensor.copy_(before)
            raise
    return _IncompatibleKeys([], [])


def _fill_all(model: nn.Module, adapter: Adapter, fitting: Tensors, targets: Tensors) -> None:
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


def check_tensors(model: nn.Module, tensors: Tensors, sites: Mapping[str, Site], whole: Tensors) -> None:
    """Refuse tensors other than these sites' vectors and these of modules, as `set_peft_model_state_dict` does.

    Args:
        model: the base, which the errors name.
        tensors: by plain name, see `plain_tensors`.
        sites: by key.
        whole: by plain name, tensors of the shapes and types that those trained in full have, as on the device "meta".

    Raises:
        ValueError: unknown or missing keys, another shape or side.
    """
    _check_keys(model, tensors, sites, whole)
    mismatched = _mismatches(model, tensors, sites, whole)
    if mismatched:
        raise _doesnt_fit(mismatched)


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
    size = read_json(path, finite=False).get("vocab_size")
    return size if isinstance(size, int) else None


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


def _plain_targets(model: nn.Module, adapter: Adapter, tensors: Tensors) -> Tensors:
    """What the keys other than vectors may fill: modules trained in full, and embeddings saved as they are."""
    targets = {plain_key(key, adapter.name): tensor for key, tensor in _own_copies(model, adapter).items()}
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
            parts.append(f"{len(keys)} {title} (such as {', '.join(map(shorten_text, keys[:2]))})")
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
    if reason := why_not_plain(tensor, is_vector=site is not None):
        return f"{key} {reason}."
    if target is not None and _kind(tensor) != _kind(target):
        return f"{key} is of {tensor.dtype} in the file and of {target.dtype} in the model."
    if tuple(tensor.shape) == expected:
        return ""
    text = f"{key} has the shape {tuple(tensor.shape)} in the file and {expected} in the model."
    if site is not None and len(site.shape) == 2 and tensor.dim() == 2:
        in_file = "input" if is_at_input(tensor) else "output"
        if in_file != site.side:
            return text + (
                f" The file's vector multiplies the module's {in_file}, the configuration's its {site.side}: "
                "check feedforward_modules."
            )
    if site is None:
        return text + _why_other_size(key, tuple(tensor.shape), expected, words)
    return text + " It was made for another base model."


def _kind(tensor: torch.Tensor) -> tuple[bool, bool, bool]:
    """What copying may not change: numbers with a fraction, complex ones, truth."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


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
