"""A writer of one token at a time on a loop of its own, by the base's own forward: what stands for vLLM here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fleet import BASE, bare, tokenizer_of

from ia3.serving.continuous import ContinuousEngine, Tokens
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.table import AdapterTable


class SlowWriter(AdapterTable):
    """Writes greedily under the adapters of its table.

    Args:
        model: the base, whose forward runs in the loop.
        at_once: how many requests are written at once; others wait.
        longest: the most tokens of a prompt and its answer.
    """

    def __init__(self, model: Any, *, at_once: int = 32, longest: int = 1000) -> None:
        super().__init__(model)
        self.model, self.longest, self.alive = model, longest, True
        self.fault: Exception | None = None
        self.under_way: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(at_once)
        # Set unless a test holds the writing back.
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    async def write(self, prompt: Sequence[int], row: str, ends: Sequence[int], most: int) -> AsyncIterator[Tokens]:
        async with self.slots:
            self.under_way.append(row)
            try:
                started, ids = time.monotonic(), list(prompt)
                while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] not in ends):
                    if self.fault is not None:
                        raise self.fault
                    ids.append(self.next_token(ids, row))
                    yield Tokens(ids[-1:], started)
                    await self.may_write.wait()
                    await asyncio.sleep(0)
            finally:
                self.under_way.remove(row)

    @torch.no_grad()
    def next_token(self, ids: list[int], row: str) -> int:
        logits = self.model(input_ids=torch.tensor([ids]), adapter_names=[row]).logits
        return int(logits[0, -1].argmax())

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Each writes one token more, and then none until the block ends."""
        self.loop.call_soon_threadsafe(self.may_write.clear)
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(self.may_write.set)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        super().close()


@contextmanager
def writing(folder: Path, *, at_once: int = 32, longest: int = 1000, **limits: Any) -> Iterator[ContinuousEngine]:
    """An engine over a slow writer and the adapters of a folder, whose folder is looked at by `refresh` alone."""
    model = bare(causal=True)
    writer = SlowWriter(model, at_once=at_once, longest=longest)
    registry = Registry(model, folder, base=BASE, table=writer)
    engine = ContinuousEngine(model, tokenizer_of(causal=True), registry, writer, Limits(**limits))
    try:
        yield engine
    finally:
        if writer.thread.is_alive():
            engine.close()
