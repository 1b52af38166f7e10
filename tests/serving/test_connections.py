"""What comes through a socket and no HTTP library sends: old and piled-up requests, damaged bodies, silent crowds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from stand_in import KEY, Site, site

BODY = '{"model": "writer", "prompt": "hello"}'
KEYED = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n"
POST = f"POST /v1/completions HTTP/1.1\r\n{KEYED}"
WHOLE = f"{POST}Content-Length: {len(BODY)}\r\n\r\n{BODY}"
CHUNKED = f"{POST}Transfer-Encoding: chunked\r\n\r\n"
LAST = "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
OLD = f"POST /v1/completions HTTP/1.0\r\n{KEYED}"


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    with site(body_s=30) as running:
        yield running


def answers(served: Site, sent: str, *, ends: bool = False) -> bytes:
    """All that comes back until the server closes the connection."""
    with served.connect() as link:
        try:
            link.sendall(sent.encode("latin1"))
            if ends:
                link.shutdown(1)
            return b"".join(iter(lambda: link.recv(65536), b""))
        except OSError:  # closed before all was sent
            return b""


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        pytest.param(f"{OLD}Content-Length: {len(BODY)}\r\n\r\n{BODY}", [200], id="HTTP/1.0"),
        pytest.param(f"{OLD}\r\n{BODY}", [400], id="HTTP/1.0 without a length"),
        pytest.param("GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 5 + LAST, [200] * 6, id="six at once"),
        pytest.param(WHOLE * 3 + LAST, [200] * 4, id="bodies at once"),
        pytest.param(f"{CHUNKED}{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n{LAST}", [200, 200], id="chunks"),
        pytest.param(
            f"{POST}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n{LAST}",
            [400],
            id="two lengths, by which two servers read two requests",
        ),
        pytest.param(f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n", [400], id="packed chunks"),
        pytest.param(f"{POST}Content-Length: +{len(BODY)}\r\n\r\n{BODY}", [400], id="a length with a sign"),
        pytest.param(f"{POST}Content-Length: {'9' * 400}\r\n\r\n{{", [400], id="a length of 400 digits"),
        pytest.param(f"{CHUNKED}3\r\n{{  \r\nzz\r\n", [400], id="a chunk without a size"),
        pytest.param(f"{CHUNKED}-5\r\nabcde\r\n", [400], id="a negative size"),
        pytest.param(f"{CHUNKED}{'f' * 400}\r\nabc", [400], id="a size of 400 digits"),
        pytest.param("GET /v1/models HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", [400], id="two hosts"),
        pytest.param("GET /v1/models HTTP/1.1\r\nHost: x\r\nA: a\0b\r\n\r\n", [400], id="a zero in a header"),
    ],
)
def test_what_is_sent_is_answered_or_refused(served: Site, sent: str, statuses: list[int]) -> None:
    found = answers(served, sent)
    assert [int(each[:3]) for each in found.split(b"HTTP/1.1 ")[1:]] == statuses, found


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(f"{CHUNKED}5\r\nab", id="half a chunk"),
        pytest.param(f"{CHUNKED}{len(BODY):x}\r\n{BODY}\r\n", id="no last chunk"),
        pytest.param(f"{CHUNKED}{'f' * 15}\r\nabc", id="less than was announced"),
        pytest.param(f"{POST}Content-Length: 5000\r\n\r\n{BODY}", id="a body that ends early"),
        pytest.param(f"{CHUNKED}1;{'a' * 200_000}\r\n{{\r\n0\r\n\r\n", id="an endless extension"),
        pytest.param(f"{POST}{'A: b' * 100_000}", id="an endless header"),
    ],
)
def test_what_ends_halfway_asks_nobody(served: Site, sent: str) -> None:
    before = len(served.engine.requests)
    assert b" 200 " not in answers(served, sent, ends=True)
    assert len(served.engine.requests) == before
    assert served.get("/health", None).status_code == 200


def test_a_body_byte_by_byte(served: Site) -> None:
    with served.connect() as link:
        for byte in WHOLE.encode():
            link.sendall(bytes([byte]))
        assert link.recv(65536).startswith(b"HTTP/1.1 200")


def test_chunks_of_one_byte_hold_up_nobody(served: Site) -> None:
    """While a body's worth of them is parsed others have their turns."""
    found: list[bytes] = []

    def send() -> None:
        with served.connect() as link:
            link.settimeout(120)
            with suppress(OSError):  # it was too slow, and is closed
                link.sendall(CHUNKED.encode() + b"1\r\n \r\n" * 100_000)
                link.sendall(f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n".encode())
            found.append(link.recv(65536))

    sending, turns = threading.Thread(target=send), 0
    sending.start()
    with served.client(None) as client:
        while sending.is_alive():
            assert client.get("/health", timeout=60).status_code == 200
            turns += 1
    assert found[0].startswith((b"HTTP/1.1 200", b"HTTP/1.1 408"))
    assert turns > 12  # of about forty, and six where much is parsed at once


def test_a_thousand_connections_that_say_nothing(served: Site) -> None:
    links = [served.connect() for _ in range(1000)]
    try:
        for link in links[::2]:
            link.sendall(b"POST /v1/comp")
        assert served.post("/v1/completions", model="writer", prompt="hello").status_code == 200
    finally:
        for link in links:
            link.close()
    assert served.get("/health", None).status_code == 200


def test_ten_thousand_names(served: Site) -> None:
    before = len(served.engine.requests)
    response = served.post("/v1/classify", models=["news"] * 10_000, input="hello")
    assert response.status_code == 400
    assert "10,000 names" in response.json()["error"]["message"]
    assert len(served.engine.requests) == before
