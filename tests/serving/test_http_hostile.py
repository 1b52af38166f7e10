"""Every route under what no client means: never a fault of the server's, never an end that doesn't come."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stand_in import ADMIN_KEY, KEY, Site, site, until

BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/completions"): {
        "model": "writer",
        "prompt": "hello",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "timeout": 60,
        "seed": 1,
    },
    ("POST", "/v1/chat/completions"): {
        "model": "writer",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 3,
    },
    ("POST", "/v1/classify"): {"models": ["news", "prod"], "input": ["hello", "there"], "timeout": 60},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "sport", "lora_path": "sport", "load_inplace": True},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "nobody", "lora_int_id": 3},
    ("PUT", "/v1/aliases"): {"alias": "best", "model": "writer"},
}
ROUTES = [pytest.param(*route, id=route[1]) for route in BODIES]
READ = ("/v1/models", "/v1/models/x", "/health", "/health/live", "/health/ready", "/metrics", "/version")

RAW = {
    "nothing": b"",
    "no JSON": b"hello",
    "half of it": b'{"model": "writer", "prompt": "hel',
    "no object": b"[1, 2]",
    "a text": b'"hello"',
    "null": b"null",
    "not UTF-8": b'{"model": "\xff\xfe", "prompt": "x"}',
    "UTF-16": '{"model": "writer"}'.encode("utf-16"),
    "a zero": b'{"model": "wri\x00ter", "prompt": "x"}',
    "an escaped zero": b'{"model": "\\u0000", "prompt": "\\u0000", "lora_name": "\\u0000", "lora_path": "\\u0000"}',
    "half a character": b'{"model": "writer", "prompt": "\\ud800"}',
    "lists in lists": b"[" * 500_000,
    "objects in objects": b'{"model":' * 100_000,
    "closed lists in lists": b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}",
    "NaN": b'{"model": "writer", "prompt": "x", "temperature": NaN}',
    "infinity": b'{"model": "writer", "prompt": "x", "timeout": Infinity}',
    "too large a float": b'{"model": "writer", "prompt": "x", "timeout": 1e999}',
    "a number of 400 digits": b'{"model": "writer", "prompt": "x", "temperature": ' + b"9" * 400 + b"}",
    "a number of 5,000 digits": b'{"model": "writer", "prompt": "x", "max_tokens": ' + b"9" * 5_000 + b"}",
    "a seed of 4,000 digits": b'{"model": "writer", "prompt": "x", "seed": ' + b"9" * 4_000 + b"}",
    "a key twice": b'{"model": "writer", "model": "news", "prompt": "x"}',
    "many keys": json.dumps({f"key{n}": n for n in range(50_000)}).encode(),
    "a million small lists": b'{"prompt": [' + b"[]," * 600_000 + b"[]]}",
}

TOO_MUCH = ("lists in lists", "a million small lists")

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**100, 0.5, -0.0, 1e308, 5e-324),
    *(
        "",
        " ",
        "a",
        "\n",
        "\x00",
        "\x7f",
        "\u202e",
        "💥" * 50,
        "a" * 2_000,
        "../../etc/passwd",
        "/etc/passwd",
        "%2e%2e",
    ),
    *("base:adapter", ":", "__base__", "true", "1", "NaN", "{text}", "{0.__class__}", "<script>", "' OR 1=1 --"),
    *([], {}, [[]], [{}], [None], {"a": None}, ["a", 1], [["a"]], {"type": "text", "text": "a"}, [1.5] * 200),
    *([{"role": "user", "content": None}], [{"role": "user"}], [{"role": "user", "content": [{"type": "text"}]}]),
    *([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost"}}]}], ["a"] * 1_000),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    with site(body_s=30) as running:
        yield running


def expect_an_answer(response: Any, sent: object) -> None:
    """Of any kind but a fault; and an error is OpenAI's object."""
    assert response.status_code < 500, (sent, response.text)
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}, sent
        assert len(response.text) < 3_000, sent


def changed(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A body in which something is wrong: a field's value, one too many, one too few, or all in another place."""
    wrong = json.loads(json.dumps(body))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        name = chance.choice(
            [*body, "prompt", "messages", "input", "model", "stop", "logit_bias", "n", chance.choice("ab")]
        )
        how = chance.randrange(4)
        if how == 0:
            wrong.pop(name, None)
        elif how == 1:
            wrong[name] = [wrong.get(name)] * chance.choice((1, 2, 200))
        elif how == 2:
            wrong[name] = {chance.choice(("text", "role", "")): wrong.get(name)}
        else:
            wrong[name] = chance.choice(JUNK)
    return wrong


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("how", RAW)
def test_bodies_that_are_none(served: Site, method: str, path: str, how: str) -> None:
    key = ADMIN_KEY if "adapter" in path or "alias" in path else KEY
    with served.client(key) as client:
        response = client.request(method, path, content=RAW[how])
    expect_an_answer(response, how)
    if how not in ("an escaped zero", "a seed of 4,000 digits"):  # which some routes may take
        assert response.status_code == (413 if how in TOO_MUCH else 400)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_fields_that_are_wrong(served: Site, method: str, path: str) -> None:
    key = ADMIN_KEY if "adapter" in path or "alias" in path else KEY
    chance = random.Random(f"{method} {path}")
    with served.client(key) as client:
        for _ in range(120):
            body = changed(BODIES[method, path], chance)
            response = client.request(method, path, content=json.dumps(body))
            expect_an_answer(response, body)


@pytest.mark.parametrize("path", READ)
def test_what_is_only_read(served: Site, path: str) -> None:
    chance = random.Random(path)
    with served.client() as client:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"):
            for end in ("", "/", "//", "?", "?a=%00", "/%00", "/%ff", "/..", "/%2e%2e/%2e%2e", "/" + "a" * 3_000):
                response = client.request(method, path + end, content=bytes(chance.randbytes(9)))
                assert response.status_code < 500, (method, path + end)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:40]),
)
def test_what_is_no_http(served: Site, sent: bytes) -> None:
    with served.connect() as link:
        try:
            link.sendall(sent)
            link.shutdown(1)
            answer = b"".join(iter(lambda: link.recv(65536), b""))
        except OSError:  # closed before all was sent
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")
    assert served.get("/health").status_code == 200


def test_a_header_of_odd_bytes(served: Site) -> None:
    for value in (b"Bearer \xff\xfe", b"Bearer " + b"a" * 10_000, b"\xc3\xa4", b"Bearer \x0b" + KEY.encode()):
        with served.connect() as link:
            link.sendall(
                b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
            )
            answer = b"".join(iter(lambda: link.recv(65536), b""))
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), value


def test_slow_and_half_bodies_are_in_nobodys_way() -> None:
    """As many as a key may have hang half sent; others are answered meanwhile, and afterwards the key is again."""
    with site(body_s=1.0, running=60) as served:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
        )
        links = [served.connect() for _ in range(60)]
        for link in links:
            link.sendall(head.encode())
        links.pop().close()
        began = time.monotonic()
        assert served.get("/health").status_code == 200
        assert all(link.recv(65536).startswith(b"HTTP/1.1 408") for link in links)
        assert time.monotonic() - began < 30  # a minute if one waited for another
        # Again and again, since its own body may be late.
        until(lambda: served.post("/v1/completions", model="writer", prompt="hello").status_code == 200)


def test_many_at_once(served: Site) -> None:
    """Threads that ask, go and load; each that stays has its own text back."""
    wrong: list[object] = []

    def ask(number: int) -> None:
        with served.client() as client:
            for turn in range(10):
                text = f"text {number} {turn}"
                stream = bool(turn % 2)
                response = client.post(
                    "/v1/completions", json={"model": "writer", "prompt": [text] * 3, "stream": stream}
                )
                if response.text.count(f"{text}!") != 3 and not stream:
                    wrong.append(response.text)

    def go(number: int) -> None:
        for _ in range(10):
            body = b'{"model": "writer", "prompt": "hello", "stream": true}'
            with served.connect() as link:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: 54 if number % 2 else 20])

    threads = [threading.Thread(target=each, args=(number,)) for number in range(6) for each in (ask, go)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(300)
        assert not each.is_alive()
    assert wrong == []
    assert served.get("/health").status_code == 200
