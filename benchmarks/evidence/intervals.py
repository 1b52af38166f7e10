"""Bootstrap intervals of accuracies, over seeds and test rows at once.

What varies between runs is which seed it was, and between test sets which texts they hold. A draw takes seeds and rows
with replacement, each seed with all of the drawn rows, so that a text that every seed gets wrong counts as one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
        of_seeds = chance.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
        means = of_seeds @ group / seeds
        found += np.take_along_axis(means, chance.integers(rows, size=(draws, rows)), 1).mean(1) / len(groups)
    return found


def interval(drawn: Bits) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


@dataclass
class Answered:
    """Which rows were right, `[seeds, rows]` of each test set, whose accuracies are averaged."""

    groups: list[Bits]

    @property
    def accuracy(self) -> float:
        return float(np.mean([group.mean() for group in self.groups]))

    @cached_property
    def drawn(self) -> Bits:
        return bootstrap(self.groups)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [group.shape for group in self.groups]

    def beside(self, other: Answered) -> tuple[float, float, float]:
        """How much more accurate it is than another on the same seeds and rows, and the interval of that.

        Raises:
            ValueError: the other answered other rows.
        """
        if self.shapes != other.shapes:
            raise ValueError("The runs are of different test sets or seeds, so they have no paired difference.")
        return (self.accuracy - other.accuracy, *interval(self.drawn - other.drawn))
