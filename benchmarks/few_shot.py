"""What T-Few's two extra losses do for few examples: PhraseBank, by the recipe t-few with and without them.

    IA3_PHRASEBANK=…/Sentences_AllAgree.txt python benchmarks/few_shot.py

Model `bundled:flan-t5-small-titler`. For each seed 500 sentences are held out, and 16, 32 or 64 others are drawn,
as many of each sentiment as of the next (the held-out ones are 61 % neutral). All settings are those of the recipe
(Adafactor 3e-3, batch 8, the likeliest label as the answer) but for the number of steps, of which 6 % warm up, as
there. Prints the median and the quartiles over the seeds.

Needs: CPU; PhraseBank; 75 minutes with --steps 250.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import ia3
from bench import say_machine
from ia3.bundled import TITLER
from ia3.data.loading import load_examples
from ia3.runs.comparison import quartiles_of
from ia3.tasks.examples import Examples, split_examples

RESULTS = Path(__file__).parent / "results" / "few_shot.json"
HELD_OUT = 500
OBJECTIVES = {"lm": "L_LM", "t-few": "L_LM + L_UL + L_LN"}


def draw(examples: Examples, count: int, seed: int) -> Examples:
    """`count` examples, as many of each label as of the next."""
    rows = list(examples.rows)
    random.Random(seed).shuffle(rows)
    by_label = [[row for row in rows if row.label == label] for label in examples.labels]
    chosen = [row for group in itertools.zip_longest(*by_label) for row in group if row is not None]
    return replace(examples, rows=tuple(chosen[:count]))


def run(examples: Examples, count: int, objective: str, seed: int, steps: int) -> dict:
    training, test = split_examples(examples, HELD_OUT / len(examples), seed)
    with tempfile.TemporaryDirectory() as folder:
        done = ia3.train(
            TITLER,
            draw(training, count, seed),
            test_data=test,
            recipe="t-few",
            objective=objective,
            steps=steps,
            warmup_steps=round(0.06 * steps),
            evaluate_every=steps,
            seed=seed,
            output=Path(folder),
            console=Console(quiet=True),
        )
    return {
        "accuracy": done.final.accuracy,
        "before": done.evaluations[0].accuracy,
        "examples": count,
        "macro_f1": done.final.macro_f1,
        "majority": done.majority,
        "objective": objective,
        "seconds": done.train_seconds,
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    examples = load_examples(os.environ["IA3_PHRASEBANK"])
    where = say_machine()
    print(f"# {arguments.steps} steps; {HELD_OUT} held out; median (quartiles) over {arguments.seeds}")
    print(f"# {'examples':<9}{'losses':<22}{'accuracy':<24}{'macro-F1':<24}s", flush=True)
    runs = []
    for count, objective in itertools.product(arguments.counts, OBJECTIVES):
        found = [run(examples, count, objective, seed, arguments.steps) for seed in arguments.seeds]
        runs += found
        columns = [quartiles_of([each[name] for each in found]) for name in ("accuracy", "macro_f1")]
        cells = "".join(f"{f'{c.median:.3f} ({c.lower:.3f} to {c.upper:.3f})':<24}" for c in columns)
        print(f"  {count:<9}{OBJECTIVES[objective]:<22}{cells}{sum(each['seconds'] for each in found):.0f}", flush=True)
    majority, before = (quartiles_of([each[name] for each in runs]).median for name in ("majority", "before"))
    print(f"# majority class {majority:.3f}; before training {before:.3f}")
    RESULTS.write_text(json.dumps({"machine": where, "runs": runs, "steps": arguments.steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
