"""Folding vectors into the weights, and out again to the very bit.

Whatever changes weights stores first what it takes to go back, and goes back where anything stops it: memory that runs
out, or Ctrl-C.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ia3.adapter import check_choice, repoint, rest, saved_copies, wake, whole_vectors
from ia3.errors import PeftWarning
from ia3.experts import find_experts
from ia3.layers import channel_dims, is_conv1d, is_plain, take_tensor
from ia3.quantised import Held, fold, held_by
from ia3.sites import SAVED_COPIES, Side, Site, logger
from ia3.state import Adapter, Originals, attached, get_adapter
from ia3.structure import layer_widths

_PART = ": "
Scales = dict[tuple[str, Side], torch.Tensor]
"""Module path and side to the product of the adapters' vectors there, every channel, `[width]`."""


def merge(model: nn.Module, names: Iterable[str] | None = None, *, keep_originals: bool) -> None:
    """Fold adapters into the weights: W ← diag(l) W and b ← l ∘ b at outputs, W ← W diag(l) at inputs.

    All is checked before the first weight changes, so a refusal leaves the model as it was.

    Args:
        model: the model.
        names: the adapters; None means the active ones. Several multiply. Those that are merged already stay so, and
            the result has the bits of merging all at once.
        keep_originals: keep the old weights in CPU memory, for `unmerge`.

    Raises:
        ValueError: an unknown adapter, adapters that can't act together, a weight shared with another module, a
            weight that is not floating-point, a vector or product that is not finite.
    """
    with ExitStack() as undo:
        _merge(model, names, undo, keep_originals=keep_originals)
        undo.pop_all()


def merge_for_good(model: nn.Module, names: Iterable[str], undo: ExitStack) -> None:
    """Fold adapters into the weights and put the modules trained in full in the place of the base's own.

    Args:
        model: the model, which may have merged adapters already.
        names: the adapters.
        undo: takes what it needs to go back, until the adapters are gone.

    Raises:
        ValueError: as `merge`, or as `check_copies`.
    """
    names, state = list(names), attached(model)
    check_copies(model, [get_adapter(model, name) for name in names])
    if state.originals is None or not set(names) <= set(state.merged):
        _merge(model, names, undo, keep_originals=state.originals is not None)
    untied = [path for name in state.merged for path in install_copies(model, get_adapter(model, name), undo)]
    write_untied(model, undo)
    for path in untied:
        logger.warning("%s was tied; it now has the weights trained for it alone.", path)


def _merge(model: nn.Module, names: Iterable[str] | None, undo: ExitStack, *, keep_originals: bool) -> None:
    state = attached(model)
    state.placement.expect_all()
    if isinstance(names, str):
        raise TypeError(f"merging takes a list of names, got {names!r}: write [{names!r}].")
    chosen = tuple(state.active if names is None else names)
    if not chosen:
        raise ValueError("There is nothing to merge: name adapters, or activate one with set_adapter.")
    if not state.enabled:
        raise ValueError("The adapters are disabled: merge after disable_adapter, or call enable_adapters() first.")
    more = tuple(name for name in chosen if name not in state.merged)
    adapters = [get_adapter(model, name) for name in (*state.merged, *more)]
    check_choice(adapters)
    if state.merged:
        what = f"merging {list(more)} too" if more else "there is nothing to do"
        warnings.warn(f"{list(state.merged)} are merged already: {what}.", PeftWarning, stacklevel=4)
    if not more:
        return
    kept, rounded = state.originals or {}, dict[str, float]()
    _check_mergeable(model, [site for adapter in adapters for site in adapter.layout.sites])
    scales, changed = _scales(model, adapters), []
    for name, parameter, new in _merged_values(model, scales, kept, rounded):
        if not _is_finite(new):
            raise ValueError(
                f"Merging {list(chosen)} would make {name} non-finite (the vector or the weight overflows "
                f"{parameter.dtype}): nothing was merged. Look for NaN or huge values in the adapter."
            )
        changed.append(name)
    weights = _store(model, changed, undo)
    for _, parameter, new in _merged_values(model, scales, kept):
        parameter.data.copy_(new)
    _mark(model, {**weights, **kept} if keep_originals else kept, (*state.merged, *more))
    if rounded:
        worst = max(rounded, key=rounded.__getitem__)
        logger.warning(
            "Merging %s rounded %d quantised weights anew, which have no scale for each channel of theirs: the answers "
            "of %s differ most from those of its vector, by %.2g of them.",
            list(chosen),
            len(rounded),
            worst,
            rounded[worst],
        )


def unmerge(model: nn.Module) -> None:
    """Put back the weights as they were before `merge`, bit for bit.

    Raises:
        ValueError: inside `disable_adapter`, which puts the merged weights back itself.
    """
    state = attached(model)
    if state.originals is None:
        warnings.warn("unmerge_adapter: nothing is merged, so there is nothing to do.", PeftWarning, stacklevel=3)
        return
    if not state.enabled:
        raise ValueError("The adapters are disabled: unmerge after disable_adapter, or call enable_adapters() first.")
    with ExitStack() as undo:
        _store(model, state.originals, undo)
        restore(model, state.originals)
        _mark(model, None, ())
        undo.pop_all()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it the model is the base, merged weights included; see `PeftModel.disable_adapter`."""
    state = attached(model)
    if not state.enabled:
        yield
        return
    originals = state.originals or {}
    merged = {name: _held(model, name).detach().clone() for name in originals}
    try:
        rest(model)
        restore(model, originals)
        yield
    finally:
        try:
            if state.originals is originals:  # nobody unmerged in between
                restore(model, merged)
        finally:
            wake(model)


def restore(model: nn.Module, weights: Originals) -> None:
    """Copy weights back in place; whatever stops it is raised once all of them are."""
    try:
        _write(model, weights)
    except BaseException:  # a half of the weights must not stay behind, whatever came
        _write(model, weights)
        raise


def _write(model: nn.Module, weights: Originals) -> None:
    for name, weight in weights.items():
        _held(model, name).data.copy_(weight)


def _held(model: nn.Module, name: str) -> torch.Tensor:
    """What a name of `Originals` stands for: a parameter, or after the path a part of a quantised layer."""
    path, _, part = name.partition(_PART)
    held = held_by(attached(model).placement.site_module(path)) if part else None
    return model.get_parameter(name) if held is None else held.parts()[part]


def _store(model: nn.Module, names: Iterable[str], undo: ExitStack) -> Originals:
    """Copies of weights in CPU memory, which come back with what is marked as merged now, should anything fail."""
    state = attached(model)
    weights = {name: _held(model, name).detach().cpu().clone() for name in names}
    undo.callback(_mark, model, state.originals, state.merged)
    undo.callback(restore, model, weights)
    return weights


def _mark(model: nn.Module, originals: Originals | None, merged: tuple[str, ...]) -> None:
    """Let it be known what is merged, and the vectors act or not act accordingly."""
    state = attached(model)
    state.originals, state.merged = originals, merged
    repoint(model)


def _scales(model: nn.Module, adapters: list[Adapter]) -> Scales:
    scales: Scales = {}
    for adapter in adapters:
        for site, full in whole_vectors(model, adapter).items():
            at = site.path, site.side
            scales[at] = scales[at] * full.reshape(-1) if at in scales else full.reshape(-1)
    return scales


def _check_mergeable(model: nn.Module, sites: Iterable[Site]) -> None:
    memory = [
        (f"{path}.{name}", *_memory(parameter))
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    for site in sites:
        module = attached(model).placement.site_module(site.path)
        experts, held = find_experts(module), held_by(module)
        own = experts.second if experts is not None else "weight"
        weight = module._parameters.get(own)
        reason = _unmergeable_reason(module, site, weight) if held is None else _away(held.parts().values())
        if reason is not None:
            raise ValueError(
                f"{site.path} has no floating-point weight of its own to merge into ({reason}): merge into a plain "
                "copy of the base, or leave the adapter unmerged."
            )
        bias = module._parameters.get("bias") if site.side == "output" else None
        for name, parameter in ((own, weight), ("bias", bias)):
            if parameter is None:
                continue
            place, start, stop = _memory(parameter)
            shared = [other for other, where, begin, end in memory if where == place and start < end and begin < stop]
            if len(shared) > 1:
                raise ValueError(
                    f"{' and '.join(shared)} are one tied {name}: merging into {site.path} would change the other "
                    f"too. Untie it first (give {site.path} a {name} of its own: nn.Parameter({name}.clone())), "
                    "or leave the adapter unmerged."
                )
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"{site.path} renormalises its rows (max_norm), so no merged weight equals it.")


_MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _unmergeable_reason(module: nn.Module, site: Site, weight: nn.Parameter | None) -> str | None:
    """Why a scaled weight would not do what the vector does; None where it would."""
    if weight is None:
        return f"a {type(module).__name__} is quantised, or its weight is computed"
    if (reason := _away([weight])) is not None:
        return reason
    if type(weight) is not nn.Parameter or weight.dtype not in _MERGEABLE:
        return f"a {type(weight).__name__} of {weight.dtype} is quantised or sharded"
    experts = find_experts(module)
    if experts is not None:
        return None if experts.is_told else f"the shape of its {experts.second} doesn't tell what is its input"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "an EmbeddingBag that takes the maximum takes another one where a vector is negative"
    if is_plain(module) or is_conv1d(module) or _is_linear_in_its_weight(module, site):
        return None
    return f"a {type(module).__name__} doesn't multiply by its weight as it is, but rounds or computes it"


def _away(tensors: Iterable[torch.Tensor]) -> str | None:
    return "it is offloaded or on the meta device" if any(tensor.is_meta for tensor in tensors) else None


@torch.no_grad()
def _is_linear_in_its_weight(module: nn.Module, site: Site) -> bool:
    """Whether a layer of another class answers as its vector would, once its weight is scaled: tried on a copy."""
    weight: Any = module._parameters["weight"]
    scale = torch.linspace(0.5, 2.0, site.width, device=weight.device)
    tried = copy(module)
    tried._forward_hooks, tried._forward_pre_hooks = OrderedDict(), OrderedDict()
    tried._parameters = dict(module._parameters)
    inputs = _example_inputs(module, weight)
    if inputs is None:
        return False
    try:
        scaled, _ = take_tensor(tried(_times(inputs, site, scale) if site.side == "input" else inputs))
        scaled = _times(scaled, site, scale) if site.side == "output" else scaled
        for name, _, new in _merged_module(module, site.path, {site.side: scale}, {}):
            tried._parameters[name.rpartition(".")[2]] = nn.Parameter(new, requires_grad=False)
        merged, _ = take_tensor(tried(inputs))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever else a foreign layer raises, it can't be tried
        return False
    tolerance = 32 * torch.finfo(weight.dtype).eps * float(scaled.abs().max())
    return bool(torch.isfinite(merged).all()) and float((merged - scaled).abs().max()) <= tolerance


def _example_inputs(module: nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    """Something that the layer takes: numbers, or token numbers."""
    widths = layer_widths(module)
    if widths is None:
        return None
    if widths[0] is None:
        return torch.arange(len(weight), device=weight.device)[:8]
    kernel = tuple(4 * size for size in getattr(module, "kernel_size", ()))
    groups = getattr(module, "n_groups", 1) if not kernel else 1  # of a linear layer that takes them apart
    shape = (8, *(groups,) * (groups > 1), widths[0], *kernel)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight)


def _times(activation: torch.Tensor, site: Site, scale: torch.Tensor) -> torch.Tensor:
    """An activation times a scale of its channels, which stand last, or before a convolution's dimensions."""
    after = max(len(site.shape) - 2, 0)
    dims = channel_dims(activation.shape, site.width, spatial=after)
    return activation * scale.to(activation.dtype).view(*dims, *(1,) * after)


def _memory(parameter: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device and addresses; a parameter without memory of its own shares it with none but itself."""
    start = parameter.data_ptr() or -id(parameter)
    return parameter.device, start, start + max(parameter.nbytes if start > 0 else 0, 1)


def _merged_values(
    model: nn.Module, scales: Scales, kept: Originals, rounded: dict[str, float] | None = None
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each tensor that changes: its name, itself, its new value in its own dtype, from the value before merging.

    A module with vectors on both sides (of two adapters) is multiplied by both at once. `rounded` takes the errors of
    quantised modules whose weights are rounded anew.
    """
    placement = attached(model).placement
    for path in {path: None for path, _ in scales}:
        own = {side: scale for (at, side), scale in scales.items() if at == path}
        module = placement.site_module(path)
        held = held_by(module)
        if held is None:
            yield from _merged_module(module, path, own, kept)
        else:
            yield from _merged_parts(held, path, own, kept, {} if rounded is None else rounded)


def _merged_parts(
    held: Held, path: str, scales: Mapping[Side, torch.Tensor], kept: Originals, rounded: dict[str, float]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    before = {name: kept[f"{path}{_PART}{name}"] for name in held.parts() if f"{path}{_PART}{name}" in kept}
    folded = fold(held, path, scales, before)
    if folded.rounded_anew:
        rounded[path] = folded.error
    for name, new in folded.parts.items():
        yield f"{path}{_PART}{name}", held.parts()[name], new


def _is_finite(value: torch.Tensor) -> bool:
    # torch can't tell of all numbers of 8 bits.
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())


def _merged_module(
    module: nn.Module, path: str, scales: Mapping[Side, torch.Tensor], kept: Originals
) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    experts = find_experts(module)
    if experts is not None:
        name = f"{path}.{experts.second}"
        matrices: nn.Parameter = module._parameters[experts.second]  # type: ignore[assignment]
        scaled = _unmerged(name, matrices, kept) * experts.over_weight(scales["input"].to(matrices.device))
        yield name, matrices, scaled.to(matrices.dtype)
        return
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    new = _unmerged(f"{path}.weight", weight, kept)
    for side in ("input", "output"):
        if side in scales:
            new = new * _over_weight(module, side, scales[side].to(weight.device))
    yield f"{path}.weight", weight, new.to(weight.dtype)
    bias = getattr(module, "bias", None)
    if bias is not None and "output" in scales:
        its = _unmerged(f"{path}.bias", bias, kept) * scales["output"].to(bias.device)
        yield f"{path}.bias", bias, its.to(bias.dtype)


def _unmerged(name: str, parameter: torch.Tensor, kept: Originals) -> torch.Tensor:
    return kept[name].to(parameter.device) if name in kept else parameter.detach()


def _over_weight(module: nn.Module, side: str, scale: torch.Tensor) -> torch.Tensor:
    """The scale `[width]` shaped to multiply the module's weight."""
    if isinstance(module, _ConvNd):
        ones = (1,) * len(module.kernel_size)
        # `[out, in / groups, …]`, transposed `[in, out / groups, …]`: each group of rows sees its own slice of columns.
        transposed = isinstance(module, _ConvTransposeNd)
        if (side == "output") != transposed:
            return scale.view(-1, 1, *ones)
        rows = module.in_channels if transposed else module.out_channels
        by_group = scale.view(module.groups, 1, -1).expand(-1, rows // module.groups, -1)
        return by_group.reshape(rows, -1, *ones)
    outputs_are_columns = is_conv1d(module) or isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return scale.view(1, -1) if (side == "output") == outputs_are_columns else scale.view(-1, 1)


# Modules trained in full


def check_copies(model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Refuse to put copies in their modules' places where the saved model would be loaded with other weights.

    Raises:
        ValueError: one is tied to modules that keep the base's weights, under whose name these would be saved.
    """
    mapping: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    replaced = {name for adapter in adapters for name, *_ in _untied(model, adapter)}
    for source in sorted(replaced & set(mapping.values())):
        base = model.get_parameter(source)
        kept = [name for name in _names_of(model, base) if name not in replaced]
        if len(kept) > 1:
            paths = [name.removesuffix(".weight") for name in kept]
            raise ValueError(
                f"{source} was trained in full and is tied to {' and '.join(kept)}, which keep the base's weights. "
                f"transformers saves these once, under the name of {source}, so the merged model would be loaded with "
                f"other weights than it has. Train what the model calls instead (modules_to_save={paths}), or leave "
                "the adapter unmerged. Nothing was merged."
            )


def install_copies(model: nn.Module, adapter: Adapter, undo: ExitStack) -> list[str]:
    """Put the modules that the adapter trained in full in the place of the base's own weights, for good.

    Returns:
        Paths of those that were tied to others.
    """
    untied = dict(_untied(model, adapter))
    for path, trained in saved_copies(model, adapter):
        module = attached(model).placement.saved_module(path)
        for parameter in trained.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for owner_path, owner in trained.named_modules():
            target = module.get_submodule(owner_path)
            for name, parameter in owner.named_parameters(recurse=False):
                own = target.get_parameter(name)
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.to(own.dtype)  # the copy of a half-precision module is in fp32
                if not _are_equal(parameter, own):
                    undo.callback(target._parameters.__setitem__, name, own)
                    target._parameters[name] = parameter
            for name, buffer in owner.named_buffers(recurse=False):
                undo.callback(target._buffers.__setitem__, name, target._buffers[name])
                target._buffers[name] = buffer
    return list(dict.fromkeys(untied.values()))


def _untied(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Names of the base's parameters that a copy replaces and that others share, with the modules' paths."""
    for path, trained in saved_copies(model, adapter):
        module = attached(model).placement.saved_module(path)
        for name, parameter in trained.named_parameters():
            held = module.get_parameter(name)
            if not _are_equal(parameter, held) and len(_names_of(model, held)) > 1:
                yield f"{path}.{name}", path


def _are_equal(trained: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a copy is what the module had, in its precision."""
    return not held.is_meta and torch.equal(trained.to(held), held)


def _names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Every name that a parameter has in the base."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, other in named if other is parameter and f".{SAVED_COPIES}." not in f".{name}"]


def write_untied(model: Any, undo: ExitStack) -> None:
    """Let the model's configuration say that its embeddings are no longer tied, if it can and none are."""
    mapping: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    if not mapping:
        return
    for target, source in list(mapping.items()):
        if model.get_parameter(target) is not model.get_parameter(source):
            undo.callback(mapping.__setitem__, target, source)
            del mapping[target]
    both = (model.config, model.config.get_text_config())
    configs = [each for each in both if getattr(each, "tie_word_embeddings", False)]
    for config in configs if not mapping else ():
        content = config.to_dict()
        # A T5's configuration means another forward by it.
        read = type(config).from_dict({**content, "tie_word_embeddings": False}).to_dict()
        if read == {**content, "tie_word_embeddings": False}:
            undo.callback(setattr, config, "tie_word_embeddings", True)
            config.tie_word_embeddings = False
