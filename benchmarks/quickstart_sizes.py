"""What `ia3 quickstart` reaches at each of its sizes: the figures that src/ia3/cli/quickstart.py holds.

For example:

    python benchmarks/quickstart_sizes.py 450 900 1800 3600

Needs: CPU; nothing more; one to seven minutes a size on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

import ia3
from bench import say_machine
from ia3.bundled import TITLER

SETTINGS = {"epochs": 2, "learning_rate": 2e-2, "batch_size": 8, "dropout": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="+", help="how many of the 3,600 tweets to train on")
    parser.add_argument("--seed", type=int, default=42, help="the quickstart's seed")
    arguments = parser.parse_args()
    say_machine()
    print("# tweets seed | accuracy interval loss | steps train-s evaluation-s", flush=True)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = ia3.train(
                TITLER,
                "bundled:tweets",
                test_data="bundled:tweets:test",
                output=Path(folder) / "run",
                limit=size,
                seed=arguments.seed,
                console=Console(quiet=True),
                **SETTINGS,
            )
        low, high = run.final.interval
        evaluated = sum(each.seconds for each in run.evaluations)
        print(
            f"{size:>8,} {arguments.seed:>4} | {run.final.accuracy:.1%} {low:.1%} to {high:.1%} {run.final.loss:.3f} | "
            f"{len(run.losses):,} {run.train_seconds:.0f} {evaluated:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
