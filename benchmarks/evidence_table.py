"""(IA)³ beside LoRA, biases, a head alone and all weights, each at its own best rate, on three bases.

    IA3_DATA=… python benchmarks/evidence_table.py [--bases minilm] [--data banking77] [--methods ia3 lora]
    IA3_DATA=… python benchmarks/evidence_table.py --parts speed memory sweep sweep-own
    python benchmarks/evidence_table.py --report

Bases are all-MiniLM-L6-v2 (22 million numbers, a new head on the mean of its tokens), `bundled:flan-t5-small-titler`
(77) and SmolLM2-135M-Instruct (135), the latter two answering by the likeliest label. Every method is trained by the
same loop (`evidence/loop.py`) in the same order. A method walks over one grid of rates from its customary one until the
best on the validation set, by one seed, has two neighbours on either side; that rate is then run with five seeds and
judged on a fixed test set. RAFT's fifty rows a task are five folds, and a task's rate is the best on the other tasks.
Intervals are bootstrap over seeds and test rows. What was sub-sampled stands in `evidence/data.py` and in each result.

Each run is a line of the results' file, and what is there is not run again: stop it, or give it `--seconds`, and go on
by the same command. `--processes` units run side by side on one GPU; `speed` wants one. `memory` counts tensors, on any
device alike. `sweep` asks which rate `ia3.sweep` picks when it trains as the runs do, `sweep-own` which by the settings
that it takes where nothing is said. The data folder has the data sets as `evidence/data.py` reads them.

`evidence_carry.py` brings all of that to a machine that nothing can be downloaded to.

Needs: one GPU, --small a CPU; peft, the three wheels, gguf, accelerate and five data sets; an hour and a half.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

import bench
from evidence import report
from evidence.bases import BASES
from evidence.data import PLANS
from evidence.methods import WORDS
from evidence.units import Settings, Unit, units, work

RESULTS = bench.RESULTS / "evidence.jsonl"
PARTS = ("runs", "speed", "memory", "sweep", "sweep-own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["runs"])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--data", nargs="+", choices=PLANS, default=[*PLANS])
    parser.add_argument("--methods", nargs="+", choices=WORDS, default=[*WORDS])
    parser.add_argument("--data-folder", type=Path, default=os.environ.get("IA3_DATA"), help="by default $IA3_DATA")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no run begins")
    parser.add_argument("--processes", type=int, default=1, help="units side by side")
    parser.add_argument("--eager", action="store_true", help="capture no step")
    parser.add_argument("--small", action="store_true", help="a few steps, two rates, one seed, to try everything")
    parser.add_argument("--list", action="store_true", help="the units that would be worked on")
    parser.add_argument("--report", action="store_true", help="table, pictures and summary of what there is")
    arguments = parser.parse_args()
    if arguments.report:
        if not arguments.results.exists():
            parser.error(f"no results at {arguments.results}")
        return report.write(arguments.results, bench.RESULTS, bench.RESULTS.parents[1] / "docs" / "images")
    chosen = units(arguments.parts, arguments.bases, arguments.data, arguments.methods)
    if arguments.list:
        return print(*chosen, sep="\n")
    if not chosen:
        parser.error("none of these bases has such data, methods and parts: see --list without them")
    if arguments.data_folder is None:
        parser.error("where are the data sets? --data-folder, or IA3_DATA")
    if arguments.small and arguments.results == RESULTS:
        parser.error("--small is for trying things: name a file of its own, --results /tmp/small.jsonl")
    settings = Settings(
        folder=arguments.data_folder,
        results=arguments.results,
        device="cuda" if torch.cuda.is_available() else "cpu",
        captured=not arguments.eager,
        small=arguments.small,
        until=time.time() + arguments.seconds,
        processes=arguments.processes,
    )
    bench.say_machine()
    failures = run(chosen, settings)
    return parser.exit(1, f"{failures} units failed\n") if failures else None


def run(chosen: list[Unit], settings: Settings) -> int:
    """Work on all units; how many failed."""
    started, failures = time.perf_counter(), 0
    for number, (line, failed) in enumerate(finished(chosen, settings), 1):
        failures += failed
        print(f"[{number}/{len(chosen)}, {time.perf_counter() - started:.0f} s] {line}", flush=True)
    return failures


def finished(chosen: list[Unit], settings: Settings) -> Iterator[tuple[str, bool]]:
    """Each unit's line and whether it failed, when it is done."""
    one = partial(attempt, settings=settings)
    if settings.processes == 1:
        yield from map(one, chosen)
        return
    with ProcessPoolExecutor(settings.processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(one, unit) for unit in chosen]):
            yield done.result()


def attempt(unit: Unit, settings: Settings) -> tuple[str, bool]:
    """A unit that fails is said and leaves the others alone."""
    try:
        return work(unit, settings), False
    except Exception:
        return f"{unit}: FAILED\n{traceback.format_exc()}", True


if __name__ == "__main__":
    main()
