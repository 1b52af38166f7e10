"""A function in two processes of one gloo group."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

WORLD = 2


def in_two_processes(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(rank, *args)` in two processes of one gloo group and return what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, (Path(folder), function, args), nprocs=WORLD)
        return torch.load(Path(folder) / "result.pt", weights_only=False)


def _worker(rank: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # They meet at a file: a port that was free may be taken by the time that they start.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        returned = function(rank, *args)
        if rank == 0:
            torch.save(returned, folder / "result.pt")
    finally:
        dist.destroy_process_group()
    # Leave without ending the interpreter: gloo's threads may free their last tensors while it ends, and each
    # that asks for its lock by then aborts the process, although the work is done and written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
