from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet import (
    BASE,
    CAUSAL,
    QUESTIONS,
    RANKED,
    TASKS,
    TEXTS,
    alone,
    ask,
    bare,
    save,
    serving,
    task_of,
    tokenizer_of,
)  # fmt: skip

import tiny_causal
from ia3.inference.complete import complete
from ia3.inference.predict import predict
from ia3.serving.engine import Engine
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.serving.requests import Dropped, NotServed, Overloaded, Request, Server, ServingError, TooLate, UnknownModel


@contextmanager
def held_back(engine: Engine) -> Iterator[list[list[str]]]:
    """The batches that ran, each the rows of its adapters; the first of them waits until the block ends."""
    batches, gate, answer = [], threading.Event(), engine._answer

    def wait(prompts: Any, rows: Any) -> Any:
        batches.append(list(rows))
        assert gate.wait(60)
        return answer(prompts, rows)

    engine._answer = wait  # type: ignore[assignment]
    try:
        yield batches
    finally:
        gate.set()


def busy(engine: Engine, batches: list[list[str]]) -> Future[Any]:
    """A request that runs until the block of `held_back` ends, so that all others wait."""
    first = engine.submit(Request(TEXTS[0], "news"))
    while not batches:
        time.sleep(1e-3)
    return first


def expect_equal(found: Any, expected: Any) -> None:
    assert found.text == expected.label
    assert found.probabilities == (expected.probabilities and pytest.approx(expected.probabilities, abs=1e-5))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_each_answer_is_that_of_the_adapter_alone(fleet: Path, batch_size: int) -> None:
    with serving(fleet, batch_size=batch_size) as engine:
        asked = [(name, text) for text in TEXTS for name in TASKS]
        answers = [engine.submit(Request(text, name)) for name, text in asked]
        found = {each: answer.result(60) for each, answer in zip(asked, answers, strict=True)}
        assert engine.drain(60)
        stats = engine.stats()
        assert {version.holders for version in engine.registry._versions.values()} == {1}  # the name alone
    assert stats["requests_answered"] == len(asked)
    assert batch_size == 1 or stats["batches"] < len(asked)
    for name, fields in TASKS.items():
        for text, expected in zip(TEXTS, alone(fleet / name, TEXTS), strict=True):
            answer = found[name, text]
            expect_equal(answer, expected)
            assert answer.adapter == name
            assert answer.label == (answer.text if answer.text in fields.get("labels", ()) else None)
            assert answer.queued_s >= 0 < answer.ran_s
    labels = {answer.label for (name, _), answer in found.items() if name == "news"}
    shares = {tuple(answer.probabilities.values()) for (name, _), answer in found.items() if name == "sports"}
    assert len(labels | {len(shares)}) > 1  # the texts matter, and the vectors act


def test_completions_of_a_causal_model(chats: Path) -> None:
    with serving(chats, causal=True, batch_size=5) as engine:
        asked = [(name, text) for text in QUESTIONS for name in CAUSAL]
        answers = [engine.submit(Request(text, name)) for name, text in asked]
        found = {each: answer.result(60) for each, answer in zip(asked, answers, strict=True)}
        said = ask(engine, "chat", QUESTIONS[0], turns=[("user", "say one"), ("assistant", "one")])
        with pytest.raises(NotServed, match="reads no earlier messages"):
            ask(engine, "plain", QUESTIONS[0], turns=[("user", "say one")])
    for name in CAUSAL:
        for text, expected in zip(QUESTIONS, alone(chats / name, QUESTIONS, causal=True), strict=True):
            expect_equal(found[name, text], expected)
    assert said.prompt_tokens > found["chat", QUESTIONS[0]].prompt_tokens
    assert max(answer.prompt_tokens for (name, _), answer in found.items() if name == "brief") <= 14


def test_a_list_shares_a_batch_however_long_it_takes_to_submit(fleet: Path) -> None:
    """But nobody waits for it for long."""
    with serving(fleet, gather_s=2) as engine:
        with engine.together(3):
            futures = [engine.submit(Request(TEXTS[0], "news")) for _ in range(2)]
            time.sleep(2.3)  # by which who is in no list has been answered
            futures.append(engine.submit(Request(TEXTS[0], "news")))
        assert all(each.result(60).label for each in futures)
        assert engine.stats()["batches"] == 1
    with serving(fleet, gather_s=0.1) as engine, engine.together(3):
        for _ in range(2):
            assert engine.submit(Request(TEXTS[0], "news")).result(60).label


def test_a_list_has_places_for_all_or_for_none(fleet: Path) -> None:
    def listed(engine: Engine, count: int) -> list[Future[Any]]:
        with engine.together(count):
            return [engine.submit(Request(TEXTS[0], "news")) for _ in range(count)]

    with serving(fleet, most_waiting=4) as engine:
        with held_back(engine) as batches:
            some = [busy(engine, batches)]
            with pytest.raises(NotServed), engine.together(3):  # what wasn't submitted keeps no place
                engine.submit(Request("", "news"))
            some += listed(engine, 3)
            with pytest.raises(Overloaded, match="3 requests wait, and not 2 more, at most 4 together, may"):
                listed(engine, 2)
            with engine.together(1):
                with pytest.raises(Overloaded, match="4 requests wait, and no more may"):
                    # Of another thread, since this one's has its place already.
                    raise_of(lambda: engine.submit(Request(TEXTS[0], "news")))
                some.append(engine.submit(Request(TEXTS[0], "news")))
        assert all(each.result(60).label for each in some)
        assert engine.stats()["requests_overloaded"] == 3
    with serving(fleet, most_waiting=4) as engine:
        with held_back(engine) as batches:
            some = [busy(engine, batches), *listed(engine, 9)]  # more than may ever wait, where nobody does
            with pytest.raises(Overloaded):
                listed(engine, 9)
        assert all(each.result(60).label for each in some)


def test_who_is_gone_since_the_time_is_over_is_too_late(fleet: Path) -> None:
    with serving(fleet) as engine, held_back(engine) as batches:
        busy(engine, batches)
        late, gone = (
            engine.submit(Request(TEXTS[0], "news", deadline=time.monotonic() + seconds)) for seconds in (1, 60)
        )
        time.sleep(1.01)
        assert late.cancel()
        assert gone.cancel()
        stats = engine.stats()
        assert (stats["requests_too_late"], stats["requests_cancelled"]) == (1, 1)


def raise_of(call: Any) -> None:
    """What a call raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_nobody_waits_for_a_list_of_others(fleet: Path) -> None:
    with serving(fleet, gather_s=600, batch_size=2) as engine:
        futures = []
        with engine.together(2):
            taking = threading.Thread(
                target=lambda: futures.extend(engine.submit(Request(TEXTS[0], name)) for name in ("news", "sports"))
            )
            taking.start()
            taking.join()
            for future in futures:
                future.result(60)


@pytest.mark.parametrize("causal", [False, True])
def test_the_base_answers_by_its_own_name(fleet: Path, chats: Path, tmp_path: Path, causal: bool) -> None:
    texts, model, tokenizer = QUESTIONS if causal else TEXTS, bare(causal=causal), tokenizer_of(causal=causal)
    written = (complete if causal else predict)(model, tokenizer, texts, max_length=512, max_new_tokens=128)
    for folder in (tmp_path, chats if causal else fleet):  # without any adapter, too
        with serving(folder, causal=causal) as engine:
            found = [engine.submit(Request(text, BASE)) for text in texts]
            assert [answer.result(60).text for answer in found] == written
            assert found[0].result().digest is None


@pytest.mark.parametrize("causal", [False, True])
def test_an_answer_may_be_cut(fleet: Path, chats: Path, causal: bool) -> None:
    texts, name = (QUESTIONS, "chat") if causal else (TEXTS, "free")
    with serving(chats if causal else fleet, causal=causal) as engine:
        whole = [ask(engine, name, text) for text in texts]
        cut = [ask(engine, name, text, max_new_tokens=2) for text in texts]
    for one, other in zip(whole, cut, strict=True):
        assert other.completion_tokens == min(2, one.completion_tokens)
        assert one.text.startswith(other.text)
        assert (other.finish_reason == "length") == (one.completion_tokens > 2 or one.finish_reason == "length")


def test_a_batch_goes_on_no_longer_than_it_is_asked_to(chats: Path) -> None:
    with serving(chats, causal=True) as engine:
        steps, model = [], engine._answer.model
        model.register_forward_hook(lambda *_: steps.append(1))
        with engine.together(2):
            some = [engine.submit(Request(QUESTIONS[0], BASE, max_new_tokens=most)) for most in (1, 3)]
        assert [each.result(60).completion_tokens for each in some] == [1, 3]
        assert len(steps) <= 1 + 3  # of 128, in one batch or in two


def test_a_label_is_given_whole(fleet: Path) -> None:
    with serving(fleet) as engine:
        label = ask(engine, "news", TEXTS[0], max_new_tokens=1)
    assert (label.finish_reason, label.completion_tokens) == ("stop", 0)


def test_an_answer_is_told_in_pieces(fleet: Path) -> None:
    told: list[str] = []

    def fail(text: str) -> None:
        raise RuntimeError("the client is gone")

    with serving(fleet) as engine:
        answer = ask(engine, "free", TEXTS[1], on_token=told.append)
        assert ask(engine, "free", TEXTS[1], on_token=fail).text == "".join(told) == answer.text


def test_who_waits_together_runs_together(fleet: Path) -> None:
    with serving(fleet, batch_size=4) as engine:
        with held_back(engine) as batches:
            first = busy(engine, batches)
            long = engine.submit(Request(" ".join(TEXTS), "sports"))
            others = [engine.submit(Request(text, name)) for text in TEXTS[:4] for name in ("news", "sports", "free")]
            soon = engine.submit(Request(TEXTS[3], "deep/two", deadline=time.monotonic() + 30))
        for each in (first, long, *others, soon):
            each.result(60)
    sizes = [len(batch) for batch in batches]
    assert sizes[:2] == [1, 1]  # who must be answered soon goes before those that came before
    assert sorted(sizes[2:]) == [1, 4, 4]  # what is written shares none of them
    assert max(len(set(batch)) for batch in batches) == 2  # news and sports


def test_the_first_waits_a_moment_for_company(fleet: Path) -> None:
    with serving(fleet, gather_s=30.0, batch_size=2) as engine:
        with held_back(engine) as batches:
            some = [engine.submit(Request(TEXTS[0], name)) for name in ("news", "sports")]
            while not batches:  # nor longer, once the batch is full
                time.sleep(1e-3)
        assert [each.result(20).label for each in some]
        alone_ = engine.submit(Request(TEXTS[0], "news"))
        time.sleep(0.05)
        assert engine.stats()["queued"] == 1
        assert engine.drain(20)  # who stops waits for nobody
        assert alone_.result(0).label
    assert [len(batch) for batch in batches] == [2, 1]


def test_texts_of_like_lengths_run_together(fleet: Path) -> None:
    with serving(fleet, batch_size=3) as engine:
        lengths, answer = [], engine._answer

        def note(prompts: Any, rows: Any) -> Any:
            lengths.append(sorted(len(prompt.tokens) for prompt in prompts))
            return answer(prompts, rows)

        engine._answer = note  # type: ignore[assignment]
        with held_back(engine) as batches:
            busy(engine, batches)
            for count in (2, 12, 2, 12, 2, 12):
                engine.submit(Request("rises " * count, "news"))
        assert engine.drain(60)
    assert lengths[1:] == [[3, 3, 3], [13, 13, 13]]


def test_labels_of_one_text_share_a_batch_under_all_who_read_it_alike(fleet: Path, tmp_path: Path) -> None:
    names = [f"decoder {index}" for index in range(5)]
    for seed, name in enumerate(names):
        save(tmp_path / name, seed, task_of(**RANKED), towers="decoder")
    save(tmp_path / "news", 9, task_of(**RANKED))
    asked = [(TEXTS[1], name) for name in names]
    asked[2:2] = [(TEXTS[1], "news"), (TEXTS[1], "news"), (TEXTS[2], names[0])]
    with serving(tmp_path, batch_size=2, gather_s=0) as engine:
        with held_back(engine) as batches:
            busy(engine, batches)
            futures = [engine.submit(Request(text, name)) for text, name in asked]
        answers = [future.result(60) for future in futures]
    assert sorted(map(len, batches[1:])) == [2, 6]  # that text, and one other or one whose encoder has vectors
    for (text, name), answer in zip(asked, answers, strict=True):
        assert answer.label == alone(tmp_path / name, [text])[0].label


def test_answers_end_with_the_positions_of_a_model(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As alone, whatever the room of those who share the batch."""
    llama = tiny_causal.llama

    def short() -> Any:
        model = llama()
        model.config.max_position_embeddings = 14
        return model

    monkeypatch.setattr(tiny_causal, "llama", short)
    with serving(chats, causal=True) as engine:
        found = [engine.submit(Request(text, "chat")) for text in QUESTIONS]
        for each, expected in zip(found, alone(chats / "chat", QUESTIONS, causal=True), strict=True):
            answer = each.result(60)
            expect_equal(answer, expected)
            assert answer.prompt_tokens + answer.completion_tokens <= 14
        with pytest.raises(NotServed, match="the model reads 14"):
            engine.submit(Request("please " * 20, "chat"))


def test_the_nearest_deadline_runs_first(fleet: Path) -> None:
    order: list[str] = []
    with serving(fleet) as engine:
        with held_back(engine) as batches:
            busy(engine, batches)
            now = time.monotonic()
            asked = {"free": 50, "writes": 40, "deep/two": 30}
            for name, seconds in asked.items():
                future = engine.submit(Request(TEXTS[0], name, deadline=now + seconds))
                future.add_done_callback(lambda done, name=name: order.append(name))
        assert engine.drain(60)
    assert order[0] == "deep/two"


def test_a_deadline_that_goes_by(fleet: Path) -> None:
    with serving(fleet) as engine:
        with held_back(engine) as batches:
            first = busy(engine, batches)
            late = engine.submit(Request(TEXTS[0], "news", deadline=time.monotonic() + 1))
            time.sleep(1.01)
        with pytest.raises(TooLate, match="deadline"):
            late.result(60)
        assert first.result(60).label
        with pytest.raises(TooLate):
            engine.submit(Request(TEXTS[0], "news", deadline=time.monotonic() - 1))
        assert engine.stats()["requests_too_late"] == 2
    assert len(batches) == 1


def test_who_goes_is_not_answered(fleet: Path) -> None:
    with serving(fleet) as engine:
        with held_back(engine) as batches:
            first = busy(engine, batches)
            gone = engine.submit(Request(TEXTS[0], "news"))
            assert engine.stats()["queued"] == 1
            assert gone.cancel()
            assert engine.stats()["queued"] == 0
            assert not first.cancel()
        with pytest.raises(CancelledError):
            gone.result(60)
        assert first.result(60).label
        assert engine.drain(60)
        assert engine.stats()["requests_cancelled"] == 1
    assert len(batches) == 1


def test_more_than_may_wait(fleet: Path) -> None:
    with serving(fleet, most_waiting=2) as engine:
        ask(engine, "news", TEXTS[0])  # by which it is known how long one takes
        with held_back(engine) as batches:
            running = [busy(engine, batches), *(engine.submit(Request(TEXTS[0], "news")) for _ in range(2))]
            with pytest.raises(Overloaded, match="2 requests wait") as refused:
                engine.submit(Request(TEXTS[0], "news"))
            assert 0 < refused.value.retry_after_s < 60
        assert all(each.result(60).label for each in running)
        assert ask(engine, "news", TEXTS[0]).label
        assert engine.stats()["requests_overloaded"] == 1


def test_drained_and_closed(fleet: Path) -> None:
    with serving(fleet) as engine:
        server: Server = engine
        assert server.ready
        with held_back(engine) as batches:
            running = busy(engine, batches)
            waiting = engine.submit(Request(TEXTS[0], "news"))
            assert not server.drain(0.01)
            assert not server.ready
            with pytest.raises(Dropped, match="stops"):
                server.submit(Request(TEXTS[0], "news"))
            for late in (running, waiting):  # who waits for them is told before the batch ends
                with pytest.raises(Dropped, match="stops"):
                    late.result(0)
            engine.close(0.01)  # and nobody waits for the batch
        assert server.drain(60)
        assert server.stats()["requests_dropped"] == 2
        assert server.stats()["requests_answered"] == 0
    with serving(fleet) as engine:
        with held_back(engine) as batches:
            running = busy(engine, batches)
            waiting = engine.submit(Request(TEXTS[0], "news"))
            draining = threading.Thread(target=engine.drain, args=(60,))
            draining.start()
            while engine.ready:
                time.sleep(1e-3)
        draining.join(60)
        assert running.result(0).label
        assert waiting.result(0).label
    with serving(fleet) as engine:
        with held_back(engine) as batches:
            running = busy(engine, batches)
            waiting = engine.submit(Request(TEXTS[0], "news"))
            closing = threading.Thread(target=engine.close)
            closing.start()
            while engine.ready:
                time.sleep(1e-3)
        closing.join(60)
        assert running.result(0).label
        with pytest.raises(Dropped):
            waiting.result(0)


def test_a_bad_request_does_not_take_its_neighbours(fleet: Path) -> None:
    with serving(fleet) as engine:
        answer = engine._answer

        def fail(prompts: Any, rows: Any) -> Any:
            if any(len(prompt.tokens) == 2 for prompt in prompts):
                raise RuntimeError("a kernel failed")
            return answer(prompts, rows)

        engine._answer = fail  # type: ignore[assignment]
        with held_back(engine) as batches:
            busy(engine, batches)
            some = [engine.submit(Request(text, "news")) for text in ("the share rises", "rises", "falls")]
        assert some[0].result(60).label
        for each in some[1:]:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                each.result(60)
        assert engine.stats()["requests_failed"] == 2
        assert engine.ready


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        (Request("a text", "nobody"), UnknownModel, "There is no model 'nobody'"),
        (Request("", "news"), NotServed, "The text is empty"),
        (Request("a \ud800", "news"), NotServed, "half a character"),
        (Request("a text", "free", max_new_tokens=0), NotServed, "0 tokens"),
        (Request("a text", "news", turns=[("user", "hello")]), NotServed, "reads no earlier messages"),
    ],
)
def test_what_cannot_be_answered(fleet: Path, request_: Request, error: type[ServingError], said: str) -> None:
    with serving(fleet) as engine:
        before = [version.holders for version in engine.registry._versions.values()]
        with pytest.raises(error, match=said):
            engine.submit(request_)
        assert [version.holders for version in engine.registry._versions.values()] == before


def test_batches_larger_than_the_table(fleet: Path) -> None:
    model = bare()
    registry = Registry(model, fleet, base=BASE, capacity=4)
    with pytest.raises(ValueError, match=r"batch_size is 5: expected a number from 1 to .* 4"):
        Engine(model, tokenizer_of(), registry, Limits(batch_size=5))
