"""Folding vectors into the weights, and out again to the very bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ia3.adapter import attached, check_copies, get_adapter, repoint, vectors
from ia3.sites import Side, Site, _is_conv1d

Originals = dict[str, torch.Tensor]
"""Parameter name to the value before merging, in CPU memory."""


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
    check_copies([get_adapter(model, name) for name in chosen])
    if state.originals is not None:
        raise ValueError(f"Adapters {list(state.merged)} are merged already: call unmerge_adapter() first.")
    scales = _scales(model, chosen)
    _check_mergeable(model, scales)
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
        ValueError: nothing is merged.
    """
    state = attached(model)
    if state.originals is None:
        raise ValueError("Nothing is merged: call merge_adapter() before unmerge_adapter().")
    restore(model, state.originals)
    state.originals, state.merged = None, ()
    repoint(model)


def restore(model: nn.Module, originals: Originals) -> None:
    """Copy the kept weights back in place."""
    for name, original in originals.items():
        model.get_parameter(name).data.copy_(original)


def _scales(model: nn.Module, names: tuple[str, ...]) -> dict[tuple[str, Side], tuple[Site, torch.Tensor]]:
    """The product of the adapters' vectors at each site, full width, `[width]`."""
    scales: dict[tuple[str, Side], tuple[Site, torch.Tensor]] = {}
    for adapter in (get_adapter(model, name) for name in names):
        for site, vector in zip(adapter.layout.sites, vectors(model, adapter), strict=True):
            full = site.widen(vector.detach()).reshape(-1)
            _, before = scales.get((site.path, site.side), (site, None))
            scales[site.path, site.side] = site, full if before is None else before * full
    return scales


def _check_mergeable(model: nn.Module, scales: dict[tuple[str, Side], tuple[Site, torch.Tensor]]) -> None:
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            users.setdefault(_memory(parameter), []).append(f"{path}.{name}")
    for site, _ in scales.values():
        module = model.get_submodule(site.path)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"{site.path} has no floating-point weight to merge into: dequantise the base, or leave the "
                "adapter unmerged."
            )
        bias = getattr(module, "bias", None) if site.side == "output" else None
        for name, parameter in (("weight", weight), ("bias", bias)):
            shared = users.get(_memory(parameter), []) if parameter is not None else []
            if len(shared) > 1:
                raise ValueError(
                    f"{' and '.join(shared)} are one tied {name}: merging into {site.path} would change the other "
                    f"too. Untie it first (give {site.path} a {name} of its own: nn.Parameter({name}.clone())), "
                    "or leave the adapter unmerged."
                )
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"{site.path} renormalises its rows (max_norm), so no merged weight equals it.")


def _memory(parameter: torch.Tensor) -> int:
    """What tells tied parameters: their address; a parameter on no device of its own has none."""
    return parameter.data_ptr() or id(parameter)


def _merged_values(
    model: nn.Module, scales: dict[tuple[str, Side], tuple[Site, torch.Tensor]]
) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Each parameter that changes: its name, itself, its new value in its own dtype.

    A module with vectors on both sides (of two adapters) is multiplied by both at once.
    """
    for path in {path: None for path, _ in scales}:
        module = model.get_submodule(path)
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        new = weight.detach()
        for side in ("input", "output"):
            if (path, side) in scales:
                new = new * _over_weight(module, side, scales[path, side][1].to(weight.device))
        yield f"{path}.weight", weight, new.to(weight.dtype)
        bias = getattr(module, "bias", None)
        if bias is not None and (path, "output") in scales:
            scaled = bias.detach() * scales[path, "output"][1].to(bias.device)
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
    outputs_are_columns = _is_conv1d(module) or isinstance(module, nn.Embedding)
    return scale.view(1, -1) if (side == "output") == outputs_are_columns else scale.view(-1, 1)
