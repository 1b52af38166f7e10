"""Processes that share one work: how one joins the others, what they add up and share, and which of them writes."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from rich.console import Console
from torch import Tensor

from ia3.errors import RefusedElsewhereError
from ia3.inference.predict import Beat, answer_in_batches
from ia3.launched import launched_processes

AnswerT = TypeVar("AnswerT")
RowT = TypeVar("RowT")
SharedT = TypeVar("SharedT")

_CPU = torch.device("cpu")
# What `accelerate launch` may put into the environment, which values of it ask for nothing, and what there is instead.
_OTHER_WAYS = (
    ("ACCELERATE_USE_DEEPSPEED", ("false", "0"), "a base that doesn't fit one GPU is divided by FSDP2 (--use_fsdp)"),
    ("ACCELERATE_USE_MEGATRON_LM", ("false", "0"), "a base that doesn't fit one GPU is divided by FSDP2 (--use_fsdp)"),
    ("ACCELERATE_MIXED_PRECISION", ("no",), "the recipe has `precision`"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "the recipe has `gradient_accumulation`"),
)
PATIENCE = timedelta(minutes=10)
"""After so long without a word from the others a process takes them for lost."""


class LostProcessError(ConnectionError):
    """Another process that shares the work ended, or did not answer in time."""


@dataclass(frozen=True)
class Processes:
    """This process among those that share a work; by itself it asks nobody.

    Args:
        rank: its number; 0 writes and prints.
        count: how many there are.
        device: where its tensors are.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def share(self, rows: Sequence[RowT]) -> Sequence[RowT]:
        """Its part of a batch, every `count`th row, so that long and short ones are spread; it may be empty."""
        return rows if self.alone else rows[self.rank :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor that each has in the same shape."""
        if self.alone:
            return tensor
        with _hearing_the_others():
            found: Tensor = reduce(tensor, "sum")
        return found

    def any(self, *asked: bool) -> list[bool]:
        """Which of some things at least one process asks for."""
        if self.alone:
            return list(asked)
        return [count > 0 for count in self.sum(torch.tensor(asked, dtype=torch.float32, device=self.device)).tolist()]

    def gather(self, own: SharedT) -> list[SharedT]:
        """What each process gives, in the order of their numbers; all get it."""
        if self.alone:
            return [own]
        with _hearing_the_others():
            found: list[SharedT] = gather_object([own])
        return found

    def of_first(self, make: Callable[[], SharedT]) -> SharedT:
        """What the first process makes; the others get it.

        Raises:
            RefusedElsewhereError: in the others, what `make` raises in the first.
        """
        if self.alone:
            return make()
        own: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                own[0] = make()
            except (ValueError, OSError, ImportError, FloatingPointError) as error:
                own[1], failure = str(error), error
        with _hearing_the_others():
            broadcast_object_list(own)
        if failure is not None:
            raise failure
        if own[1] is not None:
            raise RefusedElsewhereError(own[1])
        found: SharedT = own[0]
        return found

    def console(self, given: Console | None) -> Console:
        """The console of the first process; the others' says nothing."""
        return (given or Console(stderr=True)) if self.is_first else Console(quiet=True)

    def wait(self) -> None:
        """Go on when all have come here."""
        self.any(False)

    def answer_in_batches(
        self, batches: Iterable[list[int]], answer: Callable[[list[int]], Sequence[AnswerT]], beat: Beat
    ) -> list[AnswerT]:
        """Answer the batches in turns, each the one that a single process would answer; all get all answers.

        Args:
            batches: the indices 0, 1, … in any order.
            answer: answers one batch, in its order.
            beat: called after each round of one batch a process with the number of its rows; what it raises ends the
                work, so it must raise in all processes or in none.

        Returns:
            One answer an index, in their order.
        """
        if self.alone:
            return answer_in_batches(batches, answer, beat)
        own: dict[int, AnswerT] = {}
        left = iter(batches)
        while around := list(islice(left, self.count)):
            if self.rank < len(around):
                own |= zip(around[self.rank], answer(around[self.rank]), strict=True)
            beat(sum(map(len, around)))
        found: dict[int, AnswerT] = {}
        for each in self.gather(own):
            found |= each
        return [found[index] for index in range(len(found))]

    def expect_alike(self, facts: dict[str, Any]) -> None:
        """Refuse by a ValueError that a fact is another in some process than in the first, such as its data."""
        told = self.gather(facts)
        for name in facts:
            others = [number for number, each in enumerate(told) if each[name] != told[0][name]]
            if others:
                raise ValueError(
                    f"The processes {others} have another {name} than process 0: let all of them read the same files."
                )


ALONE = Processes()


def join(patience: timedelta = PATIENCE) -> Processes:
    """Join the processes that a launcher started, or those of the process group that the caller made.

    accelerate decides the device and the transport: GPU number LOCAL_RANK and NCCL, or without GPUs gloo. It would not
    look for other processes on a machine without a GPU, unless told so.

    Args:
        patience: how long to wait for the others, where this makes the group; one that is gone is known earlier, by its
            closed connection.

    Raises:
        ValueError: what a launcher says and what can be joined differ.
    """
    _refuse_other_ways()
    expected = launched_processes()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        expected = torch.distributed.get_world_size()
        _say_as_a_launcher()
    has_device = torch.accelerator.current_accelerator(check_available=True) is not None
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not has_device
    several = expected > 1 or "LOCAL_RANK" in os.environ
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = PartialState(cpu=on_cpu, **({"timeout": patience} if several else {}))
    if state.num_processes > 1 and not torch.distributed.is_initialized():
        raise ValueError(
            f"The process group of {state.num_processes} processes that this one belonged to is gone: start another "
            "process to train on."
        )
    if state.num_processes != expected:
        raise ValueError(
            f"A launcher or a process group says that there are {expected} processes, and this one is joined with "
            f"{state.num_processes}: start ia3 by `torchrun` or `accelerate launch`, which set LOCAL_RANK, RANK and "
            "WORLD_SIZE, and make a process group of your own before anything of accelerate."
        )
    if state.num_processes > 1 and not is_there:
        atexit.register(_leave)
    if state.process_index:
        _be_silent()
    # With this, which accelerate's launcher sets by default, transformers would read the base in one process alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return Processes(state.process_index, state.num_processes, state.device)


def _leave() -> None:
    """End the group that was made here: gloo's threads abort a process whose interpreter ends before them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _refuse_other_ways() -> None:
    """Refuse what accelerate's configuration asks for and this training would not do."""
    for name, off, what in _OTHER_WAYS:
        asked = os.environ.get(name, "")
        if asked.lower() not in ("", *off):
            raise ValueError(
                f"accelerate's configuration says {name}={asked}, which is not heard here: {what}. Launch without it, "
                "as by `torchrun`."
            )


def _say_as_a_launcher() -> None:
    """Put into the environment, where accelerate looks, what a process group knows that came without a launcher."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = torch.cuda.current_device() if torch.cuda.is_available() else rank
    facts = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
    for name, number in facts.items():
        os.environ.setdefault(name, str(number))


def _be_silent() -> None:
    """The first process says what all have to say."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    logging.getLogger("ia3").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bar()


@contextmanager
def _hearing_the_others() -> Iterator[None]:
    """Say in plain words that another process is gone.

    Raises:
        LostProcessError: instead of what the transport raises.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # this one's own
        raise
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise LostProcessError(
            "Another of the processes that share this work ended or did not answer in time, so this one ends, too; its "
            f"own message says why. What was saved is kept: start again with `resume`. ({said})"
        ) from error
