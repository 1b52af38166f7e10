"""Ranked labels under many adapters: batches that mix 1,024 of them, and one text under 100 of them.

    python benchmarks/many_texts.py [--tiny | --bundled]

Random weights in mt0-large's shape, bf16 on a GPU; `--bundled` takes flan-t5-small-titler in fp32. Three labels of up
to three tokens. All adapters are registered in an `AdapterTable` from files with random vectors, half of them
with vectors in encoder and decoder, half in the decoder alone. Medians of whole calls, tokens in, scores on the host;
on a CPU of the processor's time.

`mixed`: 32 texts of PhraseBank's lengths a call, other texts each time; under the base, under one adapter, and under 32
others of all that are registered each time, of which the table holds `capacity` on the device. `ratio` is to the base's
requests a second.

`one text`: of 64 and of 512 tokens, under one adapter and under 100, of the decoder alone and of both; `ratio` is to
one adapter's time. `apart` is the largest difference of a score from the one that the adapter gives alone. `--towers
decoder` leaves out those of both, which take long on a CPU, where `--tiny` tries the script.

Needs: one GPU, --tiny and --bundled a CPU; nothing more; 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from bench import say_machine
from ia3 import AdapterTable, IA3Config, find_sites
from ia3.bundled import TITLER, resolve_model
from ia3.inference.rank import LabelScorer
from predict import LABELS, Tokens, sentences
from register import write_adapters
from train_step import LARGE, TINY, build

RESULTS = Path(__file__).parent / "results" / "many_texts.json"
BASE = "__base__"


class Case:
    """One base model with its table, and how long calls take."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, registered: int, capacity: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.bundled:
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(resolve_model(TITLER)).to(self.device).eval()
        else:
            small = arguments.tiny or self.device == "cpu"
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            model = build(TINY if small else LARGE, dtype, self.device).eval()
        self.words = model.config.vocab_size
        self.names: dict[str, list[str]] = {}
        self.table = AdapterTable(model, capacity=capacity)
        for towers in ("all", "decoder"):
            if not (folder / towers).exists():
                (folder / towers).mkdir()
                found = find_sites(model, IA3Config(task_type="SEQ_2_SEQ_LM", towers=towers))
                write_adapters(folder / towers, found.layout, found.config, registered // 2, registered // 2)
            self.names[towers] = [f"{towers}/{place.name}" for place in sorted((folder / towers).iterdir())]
            for name in self.names[towers]:
                self.table.register(name, folder / name)
        self.scorer = LabelScorer(model, Tokens(), [str(label) for label in LABELS], max_length=4096)

    def seconds(self, call: Callable[[int], Any], rounds: int) -> float:
        """Median of a call, which is told its number."""
        taken, warm = [], 6 if self.device == "cuda" else 1
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        for turn in range(warm + rounds):
            if self.device == "cuda":
                torch.cuda.synchronize()
            started = clock()
            call(turn)
            taken.append(clock() - started)
        return statistics.median(taken[warm:])


def mixed(case: Case, rounds: int) -> list[dict[str, Any]]:
    rows, every = sentences(32 * (rounds + 6), case.words), [*case.names["all"], *case.names["decoder"]]
    chance = random.Random(0)
    ways: dict[str, Callable[[], list[str]]] = {
        "base": lambda: [BASE] * 32,
        "one adapter": lambda: [every[0]] * 32,
        "32 adapters": lambda: chance.choices(every, k=32),
    }

    def call(turn: int, names: Callable[[], list[str]]) -> Any:
        return case.scorer(rows[32 * turn : 32 * turn + 32], adapter_names=names())

    taken: dict[str, float] = {}
    for _ in range(3 if case.device == "cuda" else 1):  # shapes are recorded when they come for the second time
        taken = {way: case.seconds(lambda turn, way=way: call(turn, ways[way]), rounds) for way in ways}
    found = []
    for way, seconds in taken.items():
        speed = {"requests_per_s": 32 / seconds, "ratio": taken["base"] / seconds}
        found.append({"name": "mixed", "way": way, "ms": 1e3 * seconds, **speed, "capacity": case.table.capacity})
    return found


def one_text(case: Case, length: int, all_of: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    found = []
    text = torch.randint(2, case.words, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for towers in all_of:
        names, taken = case.names[towers][:100], {}
        for count in (1, len(names)):
            # Handed on as an argument, with the loop's values of now.
            call = lambda turn, count=count, names=names: case.scorer([text] * count, adapter_names=names[:count])  # noqa: E731
            taken[count] = case.seconds(call, rounds)
        together = case.scorer([text] * len(names), adapter_names=names)
        alone = torch.cat([case.scorer([text], adapter_names=[name]) for name in names])
        apart = float((together - alone).abs().max())
        for count, seconds in taken.items():
            row = {"name": "one text", "tokens": length, "towers": towers, "adapters": count, "ms": 1e3 * seconds}
            found.append({**row, "ratio": seconds / taken[1], "apart": apart})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bundled", action="store_true", help="flan-t5-small-titler")
    parser.add_argument("--registered", type=int, help="adapters in the table; 1,024")
    parser.add_argument("--towers", nargs="+", choices=["all", "decoder"], default=["all", "decoder"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    registered = arguments.registered or (16 if arguments.tiny else 200 if arguments.bundled else 1024)
    rounds = 3 if arguments.tiny or arguments.bundled else 20
    where, rows = say_machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for capacity in dict.fromkeys((min(256, registered), registered)):
            case = Case(arguments, Path(folder), registered, capacity)
            rows += mixed(case, rounds)
            if capacity == registered:
                rows += [row for length in (64, 512) for row in one_text(case, length, arguments.towers, rounds)]
            arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
            case.table.close()
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
