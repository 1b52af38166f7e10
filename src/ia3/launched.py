"""Which of several processes this one is, as far as the environment tells, before anything is imported or joined."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

# By the names of torchrun and accelerate, and of the launchers of MPI, as accelerate reads them.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_rank() -> int:
    """The number of this process among those that a launcher started; 0 without a launcher."""
    return _number(_RANKS, 0)


def launched_processes() -> int:
    """How many processes a launcher started; 1 without a launcher."""
    return _number(_SIZES, 1)


@contextmanager
def first_prints() -> Iterator[None]:
    """Let standard output be that of the first process alone."""
    if not launched_rank():
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _number(names: Iterable[str], otherwise: int) -> int:
    found = (os.environ.get(name, "") for name in names)
    return next((int(each) for each in found if each.isdecimal()), otherwise)
