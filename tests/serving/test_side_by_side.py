"""Answers that are written in slots: who shares them, who leaves them, and what is told meanwhile."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from fleet import (
    RANKED,
    TEXTS,
    alone,
    ask,
    at_step,
    bare,
    never_ending,
    save,
    save_fleet,
    serving,
    task_of,
    tokenizer_of,
)

from ia3 import IA3Config, get_peft_model
from ia3.fast.generate import compile_generate
from ia3.serving import writing
from ia3.serving.engine import Engine
from ia3.serving.requests import Answer, Request, TooLate
from ia3.serving.writing import Size
from ia3.tasks.task import TaskKind

LONG = {"kind": TaskKind.GENERATION, "max_length": 64, "max_new_tokens": 30}
TASKS: dict[str, dict[str, Any]] = {
    "long": LONG,
    "short": LONG | {"max_new_tokens": 2},
    "other": LONG,
    "news": RANKED,
    "far": LONG | {"max_length": 300},
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("fleet"), TASKS)


def free_slots(engine: Engine) -> list[int]:
    return [len(held.slots.free) for held in engine._writing._held.values()]


def test_the_tokens_are_those_of_compile_generate_alone(fleet: Path) -> None:
    """Under every adapter, whoever comes meanwhile."""
    tokenizer, names = tokenizer_of(), ("long", "other", "far")
    expected = {}
    for name in names:
        adapted = get_peft_model(bare(), IA3Config(task_type="SEQ_2_SEQ_LM"))
        adapted.load_adapter(fleet / name, "own")
        adapted.set_adapter("own")
        generate = compile_generate(adapted, max_new_tokens=30, min_length=0)
        for text in TEXTS[:5]:
            batch = tokenizer([text], return_tensors="pt")
            expected[name, text] = generate(batch["input_ids"], batch["attention_mask"])[0, 1:].tolist()
    with serving(fleet, batch_size=3) as engine:
        seen, found_of = {}, writing.found_of
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "found_of", lambda *given: seen.setdefault(tuple(given[2]), found_of(*given)))
            futures = {each: engine.submit(Request(each[1], each[0])) for each in expected}
            answers = {each: future.result(60) for each, future in futures.items()}
        assert engine._writing._held.keys() == {Size(128, 32), Size(512, 32)}
    assert {*seen} == {tuple(tokens) for tokens in expected.values()}
    for each, tokens in expected.items():
        assert answers[each].text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert len({*seen}) > 4


def test_who_comes_later_does_not_wait_for_a_long_answer(fleet: Path) -> None:
    order: list[str] = []
    with never_ending(fleet) as engine:

        def ask_more() -> None:
            for name in ("news", "short"):
                future = engine.submit(Request(TEXTS[0], name))
                future.add_done_callback(lambda _, name=name: order.append(name))

        write_on = engine._write_on  # however long a batch took
        engine._write_on = lambda seconds: write_on(0.0)  # type: ignore[method-assign]
        at_step(engine, 3, ask_more)
        answer = ask(engine, "long", TEXTS[1])
        order.append("long")
        assert engine.drain(60)
    assert order == ["news", "short", "long"]
    assert (answer.completion_tokens, answer.finish_reason) == (30, "length")


def test_a_batch_and_the_steps_take_turns(fleet: Path) -> None:
    """However many labels are asked, an answer goes on, for as long as they took."""
    with never_ending(fleet, batch_size=2) as engine:
        took, answered_at = [], []
        rank, step = engine._answer._rank, engine._writing.step

        def slow(*given: Any) -> Any:
            took.append("batch")
            time.sleep(0.05)
            return rank(*given)

        def note(size: Size) -> Any:
            took.append("step")
            return step(size)

        engine._answer._rank, engine._writing.step = slow, note  # type: ignore[method-assign]
        writes = engine.submit(Request(TEXTS[1], "long"))
        writes.add_done_callback(lambda _: answered_at.append(len(took)))
        labels = [engine.submit(Request(text, "news")) for text in TEXTS * 5]
        for each in (writes, *labels):
            each.result(60)
    assert answered_at[0] < len(took)  # not behind all labels
    first = took.index("step")
    meanwhile = took[first : answered_at[0]]
    assert "batch" in meanwhile  # nor they behind it
    assert ("batch", "batch") not in pairwise(meanwhile)


def test_pieces_come_before_the_end(fleet: Path) -> None:
    told: list[tuple[float, str]] = []
    with serving(fleet) as engine:
        future = engine.submit(Request(TEXTS[1], "long", on_token=lambda piece: told.append((time.monotonic(), piece))))
        answer, ended = future.result(60), time.monotonic()
        (expected,) = alone(fleet / "long", TEXTS[1:2])
    assert answer.text == expected.label == "".join(piece for _, piece in told)
    assert len(told) > 3
    assert told[0][0] < ended
    assert told[0][1] == answer.text.split()[0]


def test_who_goes_leaves_the_slot(fleet: Path) -> None:
    with never_ending(fleet, batch_size=2) as engine:
        versions, going = engine.registry._versions.values(), SimpleQueue[Any]()
        at_step(engine, 4, lambda: going.get(timeout=60).cancel())
        gone = engine.submit(Request(TEXTS[0], "long"))
        going.put(gone)
        stays = engine.submit(Request(TEXTS[1], "long"))
        answer = stays.result(60)
        with pytest.raises(CancelledError):
            gone.result(0)
        assert engine.drain(60)
        assert engine.stats()["requests_cancelled"] == 1
        assert engine.stats()["running"] == 0
        assert free_slots(engine) == [2]
        assert {version.holders for version in versions} == {1}
    assert answer.completion_tokens == 30


def test_who_is_late_leaves_the_slot(fleet: Path) -> None:
    order: list[str] = []
    with never_ending(fleet, batch_size=2) as engine:
        ask(engine, "short", TEXTS[0])  # which makes the slots
        at_step(engine, 4, lambda: time.sleep(2.1))
        late = engine.submit(Request(TEXTS[0], "long", deadline=time.monotonic() + 2))
        stays = engine.submit(Request(TEXTS[1], "long"))
        for name, future in {"late": late, "stays": stays}.items():
            future.add_done_callback(lambda _, name=name: order.append(name))
        with pytest.raises(TooLate):
            late.result(60)
        assert stays.result(60).completion_tokens == 30
        assert engine.drain(60)
        assert free_slots(engine) == [2]
    assert order == ["late", "stays"]


def test_what_runs_is_written_when_the_engine_closes(fleet: Path) -> None:
    with never_ending(fleet, batch_size=2) as engine:
        closing = threading.Thread(target=engine.close)
        at_step(engine, 2, closing.start)
        assert engine.submit(Request(TEXTS[0], "long")).result(60).completion_tokens == 30
        closing.join(60)


def save_at(folder: Path, seed: int, **where: Any) -> None:
    """An adapter with vectors at other places."""
    save(folder, seed, task_of(**LONG), **where)


def test_other_sites_come_and_nobody_is_lost(fleet: Path, tmp_path: Path) -> None:
    """Slots with room for the new sites are made when the old ones are empty."""
    save_at(tmp_path / "keys", 1, target_modules=["k"], feedforward_modules=[])
    with never_ending(tmp_path, batch_size=2) as engine:

        def load() -> Any:
            save(tmp_path / "whole", 2, task_of(**LONG))
            engine.registry.refresh(at_once=True)
            return [engine.submit(Request(text, "whole")) for text in TEXTS[:3]]

        given = at_step(engine, 5, load)
        made, make = [], engine._writing._make

        def note(size: Size) -> None:
            made.append(size)
            make(size)

        engine._writing._make = note  # type: ignore[method-assign]
        engine._answer = None  # type: ignore[assignment]  # nobody needs a whole batch
        for future in [engine.submit(Request(text, "keys")) for text in TEXTS[:2]]:
            assert future.result(60).completion_tokens == 30
        answers = [future.result(60) for future in given[0]]
        assert len(made) == 2
        ask(engine, "keys", TEXTS[2])
        assert len(made) == 2
    with never_ending(tmp_path) as engine:
        assert [ask(engine, "whole", text).text for text in TEXTS[:3]] == [answer.text for answer in answers]


def test_a_model_that_changes_under_an_answer(fleet: Path) -> None:
    """Who is written goes on; who comes then waits for slots of what the model is now."""
    with never_ending(fleet, batch_size=2) as engine:
        model = engine._writing.model

        def change() -> Any:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            return engine.submit(Request(TEXTS[1], "long"))

        given = at_step(engine, 5, change)
        engine._answer = None  # type: ignore[assignment]  # nobody needs a whole batch
        assert engine.submit(Request(TEXTS[0], "long")).result(60).completion_tokens == 30
        assert given[0].result(60).completion_tokens == 30
        (held,) = engine._writing._held.values()
        assert held.slots.is_valid()


@pytest.mark.parametrize("odd", [["q"], ["wi_1"]], ids=str)
def test_an_adapter_that_slots_cannot_have_is_answered_in_batches(fleet: Path, tmp_path: Path, odd: list[str]) -> None:
    save(tmp_path / "usual", 2, task_of(**LONG))
    save_at(tmp_path / "zodd", 3, target_modules=odd, feedforward_modules=odd)
    with serving(tmp_path, batch_size=4) as engine:
        batches, answer = [], engine._answer.__call__
        engine._answer = lambda prompts, rows: batches.append(len(rows)) or answer(prompts, rows)  # type: ignore[assignment, func-returns-value]
        asked = [(name, text) for text in TEXTS[:3] for name in ("usual", "zodd", "tiny")]
        futures = [engine.submit(Request(text, name)) for name, text in asked]
        found = dict(zip(asked, (future.result(60) for future in futures), strict=True))
        slots = {id(held.slots) for held in engine._writing._held.values()}
        assert ask(engine, "usual", TEXTS[0]).text == found["usual", TEXTS[0]].text
        assert {id(held.slots) for held in engine._writing._held.values()} == slots
    for name in ("usual", "zodd"):
        for text, expected in zip(TEXTS[:3], alone(tmp_path / name, TEXTS[:3]), strict=True):
            assert found[name, text].text == expected.label
    assert sum(batches) == 3


@pytest.mark.parametrize("where", ["admit", "step", "_make"])
def test_slots_that_fail_take_nobody_with_them(fleet: Path, where: str) -> None:
    with never_ending(fleet, batch_size=3) as engine:
        whole, told = [ask(engine, "long", text).text for text in TEXTS[:3]], list[str]()
        engine._writing.forget(Size(128, 32))
        work, count = getattr(engine._writing, where), 0

        def fail(*given: Any) -> Any:
            nonlocal count
            count += 1
            if count == (4 if where == "step" else 1):
                raise RuntimeError("a kernel failed")
            return work(*given)

        setattr(engine._writing, where, fail)
        on_token = [told.append, None, None]
        futures = [
            engine.submit(Request(text, "long", on_token=tell)) for text, tell in zip(TEXTS, on_token, strict=False)
        ]
        assert [future.result(60).text for future in futures] == whole
        assert "".join(told) == whole[0]
        assert engine.ready
        assert engine.stats()["requests_failed"] == 0


def test_a_text_that_is_asked_of_many_is_encoded_once(fleet: Path, tmp_path: Path) -> None:
    names = ["one", "two", "three", "tiny"]
    for seed, name in enumerate(names[:3]):
        save_at(tmp_path / name, seed, target_modules=r"decoder\..*\.(k|v)", feedforward_modules=[])
    with serving(tmp_path, batch_size=8) as engine:
        ask(engine, "one", TEXTS[1])
        (held,) = engine._writing._held.values()
        texts, pack = [], held.slots._packed

        def note(some: Any, *given: Any) -> Any:
            texts.append(len(some))
            return pack(some, *given)

        held.slots._packed = note
        with engine.together(4):
            futures: list[Any] = [engine.submit(Request(TEXTS[0], name)) for name in names]
        answers: list[Answer] = [future.result(60) for future in futures]
    assert texts == [1]
    for name, answer in zip(names[:3], answers, strict=False):
        assert answer.text == alone(tmp_path / name, TEXTS[:1])[0].label
