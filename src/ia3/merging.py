"""Folding vectors into the weights, and out again to the very bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ia3.adapter import Adapter, attached, check_choice, get_adapter, repoint, whole_vectors
from ia3.sites import Side, Site, is_conv1d, logger

Originals = dict[str, torch.Tensor]
"""Parameter name to the value before merging, in CPU memory."""
Scales = dict[tuple[str, Side], torch.Tensor]
"""Module path and side to the product of the adapters' vectors there, every channel, `[width]`."""


def merge(model: nn.Module, names: Iterable[str] | None = None, *, keep_originals: bool) -> None:
    """Fold adapters into the weights: W ← diag(l) W and b ← l ∘ b at outputs, W ← W diag(l) at inputs.

    All is checked before the first weight changes, so a refusal leaves the model as it was.

    Args:
        model: the model.
        names: the adapters; None means the active ones. Several multiply.
        keep_originals: keep the old weights in CPU memory, for `unmerge`.

    Raises:
        ValueError: an unknown adapter, something merged already, a weight shared with another module, a
            weight that is not floating-point, a vector or product that is not finite.
    """
    state = attached(model)
    if isinstance(names, str):
        raise TypeError(f"merging takes a list of names, got {names!r}: write [{names!r}].")
    chosen = tuple(state.active if names is None else names)
    adapters = [get_adapter(model, name) for name in chosen]
    check_choice(adapters)
    if not chosen:
        raise ValueError("There is nothing to merge: name adapters, or activate one with set_adapter.")
    if not state.enabled:
        raise ValueError("The adapters are disabled: merge after disable_adapter, or call enable_adapters() first.")
    if state.originals is not None:
        raise ValueError(f"Adapters {list(state.merged)} are merged already: call unmerge_adapter() first.")
    _check_mergeable(model, [site for adapter in adapters for site in adapter.layout.sites])
    scales = _scales(model, adapters)
    for name, parameter, new in _merged_values(model, scales):
        if not torch.isfinite(new).all():
            raise ValueError(
                f"Merging {list(chosen)} would make {name} non-finite (the vector or the weight overflows "
                f"{parameter.dtype}): nothing was merged. Look for NaN or huge values in the adapter."
            )
    originals = {}
    for name, parameter, new in _merged_values(model, scales):
        if keep_originals:
            originals[name] = parameter.detach().cpu().clone()
        parameter.data.copy_(new)
    state.originals, state.merged = originals, chosen
    repoint(model)


def unmerge(model: nn.Module) -> None:
    """Put back the weights as they were before `merge`, bit for bit.

    Raises:
        ValueError: inside `disable_adapter`, which puts the merged weights back itself.
    """
    state = attached(model)
    if state.originals is None:
        logger.warning("unmerge_adapter: nothing is merged.")
        return
    if not state.enabled:
        raise ValueError("The adapters are disabled: unmerge after disable_adapter, or call enable_adapters() first.")
    restore(model, state.originals)
    state.originals, state.merged = None, ()
    repoint(model)


def restore(model: nn.Module, originals: Originals) -> None:
    """Copy the kept weights back in place."""
    for name, original in originals.items():
        model.get_parameter(name).data.copy_(original)


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
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or hasattr(weight, "device_mesh"):
            raise ValueError(
                f"{site.path} has no floating-point weight of its own to merge into (it is quantised, computed or "
                "sharded): merge into a plain copy of the base, or leave the adapter unmerged."
            )
        bias = module._parameters.get("bias") if site.side == "output" else None
        for name, parameter in (("weight", weight), ("bias", bias)):
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


def _memory(parameter: torch.Tensor) -> tuple[torch.device, int, int]:
    """Device and addresses; a parameter without memory of its own shares it with none but itself."""
    start = parameter.data_ptr() or -id(parameter)
    return parameter.device, start, start + max(parameter.nbytes if start > 0 else 0, 1)


def _merged_values(model: nn.Module, scales: Scales) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Each parameter that changes: its name, itself, its new value in its own dtype.

    A module with vectors on both sides (of two adapters) is multiplied by both at once.
    """
    for path in {path: None for path, _ in scales}:
        module = attached(model).placement.site_module(path)
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        new = weight.detach()
        for side in ("input", "output"):
            if (path, side) in scales:
                new = new * _over_weight(module, side, scales[path, side].to(weight.device))
        yield f"{path}.weight", weight, new.to(weight.dtype)
        bias = getattr(module, "bias", None)
        if bias is not None and (path, "output") in scales:
            scaled = bias.detach() * scales[path, "output"].to(bias.device)
            yield f"{path}.bias", bias, scaled.to(bias.dtype)


def _over_weight(module: nn.Module, side: str, scale: torch.Tensor) -> torch.Tensor:
    """The scale `[width]` shaped to multiply the module's weight."""
    if isinstance(module, _ConvNd):
        ones = (1,) * len(module.kernel_size)
        if side == "output":
            return scale.view(-1, 1, *ones)
        # `[out, in / groups, …]`: each group of outputs sees its own slice of the inputs.
        by_group = scale.view(module.groups, 1, -1).expand(-1, module.out_channels // module.groups, -1)
        return by_group.reshape(module.out_channels, -1, *ones)
    outputs_are_columns = is_conv1d(module) or isinstance(module, nn.Embedding)
    return scale.view(1, -1) if (side == "output") == outputs_are_columns else scale.view(-1, 1)
