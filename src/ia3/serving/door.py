"""What every request passes: its key, its share of what runs, its line in the log, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ia3.errors import shorten
from ia3.serving.limits import Keys, RequestLimits
from ia3.serving.metrics import LOG, Metrics
from ia3.serving.openai import BadRequestError, error_of
from ia3.serving.page import PATHS
from ia3.serving.requests import Dropped, NotServed, Overloaded, Refused, ServingError, TooLate, UnknownModel
from ia3.serving.waiting import ClientGoneError

OPEN = PATHS | {"/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/version"}
"""What needs no key: nothing there is anybody's."""
ADMIN = frozenset({"/v1/aliases", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What needs the administrator's."""

_GONE = 499  # what nginx writes for a client that went; nobody reads it but the log
_STATUS: Mapping[type[ServingError], int] = {
    UnknownModel: 404,
    NotServed: 400,
    Overloaded: 429,
    TooLate: 504,
    Dropped: 503,
    Refused: 400,
}
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_response(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """An error's number, object and headers. What isn't meant for clients is told as a fault of the server."""
    param = code = None
    headers: dict[str, str] = {}
    if isinstance(error, BadRequestError):
        status, said, param, code, headers = error.status, error.message, error.param, error.code, error.headers or {}
    elif isinstance(error, ServingError):
        status = next((number for kind, number in _STATUS.items() if isinstance(error, kind)), 500)
        said = error.message
        if isinstance(error, UnknownModel):
            param, code = "model", "model_not_found"
        if isinstance(error, Overloaded | Dropped):
            headers = {"Retry-After": str(max(1, math.ceil(getattr(error, "retry_after_s", 1))))}
    elif isinstance(error, HTTPException):
        status, said, headers = error.status_code, f"{error.detail}: see /openapi.json.", dict(error.headers or {})
    else:
        status, said = 500, "The server has failed. Its log says where."
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, error_of(said, kind, param=param, code=code), headers


def as_response(_: Request, error: Exception) -> Response:
    """What FastAPI calls for an error."""
    status, content, headers = error_response(error)
    return JSONResponse(content, status, headers)


class Door:
    """The outermost application.

    Args:
        app: the one behind it.
        keys: those of clients; none lets everybody in.
        admin: those of who may change what is served; none lets nobody.
        limits: how many requests a key may have under way.
        metrics: what counts.
        hosts: the names by which alone it may be called, so that no page of elsewhere asks from within a browser; None
            for any name and page.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, admin: Keys, limits: RequestLimits, metrics: Metrics,
        hosts: frozenset[str] | None,
    ) -> None:  # fmt: skip
        self._app, self._keys, self._admin, self._limits, self._metrics = app, keys, admin, limits, metrics
        self._hosts = hosts
        self._running: Counter[int | str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(scope, receive, send)
        with self._metrics.running.track_inprogress():
            try:
                await self._enter(call)
            except (ClientGoneError, ClientDisconnect):
                call.status = _GONE
            except Exception as error:  # the outermost place: every request gets an answer
                await self._tell(call, error)
            finally:
                self._note(call)

    async def _enter(self, call: _Call) -> None:
        """Through the door, with the right key and not too often at once."""
        path, scope = call.path, call.scope
        if not path.isprintable():  # a route's pattern fits with a line break behind it, and ADMIN doesn't hold that
            raise HTTPException(404)
        if call.header(b"content-length") is not None and call.header(b"transfer-encoding") is not None:
            # A proxy that goes by the one and a server that goes by the other see two different requests in it.
            raise BadRequestError("There are both Content-Length and Transfer-Encoding: send one of them.")
        if path in OPEN:
            await self._app(scope, call.receive, call.send)
            return
        self._expect_caller(call)
        call.key = self._key_of(path, call.header(b"authorization"))
        if self._running[call.key] >= self._limits.running:
            whose = "" if call.key is None else " of this key"
            raise Overloaded(
                f"{self._limits.running:,} requests{whose} are under way, and no more may be: wait for one.", 1
            )
        self._running[call.key] += 1
        try:
            await self._app(scope, call.receive, call.send)
        finally:
            self._running[call.key] -= 1

    def _expect_caller(self, call: _Call) -> None:
        """Refuse a page of elsewhere, where who reaches the server needs no key.

        Raises:
            BadRequestError: another name than the server's own, or a page that it didn't give out.
        """
        if self._hosts is None:
            return
        host, origin = call.header(b"host"), call.header(b"origin")
        name = _name_of(host)
        if name not in self._hosts:
            raise BadRequestError(
                f"Without keys this server answers at {', '.join(sorted(self._hosts))} alone, not at {shorten(name)}: "
                "use such an address, or start `ia3 serve` with --api-keys.",
                status=403,
            )
        if origin is not None and origin.partition(b"://")[2] != host:
            raise BadRequestError(
                "Without keys this server answers no page from elsewhere: start `ia3 serve` with --api-keys.",
                status=403,
            )

    def _key_of(self, path: str, authorization: bytes | None) -> int | str | None:
        """Whose request this is: the number of a client's key, the administrator, or anybody where there are no keys.

        Raises:
            BadRequestError: a key that is missing or wrong.
        """
        needed = path in ADMIN
        keys = self._admin if needed else self._keys
        if needed and not keys:
            raise BadRequestError(
                "Nobody may change what is served over HTTP here: change the folder of adapters, or start `ia3 serve` "
                "with --admin-key-file.",
                status=403,
            )
        place = keys.find(authorization)
        if keys and place is None:
            which = "the administrator's key" if needed else "an API key"
            raise BadRequestError(
                f"This needs {which}: send the header Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return "admin" if needed else None if place is None else place + 1

    async def _tell(self, call: _Call, error: Exception) -> None:
        """An error that was raised here, or that nobody foresaw."""
        if not isinstance(error, BadRequestError | ServingError | HTTPException):
            LOG.error("fault", exc_info=error, extra={"facts": {"id": call.id}})
        if call.status is not None:  # half an answer can't be mended
            raise error
        status, content, headers = error_response(error)
        await JSONResponse(content, status, headers)(call.scope, call.receive, call.send)

    def _note(self, call: _Call) -> None:
        route = getattr(call.scope.get("route"), "path", "none")
        route = call.path if route == "none" and call.path in OPEN | ADMIN else route
        seconds, status = time.monotonic() - call.began, call.status or 500
        self._metrics.count(route, status, seconds)
        if call.path in OPEN | {"/v1/activity"} and status < 400:  # looked at every few seconds
            return
        facts = {"id": call.id, "route": route, "status": status, "seconds": round(seconds, 4), "key": call.key}
        LOG.info("request", extra={"facts": facts})


class _Call:
    """A request on its way: what it has received and sent so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.path = _path_of(scope)
        self.id, self.began = uuid.uuid4().hex, time.monotonic()
        self.status: int | None = None
        self.key: int | str | None = None
        length = self.header(b"content-length")
        self._has_body = self.header(b"transfer-encoding") is not None or length not in (None, b"0")

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.scope["headers"] if key == name), None)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._has_body = False
        return message

    async def send(self, message: Message) -> None:
        """With the request's id; and where its body wasn't read, nothing more is read from this connection."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode())] + ([(b"connection", b"close")] if self._has_body else [])
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)


def _path_of(scope: Scope) -> str:
    """The path that routes go by: without what stands before it where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and (path + "/").startswith(root + "/") else path


def _name_of(host: bytes | None) -> str:
    """The name of a Host header, without its port."""
    name = (host or b"").decode("latin-1").lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


async def read_within(request: Request, limits: RequestLimits) -> bytes:
    """A request's body, of which no more is read than the limit.

    Raises:
        BadRequestError: more bytes, or too slow.
    """
    too_large = BadRequestError(f"The body has more than {limits.body_bytes:,} bytes: send less.", status=413)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                content += piece
                if len(content) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise BadRequestError(f"The body didn't come within {limits.body_s:g} seconds.", status=408) from None
    return bytes(content)
