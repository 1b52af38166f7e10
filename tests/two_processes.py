"""A function in two processes of one gloo group."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

WORLD = 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def in_two_processes(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(rank, *args)` in two processes of one gloo group and return what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        multiprocessing.spawn(_worker, (free_port(), result, function, args), nprocs=WORLD)
        return torch.load(result, weights_only=False)


def _worker(rank: int, port: int, result: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        returned = function(rank, *args)
        if rank == 0:
            torch.save(returned, result)
    finally:
        dist.destroy_process_group()
    # Leave without ending the interpreter: gloo's threads may free their last tensors while it ends, and each
    # that asks for its lock by then aborts the process, although the work is done and written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
