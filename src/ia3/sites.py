"""Where the vectors go: sites, their order, and finding them in a model."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ia3.config import IA3Config, chosen_layers, in_layers
from ia3.errors import NoMatchingPeftModuleError, shorten
from ia3.experts import Experts, acts_in_front, find_experts, name_modules, unsupported_reason
from ia3.layers import is_conv1d, is_inside, paths_around, refusal, why_nothing_learns
from ia3.patterns import fully_matching
from ia3.peft_defaults import difference, gate_side
from ia3.structure import Block, Intervals, find_blocks, layer_widths

logger = logging.getLogger("ia3")

VECTORS = "ia3_l"
"""The name under which a module holds its vectors, as in PEFT."""
SAVED_COPIES = "modules_to_save"
"""The name under which a module holds its copies trained in full, as in PEFT."""
# More names than these say less than one pattern.
_MOST_NAMES = 5
# Names that mean the second matrix of a feed-forward in a model whose blocks are unknown.
SECOND_MATRICES = frozenset({"wo", "fc2", "down_proj", "fc_out", "mlp.c_proj", "dense_4h_to_h", "output.dense", "lin2"})

Side = Literal["input", "output"]
Names = set[str] | list[str] | str | None


@dataclass(frozen=True)
class Site:
    """One place where a vector multiplies an activation.

    Args:
        path: the module's path in the model.
        side: whether the module's input or its output is multiplied.
        shape: the vector's shape in a file: output `(out, 1)`, input `(1, in)`, convolution `(1, n, 1, …)`, the
            input of the second matrices of experts in one module `(experts, width)`.
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
        return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in intervals])

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
        rest = torch.ones(self.width, dtype=torch.bool, device="cpu")
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
        config: what to adapt; what it leaves out is found by the model's structure.
        loading: the configuration comes with a checkpoint whose keys will be compared with the sites, so a
            name that matches nothing is no error here, and a fused projection is narrowed to its keys and
            values until its vectors say otherwise.

    Raises:
        ValueError: nothing matched, a name or pattern matched nothing, a module of a kind that can't carry a
            vector, a default for a model whose keys, values or feed-forwards can't be told or reached.
    """
    by_default = config.target_modules is None
    modules = dict(_base_modules(model))
    is_asked = by_default or loading or config.feedforward_modules is None  # else the configuration says all
    blocks = find_blocks(model, config.towers if by_default else ("all",)) if is_asked else []
    config = _with_defaults(model, config, blocks, modules)
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
        left_out = [path for path, module in candidates.items() if find_experts(module) is not None]
        if left_out and not loading:
            logger.warning(
                "'all-linear' means modules: the experts of %s and %d more like it are parameters and get no vector. "
                "Name them in target_modules, beside the linear layers, where they should.",
                left_out[0],
                len(left_out) - 1,
            )
        if not config.target_modules:
            raise NoMatchingPeftModuleError(
                f"target_modules: {type(model).__name__} has no linear layer for 'all-linear', which leaves out the "
                "output layer: name its modules instead."
            )
    elif not loading:  # a file names modules
        config = name_modules(config, candidates, matching)
    if config.layers_to_transform is not None:
        if not loading:
            _check_layers(model, candidates, config)
        config.target_modules = in_layers(config)
        config.layers_to_transform = config.layers_pattern = None
    excluded = matching(config.exclude_modules, candidates, "exclude_modules")
    targets = matching(config.target_modules, candidates) - excluded
    if config.feedforward_modules is None:
        config.feedforward_modules = _second_matrices(blocks, targets, modules)
    config.feedforward_modules = _as_peft_takes_it(config.feedforward_modules, config.target_modules)
    feedforward = matching(config.feedforward_modules, targets, "feedforward_modules")
    if not loading:
        # A module that is trained in full may be excluded besides: it gets no vector either way.
        excluded = matching(config.exclude_modules, modules, "exclude_modules")
        _check_all_matched(model, candidates, config, targets | excluded, excluded, feedforward, saved)
        _check_all_learn(modules, targets)
    if not targets:
        raise NoMatchingPeftModuleError(_nothing_matched(model, candidates, "target_modules", config.target_modules))

    fused = {made.path: made.channels for block in blocks for made in block.keys_values}
    narrow = fused if by_default or loading else {}
    sites = [
        _site(path, modules[path], "input" if path in feedforward else "output", narrow.get(path))
        for path in modules
        if path in targets
    ]
    narrowed = [site.path for site in sites if site.intervals]
    note = difference(_model_type(model), [site.path for site in sites], narrowed, modules) if by_default else ""
    return Found(Layout(tuple(sites)), config, saved, note)


def _check_layers(model: nn.Module, candidates: dict[str, nn.Module], config: IA3Config) -> None:
    """Refuse a name that matches nothing in any layer, and a layer that has none of the names."""
    names = config.target_modules
    for name in sorted(names) if isinstance(names, set) else ():  # a default's pattern matches by itself
        if not matching({name}, candidates):
            raise NoMatchingPeftModuleError(_nothing_matched(model, candidates, "target_modules", name))
    for number in chosen_layers(config):
        one = deepcopy(config)
        one.layers_to_transform = number
        if not matching(in_layers(one), candidates):
            of = f" of {config.layers_pattern}" if config.layers_pattern else ""
            raise NoMatchingPeftModuleError(
                f"layers_to_transform: layer {number}{of} of {type(model).__name__} has none of the target_modules "
                f"{names if isinstance(names, str) else sorted(names or ())}. A layer's number is the first one in a "
                "path, as in "
                f"{next((path for path in candidates if re.search(r'[.][0-9]+[.]', path)), 'no path of this model')!r}."
            )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _with_defaults(
    model: nn.Module, config: IA3Config, blocks: Sequence[Block], modules: dict[str, nn.Module]
) -> IA3Config:
    config = deepcopy(config)
    if config.target_modules is not None:
        return config
    _check_complete(model, blocks)
    keys_values = {made.path for block in blocks for made in block.keys_values}
    inputs = {path for block in blocks for path in block.second_matrices}
    gates = {gate_side(_model_type(model), path) for path in inputs} & modules.keys()
    outputs, inputs = keys_values | gates, set() if gates else inputs
    others = [path for path in modules if path not in outputs | inputs]
    names = [_names_of(paths, others) for paths in (outputs, inputs) if paths]
    usual = set().union(*(excluded for _, excluded in names))
    config.target_modules = _either(chosen for chosen, _ in names)
    if config.feedforward_modules is None:
        config.feedforward_modules = names[-1][0] if inputs else set()
    if isinstance(config.exclude_modules, str):
        if not matching(config.exclude_modules, modules, "exclude_modules"):
            raise ValueError(_nothing_matched(model, modules, "exclude_modules", config.exclude_modules))
        config.exclude_modules = "|".join(
            f"({pattern})" for pattern in (config.exclude_modules, *(_ends(name) for name in sorted(usual)))
        )
    else:
        config.exclude_modules = {*usual, *(config.exclude_modules or ())} or None
    config.towers = None
    return config


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules with their paths, leaving out what adapters put there."""
    for path, module in model.named_modules():
        if path and not {VECTORS, SAVED_COPIES} & set(path.split(".")):
            yield path, module


def matches_name(path: str, names: Container[str]) -> bool:
    """Whether a path is one of the names, or ends with one after a dot."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def matching(names: Names, paths: Iterable[str], field: str = "target_modules") -> set[str]:
    """The paths that a regular expression matches in full or that end with one of the names.

    Args:
        names: a regular expression, or names.
        paths: of modules.
        field: the configuration's field with the names, for the error.

    Raises:
        ValueError: the expression is none, or it is too large or too slow.
    """
    if isinstance(names, str):
        return fully_matching(names, paths, field)
    wanted = frozenset(names or ())
    return {path for path in paths if matches_name(path, wanted)} if wanted else set()


def _find_saved(modules: dict[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    """The outermost modules with one of these names."""
    wanted = frozenset(names)
    paths = [path for path in modules if matches_name(path, wanted)]
    yield from (path for path in paths if not any(is_inside(path, p) for p in paths if p != path))


def is_at_input(vector: torch.Tensor) -> bool:
    """Whether a vector of two dimensions multiplies an input, by its shape in a file: `(1, in)`, `(experts, width)`."""
    return vector.shape[0] == 1 or vector.shape[1] > 1


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


def _names_of(wanted: set[str], others: Sequence[str], *, may_exclude: bool = True) -> tuple[set[str] | str, set[str]]:
    """What matches these paths and no others: names as short as can be and names to exclude, else a pattern."""
    names: set[str] = set()
    excluded: set[str] = set()
    for last in sorted({path.rpartition(".")[2] for path in wanted}):
        group = [path for path in wanted if path.rpartition(".")[2] == last]
        near = [path for path in others if path.rpartition(".")[2] == last]
        choices = [_tails(group, near, wanted, length) for length in (1, 2, 3)]
        allowed = [choice for choice in choices if choice is not None and (may_exclude or not choice[1])]
        fewest = min(allowed, key=lambda choice: len(choice[0]) + 1.5 * len(choice[1]), default=None)
        if fewest is None or len(fewest[0]) + len(fewest[1]) > _MOST_NAMES:
            return _pattern_of(wanted, others), set()
        names |= fewest[0]
        excluded |= fewest[1]
    return names, excluded


def _tails(
    group: Sequence[str], near: Sequence[str], wanted: set[str], length: int
) -> tuple[set[str], set[str]] | None:
    """The last parts of paths, and those of the paths that these match besides; None where they can't be told apart."""
    names = {_tail(path, length) for path in group}
    if any(part.isdigit() for name in names for part in name.split(".")[:-1]):  # a name is one for all layers
        return None
    surplus = [path for path in near if matches_name(path, names)]
    excluded = {_tail(path, length + 1) for path in surplus}
    return None if any(matches_name(path, excluded) for path in wanted) else (names, excluded)


def _tail(path: str, length: int) -> str:
    return ".".join(path.split(".")[-length:])


def _pattern_of(wanted: set[str], others: Sequence[str]) -> str:
    """A regular expression with any numbers of layers, or with every path where that would match more."""
    ends: dict[str, set[str]] = {}
    for path in wanted:
        head, _, last = path.rpartition(".")
        ends.setdefault(re.sub(r"\\\.\d+(?=\\\.|$)", lambda _: r"\.\d+", re.escape(head)), set()).add(last)
    heads = sorted(ends)
    columns = zip(*(head.split(r"\.") for head in heads), strict=False)
    common = next((n for n, parts in enumerate(columns) if len({*parts}) > 1), 0)
    for dropped in range(common or (heads[0].count(r"\.") if len(heads) == 1 else 0), -1, -1):
        cut = [r"\.".join(head.split(r"\.")[dropped:]) for head in heads]
        each = [rf"{short}\.({'|'.join(sorted(ends[head]))})" for short, head in zip(cut, heads, strict=True)]
        pattern = rf"(.*\.)?({'|'.join(each)})"
        if not matching(pattern, others):
            return pattern
    return "|".join(re.escape(path) for path in sorted(wanted))


def _ends(names: str | Iterable[str]) -> str:
    """The regular expression for what ends with one of the names."""
    each = [names] if isinstance(names, str) else sorted(names)
    return rf"(.*\.)?({'|'.join(re.escape(name) for name in each)})"


def _either(choices: Iterable[set[str] | str]) -> set[str] | str:
    listed = list(choices)
    if all(isinstance(choice, set) for choice in listed):
        return set().union(*listed)
    return "|".join(choice if isinstance(choice, str) else _ends(choice) for choice in listed)


def _second_matrices(blocks: Sequence[Block], targets: set[str], modules: dict[str, nn.Module]) -> Names:
    """Those of the targets that close a feed-forward, by the names of a model without blocks."""
    found = {path for path in targets if acts_in_front(modules[path])}
    if not blocks:
        named = {name for name in SECOND_MATRICES if matching({name}, targets)}
        return named | {path.rpartition(".")[2] for path in found}
    found |= {path for block in blocks for path in block.second_matrices} & targets
    return _names_of(found, sorted(targets - found), may_exclude=False)[0]


def _check_complete(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Refuse a default that would leave out what it stands for.

    Raises:
        ValueError: no attention, or a block whose keys, values or feed-forward can't be told or reached.
    """
    kind = _model_type(model) or type(model).__name__
    if not any(block.keys_values for block in blocks):
        problem = next((block.lacks for block in blocks if block.lacks), "")
        raise ValueError(
            f"(IA)³ multiplies an attention's keys and values, and ia3 finds no layer of {kind!r} that makes such"
            f"{f' ({problem})' if problem else ''}. {_explicitly(model, blocks)}"
        )
    lacking = [block for block in blocks if block.lacks]
    if lacking:
        raise ValueError(
            f"ia3 can't tell all that (IA)³ multiplies in {kind!r}: {len(lacking)} of its {len(blocks)} blocks lack "
            f"something, such as {lacking[0].path}: {lacking[0].lacks}. {_explicitly(model, blocks)}"
        )


def _explicitly(model: nn.Module, blocks: Sequence[Block]) -> str:
    """The explicit form, in the names of the model at hand."""
    modules = dict(_base_modules(model))
    outputs = {made.path for block in blocks for made in block.keys_values}
    inputs = {path for block in blocks for path in block.second_matrices}
    named = [_names_of(paths, [p for p in modules if p not in paths])[0] for paths in (outputs, inputs) if paths]
    ends = sorted({path.rpartition(".")[2] for path, module in modules.items() if layer_widths(module)})
    shown = ends if len(ends) <= 30 else [*ends[:30], "…"]
    if named and all(isinstance(each, set) for each in named):
        targets, fed = sorted(set().union(*named)), sorted(named[-1]) if inputs else []
        form = f"IA3Config(target_modules={targets}, feedforward_modules={fed}) is what was found of it"
    else:
        form = "IA3Config(target_modules=[…], feedforward_modules=[…])"
    return (
        f"Name the layers to adapt yourself: {form}; its layers end with {shown}. `ia3 targets` shows what a choice "
        "means."
    )


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
            if not matching(names if isinstance(names, str) else {name}, matched, field):
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
    near = difflib.get_close_matches(wanted[:100], ends, n=3)
    hint = f"Did you mean {near}? " if near else ""
    first = _first_path(model, names)
    hint = f"{first[0]} is the same module as {first[1]}: name it {first[1]!r}. " if first else hint
    shown = ends if len(ends) <= 30 else [*ends[:30], "…"]
    return (
        f"{field}: {shorten(names)} matches no module of {type(model).__name__}. {hint}A name matches a module's "
        f"whole path or its end after a dot, a regular expression the whole path. Its layers end with {shown}."
    )


def _first_path(model: nn.Module, names: Names) -> tuple[str, str] | None:
    """Of a module that has several paths, one that the names match and the first, by which it is known."""
    first = {module: path for path, module in _base_modules(model)}
    others = dict(model.named_modules(remove_duplicate=False))
    others = {path: module for path, module in others.items() if first.get(module, path) != path}
    return next(((path, first[others[path]]) for path in sorted(matching(names, others))), None)


def _site(path: str, module: nn.Module, side: Side, channels: Intervals | None) -> Site:
    widths = layer_widths(module)
    if widths is None:
        raise ValueError(
            f"{path} is a {type(module).__name__}, which can't carry a vector: expected a linear, convolution "
            "or embedding layer, or experts in one module. Name such layers in target_modules, or leave this one to "
            "exclude_modules."
        )
    experts = find_experts(module)
    if experts is not None:
        return _site_of_experts(path, side, module, experts)
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
    return Site(path, side, (width, 1), channels)


def _site_of_experts(path: str, side: Side, module: nn.Module, experts: Experts) -> Site:
    reason = unsupported_reason(module, experts)
    if reason is not None:
        raise ValueError(f"{path} holds experts that can't carry vectors: {reason}. Or leave it to exclude_modules.")
    if side == "output":
        raise ValueError(
            f"{path} holds the matrices of {experts.count} experts: their vectors multiply what goes into "
            f"{experts.second}, so name it in feedforward_modules, too, or leave it to exclude_modules."
        )
    return Site(path, side, (experts.count, experts.width))
