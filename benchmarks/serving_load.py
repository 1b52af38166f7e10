"""What the benchmarks of `ia3 serve` share: folders of adapters, words, and clients that ask and take the time."""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from ia3.tasks.task import Task, save_task

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WORDS = [f"w{number}" for number in range(200)]


class Asked(NamedTuple):
    """A text for a model; what it is asked for follows from the model."""

    model: str
    text: str
    path: str = "/v1/classify"

    @property
    def body(self) -> bytes:
        return json.dumps({"model": self.model, ("input" if "classify" in self.path else "prompt"): self.text}).encode()


def words_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose every word is a token."""
    names = ["<pad>", "</s>", "<unk>", *WORDS, "good", "bad", "neutral"]
    inner = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def texts(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """Texts of random words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(shortest, longest))) for _ in range(count)]


def multiply(first: Path, folder: Path, tasks: Sequence[Task], spread: float = 0.1) -> list[str]:
    """As many adapters as tasks like a first one, each with contents of its own; their names.

    Args:
        first: the folder of a saved adapter.
        folder: where folders are made.
        tasks: what each answers.
        spread: how far vectors lie around 1; modules trained in full have normal numbers.
    """
    chance = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in load_file(first / TENSORS).items()}
    names = [f"adapter-{number:04d}" for number in range(len(tasks))]
    for name, task in zip(names, tasks, strict=True):
        place = folder / name
        place.mkdir(parents=True)
        os.link(first / CONFIG, place / CONFIG)
        drawn = {key: torch.randn(shape, generator=chance) for key, shape in shapes.items()}
        tensors = {key: 1 + spread * x if "ia3_l" in key else 0.3 * x for key, x in drawn.items()}
        save_file(tensors, place / TENSORS, metadata={"format": "pt"})
        save_task(place, task)
    return names


class Client:
    """One connection that stays open."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._link = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)

    def __call__(self, asked: Asked) -> Any:
        """The answer.

        Raises:
            RuntimeError: there is none.
        """
        self._link.request("POST", asked.path, asked.body, {"Content-Type": "application/json"})
        response = self._link.getresponse()
        said = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {said}")
        return said


def closed(asks: Sequence[Callable[[Asked], Any]], asked: Sequence[Asked]) -> tuple[float, list[float]]:
    """So many clients who each ask again as soon as they are answered: seconds of all, and of each."""
    taken: list[float] = []
    left, lock = iter(asked), threading.Lock()

    def work(ask: Callable[[Asked], Any]) -> None:
        while True:
            with lock:
                each = next(left, None)
            if each is None:
                return
            started = time.perf_counter()
            ask(each)
            taken.append(time.perf_counter() - started)

    with ThreadPoolExecutor(len(asks)) as pool:
        started = time.perf_counter()
        for done in [pool.submit(work, ask) for ask in asks]:
            done.result()
        return time.perf_counter() - started, taken


def opened(submit: Callable[[Asked], Future[Any]], asked: Sequence[Asked], rate: float) -> list[float]:
    """Requests that come at random moments, so many a second, whatever is answered: seconds from when each was due."""
    chance, due, taken, waiting = random.Random(0), time.perf_counter(), [], []

    def note(due: float) -> Callable[[Future[Any]], None]:
        return lambda _: taken.append(time.perf_counter() - due)

    for each in asked:
        due += chance.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        waiting.append(submit(each))
        waiting[-1].add_done_callback(note(due))
    for each in waiting:
        each.result()
    return taken


def percentiles(taken: Sequence[float]) -> dict[str, float]:
    """The median and the 95th percentile, in milliseconds."""
    cuts = statistics.quantiles(taken, n=20, method="inclusive")
    return {"p50_ms": round(1e3 * cuts[9], 2), "p95_ms": round(1e3 * cuts[18], 2)}
