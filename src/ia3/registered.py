"""What an adapter's folder holds for a table: read once, and checked against a model as loading it checks it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ia3.checkpoint import check_tensors, embeddings, is_adapters, with_names_of_today
from ia3.config import CONFIG_NAME, IA3Config, TaskType
from ia3.documents import LIMIT, parse_json
from ia3.errors import listed, naming
from ia3.files import read_file
from ia3.heads import with_head
from ia3.layers import is_inside
from ia3.loading import fit_config, warn_of_other_base
from ia3.sites import Layout, Site, find_sites, matches_name
from ia3.tensors import PICKLE_NAME, SAFETENSORS_NAME, check_finite, plain_tensors
from ia3.weights import Content, Limits, Tensors, limits_of, read_content, read_pickle

# The tasks whose heads, trained in full, an adapter may bring.
_WITH_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)

Heads = Mapping[str, Mapping[str, Tensor]]
"""Modules trained in full: by path their tensors by name."""


@dataclass(frozen=True)
class Form:
    """What one configuration and one header say of a file.

    Args:
        sites: whole ones, in the order of its data.
        places: where its other tensors are, by plain key: the module's path and the name there.
        keys: of all its tensors, in the order of its data; those of sites are their keys.
        classes: how many its head chooses from; None where it has vectors alone.
        plain: all of it is fp32.
        size: the bytes of its data.
    """

    sites: tuple[Site, ...]
    places: Mapping[str, tuple[str, str]]
    keys: tuple[str, ...]
    classes: int | None
    plain: bool
    size: int

    @property
    def heads(self) -> tuple[str, ...]:
        """The paths of the modules that it holds in full."""
        return tuple(dict.fromkeys(path for path, _ in self.places.values()))


@dataclass(frozen=True)
class Saved:
    """An adapter's files, read once and not yet compared with a model.

    Args:
        folder: where they are.
        text: the configuration's.
        content: the tensors' file.
        limits: what that may hold.
        about: what tells this configuration with this header from others.
        digest: what tells the whole content.
    """

    folder: Path
    text: bytes
    content: Content
    limits: Limits
    about: bytes
    digest: str


def form_of(model: nn.Module, saved: Saved) -> Form:
    """Check a file against its configuration and the model as loading an adapter does, all but the numbers."""
    with naming(saved.folder):
        config = _config_of(saved.text, saved.folder / CONFIG_NAME)
        tensors = saved.content.tensors(saved.limits.tensors)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        tensors = plain_tensors(with_names_of_today(model, tensors))
        fit_config(model, config, tensors, "default", trainable=False)
        with_head(model, config)
        _refuse_all_but_heads(model, config, tensors, saved.folder)
        warn_of_other_base(model, config)
        found = find_sites(model, config, loading=True)
        # A file has every channel, also of a fused projection.
        sites = {site.key: site.whole for site in found.layout.sites}
        places = {f"{path}.{name}": (path, name) for path in found.saved for name in _tensors_at(model, path)}
        classes = _classes(model, tensors, places) if places else None
        check_tensors(model, tensors, sites, _whole(model, tensors, places, classes))
    own = tuple(sites[key] for key in tensors if key in sites)
    return Form(own, places, tuple(tensors), classes, dtypes == {torch.float32}, len(saved.content.data))


def _refuse_all_but_heads(model: nn.Module, config: IA3Config, tensors: Tensors, path: Path) -> None:
    """Refuse modules trained in full that are no head, which a batch can't hold once an example."""
    words = [place for place, _ in embeddings(model)]
    held = [f"{place}.weight" for place in words if f"{place}.weight" in tensors]
    if config.task_type not in _WITH_HEAD:
        held = sorted(config.modules_to_save or held)
    elif config.modules_to_save:
        names = frozenset(config.modules_to_save)
        whole = [place for place, _ in model.named_modules() if matches_name(place, names)]
        held += [place for place in whole if any(part.isdigit() for part in place.split("."))]
        held += [place for place in whole if any(is_inside(word, place) for word in words)]
    if held:
        raise holds_modules(path, held)


def holds_modules(path: Path, held: Iterable[str]) -> ValueError:
    """The error for modules trained in full where vectors alone are taken."""
    return ValueError(
        f"The adapter in {path} holds modules in full ({listed(sorted({*held}))}), not vectors alone: attach "
        "it as an ordinary adapter, with PeftModel.from_pretrained or load_adapter."
    )


def _tensors_at(model: nn.Module, path: str) -> Tensors:
    """The base's tensors of a module, in the order in which a stack of such modules has them."""
    return {name: each for name, each in model.get_submodule(path).state_dict().items() if not is_adapters(name)}


def _classes(model: Any, tensors: Tensors, places: Mapping[str, tuple[str, str]]) -> int:
    """How many classes a file's head has: the tensors of the base's number of classes may have another, all the same.

    Raises:
        ValueError: they don't agree.
    """
    own: int = model.config.num_labels
    counts: dict[str, set[int]] = {}
    for key, (path, name) in places.items():
        shape = _tensors_at(model, path)[name].shape
        if key in tensors and shape[:1] == (own,) and tensors[key].shape[1:] == shape[1:] and tensors[key].dim():
            counts.setdefault(key.rpartition(".")[0], set()).add(len(tensors[key]))
    others = {count for each in counts.values() if each != {own} for count in each}
    if len(others) > 1:
        raise ValueError(f"The parts of its head are for {listed(sorted(others))} classes: expected one number.")
    return others.pop() if others else own


def _whole(model: Any, tensors: Tensors, places: Mapping[str, tuple[str, str]], classes: int | None) -> Tensors:
    """Tensors without memory, of the shapes that a file's head with so many classes may have."""
    found: Tensors = {}
    for key, (path, name) in places.items():
        like = _tensors_at(model, path)[name]
        of_classes = key in tensors and classes is not None and tensors[key].shape == (classes, *like.shape[1:])
        is_head = like.shape[:1] == (model.config.num_labels,) and of_classes
        found[key] = torch.empty(tensors[key].shape if is_head else like.shape, dtype=like.dtype, device="meta")
    return found


def read_folder(model: nn.Module, folder: Path) -> Saved:
    """Read an adapter's files, none of which may be larger than the model could fill."""
    try:
        text = read_file(folder / CONFIG_NAME, LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        where = f"No {CONFIG_NAME} in {folder}" if folder.is_dir() else f"{folder} is no folder"
        inside = sorted(folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" It holds {len(inside):,}, such as {inside[0].parent}: register these." if inside else ""
        raise FileNotFoundError(f"{where}: expected an adapter saved by `save_pretrained`.{hint}") from error
    limits = limits_of(model)
    try:
        content = read_content(folder / SAFETENSORS_NAME, limits.bytes)
    except FileNotFoundError as error:
        if not (folder / PICKLE_NAME).is_file():
            raise FileNotFoundError(f"No {SAFETENSORS_NAME} or {PICKLE_NAME} in {folder}.") from error
        content = read_pickle(folder / PICKLE_NAME, limits)
    hashed = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    hashed.update(content.header)
    about = hashed.digest()
    hashed.update(content.data)
    return Saved(folder, text, content, limits, about, hashed.hexdigest())


def _config_of(text: bytes, path: Path) -> IA3Config:
    config = IA3Config.from_dict(parse_json(text, path), source=str(path))
    assert isinstance(config, IA3Config)
    return config


def numbers_of(model: nn.Module, form: Form, saved: Saved) -> tuple[Tensor, Heads]:
    """A file's vectors in fp32, `[D]`, and its heads, all finite; plain vectors alone are the very bytes read."""
    tensors: Tensors = {}
    if form.plain and not form.places:
        numbers = torch.frombuffer(saved.content.data, dtype=torch.float32)
    else:
        tensors = dict(zip(form.keys, saved.content.tensors(saved.limits.tensors).values(), strict=True))
        numbers = torch.cat([tensor.reshape(-1).float() for key, tensor in tensors.items() if key not in form.places])
    heads: dict[str, dict[str, Tensor]] = {path: {} for path in form.heads}
    for key, (path, name) in form.places.items():
        heads[path][name] = _in_full(model.get_submodule(path).state_dict()[name], tensors[key])
    least, most = numbers.aminmax()
    if not torch.isfinite(most - least):
        vectors = Layout(form.sites).split(numbers)
        with naming(saved.folder):
            check_finite({site.key: vector for site, vector in zip(form.sites, vectors, strict=True)})
    with naming(saved.folder):
        check_finite({key: heads[path][name] for key, (path, name) in form.places.items()})
    return numbers, heads


def _in_full(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor trained in full in the precision of an attached copy: that of its module, but half ones in fp32."""
    half = like.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(torch.float32 if half else like.dtype)
