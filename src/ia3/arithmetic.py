"""Combining adapters: arithmetic on l − 1, the distance from the identity; an absent vector is the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ia3.adapter import attach_combined, whole_vectors
from ia3.sites import Layout, Site, logger
from ia3.state import get_adapter

CombinationType = Literal["mean", "product", "sum", "task_arithmetic", "ties"]

Vectors = Mapping[Site, Tensor]


def combine(
    adapters: Sequence[Vectors],
    weights: Sequence[float],
    combination_type: CombinationType = "mean",
    *,
    density: float | None = None,
) -> dict[Site, Tensor]:
    """One adapter out of several.

    With weights w and vectors l, of shape `Site.shape`:

    - `"mean"` is 1 + Σ w (l − 1) / Σ w, the weighted mean, whatever the weights add up to; with the weights 1 − t and
      t it is the interpolation of two.
    - `"sum"` is Σ w l, PEFT's rule, which scales every activation by Σ w. It is the mean where Σ w = 1.
    - `"task_arithmetic"` is 1 + Σ w (l − 1) (Ilharco et al. 2023): the weights are λ, and −1 negates an adapter, 2 − l.
    - `"ties"` trims, elects a sign and merges what agrees with it (Yadav et al. 2023); see `ties`.
    - `"product"` is Π l^w, what several active adapters do with weights of 1.

    Args:
        adapters: full vectors by site.
        weights: one each.
        combination_type: the rule.
        density: for `"ties"`, the share of an adapter's numbers that is kept.

    Raises:
        ValueError: another number of weights than adapters, weights that are not finite or whose mean would
            divide by 0, an unknown type, a density that is missing, out of range or of no use, a power of a negative
            number, a combination that is not finite.
    """
    _check(adapters, weights, combination_type, density)
    sites = _union(adapters)
    stacked = _flat_differences(adapters)
    scale = torch.tensor(list(weights), dtype=stacked.dtype, device=stacked.device).unsqueeze(-1)
    if combination_type == "ties":
        assert density is not None
        flat = 1 + ties(stacked, scale, density)
    elif combination_type == "product":
        flat = _product(stacked, scale)
    else:
        identity, divisor = {"mean": (1.0, sum(weights)), "sum": (sum(weights), 1.0)}.get(combination_type, (1.0, 1.0))
        flat = identity + (scale * stacked).sum(0) / divisor
    combined = {site: part.view(site.shape) for site, part in zip(sites, Layout(tuple(sites)).split(flat), strict=True)}
    for site, vector in combined.items():
        if not torch.isfinite(vector).all():
            raise ValueError(f"The combination is not finite at {site.path}: the weights {list(weights)} are too big.")
    return combined


def add_weighted(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: CombinationType,
    density: float | None,
) -> None:
    """Attach a new adapter, inactive and frozen, made of others of the model; see `combine`.

    Raises:
        ValueError: what `combine` or `attach_combined` raises.
    """
    chosen = [get_adapter(model, name) for name in names]
    vectors = [whole_vectors(model, adapter) for adapter in chosen]
    values = combine(vectors, weights, combination_type, density=density)
    if combination_type == "mean" and abs(sum(weights) - 1) > 1e-6:
        logger.warning(
            "add_weighted_adapter: the weights add up to %g and are divided by that; PEFT would scale every "
            "activation by it (combination_type='sum').",
            sum(weights),
        )
    attach_combined(model, new_name, chosen, values)


def ties(differences: Tensor, weights: Tensor, density: float) -> Tensor:
    """TIES-merging of differences from the base (Yadav et al. 2023, algorithm 1).

    Each row keeps its largest numbers, those with |v| of at least the (D − int(density · D))th smallest, which are
    int(density · D) + 1 where no two are equal. Then each column elects the sign of its weighted sum, or, where that is
    zero, the sign that most columns elected; and takes the mean of the numbers that have it.

    Args:
        differences: `[adapters, D]`.
        weights: `[adapters, 1]`, applied to what trimming leaves.
        density: the share that is kept, above 0 and at most 1.

    Returns:
        `[D]`; the paper's λ is a factor to multiply it by.
    """
    size = differences.shape[-1]
    threshold = differences.abs().kthvalue(max(1, size - int(density * size)), dim=-1, keepdim=True).values
    trimmed = weights * differences.where(differences.abs() >= threshold, 0)
    signs = trimmed.sum(0).sign()
    signs = signs.where(signs != 0, signs.sum().sign())
    agreeing = trimmed.where((trimmed.sign() == signs) & (signs != 0), 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def cosine(one: Vectors, other: Vectors) -> float:
    """The cosine of two adapters' differences from the base, over the union of their sites; 0 where one has none."""
    a, b = _flat_differences([one, other]).double()
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def distance(one: Vectors, other: Vectors) -> float:
    """The Euclidean distance of two adapters, an absent vector being one."""
    a, b = _flat_differences([one, other]).double()
    return float((a - b).norm())


def _check(adapters: Sequence[Vectors], weights: Sequence[float], kind: str, density: float | None) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights: pass one weight each.")
    kinds = get_args(CombinationType)
    if kind not in kinds:
        raise ValueError(f"Unknown combination_type {kind!r}: expected {', '.join(map(repr, kinds))}.")
    if not all(isfinite(weight) for weight in weights):
        raise ValueError(f"The weights {list(weights)} are not all finite.")
    if kind == "mean" and sum(weights) == 0:
        raise ValueError(f"The weights {list(weights)} add up to 0, so they have no mean.")
    if (kind == "ties") != (density is not None):
        raise ValueError(
            "'ties' needs a density, the share of each adapter's numbers that is kept, such as 0.2."
            if density is None
            else f"density is {density}, and {kind!r} has no use for it: leave it out."
        )
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is {density}: expected a share above 0 and at most 1.")


def _union(adapters: Sequence[Vectors]) -> list[Site]:
    return list({site: None for adapter in adapters for site in adapter})


def _flat_differences(adapters: Sequence[Vectors]) -> Tensor:
    """l − 1 over the union of all sites, `[adapters, D]`, 0 where an adapter has no vector."""
    sites = _union(adapters)
    rows = []
    for adapter in adapters:
        like = next(iter(adapter.values()))
        parts = [adapter[site] - 1 if site in adapter else like.new_zeros(site.shape) for site in sites]
        rows.append(Layout(tuple(sites)).flatten(parts))
    return torch.stack(rows)


def _product(differences: Tensor, weights: Tensor) -> Tensor:
    vectors = 1 + differences
    fractional = bool((weights != weights.round()).any())
    if fractional and bool((vectors < 0).any()):
        raise ValueError("A vector holds a negative number, which has no power of a weight that is not whole.")
    return vectors.pow(weights).prod(0)
