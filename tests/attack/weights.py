"""Hostile weights of adapters, configurations of adapters, and bases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import ADAPTER_DOORS, Attack, Ground

TENSORS = "adapter_model.safetensors"


def attacks() -> Iterator[Attack]:
    """All of them."""
    for name, write in SPECIAL.items():
        yield Attack("no file", name, _instead_of(TENSORS, write), ADAPTER_DOORS)


def _instead_of(file: str, write: Callable[[Path], None]) -> Callable[[Path, Ground], None]:
    """An honest adapter with something else in the place of one of its files."""

    def build(folder: Path, ground: Ground) -> None:
        shutil.copytree(ground.adapter, folder, dirs_exist_ok=True)
        (folder / file).unlink()
        write(folder / file)

    return build


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "empty": Path.touch,
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
}
