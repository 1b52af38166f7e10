"""Digests of what a training left in its folder, so that a flipped bit is noticed, in the form of `sha256sum`.

They stand there while nobody works in the folder: of a training that ended, and of one that was stopped. An adapter
that is copied out of it stays a plain one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ia3.cache import digest
from ia3.files import read_file, write_atomically
from ia3.runs.run import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    BEST_FOLDER,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    RESULT_NAME,
    SUMS_NAME,
    SWEEP_NAME,
    SWEEP_RECIPES_NAME,
)

# A card is its owner's to edit, and pictures and reports are read by people alone.
_COVERED = {RECIPE_NAME, ENVIRONMENT_NAME, METRICS_NAME, RESULT_NAME, SWEEP_NAME, SWEEP_RECIPES_NAME, *ADAPTER_FILES}
# The most bytes of the digests: a line a file, of which a run has a dozen.
_LIMIT = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_sums(folder: Path) -> None:
    """Write the digests of the files in a folder, its adapters' among them."""
    lines = [f"{digest(folder / name)}  {name}\n" for name in _covered(folder)]
    write_atomically(folder / SUMS_NAME, "".join(lines).encode())


def _covered(folder: Path) -> list[str]:
    """The files of a folder that have a digest."""
    within = (folder, folder / ADAPTER_FOLDER, folder / BEST_FOLDER)
    paths = sorted(each / name for each in within for name in _COVERED)
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def changed_files(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Which files of a folder are not what they were when its digests were written; none where it has no digests.

    Args:
        folder: a run's or a sweep's.
        names: the files in question, or folders of theirs; all by default.

    Raises:
        ValueError: the digests themselves are damaged.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return []
    found = [_LINE.fullmatch(line) for line in read_file(path, _LIMIT).decode(errors="replace").splitlines()]
    if not all(found):
        raise ValueError(f"{path} is damaged: copy the folder again, or remove this file where you trust the others.")
    expected = {each[2]: each[1] for each in found if each is not None}
    known = dict.fromkeys([*expected, *_covered(folder)])
    asked = [name for name in known if names is None or {name, name.partition("/")[0]} & {*names}]
    return [name for name in asked if not (folder / name).is_file() or digest(folder / name) != expected.get(name)]


def expect_unchanged(folder: Path, *names: str) -> None:
    """Refuse files of a run or a sweep, or folders of theirs, that are damaged.

    Raises:
        ValueError: one of them is not what the training left.
    """
    changed = changed_files(folder, names)
    if changed:
        raise ValueError(
            f"{folder / changed[0]} is not what its training left, by {SUMS_NAME}: it is damaged. Copy it again or "
            f"train again; where you changed it yourself, remove {folder / SUMS_NAME}."
        )


def expect_adapter_unchanged(adapter: str | Path) -> None:
    """`expect_unchanged` of an adapter that stands in its run's folder; any other is nobody's to check."""
    path = Path(adapter).absolute()
    if path.name in (ADAPTER_FOLDER, BEST_FOLDER):
        expect_unchanged(path.parent, path.name)
