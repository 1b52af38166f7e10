"""Clients that ask `ia3 serve` and take the time. Nothing large is imported, since these are processes of their own."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Asked(NamedTuple):
    """A text for a model; what it is asked for follows from the model."""

    model: str
    text: str
    path: str = "/v1/classify"

    @property
    def body(self) -> bytes:
        return json.dumps({"model": self.model, ("input" if "classify" in self.path else "prompt"): self.text}).encode()


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


def ask() -> None:
    """Ask what standard input says, all at once or at a rate; print the rate, and the seconds of each."""
    about = json.load(sys.stdin)
    asked = [Asked(*each) for each in about["asked"]]
    clients = 16 if about["load"] is None else 64
    links = [Client(about["url"]) for _ in range(clients)]
    if about["load"] is None:
        seconds, taken = closed(links, asked)
        print(json.dumps({"per_s": len(asked) / seconds, "taken": taken}))
        return
    free, lock = list(links), threading.Lock()

    def one(each: Asked) -> Any:
        with lock:
            link = free.pop()
        try:
            return link(each)
        finally:
            with lock:
                free.append(link)

    with ThreadPoolExecutor(clients) as pool:
        # Handed on as an argument.
        submit: Callable[[Asked], Future[Any]] = lambda each: pool.submit(one, each)  # noqa: E731
        taken = opened(submit, asked, about["load"])
    print(json.dumps({"per_s": about["load"], "taken": taken}))
