"""Eight trainings in one batch against the same eight one after the other: seconds, rankings, and how far they differ.

    python benchmarks/sweep.py --data …/Sentences_AllAgree.txt

Model `bundled:flan-t5-small-titler` on PhraseBank, a tenth held out, answers generated, without dropout, whose random
numbers would differ: the runs of a sweep are then those of `ia3.train`. Both ways begin with a file and end with the
adapters on disk. Try it by `--steps 4 --limit 64 --test-limit 32`.

Needs: CPU; PhraseBank; 6 minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

import bench
import ia3
from ia3.bundled import TITLER
from ia3.runs.run import Run
from ia3.training.sweep import Sweep

QUIET = Console(quiet=True)


def together(data: str, over: dict[str, list[Any]], common: dict[str, Any], folder: Path) -> tuple[Sweep, float]:
    """All runs in one batch, and the seconds from the beginning to the end."""
    start = time.perf_counter()
    found = ia3.sweep(TITLER, data, over=over, output=folder / "sweep", console=QUIET, **common)
    return found, time.perf_counter() - start


def one_by_one(
    data: str, settings: list[dict[str, Any]], common: dict[str, Any], folder: Path
) -> tuple[list[Run], list[float]]:
    """The same runs in sequence, and the seconds of each."""
    runs, seconds = [], []
    for number, given in enumerate(settings):
        start = time.perf_counter()
        runs.append(ia3.train(TITLER, data, output=folder / f"run-{number}", console=QUIET, **given, **common))
        seconds.append(time.perf_counter() - start)
        print(f"alone, {given}: {seconds[-1]:.0f} s, {runs[-1].best.accuracy:.1%}", flush=True)
    return runs, seconds


def evaluation_seconds(runs: list[Run]) -> float:
    return sum(each.seconds for run in runs for each in run.evaluations)


def largest_difference(runs: list[Run], alone: list[Run]) -> dict[str, float]:
    """Over all runs: of a step's loss, a held-out loss, an accuracy, and a number of the last adapter."""
    pairs = list(zip(runs, alone, strict=True))
    evaluations = [pair for one, other in pairs for pair in zip(one.evaluations, other.evaluations, strict=True)]
    adapters = [[load_file(run.adapter_dir / "adapter_model.safetensors") for run in pair] for pair in pairs]
    return {
        "accuracy": max(abs(one.accuracy - other.accuracy) for one, other in evaluations),
        "held_out_loss": max(abs(one.loss - other.loss) for one, other in evaluations),
        "step_loss": max(abs(a - b) for one, other in pairs for a, b in zip(one.losses, other.losses, strict=True)),
        "vector": max(float((one[key] - other[key]).abs().max()) for one, other in adapters for key in one),
    }


def ranking(runs: list[Run], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings and their best evaluations, the best first."""
    order = sorted(range(len(runs)), key=lambda n: (-runs[n].best.accuracy, runs[n].best.loss))
    return [
        {**settings[n], "accuracy": round(runs[n].best.accuracy, 5), "loss": round(runs[n].best.loss, 6)} for n in order
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("IA3_PHRASEBANK"), help="by default $IA3_PHRASEBANK")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 8e-3, 2e-2, 4e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=8, help="examples a run and step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--limit", type=int, help="of training examples")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--answer-by", choices=["generation", "rank"], default="generation")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--name", default="sweep", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("where is PhraseBank? --data, or IA3_PHRASEBANK")
    over = {"learning_rate": arguments.rates, "seed": arguments.seeds}
    settings = [
        {"learning_rate": rate, "seed": seed} for rate, seed in itertools.product(arguments.rates, arguments.seeds)
    ]
    common: dict[str, Any] = {
        "answer_by": arguments.answer_by,
        "batch_size": arguments.batch_size,
        "dropout": False,
        "limit": arguments.limit,
        "precision": arguments.precision,
        "test_limit": arguments.test_limit,
    }
    common |= {"epochs": arguments.epochs} if arguments.steps is None else {"steps": arguments.steps}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found, seconds = together(arguments.data, over, common, folder)
        print(f"together: {seconds:.0f} s, {found.best.best.accuracy:.1%} by {found.settings[0]}", flush=True)
        alone, seconds_alone = one_by_one(arguments.data, settings, common, folder)
        runs = [found.runs[found.settings.index(given)] for given in settings]
        rankings = [ranking(each, settings) for each in (runs, alone)]
        keys = [[(each["learning_rate"], each["seed"]) for each in order] for order in rankings]
        report = {
            "model": TITLER,
            "common": common | {"held_out": found.best.final.total, "train_examples": found.best.train_examples},
            "over": over,
            "together": {
                "seconds": round(seconds, 2),
                "steps_seconds": round(found.seconds, 2),
                "evaluations_seconds": round(evaluation_seconds(runs), 2),
                "ranking": rankings[0],
            },
            "one_by_one": {
                "seconds": round(sum(seconds_alone), 2),
                "steps_seconds": round(sum(run.train_seconds for run in alone), 2),
                "evaluations_seconds": round(evaluation_seconds(alone), 2),
                "ranking": rankings[1],
            },
            "times_faster": round(sum(seconds_alone) / seconds, 2),
            "same_ranking": keys[0] == keys[1],
            "largest_difference": largest_difference(runs, alone),
        }
    bench.write(arguments.name, report)


if __name__ == "__main__":
    main()
