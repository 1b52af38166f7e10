"""What `ia3 train` reaches on held-out rows as it is, and by settings given beside it, such as a recipe's name.

    IA3_DATA=… python benchmarks/recipes.py [--bases minilm titler] [--data phrasebank tweets] [--seeds 0 1 2]
    IA3_DATA=… python benchmarks/recipes.py --settings '{}' '{"recipe": "all-linear", "dropout": true}'

Bases, data and the rows that are held out are those of `evidence_table.py`; rates, steps and the rest are what the
library takes where nothing is said. MiniLM gets a new head on its pooler, which is trained in full. Each run is a line
of `results/recipes.jsonl`, and what is there is not run again; a table of all of them ends it.

Needs: CPU or one GPU; two wheels, PhraseBank and the tweets; 3 to 15 minutes a run on a core.
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
from evidence.data import Data, Row, load, plan_of
from evidence.results import read
from ia3.bundled import TITLER
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import TaskKind

PATH = RESULTS / "recipes.jsonl"
BASES = {"minilm": TaskKind.SEQUENCE_CLASSIFICATION, "titler": TaskKind.LABEL_WORDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--data", nargs="+", choices=["phrasebank", "tweets"], default=["phrasebank", "tweets"])
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
        data = load(arguments.data_folder, name, plan_of(base, name))
        for seed, settings in itertools.product(arguments.seeds, arguments.settings):
            key = {"base": base, "data": name, "digest": data.digest, "settings": settings, "seed": seed}
            if not any(key.items() <= run.items() for run in known):
                known.append(key | train(data, base, settings, seed) | {"machine": machine()})
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known[-1]) + "\n")
                print(key, known[-1]["accuracy"], flush=True)
    for row in table(known):
        print(*row, sep=" | ")


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
    """Base, data, settings, rate, seeds, mean accuracy in percent."""
    of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        of.setdefault((run["base"], run["data"], json.dumps(run["settings"])), []).append(run)
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
