"""Combining adapters: arithmetic on l − 1, the distance from the identity; an absent vector is the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Literal

import torch

from ia3.sites import Site

CombinationType = Literal["mean", "sum"]


def combine(
    adapters: Sequence[Mapping[Site, torch.Tensor]],
    weights: Sequence[float],
    combination_type: CombinationType = "mean",
) -> dict[Site, torch.Tensor]:
    """One adapter out of several, site by site.

    With weights w and vectors l, of shape `Site.shape`:
    `"mean"` is 1 + Σ w (l − 1) / Σ w, the weighted mean, whatever the weights add up to;
    `"sum"` is Σ w l, PEFT's rule, which scales every activation by Σ w. They agree where Σ w = 1.

    Raises:
        ValueError: another number of weights than adapters, weights that are not finite or whose mean would
            divide by 0, an unknown type, a combination that is not finite.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights: pass one weight each.")
    if combination_type not in ("mean", "sum"):
        raise ValueError(f"Unknown combination_type {combination_type!r}: expected 'mean' or 'sum'.")
    if not all(isfinite(weight) for weight in weights):
        raise ValueError(f"The weights {list(weights)} are not all finite.")
    total = sum(weights)
    if combination_type == "mean" and total == 0:
        raise ValueError(f"The weights {list(weights)} add up to 0, so they have no mean.")
    identity, divisor = (1.0, total) if combination_type == "mean" else (total, 1.0)
    combined = {}
    for site in {site: None for adapter in adapters for site in adapter}:
        terms = [
            weight * (adapter[site] - 1) for adapter, weight in zip(adapters, weights, strict=True) if site in adapter
        ]
        combined[site] = identity + torch.stack(terms).sum(0) / divisor
        if not torch.isfinite(combined[site]).all():
            raise ValueError(f"The combination is not finite at {site.path}: the weights {list(weights)} are too big.")
    return combined
