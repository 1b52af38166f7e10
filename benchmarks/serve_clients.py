"""Sixteen clients of fifty adapters on one CPU: `ia3 serve` against a lock around one request at a time.

    python benchmarks/serve_clients.py [--requests N] [--repeats N] [--threads N] [--lock-threads N] [--json]

The base is the bundled flan-t5-small. Each adapter has random vectors near 1; four of five rank three labels, the fifth
writes up to 16 tokens. Clients are 16 threads of another process, each with a connection of its own, who ask again as
soon as they are answered. `lock` is what one writes oneself over the public interface: FastAPI, all adapters loaded,
and under a lock `set_adapter` and then `LabelScorer` or `generate`; `peft` is the same with PEFT's model. On two cores
a request alone is answered sooner by one thread than by two, and a batch by two, so each server has as many of torch's
threads as suit it. The servers take turns, `--repeats` times; figures are medians. `same` says how many answers are
those of `ia3 serve`. The time from the start of `ia3 serve` to its first answer is told, too.

Needs: CPU; the extras serve and bundled, peft; 6 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import write
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.data.loading import bundled_tweets
from ia3.inference.loading import Base
from ia3.inference.rank import LabelScorer, rankings
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from serving_clients import Asked, Client, closed, percentiles
from serving_fleet import multiply

BASE = "bundled:flan-t5-small-titler"
TEMPLATE = Template("{text} Is this good news?")
LABELS = ("negative", "neutral", "positive")
ADAPTERS, CLIENTS = 50, 16


def write_fleet(folder: Path) -> list[str]:
    base = Base(BASE)
    get_peft_model(base.load(base.kind), IA3Config(task_type="SEQ_2_SEQ_LM")).save_pretrained(folder / "first")
    ranked = Task(kind=TaskKind.LABEL_WORDS, template=TEMPLATE, labels=LABELS, max_length=64, max_new_tokens=4)
    written = Task(kind=TaskKind.GENERATION, template=Template("{text}"), max_length=64, max_new_tokens=16)
    return multiply(folder / "first", folder / "all", [written if n % 5 == 4 else ranked for n in range(ADAPTERS)])


def serve_by_lock(folder: Path, library: str) -> None:
    """What one writes oneself: a request at a time. Its port is the first line that is printed."""
    import uvicorn
    from fastapi import FastAPI

    from ia3.serving.listening import bind

    base = Base(BASE)
    tokenizer, bare = base.tokenizer, base.load(base.kind).eval()
    places = sorted(folder.iterdir())
    if library == "peft":
        import peft

        kind: Any = peft.PeftModel
    else:
        kind = PeftModel
    model = kind.from_pretrained(bare, places[0], adapter_name=places[0].name)
    for place in places[1:]:
        model.load_adapter(place, place.name)
    model.eval()
    scorer = LabelScorer(model, tokenizer, LABELS, max_length=64, batch_size=1)
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/classify")
    def classify(body: dict[str, str]) -> Any:
        with lock:
            model.set_adapter(body["model"])
            (found,) = rankings(LABELS, scorer([TEMPLATE.render({"text": body["input"]}, "the request")]))
        return {"data": [{"label": found.label, "probabilities": found.probabilities}]}

    @app.post("/v1/completions")
    def complete(body: dict[str, str]) -> Any:
        with lock:
            model.set_adapter(body["model"])
            inputs = tokenizer(body["prompt"], return_tensors="pt", truncation=True, max_length=64)
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, num_beams=1)
        return {"choices": [{"text": tokenizer.decode(tokens[0], skip_special_tokens=True).strip()}]}

    bound = bind("127.0.0.1", 0)
    bound.listen()
    print(json.dumps({"url": f"http://127.0.0.1:{bound.getsockname()[1]}"}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([bound])


@contextmanager
def started(command: list[str], threads: int) -> Iterator[str]:
    """A server's process; its address."""
    own = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=own) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise RuntimeError(f"{command} ended before it listened.")
            yield json.loads(said)["url"]
        finally:
            process.terminate()


def draw(names: list[str], count: int, seed: int) -> list[Asked]:
    chance, rows = random.Random(seed), [row.text for row in bundled_tweets()[1]]
    some = [(number, chance.choice(rows)) for number in chance.choices(range(len(names)), k=count)]
    return [
        Asked(names[number], text, "/v1/completions" if number % 5 == 4 else "/v1/classify") for number, text in some
    ]


def said_of(answer: Any) -> str:
    return answer["data"][0]["label"] if "data" in answer else answer["choices"][0]["text"]


def first_answer(folder: Path, asked: Asked, threads: int) -> float:
    """Seconds from the start of `ia3 serve` to its first answer."""
    started_at = time.perf_counter()
    with started(["-m", "ia3", "serve", BASE, "--adapters", str(folder), "--port", "0", "--json"], threads) as url:
        Client(url)(asked)
        return time.perf_counter() - started_at


def measure(
    folder: Path, names: list[str], requests: int, repeats: int, threads: int, lock_threads: int
) -> dict[str, Any]:
    ours = ["-m", "ia3", "serve", BASE, "--adapters", str(folder), "--port", "0", "--json"]
    lock = [__file__, "--lock", str(folder), "--library"]
    first = [first_answer(folder, draw(names, 1, 0)[0], threads) for _ in range(3)]
    rates: dict[str, list[float]] = {"ia3 serve": [], "lock": [], "peft": []}
    taken: dict[str, list[float]] = {name: [] for name in rates}
    with (
        started(ours, threads) as url,
        started([*lock, "ia3"], lock_threads) as by_lock,
        started([*lock, "peft"], lock_threads) as by_peft,
    ):
        urls = dict(zip(rates, (url, by_lock, by_peft), strict=True))
        some = draw(names, 40, 1)
        answers = {name: [said_of(Client(at)(each)) for each in some] for name, at in urls.items()}
        for turn in range(repeats):
            for name, at in urls.items():
                asked = draw(names, requests, turn + 2)
                seconds, each = closed([Client(at) for _ in range(CLIENTS)], asked)
                rates[name].append(requests / seconds)
                taken[name] += each
                print(f"# {name}: {requests / seconds:.1f} requests/s", file=sys.stderr, flush=True)
    rows = {
        name: {
            "requests_per_s": round(statistics.median(rates[name]), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(rates["ia3 serve"], rates[name], strict=True)), 3),
            **percentiles(taken[name]),
            "same": sum(a == b for a, b in zip(answers[name], answers["ia3 serve"], strict=True)) / len(some),
        }
        for name in rates
    }
    about = {"adapters": len(names), "clients": CLIENTS, "requests": requests, "repeats": repeats}
    about |= {"threads": threads, "lock_threads": lock_threads}
    return {**about, "first_answer_s": round(statistics.median(first), 2), "servers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=320, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch, in ia3 serve")
    parser.add_argument("--lock-threads", type=int, default=1, help="of torch, in the others")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and write results/")
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lock is not None:
        serve_by_lock(arguments.lock, arguments.library)
        return
    with tempfile.TemporaryDirectory() as folder:
        names = write_fleet(Path(folder))
        threads = arguments.threads, arguments.lock_threads
        found = measure(Path(folder) / "all", names, arguments.requests, arguments.repeats, *threads)
    if arguments.json:
        write("serve_clients", found)
        return
    print(f"{found['adapters']} adapters, {CLIENTS} clients; first answer after {found['first_answer_s']} s")
    for name, row in found["servers"].items():
        print(
            f"{name:10}{row['requests_per_s']:9} requests/s  ia3 serve is {row['ratio']} x  p50 {row['p50_ms']} ms"
            f"  p95 {row['p95_ms']} ms  same {row['same']:.0%}"
        )


if __name__ == "__main__":
    main()
