"""How long PhraseBank's sentences are: so many of them have 0, 1, 2, … tokens by flan-t5's tokenizer.

Needs: CPU; nothing more; seconds.
"""

from __future__ import annotations

import argparse
import random

COUNTS = [
    0, 0, 0, 0, 2, 0, 2, 2, 11, 14, 8, 20, 34, 43, 47, 47, 40, 61, 49, 51, 77, 57, 63, 61, 49, 84, 61, 86, 77, 51, 54,
    59, 57, 56, 56, 49, 44, 53, 45, 46, 37, 38, 30, 37, 24, 27, 26, 25, 19, 24, 20, 17, 22, 26, 12, 14, 24, 8, 14, 13,
    14, 17, 7, 11, 11, 18, 14, 6, 8, 3, 16, 10, 6, 9, 2, 2, 5, 5, 3, 5, 3, 1, 1, 4, 1, 2, 0, 0, 3, 0, 1, 0, 0, 1, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
]  # fmt: skip


def shuffled(seed: int = 0) -> list[int]:
    """The tokens of each of the 2,264 sentences, in a random order."""
    lengths = [length for length, count in enumerate(COUNTS) for _ in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def typical_batch(size: int) -> list[int]:
    """A shuffled batch whose mean and longest are nearest to the averages over all."""
    order = shuffled()
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    mean = sum(order) / len(order)
    longest = sum(map(max, batches)) / len(batches)
    return min(batches, key=lambda batch: abs(sum(batch) / size - mean) / mean + abs(max(batch) - longest) / longest)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for size in (8, 64):
        print(size, typical_batch(size))
