"""Bootstrap intervals of accuracies, over seeds and test rows at once.

What varies between runs is which seed it was, and between test sets which texts they hold. A draw takes seeds and rows
with replacement, each seed with all of the drawn rows, so that a text that every seed gets wrong counts as one text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 2_000
Bits = np.ndarray


def bootstrap(groups: Sequence[Bits], draws: int = DRAWS) -> Bits:
    """Mean accuracies of draws.

    Args:
        groups: of each test set, which rows were right, `[seeds, rows]`; their accuracies are averaged.
        draws: how many.

    Returns:
        `[draws]`; the same seeds and rows are drawn for groups of the same shapes, so that differences are paired.
    """
    chance = np.random.default_rng(0)
    found = np.zeros(draws)
    for group in groups:
        seeds, rows = group.shape
        of_seeds, of_rows = (chance.multinomial(count, np.full(count, 1 / count), draws) for count in (seeds, rows))
        # How often each answer was drawn is the product of its seed's and its row's number.
        found += ((of_seeds @ group) * of_rows).sum(1) / (seeds * rows * len(groups))
    return found


def interval(drawn: Bits) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def mean_accuracy(groups: Sequence[Bits]) -> float:
    return float(np.mean([group.mean() for group in groups]))


def difference(groups: Sequence[Bits], others: Sequence[Bits]) -> tuple[float, float, float]:
    """How much more accurate the first is than the others on the same seeds and rows, and the interval of that.

    Raises:
        ValueError: they answered other rows.
    """
    if [group.shape for group in groups] != [other.shape for other in others]:
        raise ValueError("The runs are of different test sets or seeds, so they have no paired difference.")
    low, high = interval(bootstrap(groups) - bootstrap(others))
    return mean_accuracy(groups) - mean_accuracy(others), low, high
