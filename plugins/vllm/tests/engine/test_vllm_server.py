"""The server of ia3 with vLLM as what writes: the same answers as without, and nothing lost on the way."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_bases import KINDS, make_base, write_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ia3.inference.loading import Base
from ia3.serving import on_vllm
from ia3.serving.engine import Engine
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.serving.requests import Dropped, Overloaded, Request, Server, TooLate
from ia3.tasks.task import Task, TaskKind, save_task
from ia3.tasks.template import Template

CHAT = "{% for message in messages %}t10 {{ message['content'] }} t11 {% endfor %}t12 "
TASKS: dict[str, dict[str, Any]] = {
    "chat": {"kind": TaskKind.INSTRUCTIONS, "max_length": 64, "max_new_tokens": 12},
    "brief": {"kind": TaskKind.INSTRUCTIONS, "max_length": 12, "max_new_tokens": 5, "system": "t7 t8"},
    "plain": {"kind": TaskKind.LANGUAGE_MODELLING, "max_length": 64, "max_new_tokens": 8},
}
LONG = {"kind": TaskKind.INSTRUCTIONS, "max_length": 64, "max_new_tokens": 100}
TEXTS = ["t20", "t21 t22 t23", "t30 t31 t32 t33 t34 t35 t36", " ".join(f"t{number}" for number in range(40, 70))]


def add(base: Any, folder: Path, seed: int, pattern: str = "{text}", task: Any = LONG, **config: Any) -> None:
    write_adapter(base, folder, seed, **config)
    save_task(folder, Task(template=Template(pattern), **task))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in `base`, and its adapters in `adapters`."""
    folder = tmp_path_factory.mktemp("served")
    base = make_base(folder / "base", KINDS["llama"])
    backend = Tokenizer(models.WordLevel({f"t{number}": number for number in range(256)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0", eos_token="t2", chat_template=CHAT)
    words.save_pretrained(folder / "base")
    for seed, (name, task) in enumerate(TASKS.items(), 1):
        add(base, folder / "adapters" / name, seed, "t9 {text}", task)
    add(base, folder / "adapters" / "long", 4)
    add(base, folder / "adapters" / "queries", 5, target_modules=["q_proj"], feedforward_modules=["q_proj"])
    add(base, folder / "other", 6)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str | None, str], Any]:
    """What the engine without vLLM answers, by digest and text."""
    apart = Path(shutil.copytree(folder / "adapters", folder / "apart"))
    shutil.copytree(folder / "other", apart / "other")
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    registry = Registry(model, apart, base="base")
    engine = Engine(model, AutoTokenizer.from_pretrained(folder / "base"), registry, Limits())
    names = {each.name: each.digest for each in engine.models() if each.name != "queries"}
    found = {(names[name], text): engine.submit(Request(text, name)) for name in names for text in TEXTS}
    answers = {each: future.result(120) for each, future in found.items()}
    engine.close()
    return answers


@pytest.fixture(scope="module")
def server(folder: Path):
    base = Base(str(folder / "base"))
    assert on_vllm.is_wanted(base)
    limits = Limits(batch_size=3, most_waiting=20)
    server = on_vllm.start(base, folder / "adapters", on_vllm.plan(base, 3), name="base", limits=limits)
    yield server
    server.close()


def eventually(is_so: Any) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(1e-2)


def test_mixed_requests_are_answered_as_without_vllm(server: Server, expected: dict[Any, Any]) -> None:
    names = {each.name: each.digest for each in server.models()}
    assert {*names} == {"base", "long", *TASKS}
    told: dict[Any, list[str]] = {(name, text): [] for name in names for text in TEXTS}
    answers = {
        (name, text): server.submit(Request(text, name, on_token=pieces.append))
        for (name, text), pieces in told.items()
        if not (name == "base" and text == TEXTS[3])
    }
    for (name, text), future in answers.items():
        answer, alone = future.result(120), expected[names[name], text]
        assert (answer.text, answer.digest, answer.adapter) == (alone.text, alone.digest, name)
        assert (answer.prompt_tokens, answer.completion_tokens) == (alone.prompt_tokens, alone.completion_tokens)
        assert answer.finish_reason == alone.finish_reason
        assert answer.text == "".join(told[name, text])
        assert answer.queued_s >= 0 < answer.ran_s
    assert max(map(len, told.values())) > 50  # token by token
    eventually(lambda: server.stats()["running"] == 0)


def test_what_vllm_has_no_place_for_is_refused_by_name(server: Any) -> None:
    assert "its input isn't its own" in server.registry.refused()["queries"]
    assert "ia3-vllm" not in server.registry.refused()["queries"]  # nor the place of a copy


def test_a_replaced_adapter_is_another_version(server: Any, folder: Path, expected: dict[Any, Any]) -> None:
    text, adapter = TEXTS[0], folder / "adapters" / "long"
    server.alias("prod", "long")
    before = server.submit(Request(text, "long"))
    eventually(lambda: server.stats()["running"] == 1)
    shutil.copytree(folder / "other", adapter, dirs_exist_ok=True)
    server.registry.refresh(at_once=True)
    after, pinned = (server.submit(Request(text, name)) for name in ("base:long", "prod"))
    digests = [each.result(60).digest for each in (before, after, pinned)]
    assert digests[0] == digests[2] != digests[1]
    for each in (before, after, pinned):
        assert each.result().text == expected[each.result().digest, text].text
    copies = Path(server._writer._adapters[server.registry.hold("long").version.row].lora_path).parent
    assert len([*copies.iterdir()]) == 5
    server.unload("prod")
    eventually(lambda: len([*copies.iterdir()]) == 4)


def test_who_goes_and_who_is_late_leave_vllm(server: Any) -> None:
    some = [server.submit(Request(TEXTS[0], "long", deadline=time.monotonic() + 0.01)) for _ in range(2)]
    gone = server.submit(Request(TEXTS[0], "long"))
    assert gone.cancel()
    for each in some:
        with pytest.raises(TooLate):
            each.result(60)
    with pytest.raises(CancelledError):
        gone.result(60)
    eventually(lambda: server._writer._llm.output_processor.get_num_unfinished_requests() == 0)


def test_more_than_may_wait(server: Any) -> None:
    taken = []

    def ask() -> None:
        for _ in range(40):
            taken.append(server.submit(Request(TEXTS[0], "chat")))

    with pytest.raises(Overloaded, match="20 requests wait"):
        ask()
    assert len(taken) >= 20
    assert len({each.result(120).text for each in taken}) == 1


def test_ctrl_c_in_a_terminal_does_not_end_vllm(server: Any, expected: dict[Any, Any]) -> None:
    running = server.submit(Request(TEXTS[1], "chat"))
    for child in psutil.Process().children(recursive=True):
        child.send_signal(signal.SIGINT)
    assert running.result(60).text == expected[running.result().digest, TEXTS[1]].text
    assert server.submit(Request(TEXTS[0], "chat")).result(60).text
    assert server.ready


def test_an_answer_that_vllm_gives_up_is_none(server: Any) -> None:
    llm, on_token = server._writer._llm, threading.Event()
    running = server.submit(Request(TEXTS[0], "long", on_token=lambda piece: on_token.set()))
    assert on_token.wait(60)
    (number,) = llm.output_processor.request_states
    server._writer._wait_for(llm.abort(number, internal=True))
    with pytest.raises(Dropped):
        running.result(60)


def test_a_model_that_vllm_has_no_adapters_for(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no adapters for a GPT2LMHeadModel"):
        on_vllm.plan(Base(str(tmp_path)), 2)


def test_when_vllm_dies_nobody_waits(server: Any) -> None:
    running = server.submit(Request(TEXTS[0], "chat"))
    for child in psutil.Process().children(recursive=True):
        if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline()):
            child.kill()
    with pytest.raises(Dropped):
        running.result(60)
    eventually(lambda: not server.ready)
    with pytest.raises(Dropped):
        server.submit(Request(TEXTS[0], "chat"))
    closing = threading.Thread(target=server.drain, args=(1,))
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
