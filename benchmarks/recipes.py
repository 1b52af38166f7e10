"""What `ia3 train` reaches on held-out rows as it is, and by settings given beside it, such as a recipe's name.

    IA3_DATA=… python benchmarks/recipes.py [--bases minilm titler] [--data phrasebank tweets] [--seeds 0 1 2]
    IA3_DATA=… python benchmarks/recipes.py --bases titler --data raft --settings '{}' '{"objective": "t-few"}'

Bases, data and the rows that are held out are those of `evidence_table.py`, where a seed of RAFT is the fold of each of
its tasks that is held out; rates, steps and the rest are what the library takes where nothing is said. MiniLM gets a
new head on its pooler, which is trained in full. Each run is a line of `results/recipes.jsonl`, and what is there is
not run again: where the library's defaults have changed, take the lines out first. A table of all of them ends it.

Needs: CPU or one GPU; two wheels, PhraseBank, the tweets and RAFT; 3 to 15 minutes a run on a core, 20 s on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import ia3
from bench import RESULTS, machine, say_machine
from classify_minilm import minilm
from evidence.data import RAFT, RAFT_TASKS, Data, Row, load, load_raft, plan_of
from evidence.results import append, read
from ia3.bundled import TITLER
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import TaskKind

PATH = RESULTS / "recipes.jsonl"
BASES = {"minilm": TaskKind.SEQUENCE_CLASSIFICATION, "titler": TaskKind.LABEL_WORDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--data", nargs="+", choices=["phrasebank", "tweets", RAFT], default=["phrasebank", "tweets"])
    parser.add_argument("--settings", nargs="+", type=json.loads, default=[{}, {"recipe": "all-linear"}])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-folder", type=Path, default=os.environ.get("IA3_DATA"), help="by default $IA3_DATA")
    parser.add_argument("--output", type=Path, default=PATH)
    arguments = parser.parse_args()
    if arguments.data_folder is None:
        parser.error("where are the data sets? --data-folder, or IA3_DATA")
    say_machine()
    known = read(arguments.output)
    for base, name in itertools.product(arguments.bases, arguments.data):
        drawn = sets(arguments.data_folder, base, name, arguments.seeds)
        for (seed, data), settings in itertools.product(drawn, arguments.settings):
            key = {"base": base, "data": data.name, "digest": data.digest, "settings": settings, "seed": seed}
            if not any(key.items() <= run.items() for run in known):
                known.append(key | train(data, base, settings, seed) | {"machine": machine()})
                append(arguments.output, known[-1])
                print(key, known[-1]["accuracy"], flush=True)
    for row in table(known):
        print(*row, sep=" | ")


def sets(folder: Path, base: str, name: str, seeds: list[int]) -> list[tuple[int, Data]]:
    """Each seed with the data set; of RAFT with each task, whose fold of that number is held out."""
    if name == RAFT:
        drawn = [(seed, load_raft(folder, task, seed)) for seed in seeds for task in RAFT_TASKS]
        # `ia3 train` refuses held-out labels that no training row has, as one of the fifty folds does.
        return [(seed, data) for seed, data in drawn if labels_of(data.test) <= labels_of(data.train)]
    data = load(folder, name, plan_of(base, name))
    return [(seed, data) for seed in seeds]


def labels_of(rows: tuple[Row, ...]) -> set[str]:
    return {row.label for row in rows}


def train(data: Data, base: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    model = minilm() if base == "minilm" else TITLER
    with tempfile.TemporaryDirectory() as folder:
        run = ia3.train(
            model,
            examples(data, data.train, base),
            test_data=examples(data, data.test, base),
            output=Path(folder) / "run",
            console=Console(quiet=True),
            seed=seed,
            **settings,
        )
    return {
        "accuracy": run.final.accuracy,
        "learning_rate": run.settings.learning_rate,
        "steps": len(run.losses),
        "test_rows": len(data.test),
        "train_rows": run.train_examples,
        "train_seconds": round(run.train_seconds, 1),
    }


def examples(data: Data, rows: tuple[Row, ...], base: str) -> Examples:
    """A T5 is asked; an encoder reads the text alone."""
    asked = data.instruction + "\n" if base == "titler" else ""
    found = tuple(Example(asked + row.text, row.label) for row in rows)
    return Examples(found, data.labels, data.name, 0, 0, BASES[base])


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Base, data, settings, rate, runs, mean accuracy in percent; RAFT's tasks, of equally many rows, are one."""
    of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        name = run["data"].partition("/")[0]
        of.setdefault((run["base"], name, json.dumps(run["settings"])), []).append(run)
    return [
        [
            *key,
            f"{found[0]['learning_rate']:g}",
            str(len(found)),
            f"{100 * statistics.mean(run['accuracy'] for run in found):.1f}",
        ]
        for key, found in sorted(of.items())
    ]


if __name__ == "__main__":
    main()
