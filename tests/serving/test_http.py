"""The routes around an engine's stand-in: what clients send and get, with the `openai` client as it is."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NoReturn

import httpx2
import openai
import pytest
from pydantic import TypeAdapter
from stand_in import ADMIN_KEY, KEY, NEWS, OTHER_KEY, PROBABILITIES, WRITER, Site, events, site, until

from ia3.serving.listening import own_names
from ia3.serving.metrics import log_in_lines
from ia3.serving.requests import Answer, Request
from ia3.serving.shapes import answers_of


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    with site() as running:
        yield running


@pytest.fixture
def client(served: Site) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error object, whole."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


class TestTheOpenAIClient:
    def test_completions(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="writer", prompt=["one", "two"], max_tokens=5, temperature=0)
        assert [choice.text for choice in answer.choices] == ["one!", "two!"]
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].finish_reason == "length"
        assert answer.system_fingerprint == WRITER.digest
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 8, 14)

    def test_a_completion_in_pieces(self, client: openai.OpenAI) -> None:
        options = {"include_usage": True}
        chunks = [*client.completions.create(model="writer", prompt="hello", stream=True, stream_options=options)]
        *words, end = chunks
        assert [chunk.choices[0].text for chunk in words] == ["h", "el", "lo!"]
        assert [chunk.choices[0].finish_reason for chunk in words] == [None, None, "length"]
        assert end.choices == []
        assert end.usage.total_tokens == 7
        assert len({chunk.id for chunk in chunks}) == 1

    def test_a_conversation(self, client: openai.OpenAI, served: Site) -> None:
        messages: list[Any] = [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi.", "refusal": None},
            {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
        ]
        answer = client.chat.completions.create(model="writer", messages=messages, max_completion_tokens=9)
        assert answer.choices[0].message.content == "And now?!"
        assert answer.choices[0].message.role == "assistant"
        asked = served.engine.requests[-1]
        assert (asked.text, asked.max_new_tokens) == ("And now?", 9)
        assert asked.turns == [("system", "Be short."), ("user", "Hello"), ("assistant", "Hi.")]

    def test_a_conversation_in_pieces(self, client: openai.OpenAI) -> None:
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        with client.chat.completions.stream(model="writer", messages=messages) as stream:
            for _ in stream:
                pass
            message = stream.current_completion_snapshot.choices[0].message
        assert (message.role, message.content) == ("assistant", "hello!")
        chunks = [*client.chat.completions.create(model="writer", messages=messages, stream=True)]
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "hello!"
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_a_label_in_pieces(self, client: openai.OpenAI) -> None:
        chunks = [*client.completions.create(model="news", prompt="hello", stream=True)]
        assert [chunk.choices[0].text for chunk in chunks] == ["good"]

    def test_embeddings(self, client: openai.OpenAI, served: Site) -> None:
        for how in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
            answer: Any = client.embeddings.create(model="writer", input=["one", "three"], **how)
            assert [each.index for each in answer.data] == [0, 1]
            expected = [pytest.approx([0.6, -0.8, length]) for length in (3, 5)]
            assert [each.embedding for each in answer.data] == expected
            assert (answer.model, answer.digest) == ("writer", WRITER.digest)
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 10)
        assert all(request.embeds for request in served.engine.requests[-4:])
        with pytest.raises(openai.BadRequestError, match="dimensions is not offered"):
            client.embeddings.create(model="writer", input="one", dimensions=2)
        with pytest.raises(openai.BadRequestError, match="input"):
            client.embeddings.create(model="writer", input=[[1, 2]])
        with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
            client.embeddings.create(model="nobody", input="one")

    def test_the_list_of_models(self, client: openai.OpenAI) -> None:
        cards = {each.id: each for each in client.models.list()}
        assert {"tiny", "news", "writer"} <= set(cards)
        assert (cards["news"].parent, cards["news"].digest, cards["news"].aliases) == ("tiny", NEWS.digest, ["prod"])
        assert cards["tiny"].parent is None

    @pytest.mark.parametrize("name", ["news", "prod", "tiny:news"])
    def test_one_model(self, client: openai.OpenAI, name: str) -> None:
        card: Any = client.models.retrieve(name)
        assert (card.id, card.labels) == ("news", ["good", "bad"])

    def test_its_classes_of_errors(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="no model 'nobody'") as found:
            client.completions.create(model="nobody", prompt="hello")
        assert found.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="no such model"):
            client.models.retrieve("nobody")
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="writer", prompt="busy")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another-one-of-them").models.list()
        with pytest.raises(openai.BadRequestError, match="news chooses from labels"):
            client.completions.create(model="news", prompt="hello", max_tokens=4)
        with pytest.raises(openai.APIError, match="deadline went by"):
            [*client.completions.create(model="writer", prompt="breaks", stream=True)]


class TestLabels:
    def test_a_text_by_many_models_is_one_request(self, served: Site) -> None:
        found = served.post("/v1/classify", models=["news", "prod", "tiny:news"], input="hello").json()
        assert [each["model"] for each in found["data"]] == ["news", "prod", "tiny:news"]
        for each in found["data"]:
            assert (each["label"], each["probabilities"], each["digest"]) == ("good", PROBABILITIES, NEWS.digest)
            assert (each["adapter"], each["queued_ms"], each["ran_ms"]) == ("news", 100, 200)
        assert found["usage"]["prompt_tokens"] == 15
        until(lambda: served.engine.lists[-1] == 3)

    def test_texts_by_models(self, served: Site) -> None:
        found = served.post("/v1/classify", models=["news", "prod"], input=["a", "b"]).json()["data"]
        assert [(each["index"], each["model"]) for each in found] == [
            (0, "news"),
            (0, "prod"),
            (1, "news"),
            (1, "prod"),
        ]

    def test_an_answer_that_is_no_label(self, served: Site) -> None:
        """It is told as it is, and takes no others along."""
        found = served.post("/v1/classify", model="news", input=["odd", "hello"]).json()["data"]
        assert [(each["label"], each["text"]) for each in found] == [(None, "odd"), ("good", "good")]

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"model": "news", "models": ["news"]}, "either model or models"),
            ({}, "either model or models"),
            ({"model": "writer"}, "writer writes text and has no labels"),
        ],
    )
    def test_what_has_no_label(self, served: Site, body: dict[str, Any], said: str) -> None:
        response = served.post("/v1/classify", input="hello", **body)
        assert response.status_code == 400
        assert said in error_of(response)["message"]


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "status", "kind"),
        [
            ("busy", 429, "rate_limit_error"),
            ("late", 504, "timeout_error"),
            ("drop", 503, "service_unavailable_error"),
            ("fault", 500, "server_error"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_an_error_of_the_engine(self, served: Site, text: str, status: int, kind: str, stream: bool) -> None:
        """Before the first word a stream's error is an ordinary one."""
        response = served.post("/v1/completions", model="news", prompt=text, stream=stream)
        assert response.status_code == status
        assert error_of(response)["type"] == kind
        assert "secret" not in response.text

    def test_when_to_come_again(self, served: Site) -> None:
        response = served.post("/v1/completions", model="news", prompt="busy")
        assert response.headers["retry-after"] == "3"

    def test_an_error_between_pieces(self, served: Site) -> None:
        *words, error = events(served.post("/v1/completions", model="writer", prompt="breaks", stream=True).text)
        assert "".join(each["choices"][0]["text"] for each in words) == "bre"
        assert error["error"]["type"] == "timeout_error"

    def test_one_bad_request_drops_its_neighbours(self, served: Site) -> None:
        response = served.post("/v1/completions", model="writer", prompt=["wait", "wait", "busy"])
        assert response.status_code == 429
        assert all(each.cancelled() for each in served.engine.futures[-2:])

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", 0.7),
            ("presence_penalty", 1),
            ("stop", ["."]),
            ("logit_bias", {"5": 1}),
            ("n", 2),
            ("echo", True),
            ("echo", 0),
            ("n", True),
            ("best_of", 3),
            ("tools", []),
            ("logprobs", 1),
            ("timeout", 121),
            ("prompt", 7),
            ("prompt", []),
            ("max_tokens", 0),
            ("max_tokens", 5000),
            ("max_tokens", True),
            ("max_tokens", "5"),
            ("timeout", -1),
            ("model", ""),
        ],
    )
    def test_what_is_not_offered_is_named(self, served: Site, field: str, value: Any) -> None:
        response = served.post("/v1/completions", **{"model": "writer", "prompt": "hello", field: value})
        assert response.status_code == 400
        assert field in error_of(response)["message"]
        assert error_of(response)["param"] == field

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"messages": [{"role": "assistant", "content": "Hello"}]}, "expected the user's"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "user", "content": "a"}], "logprobs": True}, "logprobs is not offered"),
            ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "x"}]}, "tools is not offered"),
            ({"messages": [{"role": "user", "content": "a"}], "functions": []}, "is not offered, leave it out"),
            ({"messages": [{"role": "tool", "content": "Hello"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": "Hello"}] * 300}, "300 messages"),
            ({"messages": [{"role": "user", "content": "a" * 60_000}] * 2}, "120,000 characters"),
            (
                {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 2},
                "both max_tokens and",
            ),
        ],
    )
    def test_conversations_that_are_none(self, served: Site, body: dict[str, Any], said: str) -> None:
        response = served.post("/v1/chat/completions", model="writer", **body)
        assert response.status_code == 400
        assert said in error_of(response)["message"]

    def test_what_changes_nothing_may_be_said(self, served: Site) -> None:
        neutral = {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "logprobs": False, "store": True}
        messages = [{"role": "user", "content": "a", "name": "ada"}]
        more = {"metadata": {"a": "b"}, "user": "ada", "temperature": 0, "seed": 1}
        response = served.post("/v1/chat/completions", model="writer", messages=messages, **neutral, **more)
        assert response.status_code == 200

    @pytest.mark.parametrize(
        ("path", "body", "said"),
        [
            ("/v1/completions", {"model": "writer", "prompt": ["a"] * 129}, "129 texts"),
            ("/v1/completions", {"model": "writer", "prompt": "a" * 100_001}, "100,001 characters"),
            ("/v1/classify", {"models": ["news"] * 129, "input": "a"}, "129 names"),
            ("/v1/classify", {"models": ["news"] * 100, "input": ["a"] * 100}, "more than 1,024 answers"),
        ],
    )
    def test_more_than_the_limits(self, served: Site, path: str, body: dict[str, Any], said: str) -> None:
        response = served.post(path, **body)
        assert response.status_code == 400
        assert said in error_of(response)["message"]

    @pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/v1/completions", 405), ("/v1/models/", 404)])
    def test_routes_that_are_none(self, served: Site, path: str, status: int) -> None:
        response = served.get(path)
        assert response.status_code == status
        assert error_of(response)["message"]


class TestKeys:
    @pytest.mark.parametrize("path", ["/v1/models", "/v1/models/news", "/v1/activity", "/nowhere", "/page"])
    @pytest.mark.parametrize("key", [None, "wrong", ADMIN_KEY, f"{KEY}x", KEY[:-1]])
    def test_what_needs_a_key(self, served: Site, path: str, key: str | None) -> None:
        response = served.get(path, key)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("header", [KEY, f"Basic {KEY}", f"Bearer{KEY}", f"Bearer ,{KEY}", "Bearer"])
    def test_other_headers(self, served: Site, header: str) -> None:
        assert httpx2.get(f"{served.url}/v1/models", headers={"Authorization": header}).status_code == 401

    def test_any_key_of_several(self, served: Site) -> None:
        assert served.get("/v1/models", KEY).status_code == served.get("/v1/models", OTHER_KEY).status_code == 200

    @pytest.mark.parametrize(
        "path", ["/health", "/health/live", "/health/ready", "/metrics", "/version", "/openapi.json", "/"]
    )
    def test_what_needs_none(self, served: Site, path: str) -> None:
        assert served.get(path, None).status_code == 200

    @pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/aliases"])
    @pytest.mark.parametrize("end", ["", "%0A", "%0a", "/", "%2F", "?", "%00"])
    @pytest.mark.parametrize("key", [None, KEY])
    def test_what_needs_the_administrators(self, served: Site, path: str, end: str, key: str | None) -> None:
        """A path that is nearly one of these is none of them."""
        before = dict(served.engine.served)
        for method in ("POST", "PUT"):
            with served.client(key) as client:
                body = {"lora_name": "news", "lora_path": "x", "load_inplace": True} if "load_lora" in path else {}
                response = client.request(method, f"{path}{end}", json=body)
            assert response.status_code in (401, 404, 405), response.text
        assert served.engine.served == before

    def test_nobody_administers_without_a_key_for_it(self) -> None:
        with site(keys=()) as served:
            for end in ("", "%0A"):
                response = served.post(f"/v1/unload_lora_adapter{end}", None, lora_name="news")
                assert response.status_code in (403, 404)
            said = served.post("/v1/aliases", None).text
            assert "change the folder of adapters, or start `ia3 serve` with --admin-key-file" in said
            assert "news" in served.engine.served
            assert served.get("/v1/models", None).status_code == 200  # whom nobody gave keys, everybody may ask


class TestBelowAPath:
    """Of a proxy or another application, which stands before the routes' own paths in what the application sees."""

    def test_who_may_do_what_is_the_same(self) -> None:
        with site(root_path="/ia3") as served:
            assert served.post("/v1/unload_lora_adapter", lora_name="news").status_code == 401
            assert served.get("/health/ready", None).status_code == 200
            assert served.get("/v1/models", None).status_code == 401
            assert served.get("/v1/models").status_code == 200
            assert 'route="/v1/models"' in served.get("/metrics", None).text
        with site(keys=(), root_path="/ia3") as served:
            assert served.post("/v1/unload_lora_adapter", None, lora_name="news").status_code == 403
            assert "news" in served.engine.served


class TestPagesOfElsewhere:
    """Without keys a browser's user would lend this machine's server to any page."""

    NAMES = own_names("127.0.0.1")

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 200),
            ({"Host": "localhost:80"}, 200),
            ({"Host": "[::1]:80"}, 200),
            ({"Host": "evil.example"}, 403),
            ({"Host": "127.0.0.1.evil.example"}, 403),
            ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
            ({"Host": "localhost:80", "Origin": "http://localhost:3000"}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
        ],
    )
    def test_they_get_nothing(self, headers: dict[str, str], status: int) -> None:
        with site(keys=(), hosts=self.NAMES) as served, served.client(None) as client:
            response = client.post("/v1/classify", json={"model": "news", "input": "a"}, headers=headers)
        assert response.status_code == status
        assert status == 200 or "--api-keys" in error_of(response)["message"]


class TestWhatIsServed:
    def test_loading_and_unloading(self, served: Site) -> None:
        body = {"lora_name": "sport", "lora_path": "sport"}
        card = served.post("/v1/load_lora_adapter", ADMIN_KEY, **body).json()
        assert (card["id"], card["parent"], card["digest"]) == ("sport", "tiny", "f" * 64)
        assert served.get("/v1/models/sport").status_code == 200
        again = served.post("/v1/load_lora_adapter", ADMIN_KEY, **body)
        assert again.status_code == 400
        assert "load_inplace" in error_of(again)["message"]
        assert served.post("/v1/load_lora_adapter", ADMIN_KEY, **body, load_inplace=True).status_code == 200
        assert served.post("/v1/unload_lora_adapter", ADMIN_KEY, lora_name="sport").json()["deleted"]
        assert served.get("/v1/models/sport").status_code == 404
        assert served.post("/v1/unload_lora_adapter", ADMIN_KEY, lora_name="sport").status_code == 404

    def test_a_path_that_leads_out(self, served: Site) -> None:
        body = {"lora_name": "evil", "lora_path": "../../etc"}
        response = served.post("/v1/load_lora_adapter", ADMIN_KEY, **body)
        assert response.status_code == 400
        assert "leads out" in error_of(response)["message"]

    def test_an_alias(self, served: Site) -> None:
        with served.client(ADMIN_KEY) as client:
            moved = client.put("/v1/aliases", json={"alias": "best", "model": "writer"})
            missing = client.put("/v1/aliases", json={"alias": "best", "model": "nobody"})
        assert moved.json()["aliases"] == ["best"]
        assert missing.status_code == 404
        assert served.post("/v1/completions", model="best", prompt="hello").json()["choices"][0]["text"] == "hello!"


class TestClientsThatGo:
    @pytest.mark.parametrize("stream", [False, True])
    def test_their_work_is_dropped(self, stream: bool) -> None:
        with site() as served:
            body = json.dumps({"model": "writer", "prompt": ["wait", "one"], "stream": stream}).encode()
            link = served.connect()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: len(served.engine.futures) == 2 and served.engine.futures[1].done())
            time.sleep(0.05)
            assert not served.engine.futures[0].done()
            link.close()
            until(lambda: served.engine.futures[0].cancelled())

    def test_nobody_waits_longer_than_said(self) -> None:
        with site() as served:
            began = time.monotonic()
            response = served.post("/v1/completions", model="writer", prompt="wait", timeout=1)
            ended = time.monotonic()
            assert response.status_code == 504
            assert "within 1 second" in error_of(response)["message"]
            assert ended - began < 30
            until(served.engine.futures[-1].cancelled)
            deadline = served.engine.requests[-1].deadline
            assert deadline is not None
            assert began + 1 <= deadline <= ended

    def test_what_fails_while_a_list_is_submitted_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with site() as served:

            def together(count: int) -> NoReturn:
                raise RuntimeError("no lists")

            monkeypatch.setattr(served.engine, "together", together)
            assert served.post("/v1/completions", model="writer", prompt=["a", "b"]).status_code == 500
            assert served.post("/v1/completions", model="writer", prompt="a").status_code == 200

    def test_what_is_being_submitted_is_dropped_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with site() as served:
            submit, gone = served.engine.submit, threading.Event()

            def slowly(request: Request) -> Future[Answer]:
                future = submit(request)
                if len(served.engine.futures) == 2:
                    gone.wait(10)
                return future

            monkeypatch.setattr(served.engine, "submit", slowly)
            body = json.dumps({"model": "writer", "prompt": ["wait"] * 3}).encode()
            with served.connect() as link:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda: len(served.engine.futures) == 2)
            until(lambda: served.engine.futures[0].cancelled())
            gone.set()
            until(lambda: served.engine.futures[1].cancelled())
            time.sleep(0.05)
            assert len(served.engine.futures) == 2

    def test_a_stream_that_nobody_reads_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ia3.serving.http._TO_READ", 1)
        with site(answer_s=4) as served, socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
            asked = {"model": "writer", "prompt": ["ä" * 100_000] * 10, "stream": True}  # six bytes a letter come back
            body = json.dumps(asked, ensure_ascii=False).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: len(served.engine.futures) == 10)
            assert "ia3_http_requests_running 2.0" in served.get("/metrics").text
            until(lambda: "ia3_http_requests_running 1.0" in served.get("/metrics").text)
            assert 'status="499"' in served.get("/metrics").text

    def test_a_key_has_so_many_under_way(self) -> None:
        with site(running=2) as served:
            ask = {"model": "writer", "prompt": "wait"}
            threads = [threading.Thread(target=served.post, args=("/v1/completions",), kwargs=ask) for _ in range(2)]
            for each in threads:
                each.start()
            until(lambda: len(served.engine.futures) == 2)
            response = served.post("/v1/completions", model="writer", prompt="hello")
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert "2 requests of this key are under way" in error_of(response)["message"]
            assert served.post("/v1/completions", OTHER_KEY, model="writer", prompt="hello").status_code == 200
            assert served.get("/health/ready", None).status_code == 200
            served.engine.released.set()
            for each in threads:
                each.join()
            assert served.post("/v1/completions", model="writer", prompt="hello").status_code == 200


class TestBodies:
    def test_a_declared_length_is_refused_unread(self, served: Site) -> None:
        with served.connect() as link:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            link.sendall(f"{head}Content-Length: 99999999999999999999\r\n\r\n".encode())
            answer = b"".join(iter(lambda: link.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 413")

    def test_an_endless_body_is_cut(self) -> None:
        with site(body_bytes=10_000) as served, served.connect() as link:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            link.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(11):
                link.sendall(b"3e8\r\n" + b"[" * 1000 + b"\r\n")
            assert b"".join(iter(lambda: link.recv(65536), b"")).startswith(b"HTTP/1.1 413")

    def test_a_slow_body(self) -> None:
        with site(body_s=0.2) as served, served.connect() as link:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            link.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert link.recv(65536).startswith(b"HTTP/1.1 408")

    def test_no_body_is_read_without_a_key(self, served: Site) -> None:
        with served.connect() as link:
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
            answer = b"".join(iter(lambda: link.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer  # so that nobody waits for the rest

    def test_large_bodies_of_ordinary_clients(self, served: Site) -> None:
        assert served.post("/v1/completions", model="writer", prompt="a" * 3_000_000).status_code == 413


def answers(served: Site) -> bool:
    try:
        return served.get("/health").status_code > 0
    except httpx2.HTTPError:
        return False


class TestStopping:
    def test_what_runs_is_answered_and_nothing_more_is_taken(self) -> None:
        with site(drain_s=60) as served:
            found: list[httpx2.Response] = []
            ask = {"model": "writer", "prompt": "wait"}
            asking = threading.Thread(target=lambda: found.append(served.post("/v1/completions", **ask)))
            asking.start()
            until(lambda: served.engine.futures)
            served.listener.should_exit = True
            until(lambda: not answers(served))
            served.engine.released.set()
            asking.join()
            served.thread.join(60)
            assert found[0].json()["choices"][0]["text"] == "wait!"
            assert not served.engine.ready

    def test_the_rest_of_a_list_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with site(drain_s=60) as served:
            submit, found, go = served.engine.submit, list[httpx2.Response](), threading.Event()

            def slowly(request: Request) -> Future[Answer]:
                future = submit(request)
                go.wait(60)
                return future

            monkeypatch.setattr(served.engine, "submit", slowly)
            ask = {"model": "writer", "prompt": ["a", "b", "c"]}
            asking = threading.Thread(target=lambda: found.append(served.post("/v1/completions", **ask)))
            asking.start()
            until(lambda: served.engine.futures)
            served.listener.should_exit = True
            until(lambda: not answers(served))
            go.set()
            asking.join()
            assert [each["text"] for each in found[0].json()["choices"]] == ["a!", "b!", "c!"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_not_answered_in_time_is_told(self, stream: bool) -> None:
        with site(drain_s=0.3) as served:
            found: list[httpx2.Response] = []
            ask = {"model": "writer", "prompt": "wait", "stream": stream}
            asking = threading.Thread(target=lambda: found.append(served.post("/v1/completions", **ask)))
            asking.start()
            until(lambda: served.engine.futures)
            served.listener.should_exit = True
            asking.join(60)
            assert found[0].status_code == 503
            assert error_of(found[0])["type"] == "service_unavailable_error"
            assert found[0].headers["retry-after"] == "1"

    def test_not_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ia3.serving.listening._FAILED_S", 600.0)
        with site() as served:
            served.engine.ready = False
            assert served.get("/health", None).status_code == served.get("/health/ready", None).status_code == 503
            assert served.get("/health/live", None).status_code == 200
            assert served.post("/v1/completions", model="writer", prompt="hello").status_code == 503


class TestWhatIsSeen:
    def test_metrics_name_nobody(self, served: Site) -> None:
        served.post("/v1/completions", model="writer", prompt="hello")
        served.get("/v1/models/writer")
        text = served.get("/metrics", None).text
        assert 'ia3_http_requests_total{route="/v1/completions",status="200"}' in text
        assert 'route="/v1/models/{name:path}"' in text
        assert "writer" not in text
        assert "news" not in text

    def test_the_log(self, capfd: pytest.CaptureFixture[str]) -> None:
        logger = logging.getLogger("ia3.serving")
        former = (logger.handlers[:], logger.level, logger.propagate)
        try:
            log_in_lines()
            with site() as served:
                served.post("/v1/completions", model="writer", prompt="a private text")
                served.post("/v1/completions", model="writer", prompt="fault")
                served.get("/health", None)
                served.get("/v1/activity")
                served.get("/v1/activity", None)
                served.post("/v1/load_lora_adapter", ADMIN_KEY)
        finally:
            logger.handlers[:], logger.level, logger.propagate = former
        written = capfd.readouterr().err
        lines = [json.loads(line) for line in written.splitlines()]
        requests = [each for each in lines if each["event"] == "request"]
        assert [(each["route"], each["status"]) for each in requests] == [
            ("/v1/completions", 200),
            ("/v1/completions", 500),
            ("none", 401),
            ("/v1/load_lora_adapter", 400),
        ]
        assert [each["key"] for each in requests] == [1, 1, None, "admin"]
        fault = next(each for each in lines if each["event"] == "fault")
        assert (fault["error"], fault["id"]) == ("RuntimeError", requests[1]["id"])
        for private in ("private", KEY, ADMIN_KEY, "secret"):
            assert private not in written

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "/v1/completions", {"model": "writer", "prompt": ["hello", "there"]}),
            ("POST", "/v1/chat/completions", {"model": "writer", "messages": [{"role": "user", "content": "hello"}]}),
            ("POST", "/v1/classify", {"models": ["news"], "input": "hello"}),
            ("GET", "/v1/activity", None),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "fresh", "lora_path": "fresh"}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "news"}),
            ("PUT", "/v1/aliases", {"alias": "best", "model": "writer"}),
            ("GET", "/v1/models", None),
            ("GET", "/v1/models/{name:path}", None),
            ("GET", "/health", None),
            ("GET", "/health/live", None),
            ("GET", "/version", None),
        ],
    )
    def test_answers_are_as_described(self, method: str, path: str, body: Any) -> None:
        """Field by field, and an error's, too."""
        whole, error = (TypeAdapter(answers_of(path)[status]["model"]) for status in (200, "4XX"))
        key = ADMIN_KEY if "adapter" in path or "alias" in path else KEY
        with site() as served, served.client(key) as client:
            for kind, at in ((whole, path.replace("{name:path}", "writer")), (error, f"{path}/no")):
                said = client.request(method, at, json=body).json()
                assert kind.validate_python(said) == said  # which leaves out what it doesn't know

    def test_what_may_be_left_out_may_be_null(self, served: Site) -> None:
        described = served.get("/openapi.json", None).json()["paths"]["/v1/completions"]["post"]["requestBody"]
        fields = described["content"]["application/json"]["schema"]["properties"]
        may = {name for name, field in fields.items() if {"type": "null"} in field.get("anyOf", ())}
        assert may == fields.keys() - {"model", "prompt"}
        body = dict.fromkeys(may) | {"model": "writer", "prompt": "hello"}
        assert served.post("/v1/completions", **body).status_code == 200

    def test_the_description(self, served: Site) -> None:
        described = served.get("/openapi.json", None).json()
        paths, schemas = described["paths"], described["components"]["schemas"]
        assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described))) <= set(schemas)
        assert {"Message", "TextPart", "StreamOptions"} <= set(schemas)
        assert {"/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/aliases"} <= set(paths)
        schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"model", "prompt"} == set(schema["required"])
