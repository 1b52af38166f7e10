"""Two replicas on Ray are killed under load while adapters are replaced: no answer is another's, and none is lost.

    RAY_AUTH_MODE=disabled python benchmarks/serve_on_ray.py [--tiny] [--clients 6] [--seconds 10]

A cluster on this machine, two replicas of one CPU each, adapters of random vectors. Clients ask for labels and for
words, one in four as a stream; whoever gets an error counts it and asks once more. Meanwhile an adapter's folder is
replaced every half second. One replica is killed by SIGKILL, and when another has taken its place, the second of the
first two, so that at the end only replicas that started under load are there. Each answer is compared with what the
content whose digest it names answers alone, and that content must be one of the name that was asked; at the end, with
the last one under each name.

`errors` are what clients saw of requests that a killed replica had under way, `retried` those that were answered when
asked again, `wrong` answers of another adapter, `lost` requests without an answer after the second try.

Needs: CPU, two cores; ray[serve], psutil; some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import psutil
import ray
import torch
from ray import serve
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from bench import say_machine, write
from ia3 import IA3Config, get_peft_model
from ia3.inference.answering import Answerer
from ia3.inference.loading import Base, load_adapter
from ia3.serving.listening import bind
from ia3.serving.on_ray import app
from ia3.serving.registry import Registry
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind, load_task, save_task
from ia3.tasks.template import Template

LABELS = ("negative", "neutral", "positive")
TEXTS = tuple(f"The share {verb} by {count}." for verb in ("rises", "falls") for count in ("half", "a half", "a few"))
# The contents that each name takes in turn: those that choose from labels, and those that write.
RANKED = {"a": ("one", "two"), "b": ("two", "three")}
WRITING = {"c": ("four", "five")}
NAMES = RANKED | WRITING
REPLICAS, REPLACE_S, READY_S, AGREE_S = 2, 0.5, 900, 120
# Else what Ray starts waits for whatever the machine does, and a proxy that is slow to start is taken for a dead one.
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
# How long a client rests after an answer while a replica starts, which needs the processor, too.
REST_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a T5 of two narrow blocks in place of the bundled one")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load before, between and after the kills")
    arguments = parser.parse_args()
    say_machine()
    with tempfile.TemporaryDirectory() as place, cluster() as url:
        base = _tiny_base(Path(place) / "base") if arguments.tiny else "bundled:flan-t5-small-titler"
        fleet = Fleet.write(base, Path(place))
        serve.run(app({"base": base, "adapters": fleet.folder, "replicas": REPLICAS}))
        found = storm(url, fleet, arguments.clients, arguments.seconds)
    shown = "a T5 of two narrow blocks" if arguments.tiny else base
    write("serve_on_ray", {"base": shown, "ray": version("ray"), "clients": arguments.clients, **found})


def _tiny_base(folder: Path) -> str:
    """A T5 of random weights that knows the words of these texts."""
    words = ["<pad>", "</s>", "<unk>", *LABELS, *dict.fromkeys(" ".join(TEXTS).replace(".", " .").split())]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**shape, decoder_start_token_id=0, initializer_factor=4.0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Ray on this machine, and the address at which its proxy listens."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    ray.init(num_cpus=REPLICAS, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@dataclass
class Fleet:
    """A folder of adapters, the contents that its names take in turn, and what each content answers alone.

    Args:
        folder: what is served.
        contents: where the contents are kept.
        digests: of each content.
        alone: by digest and text.
        may: the digests that a name's answers may be of: all that it ever stood for, and at the end its last.
        now: the digest under each name.
    """

    folder: Path
    contents: Path
    digests: dict[str, str]
    alone: dict[str, dict[str, Any]]
    may: dict[str, set[str]] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)
    replaced: int = 0

    @classmethod
    def write(cls, base: str, place: Path) -> Fleet:
        """Adapters of random vectors on a base, and the first of them under their names."""
        contents = place / "contents"
        loaded = Base(base)
        for of_kind in (RANKED, WRITING):
            for name in {name for names in of_kind.values() for name in names}:
                _write_content(loaded, contents / name, writes=of_kind is WRITING)
        registry = Registry(loaded.load(loaded.kind), contents, base="base")
        digests = {each.name: str(each.digest) for each in registry.models() if each.digest is not None}
        assert not registry.refused()
        registry.close()
        alone = {digest: _answers_alone(contents / name) for name, digest in digests.items()}
        assert len({str(each) for each in alone.values()}) == len(digests), "another's answer would look right"
        fleet = cls(place / "adapters", contents, digests, alone)
        for name, names in NAMES.items():
            fleet.put(name, names[0])
        return fleet

    def put(self, name: str, content: str) -> None:
        """Let a name's folder be another content's."""
        place, new = self.folder / name, self.folder.parent / f"new-{self.replaced}"
        shutil.copytree(self.contents / content, new)
        self.now[name] = self.digests[content]
        self.may.setdefault(name, set()).add(self.now[name])
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            place.rename(self.folder.parent / f"old-{self.replaced}")
        new.rename(place)
        self.replaced += 1

    def is_right(self, name: str, text: str, answer: dict[str, Any]) -> bool:
        """Whether an answer is the one that its adapter gives alone, and its adapter one of this name."""
        if answer["digest"] not in self.may[name]:
            return False
        right, given = self.alone[answer["digest"]][text], answer["probabilities"]
        close = given is None or all(abs(given[each] - share) < 1e-3 for each, share in right.probabilities.items())
        return close and answer["text"] == right.label


def _write_content(base: Base, folder: Path, *, writes: bool) -> None:
    model = get_peft_model(base.load(base.kind), IA3Config(task_type="SEQ_2_SEQ_LM"))
    torch.manual_seed(sum(folder.name.encode()))
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if "ia3_l" in name:
                vector.uniform_(-2, 4)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(folder)
    more = {"kind": TaskKind.GENERATION} if writes else {"kind": TaskKind.LABEL_WORDS, "labels": LABELS}
    save_task(folder, Task(template=Template("{text}"), max_length=64, max_new_tokens=6, **more))


def _answers_alone(folder: Path) -> dict[str, Any]:
    model, tokenizer = load_adapter(folder)
    task = load_task(folder)
    assert task is not None
    found = Answerer(model, tokenizer, task, batch_size=1)([Example(text, "") for text in TEXTS])
    return dict(zip(TEXTS, found, strict=True))


def storm(url: str, fleet: Fleet, clients: int, seconds: float) -> dict[str, Any]:
    """What came of all requests while adapters were replaced and both replicas killed, one after the other."""
    done, load = threading.Event(), Load(url, fleet)
    replaced_s = []
    with ThreadPoolExecutor(clients + 1) as pool:
        running = [pool.submit(load.ask_until, done, seed) for seed in range(clients)]
        running.append(pool.submit(_replace_until, done, fleet))
        try:
            time.sleep(seconds)
            asked, former = load.count["answered"], replicas()
            for each in former:
                replaced_s.append(round(_kill(each, load), 1))
                time.sleep(seconds)
        finally:
            done.set()
    for each in running:
        each.result()
    assert not {each.pid for each in former} & {each.pid for each in replicas()}
    return {
        **{name: load.count[name] for name in ("answered", "streams", "retried", "wrong", "lost")},
        "errors": dict(load.errors),
        "killed": len(replaced_s),
        "until_replaced_s": replaced_s,
        "adapters_replaced": fleet.replaced,
        "contents_seen": len(load.seen),
        "requests_per_s_before": round(asked / seconds, 1),
        "new_replicas_answer_all": _agree(load),
    }


def _agree(load: Load) -> bool:
    """Whether in the end all replicas answer by the last content of each name; they look every second or so."""
    load.fleet.may = {name: {digest} for name, digest in load.fleet.now.items()}
    end = time.monotonic() + AGREE_S
    while time.monotonic() < end:
        if all(load.ask(name, text) for _ in range(2 * REPLICAS) for name in NAMES for text in TEXTS):
            return True
    return False


def replicas() -> list[psutil.Process]:
    """The processes of this cluster's replicas."""
    below = psutil.Process().children(recursive=True)
    return [each for each in below if any("ServeReplica" in part for part in each.cmdline())]


def _kill(replica: psutil.Process, load: Load) -> float:
    """Kill a replica; the seconds until another has taken its place."""
    start, former = time.monotonic(), {each.pid for each in replicas()}
    replica.send_signal(signal.SIGKILL)
    time.sleep(1)
    load.rest_s = REST_S
    while time.monotonic() < start + READY_S:
        time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            there = {each.pid for each in replicas()}
            states = serve.status().applications["default"].deployments["ia3"].replica_states
            if replica.pid not in there and there - former and states == {"RUNNING": REPLICAS}:
                load.rest_s = 0.0
                return time.monotonic() - start
    raise TimeoutError(f"No replica took the place of a killed one within {READY_S} s.")


def _replace_until(done: threading.Event, fleet: Fleet) -> None:
    chance = random.Random(0)
    while not done.wait(REPLACE_S):
        name = chance.choice([*NAMES])
        fleet.put(name, chance.choice(NAMES[name]))


class Load:
    """Clients of a server, and what they got.

    Args:
        url: where it listens.
        fleet: what it serves.
    """

    def __init__(self, url: str, fleet: Fleet) -> None:
        self.fleet, self.client = fleet, httpx2.Client(base_url=url, timeout=60)
        self.count, self.errors, self.seen = Counter[str](), Counter[str](), set[str]()
        self.lock, self.rest_s = threading.Lock(), 0.0

    def ask_until(self, done: threading.Event, seed: int) -> None:
        """Ask one question after another."""
        chance = random.Random(seed)
        while not done.is_set():
            self.ask(chance.choice([*NAMES]), chance.choice(TEXTS), stream=chance.random() < 0.25)
            time.sleep(self.rest_s)

    def ask(self, name: str, text: str, *, stream: bool = False) -> bool:
        """Ask, and after an error once more; whether there was the right answer."""
        for attempt in range(2):
            answer = self._try(name, text, stream=stream)
            if isinstance(answer, dict):
                return self._note(name, text, answer, retried=attempt > 0)
            with self.lock:
                self.errors[answer] += 1
            time.sleep(0.2)
        with self.lock:
            self.count["lost"] += 1
        return False

    def _note(self, name: str, text: str, answer: dict[str, Any], *, retried: bool) -> bool:
        right = self.fleet.is_right(name, text, answer)
        with self.lock:
            self.count.update(answered=1, retried=retried, wrong=not right, streams=answer["stream"])
            self.seen.add(answer["digest"])
        return right

    def _try(self, name: str, text: str, *, stream: bool) -> dict[str, Any] | str:
        """The answer, or what the client saw instead."""
        try:
            if name in RANKED and not stream:
                response = self.client.post("/v1/classify", json={"model": name, "input": text})
                if response.status_code != 200:
                    return f"status {response.status_code}"
                return response.json()["data"][0] | {"stream": False}
            asked = {"model": name, "prompt": text, "stream": stream}
            with self.client.stream("POST", "/v1/completions", json=asked) as response:
                content = response.read().decode()
            if response.status_code != 200:
                return f"status {response.status_code}"
        except httpx2.HTTPError as error:
            return type(error).__name__
        if not stream:
            return _as_answer([json.loads(content)], stream=False)
        lines = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
        if not lines or lines[-1] != "[DONE]":
            return "a stream without its end"
        events = [json.loads(line) for line in lines[:-1]]
        return "an error in a stream" if "error" in events[-1] else _as_answer(events, stream=True)


def _as_answer(events: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
    text = "".join(each["choices"][0]["text"] for each in events)
    return {"text": text, "digest": events[-1]["system_fingerprint"], "probabilities": None, "stream": stream}


if __name__ == "__main__":
    main()
