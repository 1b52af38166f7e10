"""Triton's kernels: how they are written down, launched, and compiled side by side beforehand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ia3.fast.ops.backend import has_triton

MAX_NUMBERS = 1 << 31
"""A tensor of so many numbers and more is PyTorch's: kernels count in 32 bits, where not said otherwise."""


class _Kernel:
    """A kernel, or a function of kernels, that Triton gets when it is first needed.

    Importing Triton takes half a second, is possible only where it is installed, and is for nothing on a CPU. The
    kernel's file therefore names `tl` for type checkers alone, and here the function gets Triton's modules and what
    Triton made of the kernels that it calls.
    """

    def __init__(self, function: FunctionType, do_not_specialize: Sequence[str]) -> None:
        self.function, self.do_not_specialize = function, do_not_specialize

    @cached_property
    def by_triton(self) -> Any:
        import triton
        import triton.language

        known = {**self.function.__globals__, "tl": triton.language}
        used = {name: known[name] for name in self.function.__code__.co_names if name in known}
        known |= {name: value.by_triton for name, value in used.items() if isinstance(value, _Kernel)}
        own = FunctionType(self.function.__code__, known, self.function.__name__)
        own.__annotations__ = self.function.__annotations__
        return triton.jit(own, do_not_specialize=self.do_not_specialize)


def jit(function: Any = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """`triton.jit`, without Triton for the time being.

    Args:
        function: the kernel; None where what decorates it is called first.
        do_not_specialize: integers of which a value that is 1 or a multiple of 16 is nothing to compile anew for.
    """
    if function is None:
        return partial(jit, do_not_specialize=do_not_specialize)
    return _Kernel(function, do_not_specialize)


class _Mode(threading.local):
    """What this thread does with kernels; another one may run them meanwhile."""

    only_compiles = False


_mode = _Mode()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """With a GPU as the current one, where Triton launches and PyTorch records, whichever the tensors are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel, on the device of its tensors.

    Args:
        kernel: decorated with `jit`.
        grid: how many programs, along up to three axes.
        arguments: tensors, where the kernel takes pointers, None and numbers; a tensor before all numbers.
        constants: what it is compiled for.
    """
    first: Tensor = next(each for each in arguments if each is not None)
    with on_device(first.device):
        if _mode.only_compiles:
            kernel.by_triton.run(*arguments, grid=grid, warmup=True, **constants)
        else:
            kernel.by_triton[grid](*arguments, **constants)


def compile_kernels(computation: Callable[[], object], device: torch.device) -> None:
    """Compile the kernels that a computation launches, side by side; one after the other they take many seconds.

    Args:
        computation: run once with all but the kernels, so that what it computes means nothing: it must be one that can
            be run again. Not run at all on a device without kernels.
        device: the model's.
    """
    start_compiling(computation, device)()


def start_compiling(computation: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The same, in threads that go on afterwards; returns what waits for them."""
    if not has_triton(device):
        return lambda: None
    import triton

    compilers = _Compilers(device)
    # What can't be compiled says so when it is launched.
    mode = triton.AsyncCompileMode(compilers, ignore_errors=True)

    def find() -> None:
        mode.__enter__()
        computation()

    random = torch.cuda.get_rng_state(device)
    _mode.only_compiles = True
    try:
        # A backward on a thread of its own would compile as ever. Outside of this context Triton compiles as ever.
        with torch.autograd.set_multithreading_enabled(False):
            copy_context().run(find)
    finally:
        _mode.only_compiles = False
        torch.cuda.set_rng_state(random, device)
        compilers.shutdown(wait=False)
    return lambda: mode.__exit__(None, None, None)


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, each with the function that launches it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(lambda: _launchable(compile_kernel()))


def _launchable(kernel: Any) -> Any:
    getattr(kernel, "run", None)  # Triton makes the launcher when it is first asked for
    return kernel


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up: how many blocks of y hold x."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of two from x on: the size of a block that holds x."""
    return 1 << (x - 1).bit_length()
