"""From a socket to an exit code: uvicorn, which drains the engine when it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ia3.serving.requests import Server

# Heads larger than these are refused before anything reads them.
_LARGEST_HEAD = 32 << 10
# Bytes that are parsed before others have a turn: as chunks of a byte each they take some hundredths of a second.
_PIECE = 8 << 10
# Seconds that clients have to read what became of their requests at the end.
_TO_TELL_S = 2
# Seconds for which an idle connection is held, longer than proxies hold theirs: else they ask where nobody listens.
_IDLE_S = 75
# Seconds in which an engine that has failed is seen to have, before the process ends for it.
_FAILED_S = 3.0


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, at which nobody listens yet.

    Raises:
        ValueError: the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:  # nobody else would close it
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{host}, port {port}: {why}. Give another `host` or `port`, or 0 for a free port.") from error
    return bound


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def in_url(host: str) -> str:
    """An address as it stands in a URL and in a Host header."""
    return f"[{host}]" if ":" in host else host


def own_names(host: str) -> frozenset[str]:
    """What a server that only this machine reaches is called, as a Host header says it without a port."""
    return frozenset({"localhost", "127.0.0.1", "[::1]", in_url(host).lower()})


def listen(app: FastAPI, server: Server, bound: socket.socket, *, drain_s: float = 30.0) -> bool:
    """Answer until SIGTERM or Ctrl-C, or until the engine has failed: then accept nothing more, and end what was begun.

    What was begun may still send the rest of its requests to the engine, which takes none after `drain_s`.

    Args:
        app: what `make_app` made.
        server: whose requests are waited for, and which is closed.
        bound: where to listen.
        drain_s: the most seconds to wait for them.

    Returns:
        Whether it was told to stop.
    """
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=math.ceil(drain_s) + _TO_TELL_S,
    )
    listener = Listener(config, server, drain_s)
    try:
        listener.run([bound])
    finally:
        # What still runs, after that time, is for nobody.
        server.close(_TO_TELL_S)
    return not listener.is_over


class _Connection(H11Protocol):
    """uvicorn's, which reads little at once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        if hasattr(transport, "max_size"):  # asyncio's own
            transport.max_size = _PIECE
        super().connection_made(transport)


class Listener(uvicorn.Server):
    """uvicorn's, for an engine that is drained.

    Args:
        config: uvicorn's.
        engine: whose requests are waited for.
        drain_s: the most seconds to wait.
    """

    def __init__(self, config: uvicorn.Config, engine: Server, drain_s: float) -> None:
        config.http = _Connection
        super().__init__(config)
        self._engine, self._drain_s = engine, drain_s
        self._was_ready = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the engine has failed: it takes no more requests, though nobody told it to stop."""
        return time.monotonic() - self._was_ready > _FAILED_S and not self.should_exit

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn's, several times a second. Who starts processes again sees one that has ended."""
        if self._engine.ready:
            self._was_ready = time.monotonic()
        return await super().on_tick(counter) or self.is_over

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which raises the signal again at the end, so that an orderly stop would look like a kill."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in former.items():
                signal.signal(each, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Connections end their requests, for which the engine goes on; those that are too late are told so."""
        ending = asyncio.create_task(super().shutdown(sockets))
        await asyncio.wait([ending], timeout=self._drain_s)
        await asyncio.to_thread(self._engine.drain, 0)
        await ending
