"""Waiting for an engine's threads from the loop of HTTP: until all is answered, the client is gone, or it is late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

from ia3.serving.requests import Answer, Dropped, Request, TooLate

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


class Waiting:
    """Requests that belong together; leaving the block drops what isn't answered.

    Everything that can happen comes through one queue: a piece of an answer, an answer, an error, the client's going,
    the end of the time.

    Args:
        submit: what takes a request in, as `Server.submit`.
        together: as `Server.together`.
        requests: what is asked.
        receive: the connection's, from which the whole body was read.
        seconds: until nobody waits any more.
    """

    def __init__(
        self,
        submit: Callable[[Request], Future[Answer]],
        together: Callable[[int], AbstractContextManager[None]],
        requests: Sequence[Request],
        receive: Receive,
        seconds: float,
    ) -> None:
        self._take, self._together, self._requests, self._dropped = submit, together, requests, False
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str | Future[Answer] | Exception]] = asyncio.Queue()
        self._futures: list[Future[Answer]] = []
        late = TooLate(f"There was no answer within {seconds:g} seconds: send less at once, or try again later.")
        self._timer = self._loop.call_later(seconds, self._events.put_nowait, (0, late))
        self._watch = self._loop.create_task(self._watch_client(receive))
        # In a thread, since a server makes tokens of a text when it takes it.
        self._loop.run_in_executor(None, self._submit)

    async def events(self) -> AsyncIterator[tuple[int, str | Answer]]:
        """Pieces and answers as they come, each with its request's index.

        Raises:
            ServingError: the first request that gets no answer.
            ClientGoneError: the client has closed its connection.
        """
        left = len(self._requests)
        while left:
            index, found = await self._events.get()
            if isinstance(found, Exception):
                raise found
            if isinstance(found, str):
                yield index, found
                continue
            left -= 1
            try:
                answer = found.result()
            except CancelledError:
                raise Dropped("The server has dropped this request: try again.") from None
            yield index, answer

    async def answers(self) -> list[Answer]:
        """All answers, in the order of the requests; see `events` for what is raised."""
        found = {index: each async for index, each in self.events() if isinstance(each, Answer)}
        return [found[index] for index in range(len(found))]

    def drop(self) -> None:
        """Nobody waits any more."""
        self._dropped = True
        self._timer.cancel()
        self._watch.cancel()
        for future in self._futures:
            future.cancel()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        self.drop()

    def _submit(self) -> None:
        """Submit all; the first that isn't taken is the end of all, as is whatever else fails here."""
        try:
            count = len(self._requests)
            with self._together(count) if count > 1 else nullcontext():
                for index, request in enumerate(self._requests):
                    tell = self._teller(index)
                    sent = request if request.on_token is None else replace(request, on_token=tell)
                    self._futures.append(self._take(sent))
                    self._futures[-1].add_done_callback(tell)
                    if self._dropped:  # meanwhile
                        self._futures[-1].cancel()
                        return
        except Exception as error:  # whatever it is, a client waits for it
            self._teller(0)(error)

    def _teller(self, index: int) -> Callable[[Any], None]:
        """What the engine's threads call; the loop may be closed by then."""

        def tell(what: Any) -> None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, what))

        return tell

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((0, ClientGoneError()))
