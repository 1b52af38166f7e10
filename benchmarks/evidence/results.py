"""Results: one line of JSON a run, which rates are tried next, and which one a method is judged by.

A rate is chosen on the validation set. RAFT has none: there a task's rate is the best on the other tasks, of those that
the search tried, which goes by the mean over all tasks.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Half decades: the same for every method, which walks over them from its customary one.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Rates that the best one must have on either side; RAFT's walks are a task's folds long each.
REACH, RAFT_REACH = 2, 1
SEEDS = (0, 1, 2, 3, 4)
KEY = ("kind", "base", "data", "digest", "method", "rate", "seed", "steps", "batch_size", "max_length")

Record = dict[str, Any]


class Results:
    """A file of records that several processes append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[tuple[Any, ...], Record] = {key_of(record): record for record in read(path)}

    def find(self, **key: Any) -> Record | None:
        return self.records.get(key_of(key))

    def add(self, record: Record) -> None:
        append(self.path, record)
        self.records[key_of(record)] = record


def append(path: Path, record: Record) -> None:
    """Write a whole line at once, so that a kill leaves at most one torn line, which `read` passes over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False, sort_keys=True) + "\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """All whole lines of a file; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)


def pack_bits(correct: Sequence[bool]) -> str:
    """Which rows were right, as hexadecimal digits, the first row the highest bit."""
    digits = -(-len(correct) // 4)
    number = int("".join("01"[each] for each in correct).ljust(4 * digits, "0") or "0", 2)
    return f"{number:0{digits}x}"


def unpack_bits(packed: str, count: int) -> list[bool]:
    bits = "".join(f"{int(digit, 16):04b}" for digit in packed)
    return [bit == "1" for bit in bits[:count]]


def accuracy(correct: Sequence[bool]) -> float:
    return sum(correct) / len(correct)


def next_rate(scores: dict[float, float], customary: float, reach: int) -> float | None:
    """The rate to try next: until the best has so many neighbours on either side, or the grid ends.

    Args:
        scores: of the rates tried so far.
        customary: the first.
        reach: how many neighbours.
    """
    if not scores:
        return customary
    at = RATES.index(best_rate(scores))
    wanted = [at + step * side for step in range(1, reach + 1) for side in (-1, 1)]
    return next((RATES[n] for n in wanted if 0 <= n < len(RATES) and RATES[n] not in scores), None)


def best_rate(scores: dict[float, float]) -> float:
    """The rate with the highest score; of equal ones the lowest, which is the calmer one."""
    return max(sorted(scores), key=scores.__getitem__)


def validation_scores(records: Iterable[Record]) -> dict[float, float]:
    """Each rate's mean accuracy on the validation set; a hundredth of a row's worth of its loss settles ties.

    Nothing of the test set is looked at.
    """
    found: dict[float, list[float]] = {}
    for record in records:
        loss = record["validation_loss"]
        tie = -1.0 if loss is None else -math.tanh(loss)
        score = record["validation_accuracy"] + 0.01 * tie / record["validation_rows"]
        found.setdefault(record["rate"], []).append(score)
    return {rate: sum(scores) / len(scores) for rate, scores in found.items()}


def accuracy_by_task(records: Iterable[Record]) -> dict[float, dict[str, float]]:
    """Of each rate and each task of RAFT, over all rows of its folds."""
    right: dict[tuple[float, str], list[int]] = {}
    for record in records:
        counts = right.setdefault((record["rate"], record["data"]), [0, 0])
        counts[0] += sum(unpack_bits(record["test_correct"], record["test_rows"]))
        counts[1] += record["test_rows"]
    found: dict[float, dict[str, float]] = {}
    for (rate, task), (correct, rows) in right.items():
        found.setdefault(rate, {})[task] = correct / rows
    return found


def rate_of_task(by_task: dict[float, dict[str, float]], task: str) -> float:
    """The rate that is best on the other tasks."""
    return best_rate(
        {rate: mean([score for name, score in tasks.items() if name != task]) for rate, tasks in by_task.items()}
    )


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def walk(customary: float, reach: int, score: Callable[[float], float | None]) -> dict[float, float]:
    """Try rates until `next_rate` asks for no more, or there is no time for one (None)."""
    scores: dict[float, float] = {}
    while (rate := next_rate(scores, customary, reach)) is not None:
        found = score(rate)
        if found is None:
            break
        scores[rate] = found
    return scores
