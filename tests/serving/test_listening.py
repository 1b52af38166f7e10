"""A process that serves: where it listens, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

from ia3.serving.listening import bind, is_loopback

SERVING = """
import sys
import threading
from stand_in import StandIn
from ia3.serving.http import make_app
from ia3.serving.limits import RequestLimits
from ia3.serving.listening import bind, listen
from ia3.serving.metrics import log_in_lines

class Told(StandIn):
    def submit(self, request):
        future = super().submit(request)
        print("submitted", flush=True)
        threading.Timer(1, self.released.set).start()
        return future

    def drain(self, timeout_s):
        print("draining", flush=True)
        return super().drain(timeout_s)

engine, bound = Told(), bind("127.0.0.1", 0)
bound.listen()
log_in_lines()
print(bound.getsockname()[1], flush=True)
# What hangs half sent would be waited for longer than any test here waits.
listen(make_app(engine, limits=RequestLimits(body_s=600)), engine, bound, drain_s=float(sys.argv[1]))
print("closed" if engine.closed else "open", flush=True)
"""


def start(drain_s: float) -> tuple[subprocess.Popen[str], str]:
    paths = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, str(drain_s)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(number: int) -> None:
    """What was begun is answered, also in pieces; idle and half connections are in nobody's way; the exit code is 0."""
    process, url = start(600)
    assert process.stdout is not None
    assert httpx2.get(f"{url}/health", timeout=60).status_code == 200
    found: list[httpx2.Response] = []

    def ask(stream: bool) -> None:
        body = {"model": "writer", "prompt": "wait", "stream": stream}
        found.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=60))

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for each in asking:
        each.start()
    assert process.stdout.readline() + process.stdout.readline() == "submitted\n" * 2
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as idle:
        idle.sendall(b"GET /hea")
        process.send_signal(number)
        rest, said = process.communicate(timeout=120)
    for each in asking:
        each.join(60)
    assert rest == "draining\nclosed\n"
    assert process.returncode == 0, said
    assert [each.status_code for each in found] == [200, 200]
    assert all("wait!" in each.text or "[DONE]" in each.text for each in found)
    assert "Traceback" not in said


def test_what_doesnt_end_is_left() -> None:
    process, url = start(0)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert httpx2.get(f"{url}/health", timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 0


class TestAddresses:
    def test_a_port_that_is_taken(self) -> None:
        with bind("127.0.0.1", 0) as bound:
            bound.listen()
            port = bound.getsockname()[1]
            with pytest.raises(ValueError, match=rf"127\.0\.0\.1, port {port}: .*Give another `host` or `port`"):
                bind("127.0.0.1", port)

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "999.1.1.1", "a" * 70, "192.0.2.1"])
    def test_a_host_that_is_none(self, host: str) -> None:
        with pytest.raises(ValueError, match="Give another `host`"):
            bind(host, 0)

    @pytest.mark.parametrize(
        ("host", "alone"),
        [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("shop", False)],
    )
    def test_who_reaches_it(self, host: str, alone: bool) -> None:
        assert is_loopback(host) == alone
