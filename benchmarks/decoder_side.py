"""What it costs in accuracy to adapt an encoder-decoder's decoder alone: PhraseBank, over rates and seeds.

    IA3_PHRASEBANK=…/Sentences_AllAgree.txt python benchmarks/decoder_side.py

`bundled:flan-t5-small-titler` in fp32 by `ia3.train`, with the quickstart's settings but for the rate: 600 sentences on
which all annotators agree, two passes, batches of 8, no dropout; 400 others are ranked. The split is the same for all
runs, and those of a seed share their examples and order. `all` is (IA)³ as ever, `decoder` is `towers="decoder"`. Runs
that were not asked for stay in the results.

Needs: CPU; PhraseBank; a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from itertools import product
from pathlib import Path

from rich.console import Console

import ia3
from bench import say_machine
from ia3.bundled import TITLER

RESULTS = Path(__file__).parent / "results" / "decoder_side.json"
TOWERS = {"all": None, "decoder": "decoder"}


def run(name: str, rate: float, seed: int, limit: int, steps: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trained = ia3.train(
            TITLER,
            os.environ["IA3_PHRASEBANK"],
            output=Path(folder) / "run",
            console=Console(quiet=True),
            towers=TOWERS[name],
            learning_rate=rate,
            batch_size=8,
            dropout=False,
            answer_by="rank",
            test_size=0.25,
            test_limit=400,
            limit=limit,
            seed=seed,
            **({"epochs": 2} if steps is None else {"steps": steps}),
        )
        adapter = ia3.PeftConfig.from_pretrained(trained.adapter_dir)
    return {
        "adapted": name,
        "learning_rate": rate,
        "seed": seed,
        "accuracies": [each.accuracy for each in trained.evaluations],
        "held_out": trained.final.total,
        "target_modules": sorted(adapter.target_modules) if name == "all" else adapter.target_modules,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=TOWERS, nargs="+", default=[*TOWERS])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-2, 4e-2, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--steps", type=int, help="steps in all, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = json.loads(arguments.output.read_text())["runs"] if arguments.output.exists() else []
    asked = {(*each,) for each in product(arguments.of, arguments.rates, arguments.seeds)}
    runs = [each for each in runs if (each["adapted"], each["learning_rate"], each["seed"]) not in asked]
    report = {"machine": say_machine(), "runs": runs}
    for rate in arguments.rates:
        for seed in arguments.seeds:
            for name in arguments.of:
                result = run(name, rate, seed, arguments.limit, arguments.steps)
                print(json.dumps(result), flush=True)
                runs.append(result)
                arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in TOWERS:
        for rate in sorted({each["learning_rate"] for each in runs if each["adapted"] == name}):
            of_rate = [each for each in runs if (each["adapted"], each["learning_rate"]) == (name, rate)]
            last = [each["accuracies"][-1] for each in of_rate]
            print(f"{name} at {rate:g}: mean {statistics.mean(last):.1%} of {[round(each, 4) for each in last]}")


if __name__ == "__main__":
    main()
