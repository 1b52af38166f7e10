"""An engine's stand-in, whose answers are known, and HTTP around it on a port of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import uvicorn

from ia3.serving.http import make_app
from ia3.serving.intake import runs_from_now
from ia3.serving.limits import Keys, RequestLimits
from ia3.serving.listening import Listener, bind
from ia3.serving.requests import (
    Answer,
    Dropped,
    NotServed,
    Overloaded,
    Refused,
    Request,
    Served,
    TooLate,
    UnknownModel,
)

KEY, OTHER_KEY, ADMIN_KEY = "a-key-of-a-client", "the-key-of-another", "administrators-key"
NEWS = Served("news", "d" * 64, "tiny", ("prod",), "label-words", ("good", "bad"))
WRITER = Served("writer", "e" * 64, "tiny", (), "generation")
PROBABILITIES = {"good": 0.75, "bad": 0.25}
OUTCOMES = ("answered", "failed", "too_late", "cancelled", "overloaded", "dropped")
FIGURES = (
    *("queued", "running", "adapters", "refused", "versions", "resident"),
    *("batches", "ran_s", "prompt_tokens", "completion_tokens"),
    *(f"requests_{outcome}" for outcome in OUTCOMES),
)


@dataclass
class StandIn:
    """Answers at once, but for texts that ask for trouble: `wait` until `released`, `late`, `busy`, `fault`, `drop`,
    `odd`, `breaks`."""

    ready: bool = True
    served: dict[str, Served] = field(default_factory=lambda: {each.name: each for each in (NEWS, WRITER)})
    requests: list[Request] = field(default_factory=list)
    futures: list[Future[Answer]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lists: list[int] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(8)

    def submit(self, request: Request) -> Future[Answer]:
        if not self.ready:
            raise Dropped("This server stops: ask another.")
        served = self._find(request.model)
        if request.text == "busy":
            raise Overloaded("7 requests wait: ask again.", 2.5)
        if served is NEWS and request.max_new_tokens is not None:
            raise NotServed("news chooses from labels: leave max_tokens out.")
        if request.labels and not served.labels:
            raise NotServed(f"{request.model} writes text and has no labels: ask /v1/completions.")
        self.requests.append(request)
        future: Future[Answer] = Future()
        self.futures.append(future)
        if request.text != "wait":
            self.pool.submit(self._answer, request, served, future)
        else:
            threading.Thread(target=self._wait, args=(request, served, future), daemon=True).start()
        return future

    @contextmanager
    def together(self, count: int) -> Iterator[None]:
        self.lists.append(0)
        before = len(self.requests)
        yield
        self.lists[-1] = len(self.requests) - before

    def _wait(self, request: Request, served: Served, future: Future[Answer]) -> None:
        self.released.wait(60)
        self._answer(request, served, future)

    def _answer(self, request: Request, served: Served, future: Future[Answer]) -> None:
        if request.text == "drop":
            future.cancel()
        if not runs_from_now(future):
            return
        if request.embeds:
            vector = [0.6, -0.8, float(len(request.text))]
            future.set_result(Answer("", None, None, served.name, served.digest, 5, 0, "stop", 0.1, 0.2, vector))
        elif request.text == "late":
            future.set_exception(TooLate("The deadline went by."))
        elif request.text == "fault":
            future.set_exception(RuntimeError(f"a secret: {request.text}"))
        elif request.text == "odd":
            future.set_result(Answer("odd", None, None, served.name, served.digest, 5, 2, "stop", 0.1, 0.2))
        elif served.labels:
            first, *others = served.labels
            shares = {first: 0.75, **dict.fromkeys(others, 0.25 / max(1, len(others)))}
            future.set_result(Answer(first, first, shares, served.name, served.digest, 5, 0, "stop", 0.1, 0.2))
        else:
            text = f"{request.text}!"
            for piece in (text[:1], text[1:3]) if request.on_token else ():
                request.on_token(piece)  # type: ignore[misc]
            if request.text == "breaks":
                future.set_exception(TooLate("The deadline went by."))
                return
            future.set_result(Answer(text, None, None, served.name, served.digest, 3, 4, "length", 0.1, 0.2))

    def find(self, name: str) -> Served | None:
        if name == "tiny":
            return self.models()[0]
        with suppress(UnknownModel):
            return self._find(name)
        return None

    def _find(self, name: str) -> Served:
        for each in self.served.values():
            if name in (each.name, f"tiny:{each.name}", *each.aliases):
                return each
        raise UnknownModel(f"There is no model {name[:20]!r}.")

    def models(self) -> list[Served]:
        return [Served("tiny", None, None), *self.served.values()]

    def load(self, name: str, path: str) -> Served:
        if ".." in path or path.startswith("/"):
            raise Refused("The path leads out of the folder: give one below it.")
        self.served[name] = Served(name, "f" * 64, "tiny", (), "label-words", ("good", "bad"))
        return self.served[name]

    def unload(self, name: str) -> None:
        del self.served[self._find(name).name]

    def alias(self, alias: str, name: str) -> Served:
        found = self._find(name)
        self.served[found.name] = replace(found, aliases=(*found.aliases, alias))
        return self.served[found.name]

    def stats(self) -> dict[str, float]:
        """Each with another number."""
        return {name: float(number) for number, name in enumerate(FIGURES, 2)}

    def drain(self, timeout_s: float) -> bool:
        self.ready = False
        end = time.monotonic() + timeout_s
        while any(not each.done() for each in self.futures) and time.monotonic() < end:
            time.sleep(0.01)
        for each in self.futures:
            with suppress(InvalidStateError):
                each.set_exception(Dropped("This server stops: ask another."))
        return True

    def close(self, timeout_s: float | None = None) -> None:
        self.ready, self.closed = False, True
        self.pool.shutdown(wait=False)


@dataclass
class Site:
    """A running server: its engine, its address, and clients of it."""

    engine: Any
    url: str
    listener: Listener
    thread: threading.Thread

    def client(self, key: str | None = KEY) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=20)

    def post(self, path: str, key: str | None = KEY, **body: Any) -> httpx2.Response:
        with self.client(key) as client:
            return client.post(path, json=body)

    def get(self, path: str, key: str | None = KEY) -> httpx2.Response:
        with self.client(key) as client:
            return client.get(path)

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=20)

    def send_raw(self, head: str, body: bytes, key: str = KEY) -> bytes:
        """All that comes back for bytes as they are, on a connection of its own."""
        with self.connect() as link:
            about = (
                f"Host: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            link.sendall(f"{head} HTTP/1.1\r\n{about}".encode() + body)
            return b"".join(iter(lambda: link.recv(65536), b""))


@contextmanager
def site(
    engine: Any = None,
    *,
    keys: Sequence[str] = (KEY, OTHER_KEY),
    drain_s: float = 5.0,
    hosts: frozenset[str] | None = None,
    root_path: str = "",
    **limits: Any,
) -> Iterator[Site]:
    """A server on a free port of this machine, for a stand-in or the engine that is given, which it closes."""
    engine = engine or StandIn()
    own: Any = {"keys": Keys(keys), "admin": Keys([ADMIN_KEY])} if keys else {}
    app = make_app(engine, limits=RequestLimits(**limits), hosts=hosts, **own)
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=int(drain_s) + 20,  # ours comes first
        root_path=root_path,
    )
    listener = Listener(config, engine, drain_s)
    thread = threading.Thread(target=listener.run, args=([bound],), daemon=True)
    thread.start()
    running = Site(engine, f"http://127.0.0.1:{bound.getsockname()[1]}", listener, thread)
    while not listener.started:
        time.sleep(0.005)
    try:
        yield running
    finally:
        if isinstance(engine, StandIn):
            engine.released.set()
        listener.should_exit = True
        thread.join(60)
        engine.close()
        assert not thread.is_alive()


def until(reached: Any, seconds: float = 60) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.005)


def events(text: str) -> list[Any]:
    """The objects of a stream, behind whose last stands `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
