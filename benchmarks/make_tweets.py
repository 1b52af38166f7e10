"""Make the tweets that come with ia3 from zeroshot/twitter-financial-news-sentiment 1.0.0.

    python benchmarks/make_tweets.py FOLDER [--output src/ia3/data/tweets]

FOLDER holds the data set's `sent_train.csv` and `sent_valid.csv`. The same input gives the same bytes.

Needs: CPU; the data set as CSV files; seconds.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from collections import defaultdict
from pathlib import Path

LABELS = {"0": "negative", "1": "positive", "2": "neutral"}  # the data set's Bearish, Bullish, Neutral
TRAIN_PER_CLASS, TEST_PER_CLASS = 1200, 100
SEED = 42
OUTPUT = Path(__file__).parents[1] / "src" / "ia3" / "training" / "tweets"

_LINK = re.compile(r"https?://\S+")

Row = tuple[str, str]


def read(path: Path) -> list[Row]:
    """The different texts of a file with their labels: links removed, white space normalised.

    Of texts that differ in case alone the first stays; one that has several labels is left out.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(clean(row["text"]), LABELS[row["label"]]) for row in csv.DictReader(file)]
    labels = defaultdict(set)
    for text, label in rows:
        labels[text.casefold()].add(label)
    first = {text.casefold(): (text, label) for text, label in reversed(rows)}
    return [first[key] for key, found in labels.items() if key and len(found) == 1]


def clean(text: str) -> str:
    """The text without links and with single spaces."""
    return " ".join(_LINK.sub(" ", text).split())


def sample(rows: list[Row], per_class: int, rng: random.Random) -> list[Row]:
    """Draw `per_class` rows of each class, so ordered that any first N are balanced."""
    drawn = []
    for label in sorted(LABELS.values()):
        of_label = [row for row in rows if row[1] == label]
        drawn.append(rng.sample(of_label, per_class))
    ordered = []
    for triple in zip(*drawn, strict=True):
        ordered.extend(rng.sample(triple, len(triple)))
    return ordered


def write(path: Path, rows: list[Row]) -> None:
    """Write UTF-8 with the header `text,label` and LF."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where sent_train.csv and sent_valid.csv are")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    train, held_out = read(arguments.folder / "sent_train.csv"), read(arguments.folder / "sent_valid.csv")
    seen = {text.casefold() for text, _ in held_out}
    train = [row for row in train if row[0].casefold() not in seen]
    rng = random.Random(SEED)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write(arguments.output / "test.csv", sample(held_out, TEST_PER_CLASS, rng))
    write(arguments.output / "train.csv", sample(train, TRAIN_PER_CLASS, rng))


if __name__ == "__main__":
    main()
