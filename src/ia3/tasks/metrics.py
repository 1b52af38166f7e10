"""What an evaluation says: accuracy with its interval, the majority baseline, the confusion matrix, F1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from ia3.errors import listed

# What every evaluation says; other figures, such as `entity_f1`, are its kind of task's own.
_USUAL = {
    *("accuracy", "accuracy_interval_95", "confusion", "correct", "examples", "f1", "labels", "loss", "macro_f1"),
    *("majority_baseline", "method", "seconds", "step"),
}
# The standard normal's 97.5 % quantile: two-sided 95 % intervals.
_Z_95 = 1.959963984540054


def count_correct(references: Sequence[str], predictions: Sequence[str]) -> int:
    """How many predictions equal the references, letter for letter.

    Raises:
        ValueError: the two differ in length.
    """
    if len(references) != len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} examples: expected one prediction an example."
        )
    return sum(right == predicted for right, predicted in zip(references, predictions, strict=True))


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, which stays inside [0, 1] and never has width 0.

    Args:
        correct: how many were right.
        total: out of how many.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: `total` is 0, or `correct` is not between 0 and `total`.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    _expect_some(total)
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total}: expected a number from 0 to {total}.")
    share = correct / total
    shrink = 1 + _Z_95**2 / total
    centre = (share + _Z_95**2 / (2 * total)) / shrink
    half = _Z_95 * sqrt(share * (1 - share) / total + _Z_95**2 / (4 * total**2)) / shrink
    # Exact where the formula is exact but its floats are not.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half


def majority_baseline(references: Sequence[str]) -> float:
    """The accuracy of always answering the most frequent label.

    Raises:
        ValueError: there are no examples.
    """
    _expect_some(len(references))
    return max(Counter(references).values()) / len(references)


def confusion_matrix(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Count how often each label was answered by each label.

    Args:
        references: the right labels.
        predictions: what the model generated; anything may come.
        labels: the label words, the order of rows and columns.

    Returns:
        `[len(labels), len(labels) + 1]` counts: a row a true label, a column a prediction, the last column
        for predictions that are no label.

    Raises:
        ValueError: a true label is not among `labels`, or the two sequences differ in length.
    """
    count_correct(references, predictions)
    position = {label: index for index, label in enumerate(labels)}
    unknown = sorted(set(references) - set(labels))
    if unknown:
        raise ValueError(f"Labels [{listed(unknown)}] are not among [{listed(labels)}].")
    matrix = [[0] * (len(labels) + 1) for _ in labels]
    for right, predicted in zip(references, predictions, strict=True):
        matrix[position[right]][position.get(predicted, len(labels))] += 1
    return matrix


def without_empty_other(counts: list[list[int]], labels: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """A confusion matrix and its columns' names to look at: the last column goes where nothing fell into it."""
    if any(row[-1] for row in counts):
        return counts, [*labels, "other"]
    return [row[:-1] for row in counts], list(labels)


def f1_scores(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, float]:
    """2 hits / (2 hits + misses + false alarms) of each label that occurs as references or prediction.

    Args:
        counts: as `confusion_matrix` gives them.
        labels: the label words, in its order.
    """
    scores = {}
    for place, label in enumerate(labels):
        as_truth, as_prediction = sum(counts[place]), sum(row[place] for row in counts)
        if as_truth + as_prediction:
            scores[label] = 2 * counts[place][place] / (as_truth + as_prediction)
    return scores


def figures_of(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """The figures of answers, as JSON writes them.

    Args:
        references: the right labels; none where texts alone are learned, and then there is nothing but their number.
        predictions: what was answered.
        labels: the label words; none where answers are free text.

    Returns:
        `accuracy`, its `accuracy_interval_95`, `correct` of `examples`; with labels also `confusion`, `f1`, `labels`,
        `macro_f1` and `majority_baseline`.

    Raises:
        ValueError: what the figures' own functions raise.
    """
    correct, total = count_correct(references, predictions), len(references)
    if not total:
        return {"correct": 0, "examples": 0}
    figures = {
        "accuracy": correct / total,
        "accuracy_interval_95": list(wilson_interval(correct, total)),
        "correct": correct,
        "examples": total,
    }
    if not labels:
        return figures
    confusion = confusion_matrix(references, predictions, labels)
    f1 = f1_scores(confusion, labels)
    return figures | {
        "confusion": confusion,
        "f1": f1,
        "labels": list(labels),
        "macro_f1": sum(f1.values()) / len(f1),
        "majority_baseline": majority_baseline(references),
    }


def further_scores(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those of an evaluation's figures that not every evaluation has."""
    return {name: value for name, value in figures.items() if name not in _USUAL}


def describe(figures: Mapping[str, Any], unit: str = "") -> dict[str, str]:
    """Figures for the eye, by their names.

    Args:
        figures: as `figures_of` gives them, with `method`, how the answers were found, and any further scores.
        unit: what was counted, with a space before it.
    """
    rows = {}
    if figures["examples"]:
        low, high = figures["accuracy_interval_95"]
        interval = f"95 % interval {low:.1%} to {high:.1%}"
        rows["accuracy"] = f"{figures['accuracy']:.1%} of {figures['examples']:,}{unit} ({interval})"
    rows["asked for"] = str(figures["method"])
    rows |= {name.replace("_", " "): write_score(name, value) for name, value in further_scores(figures).items()}
    if figures.get("macro_f1") is not None:
        rows["macro-F1"] = f"{figures['macro_f1']:.3f}"
    if figures.get("majority_baseline") is not None:
        rows["majority class"] = f"{figures['majority_baseline']:.1%}"
    return rows


def write_score(name: str, value: float) -> str:
    """A further figure of an evaluation for the eye: a share, a number of words, or a score."""
    if name.startswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if name.startswith("words") else f"{value:.3f}"


def _expect_some(total: int) -> None:
    if total < 1:
        raise ValueError("There are no examples to evaluate: expected at least one.")
