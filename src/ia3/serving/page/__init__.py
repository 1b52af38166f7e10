"""The page at `/`: three files as they are, without a key. What they show they ask for as any client does, with one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PATHS = frozenset(_FILES)
"""Where its files are."""

# Nothing from elsewhere, nothing inline; and where a browser knows trusted types, no text ever becomes markup.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Make an application answer the page's paths."""
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _sending(name, kind), methods=["GET"], include_in_schema=False, response_model=None)


def _sending(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    """A route that sends a file of this package."""
    content = (files(__name__) / name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return send
