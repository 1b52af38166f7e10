"""Serving 1,024 adapters on one GPU costs what serving one costs: in process and over HTTP, labels and words.

    python benchmarks/serve_gpu.py [--tiny] [--parts labels-encoder labels-mt0 words decoder-side start] [--seconds N]

Random weights in the shapes of BERT-base and mt0-large, bf16. Requests go to the engine by its public names.

- `labels-…`: 1,024 adapters of three labels, texts of 8 to 40 tokens, each request for any of them, against the same
  requests for one adapter of the same folder; in process, and over HTTP with clients in processes of their own. Then
  requests that come at random moments (Poisson) at 50 % and 90 % of the rate that was just reached. Before, batches of
  all sizes come for so long (`warm_up_s`): shapes are recorded when they come for the second time.
- `words`: 256 adapters that write 32 tokens, against the base through the same engine, and against PEFT, which switches
  from a group of requests for one adapter to the next: 3 groups of 4 are timed.
- `decoder-side`: one text under 100 adapters whose vectors act in the decoder alone, against one of them.
- `start`: from the start of `ia3 serve` on a folder of mt0-large's size to the first answer.

A part that can't be measured says why. `--tiny` tries everything on a CPU.

Needs: one GPU, --tiny a CPU; the extra serve, peft; 8 minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import train_step
from bench import RESULTS, machine
from ia3 import IA3Config, get_peft_model
from ia3.serving.engine import Engine
from ia3.serving.intake import Limits
from ia3.serving.requests import Request
from ia3.serving.starting import registry_for
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from serving_clients import Asked, Client, opened, percentiles
from serving_fleet import multiply, texts, words_tokenizer

LABELS = ("good", "bad", "neutral")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BERT = {"vocab_size": 30522}
TINY_BERT = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64
}  # fmt: skip
DECODER_SIDE = {
    "target_modules": r"decoder\..*\.(k|v|wo)",
    "feedforward_modules": r"decoder\..*\.wo",
}
# Requests that are under way at once where the rate is measured, and processes that ask over HTTP.
UNDER_WAY, PROCESSES = 256, 4


def task(kind: TaskKind, **more: Any) -> Task:
    return Task(kind=kind, template=Template.of_column("text"), max_length=64, **more)


RANKED = task(TaskKind.LABEL_WORDS, labels=LABELS, max_new_tokens=4)
CLASSES = task(TaskKind.SEQUENCE_CLASSIFICATION, labels=LABELS)


class Bench:
    """Sizes, and where results go."""

    def __init__(self, tiny: bool, seconds: float, report: Callable[[dict[str, Any]], None]) -> None:
        self.tiny, self.seconds, self.report = tiny, seconds, report
        self.adapters, self.writers, self.together = (12, 8, 6) if tiny else (1024, 256, 100)
        self.batch, self.new = (8, 4) if tiny else (128, 32)

    # The bases

    def mt0(self) -> Any:
        model = train_step.build(train_step.TINY if self.tiny else train_step.LARGE, DTYPE, DEVICE).eval()
        model.generation_config.pad_token_id = 0
        return model

    def bert(self) -> Any:
        torch.manual_seed(0)
        config = BertConfig(**(TINY_BERT if self.tiny else BERT), num_labels=len(LABELS))
        return BertForSequenceClassification(config).to(DEVICE, DTYPE).eval()

    @contextmanager
    def engine(
        self, model: Any, config: IA3Config, tasks: Sequence[Task], spread: float = 0.1
    ) -> Iterator[tuple[Engine, list[str]]]:
        """An engine of so many adapters, and their names."""
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            adapted = get_peft_model(model, config)
            adapted.save_pretrained(Path(folder) / "first")
            adapted.unload()
            names = multiply(Path(folder) / "first", Path(folder) / "all", tasks, spread)
            written = time.perf_counter()
            registry = registry_for(model, Path(folder) / "all", base="base", batch_size=self.batch)
            read = time.perf_counter()
            if registry.refused():
                raise ValueError(next(iter(registry.refused().values())))
            self.report(
                {"set_up": len(names), "writing_s": round(written - started, 2), "reading_s": round(read - written, 2)}
            )
            limits = Limits(batch_size=self.batch, most_waiting=1 << 20, deadline_s=600)
            engine = Engine(model, words_tokenizer(), registry, limits)
            try:
                yield engine, names
            finally:
                engine.close()

    # Rates

    def warm_up(self, engine: Engine, names: Sequence[str]) -> None:
        """Let batches of all sizes come, each shape of which is recorded when it comes for the second time."""
        started = time.perf_counter()
        for turn in range(1 if self.tiny else 6):
            under_way = 1
            while under_way <= UNDER_WAY:
                self.rate(engine, self.draw(names, 8 * min(under_way, self.batch), 20 + turn), under_way)
                under_way *= 2
        self.report({"warm_up_s": round(time.perf_counter() - started, 2)})

    def rate(self, engine: Engine, asked: Sequence[Asked], under_way: int = UNDER_WAY) -> float:
        """Requests a second in process, with so many under way."""
        room = threading.Semaphore(under_way)
        futures = []
        started = time.perf_counter()
        for each in asked:
            room.acquire()
            futures.append(engine.submit(Request(each.text, each.model)))
            futures[-1].add_done_callback(lambda _: room.release())
        for future in futures:
            future.result()
        return len(asked) / (time.perf_counter() - started)

    def draw(self, names: Sequence[str], count: int, seed: int = 0) -> list[Asked]:
        chance = torch.Generator().manual_seed(seed)
        places = torch.randint(len(names), (count,), generator=chance).tolist()
        some = texts(count, 8, 40, seed)
        return [Asked(names[place], text) for place, text in zip(places, some, strict=True)]

    def labels(self, part: str, model: Any, config: IA3Config, kind: Task) -> None:
        with self.engine(model, config, [kind] * self.adapters) as (engine, names):
            ways = {"one": names[:1], "mixed": names}
            self.warm_up(engine, names)
            few = self.rate(engine, self.draw(names, 8 * self.batch, 1))
            count = max(8 * self.batch, int(few * self.seconds / 20))
            self.pairs(part, "in process", count, names, lambda asked: self.rate(engine, asked), ways)
            reached = self.rate(engine, self.draw(names, count, 9))
            for share in (0.5, 0.9):
                some = self.draw(names, max(20, int(share * reached * self.seconds / 4)), 7)
                taken = opened(lambda each: engine.submit(Request(each.text, each.model)), some, share * reached)
                self.report({"part": part, "how": "in process", "load": share, **percentiles(taken)})
            self.over_http(part, engine, names, count, ways)

    def pairs(
        self,
        part: str,
        how: str,
        count: int,
        names: Sequence[str],
        rate: Callable[[Sequence[Asked]], float],
        ways: dict[str, Sequence[str]],
    ) -> None:
        """Both ways in turns: all requests of a way by all of its seconds, and quartiles of the turns' own ratios.

        How large the batches are that form differs from turn to turn, so a turn's ratio says little.
        """
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(3 if self.tiny else 25):
            for name, some in ways.items():
                found[name].append(rate(self.draw(some, count, turn + 2)))
        ratios = [mixed / one for mixed, one in zip(found["mixed"], found["one"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rates = {f"{name}_per_s": round(statistics.harmonic_mean(each), 1) for name, each in found.items()}
        ratio = rates["mixed_per_s"] / rates["one_per_s"]
        row = {"part": part, "how": how, "adapters": len(names), **rates, "ratio": round(ratio, 4)}
        self.report({**row, "quartiles": [round(low, 4), round(high, 4)]})

    def over_http(
        self, part: str, engine: Engine, names: Sequence[str], count: int, ways: dict[str, Sequence[str]]
    ) -> None:
        with listening(engine) as url, ThreadPoolExecutor(PROCESSES) as pool:

            def rate(asked: Sequence[Asked], load: float | None = None) -> tuple[float, list[float]]:
                parts = [asked[start::PROCESSES] for start in range(PROCESSES)]
                share = None if load is None else load / PROCESSES
                found = list(pool.map(lambda some: ask_from_outside(url, some, share), parts))
                return sum(each["per_s"] for each in found), [second for each in found for second in each["taken"]]

            few = min(count, 32 if self.tiny else 1000)
            self.pairs(part, "over HTTP", few, names, lambda asked: rate(asked)[0], ways)
            reached, taken = rate(self.draw(names, few, 9))
            self.report({"part": part, "how": "over HTTP, all at once", **percentiles(taken)})
            for share in (0.5, 0.9):
                some = self.draw(names, max(40, int(share * reached * self.seconds / 4)), 7)
                _, taken = rate(some, share * reached)
                self.report({"part": part, "how": "over HTTP", "load": share, **percentiles(taken)})

    # The parts

    def labels_encoder(self) -> None:
        config = IA3Config(task_type="SEQ_CLS", modules_to_save=["classifier"])
        self.labels("labels-encoder", self.bert(), config, CLASSES)

    def labels_mt0(self) -> None:
        self.labels("labels-mt0", self.mt0(), IA3Config(task_type="SEQ_2_SEQ_LM"), RANKED)

    def words(self) -> None:
        model, config = self.mt0(), IA3Config(task_type="SEQ_2_SEQ_LM")
        count = 2 * self.writers if self.tiny else 4 * self.writers
        some = texts(count, 32, 32)
        writing = task(TaskKind.GENERATION, max_new_tokens=self.new)
        with self.engine(model, config, [writing] * self.writers) as (engine, names):

            def speed(models: Sequence[str]) -> float:
                started = time.perf_counter()
                futures = [
                    engine.submit(Request(text, models[place % len(models)], max_new_tokens=self.new))
                    for place, text in enumerate(some)
                ]
                return sum(each.result().completion_tokens for each in futures) / (time.perf_counter() - started)

            ways = {"base": ["base"], "mixed": names}
            for models in ways.values():
                speed(models)
            found = {name: [] for name in ways}
            for _ in range(3):
                for name, models in ways.items():
                    found[name].append(speed(models))
        base, mixed = (statistics.median(found[name]) for name in ways)
        row = {"base_tokens_per_s": round(base), "mixed_tokens_per_s": round(mixed), "ratio": round(mixed / base, 4)}
        switching = self.switching(model, some[:4])
        row |= {"peft_tokens_per_s": round(switching), "times_peft": round(mixed / switching, 2)}
        self.report({"part": "words", "adapters": len(names), **row})

    def switching(self, model: Any, some: Sequence[str]) -> float:
        """Tokens a second of PEFT's model: an adapter switched on, its group written, and so on."""
        import peft

        names = ["one", "two", "three", "four"]
        model = peft.get_peft_model(model, peft.IA3Config(task_type="SEQ_2_SEQ_LM"), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft.IA3Config(task_type="SEQ_2_SEQ_LM"))
        model.eval()
        batch = words_tokenizer()(list(some), return_tensors="pt", padding=True).to(DEVICE)
        batch.pop("token_type_ids", None)
        rates = []
        for name in names:
            started = time.perf_counter()
            model.set_adapter(name)
            new = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False, "num_beams": 1}
            model.generate(**batch, **new)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            rates.append(len(some) * self.new / (time.perf_counter() - started))
        model.unload()
        return statistics.median(rates[1:])

    def decoder_side(self) -> None:
        config = IA3Config(task_type="SEQ_2_SEQ_LM", **DECODER_SIDE)
        writing = task(TaskKind.GENERATION, max_new_tokens=self.new)
        with self.engine(self.mt0(), config, [writing] * self.together) as (engine, names):

            def seconds(models: Sequence[str], text: str) -> float:
                started = time.perf_counter()
                with engine.together(len(models)):
                    futures = [engine.submit(Request(text, model)) for model in models]
                for future in futures:
                    future.result()
                return time.perf_counter() - started

            found: dict[int, list[float]] = {1: [], len(names): []}
            for turn, text in enumerate(texts(9, 32, 32)):
                for count, each in found.items():
                    taken = seconds(names[:count], text)
                    if turn > 1:
                        each.append(taken)
        one, all_ = (1e3 * statistics.median(each) for each in found.values())
        row = {"one_ms": round(one, 2), "all_ms": round(all_, 2), "times_one": round(all_ / one, 3)}
        self.report({"part": "decoder-side", "adapters": len(names), **row})

    def start(self) -> None:
        model, config = self.mt0(), IA3Config(task_type="SEQ_2_SEQ_LM")
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            model.save_pretrained(base)
            words_tokenizer(base)
            get_peft_model(model, config).save_pretrained(Path(folder) / "first")
            del model
            names = multiply(Path(folder) / "first", Path(folder) / "all", [RANKED] * min(50, self.adapters))
            command = [sys.executable, "-m", "ia3", "serve", str(base), "--adapters", str(Path(folder) / "all")]
            started = time.perf_counter()
            pipes: Any = {"stdout": subprocess.PIPE, "text": True}
            with subprocess.Popen([*command, "--port", "0", "--json"], **pipes) as process:
                try:
                    line = process.stdout.readline()
                    if not line:
                        raise ChildProcessError("ia3 serve ended before it listened; see what it said above")
                    url = json.loads(line)["url"]
                    Client(url)(Asked(names[0], "w1 w2 w3"))
                    seconds = time.perf_counter() - started
                finally:
                    process.terminate()
        self.report({"part": "start", "adapters": len(names), "first_answer_s": round(seconds, 2)})


@contextmanager
def listening(engine: Engine) -> Iterator[str]:
    """The engine over HTTP, in a thread; its address.

    Raises:
        ImportError: the extra serve is missing.
    """
    import uvicorn

    from ia3.serving.http import make_app
    from ia3.serving.limits import RequestLimits
    from ia3.serving.listening import bind

    app = make_app(engine, limits=RequestLimits(running=4096))
    bound = bind("127.0.0.1", 0)
    bound.listen(1024)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask_from_outside(url: str, asked: Sequence[Asked], load: float | None) -> dict[str, Any]:
    """Let a process of its own ask; its rate, and the seconds of each."""
    about = json.dumps({"url": url, "asked": asked, "load": load})
    own = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", "from serving_clients import ask; ask()"]
    done = subprocess.run(command, input=about, stdout=subprocess.PIPE, text=True, env=own, check=True)
    return json.loads(done.stdout)


PARTS: dict[str, Callable[[Bench], None]] = {
    "labels-encoder": Bench.labels_encoder,
    "labels-mt0": Bench.labels_mt0,
    "words": Bench.words,
    "decoder-side": Bench.decoder_side,
    "start": Bench.start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--seconds", type=float, help="of one measurement; 20, --tiny 2")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_gpu.json")
    arguments = parser.parse_args()
    where = machine()
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")

    bench = Bench(arguments.tiny, arguments.seconds or (2 if arguments.tiny else 20), report)
    for part in arguments.parts:
        started = time.perf_counter()
        try:
            PARTS[part](bench)
        except Exception as error:  # the other parts all the same
            traceback.print_exc()
            report({"part": part, "absent": f"{type(error).__name__}: {error}"})
        report({"part": part, "took_s": round(time.perf_counter() - started, 1)})
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
