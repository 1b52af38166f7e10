"""Where the vectors go: sites, their order, and finding them in a model."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ia3.config import IA3Config, chosen_layers, in_layers
from ia3.errors import NoMatchingPeftModuleError
from ia3.families import FAMILIES, FEEDFORWARD_NAMES, Family, Intervals
from ia3.layers import paths_around, refusal, why_nothing_learns

logger = logging.getLogger("ia3")

VECTORS = "ia3_l"
"""The name under which a module holds its vectors, as in PEFT."""
SAVED_COPIES = "modules_to_save"
"""The name under which a module holds its copies trained in full, as in PEFT."""

Side = Literal["input", "output"]
Names = set[str] | list[str] | str | None


@dataclass(frozen=True)
class Site:
    """One place where a vector multiplies an activation.

    Args:
        path: the module's path in the model.
        side: whether the module's input or its output is multiplied.
        shape: the vector's shape in a file: output `(out, 1)`, input `(1, in)`, convolution `(1, n, 1, …)`.
        intervals: the channels that are trained, as half-open ranges; None for all.
    """

    path: str
    side: Side
    shape: tuple[int, ...]
    intervals: Intervals | None = None

    @property
    def key(self) -> str:
        """The vector's key in a file, without PEFT's prefix."""
        return f"{self.path}.{VECTORS}" if self.path else VECTORS

    @property
    def width(self) -> int:
        """Channels of the activation."""
        return prod(self.shape)

    @property
    def trained_width(self) -> int:
        """Channels that the vector holds."""
        if self.intervals is None:
            return self.width
        return sum(stop - start for start, stop in self.intervals)

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """The shape of the trained parameter."""
        return self.shape if self.intervals is None else (self.trained_width, 1)

    @property
    def whole(self) -> Site:
        """The same place with every channel trained, as files and tables have it."""
        return replace(self, intervals=None)

    def channels(self) -> torch.Tensor:
        """Indices of the trained channels, `[trained_width]`."""
        intervals = self.intervals or ((0, self.width),)
        return torch.cat([torch.arange(start, stop) for start, stop in intervals])

    def widen(self, vector: torch.Tensor) -> torch.Tensor:
        """The trained channels among ones: `trained_shape -> shape`."""
        if self.intervals is None:
            return vector
        full = torch.ones(self.width, dtype=vector.dtype, device=vector.device)
        return full.index_copy(0, self.channels().to(vector.device), vector.reshape(-1)).view(self.shape)

    def narrow(self, vector: torch.Tensor) -> torch.Tensor:
        """The trained channels of a full vector: `shape -> trained_shape`."""
        if self.intervals is None:
            return vector
        return vector.reshape(-1)[self.channels().to(vector.device)].view(self.trained_shape)

    def fits(self, vector: torch.Tensor) -> bool:
        """Whether a full vector is one outside the trained channels, so that `narrow` loses nothing."""
        if self.intervals is None:
            return True
        rest = torch.ones(self.width, dtype=torch.bool)
        rest[self.channels()] = False
        return bool((vector.reshape(-1).cpu()[rest] == 1).all())


@dataclass(frozen=True)
class Layout:
    """The ordered sites of an adapter: an adapter is one vector of `size` numbers."""

    sites: tuple[Site, ...]

    @cached_property
    def widths(self) -> list[int]:
        return [site.trained_width for site in self.sites]

    @property
    def size(self) -> int:
        """D, the adapter's trained numbers."""
        return sum(self.widths)

    def flatten(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One vector a site, of any shape with the site's trained width, to `[D]`.

        Raises:
            ValueError: another number of vectors than sites, or another width.
        """
        widths = [vector.numel() for vector in vectors]
        if widths != self.widths:
            raise ValueError(
                f"The layout has {len(self.widths)} sites of {self.size} numbers; got {len(widths)} vectors "
                f"of {sum(widths)} numbers. Pass one vector a site, in the layout's order."
            )
        return torch.cat([vector.reshape(-1) for vector in vectors])

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[…, D]` to one slice `[…, trained width]` a site; its backward is one concatenation.

        Raises:
            ValueError: the last dimension is not D.
        """
        if flat.shape[-1] != self.size:
            raise ValueError(f"Expected a last dimension of {self.size}, got {tuple(flat.shape)}.")
        return torch.split(flat, self.widths, dim=-1)


@dataclass(frozen=True)
class Found:
    """What `find_sites` found.

    Args:
        layout: the sites, in the order of the model's modules.
        config: the configuration with its defaults filled in; the one passed stays as it is.
        saved: paths of the modules to be trained in full.
        note: how the default differs from PEFT's; empty where it doesn't or no default was used.
    """

    layout: Layout
    config: IA3Config
    saved: tuple[str, ...]
    note: str = ""


def find_sites(model: nn.Module, config: IA3Config, *, loading: bool = False) -> Found:
    """Match a configuration against a model.

    Args:
        model: the base model.
        config: what to adapt; defaults by `model.config.model_type` where it leaves them out.
        loading: the configuration comes with a checkpoint whose keys will be compared with the sites, so a
            name that matches nothing is no error here, and a fused projection is narrowed to its keys and
            values until its vectors say otherwise.

    Raises:
        ValueError: nothing matched, a name or pattern matched nothing, a module of a kind that can't carry a
            vector, an unknown model type without targets.
    """
    family = FAMILIES.get(_model_type(model))
    by_default = config.target_modules is None
    config = _with_defaults(model, config, family)
    modules = dict(_base_modules(model))
    saved = tuple(_find_saved(modules, config.modules_to_save or ()))
    for path in saved:
        if isinstance(modules[path], nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise ValueError(
                f"modules_to_save: {path} is a {type(modules[path]).__name__}, which is never called: name the modules "
                "in it."
            )
    candidates = {p: m for p, m in modules.items() if not any(is_inside(p, s) for s in saved)}

    if config.target_modules == "all-linear":
        config.target_modules = set(_linear_paths(model, candidates))
        if not config.target_modules:
            raise NoMatchingPeftModuleError(
                f"target_modules: {type(model).__name__} has no linear layer for 'all-linear', which leaves out the "
                "output layer: name its modules instead."
            )
    if config.layers_to_transform is not None:
        if not loading:
            _check_layers(model, candidates, config)
        config.target_modules = in_layers(config)
        config.layers_to_transform = config.layers_pattern = None
    excluded = matching(config.exclude_modules, candidates)
    targets = matching(config.target_modules, candidates) - excluded
    if config.feedforward_modules is None:
        known = family.feedforward if family is not None else FEEDFORWARD_NAMES
        config.feedforward_modules = {name for name in known if matching({name}, targets)}
    config.feedforward_modules = _as_peft_takes_it(config.feedforward_modules, config.target_modules)
    feedforward = matching(config.feedforward_modules, targets)
    if not loading:
        # A module that is trained in full may be excluded besides: it gets no vector either way.
        excluded = matching(config.exclude_modules, modules)
        _check_all_matched(model, candidates, config, targets | excluded, excluded, feedforward, saved)
        _check_all_learn(modules, targets)
    if not targets:
        raise NoMatchingPeftModuleError(_nothing_matched(model, candidates, "target_modules", config.target_modules))

    narrow = family.fused if family is not None and (by_default or loading) else {}
    sites = [
        _site(model, path, modules[path], "input" if path in feedforward else "output", narrow)
        for path in modules
        if path in targets
    ]
    note = family.differs if family is not None and by_default else ""
    return Found(Layout(tuple(sites)), config, saved, note)


def _check_layers(model: nn.Module, candidates: dict[str, nn.Module], config: IA3Config) -> None:
    """Refuse a name that matches nothing in any layer, and a layer that has none of the names."""
    assert isinstance(config.target_modules, set)
    for name in sorted(config.target_modules):
        if not matching({name}, candidates):
            raise NoMatchingPeftModuleError(_nothing_matched(model, candidates, "target_modules", name))
    for number in chosen_layers(config):
        if not matching(in_layers(replace(config, layers_to_transform=number)), candidates):
            of = f" of {config.layers_pattern}" if config.layers_pattern else ""
            raise NoMatchingPeftModuleError(
                f"layers_to_transform: layer {number}{of} of {type(model).__name__} has none of the target_modules "
                f"{sorted(config.target_modules)}. A layer's number is the first one in a path, as in "
                f"{next((path for path in candidates if re.search(r'[.][0-9]+[.]', path)), 'no path of this model')!r}."
            )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _with_defaults(model: nn.Module, config: IA3Config, family: Family | None) -> IA3Config:
    config = deepcopy(config)
    if config.target_modules is not None:
        return config
    if family is None:
        kind = _model_type(model) or type(model).__name__
        raise ValueError(
            f"ia3 has no default for {kind!r}: pass target_modules (the modules that make keys, values and "
            f"the feed-forward intermediate) and feedforward_modules. Defaults exist for {sorted(FAMILIES)}."
        )
    config.target_modules = set(family.targets)
    paths = [path for path, _ in _base_modules(model)]
    usual = {name for name in family.exclude if matching({name}, paths)}
    if isinstance(config.exclude_modules, str):
        if not matching(config.exclude_modules, paths):
            modules = dict(_base_modules(model))
            raise ValueError(_nothing_matched(model, modules, "exclude_modules", config.exclude_modules))
        patterns = [config.exclude_modules, *(rf"(.*\.)?{re.escape(name)}" for name in sorted(usual))]
        config.exclude_modules = "|".join(f"({pattern})" for pattern in patterns)
    else:
        config.exclude_modules = {*usual, *(config.exclude_modules or ())} or None
    return config


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules with their paths, leaving out what adapters put there."""
    for path, module in model.named_modules():
        if path and not {VECTORS, SAVED_COPIES} & set(path.split(".")):
            yield path, module


def matches_name(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names, or ends with one after a dot."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def matching(names: Names, paths: Iterable[str]) -> set[str]:
    """The paths that a regular expression matches in full or that end with one of the names."""
    if names is None:
        return set()
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"{names!r} is not a valid regular expression: {error}.") from error
        return {path for path in paths if pattern.fullmatch(path)}
    return {path for path in paths if matches_name(path, names)}


def _find_saved(modules: dict[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    """The outermost modules with one of these names."""
    paths = [path for path in modules if matches_name(path, names)]
    yield from (path for path in paths if not any(is_inside(path, p) for p in paths if p != path))


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer with a transposed weight, recognised without importing transformers."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf")


def _linear_paths(model: nn.Module, candidates: dict[str, nn.Module]) -> Iterator[str]:
    """Every linear layer but the output layer, and those in which no vector could act or learn."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        p: w for p, m in candidates.items() if (w := layer_widths(m)) and (is_conv1d(m) or hasattr(m, "in_features"))
    }
    for path, widths in linear.items():
        module = candidates[path]
        is_head = any(inner is head for inner in module.modules())  # the head, or what holds its copy trained in full
        # What a linear layer is made of, such as a LoRA's matrices, is reached through it.
        is_part = any(around in linear for around in paths_around(path))
        if is_head or is_part:
            continue
        reason = why_nothing_learns(candidates, path) or refusal(module, "output", widths)
        if reason is None:
            yield path
        else:
            logger.warning("all-linear leaves out %s: it %s.", path, reason)


def _as_peft_takes_it(feedforward: Names, targets: Names) -> Names:
    """PEFT demands that listed feed-forward names be among listed target names; a pattern is free of that."""
    if not isinstance(feedforward, set) or not isinstance(targets, set) or feedforward <= targets:
        return feedforward
    return rf"(.*\.)?({'|'.join(re.escape(name) for name in sorted(feedforward))})"


def _check_all_matched(
    model: nn.Module,
    candidates: dict[str, nn.Module],
    config: IA3Config,
    targets: set[str],
    excluded: set[str],
    feedforward: set[str],
    saved: tuple[str, ...],
) -> None:
    for field, names, matched in (
        ("target_modules", config.target_modules, targets),
        ("exclude_modules", config.exclude_modules, excluded),
        ("feedforward_modules", config.feedforward_modules, feedforward),
        ("modules_to_save", set(config.modules_to_save or ()), saved),
    ):
        for name in [names] if isinstance(names, str) else sorted(names or ()):
            if not matching(names if isinstance(names, str) else {name}, matched):
                raise NoMatchingPeftModuleError(_nothing_matched(model, candidates, field, name))


def _check_all_learn(modules: dict[str, nn.Module], targets: set[str]) -> None:
    """Refuse sites where no gradient comes back."""
    for path in sorted(targets):
        reason = why_nothing_learns(modules, path)
        if reason is not None:
            raise ValueError(f"{path} {reason}.")


def _nothing_matched(model: nn.Module, candidates: dict[str, nn.Module], field: str, names: Names) -> str:
    ends = sorted({path.rsplit(".", 1)[-1] for path, module in candidates.items() if layer_widths(module)})
    wanted = names if isinstance(names, str) else " ".join(sorted(names or ()))
    near = difflib.get_close_matches(wanted, ends, n=3)
    hint = f"Did you mean {near}? " if near else ""
    first = _first_path(model, names)
    hint = f"{first[0]} is the same module as {first[1]}: name it {first[1]!r}. " if first else hint
    shown = ends if len(ends) <= 30 else [*ends[:30], "…"]
    return (
        f"{field}: {names!r} matches no module of {type(model).__name__}. {hint}A name matches a module's "
        f"whole path or its end after a dot, a regular expression the whole path. Its layers end with {shown}."
    )


def _first_path(model: nn.Module, names: Names) -> tuple[str, str] | None:
    """Of a module that has several paths, one that the names match and the first, by which it is known."""
    first = {module: path for path, module in _base_modules(model)}
    for path, module in model.named_modules(remove_duplicate=False):
        if first.get(module, path) != path and matching(names, [path]):
            return path, first[module]
    return None


def layer_widths(module: Any) -> tuple[int | None, int] | None:
    """Input and output channels of a layer; None for the input of an embedding, or for other modules."""
    # The latter is the last projection of torch's MultiheadAttention, which reads its weight and never calls it.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, module.embedding_dim
    if is_conv1d(module):
        return module.weight.shape[0], module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return None


def _site(
    model: nn.Module,
    path: str,
    module: nn.Module,
    side: Side,
    fused: dict[str, Callable[..., Intervals | None]],
) -> Site:
    widths = layer_widths(module)
    if widths is None:
        raise ValueError(
            f"{path} is a {type(module).__name__}, which can't carry a vector: expected a linear, convolution "
            "or embedding layer. Name such layers in target_modules, or leave this one to exclude_modules."
        )
    width = widths[0] if side == "input" else widths[1]
    if width is None:
        raise ValueError(
            f"{path} is an embedding: its input are token numbers, which no vector can multiply. Remove it "
            "from feedforward_modules."
        )
    refused = refusal(module, side, widths)
    if refused is not None:
        raise ValueError(f"{path} {refused}.")
    if isinstance(module, _ConvNd):
        return Site(path, side, (1, width) + (1,) * len(module.kernel_size))
    if side == "input":
        return Site(path, side, (1, width))
    split = next((split for name, split in fused.items() if matches_name(path, [name])), None)
    return Site(path, side, (width, 1), split(model.config, width) if split else None)
