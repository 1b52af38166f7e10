"""The processes that `torchrun` or `accelerate launch` started to share one work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

# Processes wait for the slowest; one that is gone is known by its closed connection.
_PATIENCE = timedelta(days=30)


class RefusedElsewhereError(ValueError):
    """The first process refuses the work, and says why."""


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Args:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks."""
        return self.rank == 0

    def by_first(self, decide: Callable[[], ResultT]) -> ResultT:
        """What the first process finds, for all.

        Raises:
            RefusedElsewhereError: in the others, what `decide` raises in the first.
            ChildProcessError: the first process is gone.
        """
        if self.count == 1:
            return decide()
        import torch.distributed as dist

        found: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                found[0] = decide()
            except (ValueError, OSError, ImportError) as error:
                found[1], failure = str(error), error
        with _gone():
            dist.broadcast_object_list(found, src=0)
        if failure is not None:
            raise failure
        if found[1] is not None:
            raise RefusedElsewhereError(found[1])
        result: ResultT = found[0]
        return result

    def wait(self) -> None:
        """Until all have come here.

        Raises:
            ChildProcessError: one of them is gone.
        """
        if self.count > 1:
            import torch.distributed as dist

            with _gone():
                dist.barrier()


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ChildProcessError(
            "Another of the processes that share this work ended early; its own message says why. What was answered is "
            "kept: start again with `resume=True`, in any number of processes."
        ) from error


def shares_work() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def sharing() -> Iterator[Processes]:
    """This process among those that it was started with; each takes the accelerator of its number."""
    if not shares_work():
        yield Processes()
        return
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    begun = not dist.is_initialized()
    if begun:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if begun:
            dist.destroy_process_group()
