"""The routes: OpenAI's for words and vectors, `/v1/classify` for labels, vLLM's for loading, and how it goes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ia3.serving.door import Door, as_response, error_response, read_within
from ia3.serving.limits import Keys, RequestLimits
from ia3.serving.metrics import LOG, Metrics
from ia3.serving.openai import (
    AliasBody,
    BadRequestError,
    BodyT,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingsBody,
    LoadBody,
    UnloadBody,
    Written,
    card_of,
    conversation_of,
    label_of,
    new_tokens_of,
    read_body,
    schema_of,
    texts_of,
    usage_of,
    vector_of,
)
from ia3.serving.page import add_page
from ia3.serving.recent import SECONDS
from ia3.serving.requests import Answer, Served, Server, ServingError, UnknownModel
from ia3.serving.requests import Request as Asked
from ia3.serving.shapes import answers_of
from ia3.serving.waiting import ClientGoneError, Waiting

_LARGE = 64 << 10
# Adapters that are told by how much they answer.
_BUSIEST = 100
# Seconds that a client has to read the last of a stream.
_TO_READ = 10


def make_app(
    server: Server, *, keys: Keys | None = None, admin: Keys | None = None, limits: RequestLimits | None = None,
    hosts: frozenset[str] | None = None,
) -> FastAPI:  # fmt: skip
    """The application that serves a server's adapters.

    Args:
        server: who answers.
        keys: of clients; without any everybody is let in.
        admin: of who may load, unload and alias; without any nobody may.
        limits: the most that a request may bring.
        hosts: the names by which alone the server may be called, without ports, by no page of elsewhere; None for any.
    """
    limits, metrics = limits or RequestLimits(), Metrics(server)
    app = FastAPI(title="ia3 serve", version=version("ia3"), docs_url=None, redoc_url=None, redirect_slashes=False)
    for kind in (BadRequestError, ServingError, HTTPException):
        app.add_exception_handler(kind, as_response)
    app.add_middleware(Door, keys=keys or Keys(), admin=admin or Keys(), limits=limits, metrics=metrics, hosts=hosts)
    add_page(app)
    _Routes(server, limits, metrics).add_to(app)  # which describes all that there is
    return app


class _Routes:
    """The routes of one server."""

    def __init__(self, server: Server, limits: RequestLimits, metrics: Metrics) -> None:
        self._server, self._limits, self._metrics = server, limits, metrics
        self._created = int(time.time())
        self._changing = asyncio.Lock()

    def add_to(self, app: FastAPI) -> None:
        """Make the application answer them, and describe them."""
        shared: dict[str, Any] = {}
        for path, body, route in (
            ("/v1/completions", CompletionBody, self.complete),
            ("/v1/chat/completions", ChatBody, self.chat),
            ("/v1/classify", ClassifyBody, self.classify),
            ("/v1/embeddings", EmbeddingsBody, self.embed),
            ("/v1/load_lora_adapter", LoadBody, self.load),
            ("/v1/unload_lora_adapter", UnloadBody, self.unload),
            ("/v1/aliases", AliasBody, self.alias),
        ):
            schema = schema_of(body)
            shared |= schema.pop("$defs", {})
            about = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
            method = "PUT" if body is AliasBody else "POST"
            more: Any = {"openapi_extra": about, "responses": answers_of(path), "response_model": None}
            app.add_api_route(path, route, methods=[method], **more)
        for path, look in (
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/v1/activity", self.activity),
            ("/health", self.ready),
            ("/health/ready", self.ready),
            ("/health/live", self.live),
            ("/metrics", self.metrics),
            ("/version", self.version),
        ):
            more = {"responses": answers_of(path), "response_model": None}
            kind = PlainTextResponse if path == "/metrics" else JSONResponse
            app.add_api_route(path, look, methods=["GET"], response_class=kind, **more)
        app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(shared)

    # Words

    async def complete(self, request: Request) -> Response:
        """Complete each prompt."""
        body = await self._read(request, CompletionBody)
        body.check_offered()
        texts = texts_of(body.prompt, "prompt", self._limits)
        most = new_tokens_of(body, self._limits)
        asked = [Asked(text, body.model, max_new_tokens=most) for text in texts]
        return await self._write(request, body, asked)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation's last message."""
        body = await self._read(request, ChatBody)
        body.check_offered()
        text, turns = conversation_of(body, self._limits)
        asked = Asked(text, body.model, max_new_tokens=new_tokens_of(body, self._limits), turns=turns)
        return await self._write(request, body, [asked])

    async def _write(self, request: Request, body: CompletionBody | ChatBody, asked: list[Asked]) -> Response:
        written = Written(body.model, chat=isinstance(body, ChatBody))
        if not body.stream:
            with self._wait(request, asked, body.timeout) as waiting:
                answers = await waiting.answers()
            return JSONResponse(written.whole(answers))
        waiting = self._wait(request, [replace(each, on_token=_pieces) for each in asked], body.timeout)
        try:
            events = waiting.events()
            first = await anext(events)  # so that what fails before the first word has its number
        except BaseException:  # a client's going, too, drops what was asked
            waiting.drop()
            raise
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _Stream(waiting, self._chunks(written, first, events, len(asked), usage=usage))

    async def _chunks(
        self,
        written: Written,
        first: tuple[int, str | Answer],
        events: AsyncIterator[tuple[int, str | Answer]],
        count: int,
        *,
        usage: bool,
    ) -> AsyncIterator[dict[str, Any]]:
        """What a stream sends. Of an answer that came whole, or with an end that no piece had, that end comes last."""
        sent = [""] * count
        answers: dict[int, Answer] = {}
        async for index, found in _behind(first, events):
            if isinstance(found, str):
                sent[index] += found
                yield written.piece(index, found)
                continue
            answers[index] = found
            yield written.piece(index, found.text.removeprefix(sent[index]), found)
        if usage:
            yield written.usage([answers[index] for index in range(count)])

    # Labels

    async def classify(self, request: Request) -> Response:
        """Label every text by every model."""
        body = await self._read(request, ClassifyBody)
        if (body.model is None) == (body.models is None):
            raise BadRequestError("Expected either model or models, a list: send one of them.", param="model")
        models = [body.model] if body.model is not None else list(body.models or ())
        texts = texts_of(body.input, "input", self._limits)
        if len(models) > self._limits.models:
            said = f"models has {len(models):,} names, expected at most {self._limits.models:,} a request."
            raise BadRequestError(said, param="models")
        if len(texts) * len(models) > self._limits.answers:
            raise BadRequestError(
                f"{len(texts):,} texts by {len(models):,} models are more than {self._limits.answers:,} answers, the "
                "most of a request: send several.",
                param="input",
            )
        pairs = [(index, text, model) for index, text in enumerate(texts) for model in models]
        asked = [Asked(text, model, labels=True) for _, text, model in pairs]
        with self._wait(request, asked, body.timeout) as waiting:
            answers = await waiting.answers()
        data = [label_of(index, model, each) for (index, _, model), each in zip(pairs, answers, strict=True)]
        return JSONResponse({"object": "list", "data": data, "usage": usage_of(answers)})

    # Vectors

    async def embed(self, request: Request) -> Response:
        """Give the vector of each text."""
        body = await self._read(request, EmbeddingsBody)
        body.check_offered()
        texts = texts_of(body.input, "input", self._limits)
        asked = [Asked(text, body.model, embeds=True) for text in texts]
        with self._wait(request, asked, body.timeout) as waiting:
            answers = await waiting.answers()
        read = sum(each.prompt_tokens for each in answers)
        return JSONResponse(
            {
                "object": "list",
                "data": [vector_of(index, each, body.encoding_format) for index, each in enumerate(answers)],
                "model": body.model,
                "digest": answers[0].digest,
                "usage": {"prompt_tokens": read, "total_tokens": read},
            }
        )

    # What is served

    async def models(self) -> Response:
        """All that can be asked."""
        return await asyncio.to_thread(self._list)  # of ten thousand it takes its time

    def _list(self) -> Response:
        cards = [card_of(each, self._created) for each in self._server.models()]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        """One of them, with its labels."""
        found = self._server.find(name)
        if found is None:
            raise UnknownModel("There is no such model: /v1/models lists those that there are.")
        return JSONResponse(card_of(found, self._created) | {"labels": list(found.labels)})

    async def load(self, request: Request) -> Response:
        """Serve an adapter of the folder under a name."""
        body = await self._read(request, LoadBody)
        async with self._changing:
            if not body.load_inplace and self._server.find(body.lora_name) is not None:
                raise BadRequestError(
                    f"{body.lora_name} is served already: send load_inplace true to replace it.", param="lora_name"
                )
            loaded = await asyncio.to_thread(self._server.load, body.lora_name, body.lora_path)
        return self._changed("loaded", loaded)

    async def unload(self, request: Request) -> Response:
        """Serve an adapter no more."""
        body = await self._read(request, UnloadBody)
        async with self._changing:
            await asyncio.to_thread(self._server.unload, body.lora_name)
        LOG.info("unloaded", extra={"facts": {"adapter": body.lora_name}})
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    async def alias(self, request: Request) -> Response:
        """Let a name mean what another means now."""
        body = await self._read(request, AliasBody)
        async with self._changing:
            named = await asyncio.to_thread(self._server.alias, body.alias, body.model)
        return self._changed("aliased", named, alias=body.alias)

    def _changed(self, how: str, served: Served, **more: str) -> Response:
        LOG.info(how, extra={"facts": {"adapter": served.name, "digest": served.digest, **more}})
        return JSONResponse(card_of(served, self._created))

    # How it goes

    async def ready(self) -> Response:
        """Whether requests are taken."""
        ready = self._server.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def activity(self) -> Response:
        """What happens now, and which adapters answered most in the last minutes."""
        stats = self._server.stats()
        now = {name: int(stats[name]) for name in ("queued", "running", "adapters", "refused", "resident")}
        busiest = self._metrics.recent.counts().most_common(_BUSIEST)
        data = [{"adapter": adapter, "answers": count} for adapter, count in busiest]
        about = {"object": "activity", "ready": self._server.ready, "seconds": SECONDS}
        return JSONResponse({**about, **now, "data": data})

    async def live(self) -> Response:
        """That this process answers."""
        return JSONResponse({"status": "live"})

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return PlainTextResponse(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def version(self) -> Response:
        """The version of this package."""
        return JSONResponse({"version": version("ia3")})

    # What they share

    async def _read(self, request: Request, kind: type[BodyT]) -> BodyT:
        content = await read_within(request, self._limits)
        if len(content) > _LARGE:  # whose parsing would let everybody wait
            return await asyncio.to_thread(read_body, content, kind)
        return read_body(content, kind)

    def _wait(self, request: Request, asked: list[Asked], timeout: float | None) -> Waiting:
        """Submit what is asked, with the moment from which on nobody waits.

        Raises:
            BadRequestError: a time that is longer than the limit.
        """
        seconds, most = timeout or self._limits.answer_s, self._limits.answer_s
        if seconds > most:
            raise BadRequestError(
                f"timeout is {seconds:g} seconds, expected at most {most:g}: send less at once.", param="timeout"
            )
        until = time.monotonic() + seconds
        timed = [replace(each, deadline=until) for each in asked]
        return Waiting(self._metrics.submit, self._server.together, timed, request.receive, seconds)


def _pieces(_: str) -> None:
    """Stands in a request that streams until `Waiting` puts its own in."""


async def _behind(
    first: tuple[int, str | Answer], events: AsyncIterator[tuple[int, str | Answer]]
) -> AsyncIterator[tuple[int, str | Answer]]:
    yield first
    async for each in events:
        yield each


class _Stream(Response):
    """Server-sent events, until all is said or the client is gone; an error in between is the last event but one.

    Args:
        waiting: what is dropped at the end.
        chunks: the events' objects.
    """

    media_type = "text/event-stream"

    def __init__(self, waiting: Waiting, chunks: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._waiting, self._chunks = waiting, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._waiting:
            try:
                async with asyncio.timeout(self._waiting.seconds + _TO_READ):
                    await self._send_all(send)
            except TimeoutError:  # a client that doesn't read
                raise ClientGoneError from None

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await self._send(send, json.dumps(chunk))
        except ClientGoneError:
            raise
        except Exception as error:  # whatever it is, a client waits for it
            if not isinstance(error, ServingError):
                LOG.error("fault", exc_info=error)
            await self._send(send, json.dumps(error_response(error)[1]))
        await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _send(send: Send, data: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
