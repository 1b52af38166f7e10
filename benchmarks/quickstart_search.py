"""Which settings the quickstart trains with: every combination of those given, each trained and compared.

Settings are chosen on the last 600 of the bundled training tweets, which no run of the search trains on; the
300 held-out tweets are looked at only with `--held-out`, for the settings chosen. For example:

    python benchmarks/quickstart_search.py --learning-rates 3e-3 8e-3 2e-2 --epochs 3 --seeds 0 1
    python benchmarks/quickstart_search.py --held-out --learning-rates 8e-3 --epochs 3 --seeds 0 1 2

Needs: CPU or one GPU; nothing more; 6 minutes a combination on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import ia3
from bench import say_machine
from ia3.bundled import TITLER
from ia3.data.loading import bundled_tweets
from ia3.runs.run import Run
from ia3.tasks.examples import Examples

VALIDATION = 600


def main() -> None:
    arguments = parse_arguments()
    say_machine()
    print(f"# accuracy on {'the 300 held-out tweets' if arguments.held_out else f'{VALIDATION} training tweets'}")
    print("# lr batch examples epochs grouped dropout seed prefix | s/step train-s | loss accuracy by epoch")
    for combination in itertools.product(
        arguments.learning_rates,
        arguments.batch_sizes,
        arguments.examples,
        arguments.epochs,
        arguments.group_by_length,
        arguments.dropout,
        arguments.prefixes,
        arguments.seeds,
        arguments.target_modules,
    ):
        run_one(arguments.model, *combination, held_out=arguments.held_out)


def run_one(
    model: str,
    learning_rate: float,
    batch_size: int,
    count: int,
    epochs: int,
    grouped: int,
    dropout: int,
    prefix: str,
    seed: int,
    targets: str | None,
    *,
    held_out: bool,
) -> None:
    """Train once from the identity and print one line."""
    training, test = bundled_tweets()
    if not held_out:
        training, test = training[:-VALIDATION], training[-VALIDATION:]
    with tempfile.TemporaryDirectory() as folder:
        run = ia3.train(
            model,
            with_prefix(training[:count], prefix),
            test_data=with_prefix(test, prefix),
            output=Path(folder),
            console=Console(quiet=True),
            learning_rate=learning_rate,
            batch_size=batch_size,
            epochs=epochs,
            group_by_length=bool(grouped),
            dropout=bool(dropout),
            answer_by="generation",
            seed=seed,
            target_modules=targets,
        )
    print(line(run, prefix), targets or "", flush=True)


def with_prefix(examples: Examples, prefix: str) -> Examples:
    return replace(examples, rows=tuple(replace(row, text=prefix + row.text) for row in examples.rows))


def line(run: Run, prefix: str) -> str:
    settings = run.settings
    grouped = "grouped" if settings.group_by_length else "mixed  "
    dropout = "dropout" if settings.dropout else "none   "
    accuracies = " ".join(f"{100 * each.accuracy:.1f}" for each in run.evaluations[1:])
    return (
        f"{settings.learning_rate:<7g} {settings.batch_size:>2} {run.train_examples} {settings.epochs} "
        f"{grouped} {dropout} {settings.seed} {prefix!r} | "
        f"{run.train_seconds / len(run.losses):.3f} {run.train_seconds:.0f} | {run.final.loss:.3f} {accuracies}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=TITLER)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[8e-3])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--examples", type=int, nargs="+", default=[3600])
    parser.add_argument("--epochs", type=int, nargs="+", default=[3])
    parser.add_argument("--group-by-length", type=int, nargs="+", default=[1], choices=[0, 1])
    parser.add_argument("--dropout", type=int, nargs="+", default=[0], choices=[0, 1])
    parser.add_argument("--prefixes", nargs="+", default=[""])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--target-modules", nargs="+", default=[None], help="instead of the family's, as all-linear")
    parser.add_argument("--held-out", action="store_true", help="evaluate on the 300 held-out tweets")
    return parser.parse_args()


if __name__ == "__main__":
    main()
