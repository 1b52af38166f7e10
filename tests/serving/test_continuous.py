from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from fleet import BASE, CAUSAL, QUESTIONS, alone, bare, save, task_of, tokenizer_of
from slow_writer import writing

from ia3.inference.complete import complete
from ia3.serving.requests import Dropped, NotServed, Overloaded, Request, Server, ServingError, TooLate, UnknownModel
from ia3.tasks.task import TaskKind

LONG = {"kind": TaskKind.INSTRUCTIONS, "max_length": 64, "max_new_tokens": 400}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters whose vectors give long answers."""
    folder = tmp_path_factory.mktemp("endless")
    for name, seed in (("long", 3), ("other", 10)):
        save(folder / name, seed, task_of(**LONG), causal=True)
    return folder


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until something is so, for a minute at most."""
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(1e-3)


def ask(engine: Server, model: str, text: str, **more: Any) -> Any:
    return engine.submit(Request(text, model, **more)).result(60)


def test_each_answer_is_that_of_the_adapter_alone(chats: Path) -> None:
    with writing(chats, at_once=5) as engine:
        asked = [(name, text) for text in QUESTIONS for name in CAUSAL]
        answers = [engine.submit(Request(text, name)) for name, text in asked]
        found = {each: answer.result(60) for each, answer in zip(asked, answers, strict=True)}
        said = ask(engine, "chat", QUESTIONS[0], turns=[("user", "say one"), ("assistant", "one")])
        assert engine.drain(60)
        stats = engine.stats()
        assert {version.holders for version in engine.registry._versions.values()} == {1}  # the name alone
    assert stats["requests_answered"] == len(asked) + 1
    assert stats["completion_tokens"] == said.completion_tokens + sum(each.completion_tokens for each in found.values())
    assert (stats["queued"], stats["running"], stats["adapters"], stats["versions"]) == (0, 0, 3, 3)
    for name in CAUSAL:
        for text, expected in zip(QUESTIONS, alone(chats / name, QUESTIONS, causal=True), strict=True):
            answer = found[name, text]
            assert (answer.text, answer.label, answer.probabilities) == (expected.label, None, None)
            assert answer.adapter == name
            assert answer.queued_s >= 0 < answer.ran_s
    assert max(answer.queued_s for answer in found.values()) > 0
    assert said.prompt_tokens > found["chat", QUESTIONS[0]].prompt_tokens
    assert len({answer.text for answer in found.values()}) > 3


def test_the_base_answers_by_its_own_name(chats: Path) -> None:
    model, tokenizer = bare(causal=True), tokenizer_of(causal=True)
    written = complete(model, tokenizer, QUESTIONS[:3], max_length=512, max_new_tokens=128)
    with writing(chats) as engine:
        found = [engine.submit(Request(text, BASE)).result(60) for text in QUESTIONS[:3]]
    assert [answer.text for answer in found] == written
    assert {answer.digest for answer in found} == {None}


def test_how_an_answer_ends(chats: Path) -> None:
    with writing(chats) as engine:
        whole = [ask(engine, name, text) for name in CAUSAL for text in QUESTIONS]
        cut = [ask(engine, name, text, max_new_tokens=2) for name in CAUSAL for text in QUESTIONS]
    for one, other in zip(whole, cut, strict=True):
        assert other.completion_tokens == min(2, one.completion_tokens)
        assert one.text.startswith(other.text)
        assert (other.finish_reason == "length") == (one.completion_tokens > 2 or one.finish_reason == "length")


def test_an_answer_is_told_as_it_is_written(endless: Path) -> None:
    told: list[str] = []

    def fail(piece: str) -> None:
        raise RuntimeError("the client is gone")

    with writing(endless) as engine:
        with engine._writer.held_back():
            answer = engine.submit(Request(QUESTIONS[0], "long", max_new_tokens=20, on_token=told.append))
            eventually(lambda: len(told) > 0)
            assert not answer.done()
        assert answer.result(60).text == "".join(told)
        assert len(told) > 5
        assert all(piece == piece.rstrip() for piece in told)  # what follows may take a blank away
        assert ask(engine, "long", QUESTIONS[0], max_new_tokens=20, on_token=fail).text == "".join(told)


def test_requests_run_side_by_side(endless: Path) -> None:
    with writing(endless) as engine:
        with engine._writer.held_back():
            long = engine.submit(Request(QUESTIONS[0], "long"))
            eventually(lambda: engine.stats()["running"] == 1)
            first = engine.submit(Request(QUESTIONS[1], "other", max_new_tokens=1))
            eventually(lambda: engine.stats()["running"] == 2)
            is_over: list[bool] = []
            first.add_done_callback(lambda _: is_over.append(long.done()))
        assert first.result(60).text
        eventually(lambda: bool(is_over))
        assert is_over == [False]
        long.cancel()


def test_a_deadline_that_goes_by(endless: Path) -> None:
    with writing(endless, at_once=1) as engine:
        with engine._writer.held_back():
            some = [engine.submit(Request(QUESTIONS[0], "long", deadline=time.monotonic() + 1)) for _ in range(2)]
            for each in some:  # one was written, the other waited
                with pytest.raises(TooLate, match="deadline"):
                    each.result(60)
            eventually(lambda: not engine._writer.under_way)
        with pytest.raises(TooLate):
            engine.submit(Request(QUESTIONS[0], "long", deadline=time.monotonic() - 1))
        assert engine.stats()["requests_too_late"] == 3
        assert ask(engine, "long", QUESTIONS[0], max_new_tokens=2).text


def test_who_goes_is_not_written_to(endless: Path) -> None:
    with writing(endless, at_once=1) as engine:
        with engine._writer.held_back():
            running = engine.submit(Request(QUESTIONS[0], "long"))
            waiting = engine.submit(Request(QUESTIONS[0], "other"))
            eventually(lambda: engine.stats()["running"] == 1)
            assert engine.stats()["queued"] == 1
            assert running.cancel()
            assert waiting.cancel()
            with pytest.raises(CancelledError):
                running.result(60)
            eventually(lambda: not engine._writer.under_way)
            eventually(lambda: engine.stats()["running"] == engine.stats()["queued"] == 0)
        assert engine.drain(60)
        assert engine.stats()["requests_cancelled"] == 2


def test_more_than_may_wait(endless: Path) -> None:
    with writing(endless, at_once=1, most_waiting=2) as engine:
        for _ in range(2):
            ask(engine, "long", QUESTIONS[0], max_new_tokens=1)  # by which it is known how long one takes
        eventually(lambda: engine.stats()["running"] == 0)
        with engine._writer.held_back():
            some = [engine.submit(Request(QUESTIONS[0], "long", max_new_tokens=3))]
            eventually(lambda: engine.stats()["running"] == 1)
            some += [engine.submit(Request(QUESTIONS[0], "long", max_new_tokens=3)) for _ in range(2)]
            with pytest.raises(Overloaded, match="2 requests wait") as refused:
                engine.submit(Request(QUESTIONS[0], "long"))
            assert 0 < refused.value.retry_after_s < 60
        assert len({each.result(60).text for each in some}) == 1
        assert engine.stats()["requests_overloaded"] == 1


def test_drained_and_closed(endless: Path) -> None:
    with writing(endless, at_once=1) as engine:
        server: Server = engine
        assert server.ready
        with engine._writer.held_back():
            some = [engine.submit(Request(QUESTIONS[0], "long", max_new_tokens=3)) for _ in range(2)]
            assert not server.drain(0.01)
            assert not server.ready
            with pytest.raises(Dropped, match="stops"):
                server.submit(Request(QUESTIONS[0], "long"))
        assert server.drain(60)
        assert all(each.done() for each in some)
    with writing(endless, at_once=1) as engine:
        with engine._writer.held_back():
            running = engine.submit(Request(QUESTIONS[0], "long", max_new_tokens=3))
            eventually(lambda: engine.stats()["running"] == 1)
            waiting = engine.submit(Request(QUESTIONS[0], "long"))
            closing = threading.Thread(target=engine.close)
            closing.start()
            with pytest.raises(Dropped):
                waiting.result(60)
        closing.join(60)
        assert running.result(0).text
        assert not engine.ready


def test_a_request_that_has_not_begun_is_dropped(endless: Path) -> None:
    with writing(endless) as engine:
        blocked = threading.Event()
        engine._writer.loop.call_soon_threadsafe(blocked.wait, 60)
        waiting = engine.submit(Request(QUESTIONS[0], "long"))
        closing = threading.Thread(target=engine.close)
        closing.start()
        eventually(lambda: not engine.ready)
        with engine._changed:  # by when the stop is in the loop, before the request's first step
            pass
        blocked.set()
        with pytest.raises(Dropped):
            waiting.result(60)
        closing.join(60)
        assert not closing.is_alive()


def test_a_request_keeps_the_version_that_it_came_for(endless: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(endless, tmp_path / "folder"))
    expected = [each.label for each in alone(folder / "long", QUESTIONS[:1], causal=True)]
    with writing(folder) as engine:
        with engine._writer.held_back():
            running = engine.submit(Request(QUESTIONS[0], "long"))
            eventually(lambda: engine.stats()["running"] == 1)
            save(folder / "long", 7, task_of(**LONG), causal=True)
            engine.registry.refresh(at_once=True)
            assert len(engine.registry.table) == 3
            other = engine.submit(Request(QUESTIONS[0], "long", max_new_tokens=1))
        found = running.result(60)
        assert found.text == expected[0]
        assert found.digest != other.result(60).digest
        assert engine.drain(60)
        assert len(engine.registry.table) == 2


def test_a_fault_is_its_own_requests(endless: Path) -> None:
    with writing(endless) as engine:
        for fault, error in (
            (RuntimeError("a kernel failed"), RuntimeError),
            (ValueError("not this text"), NotServed),
            (Dropped("the writer has died"), Dropped),
        ):
            engine._writer.fault = fault
            with pytest.raises(error, match=str(fault)):
                ask(engine, "long", QUESTIONS[0])
        engine._writer.fault = None
        assert ask(engine, "long", QUESTIONS[0], max_new_tokens=1).text
        assert engine.stats()["requests_failed"] == 2
        engine._writer.alive = False
        assert not engine.ready
        with pytest.raises(Dropped):
            engine.submit(Request(QUESTIONS[0], "long"))


def test_answers_end_where_the_writers_room_does(endless: Path) -> None:
    with writing(endless, longest=14) as engine:
        found = ask(engine, "long", "say")
        assert found.prompt_tokens + found.completion_tokens == 14
        assert found.finish_reason == "length"
        with pytest.raises(NotServed, match="this server has room for 14"):
            ask(engine, "long", "please " * 20)


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        (Request("a text", "nobody"), UnknownModel, "There is no model 'nobody'"),
        (Request("", "chat"), NotServed, "The text is empty"),
        (Request("say one", "plain", turns=[("user", "hello")]), NotServed, "reads no earlier messages"),
    ],
)
def test_what_cannot_be_answered(chats: Path, request_: Request, error: type[ServingError], said: str) -> None:
    with writing(chats) as engine:
        with pytest.raises(error, match=said):
            engine.submit(request_)
        assert {version.holders for version in engine.registry._versions.values()} == {1}
