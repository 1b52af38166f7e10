"""The data sets, each with a fixed test set, a validation set that rates are chosen on, and what is trained on.

Texts that occur twice are kept once. Which texts are held out is the same for every base, method, rate and seed. RAFT's
hidden test labels are not public: there a seed is one of five folds of a task's fifty rows, and has no validation set.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from instruct_smollm2 import INSTRUCTION, NAMES, orders

FOLDS = 5
RAFT = "raft"
# banking_77's fifty rows have less than one row of each of its 77 labels, so nothing can be held out.
RAFT_TASKS = (
    "ade_corpus_v2",
    "neurips_impact_statement_risks",
    "one_stop_english",
    "overruling",
    "semiconductor_org_types",
    "systematic_review_inclusion",
    "tai_safety_research",
    "terms_of_service",
    "tweet_eval_hate",
    "twitter_complaints",
)


@dataclass(frozen=True)
class Row:
    text: str
    label: str


@dataclass(frozen=True)
class Plan:
    """How much of a data set is used, and how it is trained.

    Args:
        test, validation, train: the most rows of each.
        steps: of `batch_size` examples each.
        max_length: tokens of a text, the instruction's among them.
    """

    test: int
    validation: int
    train: int
    steps: int
    batch_size: int
    max_length: int = 128


PLANS = {
    "phrasebank": Plan(test=600, validation=400, train=1_264, steps=300, batch_size=16),
    "tweets": Plan(test=1_000, validation=500, train=4_000, steps=500, batch_size=16),
    "banking77": Plan(test=3_080, validation=1_000, train=9_000, steps=800, batch_size=32, max_length=64),
    "clinc150": Plan(test=4_500, validation=1_000, train=15_000, steps=800, batch_size=32, max_length=64),
    "orders": Plan(test=500, validation=200, train=64, steps=60, batch_size=8),
    RAFT: Plan(test=10, validation=0, train=40, steps=80, batch_size=8, max_length=256),
}
# The largest base takes fewer steps, to stay within minutes.
STEPS = {("smollm2", "phrasebank"): 200, ("smollm2", "tweets"): 300}


def plan_of(base: str, name: str, *, small: bool = False) -> Plan:
    """How a base is trained on a data set; `small` is enough to see that everything runs."""
    plan = PLANS[name]
    plan = replace(plan, steps=STEPS.get((base, name), plan.steps))
    return replace(plan, test=8, validation=8, train=40, steps=4, batch_size=2, max_length=80) if small else plan


@dataclass(frozen=True)
class Data:
    """A data set, or one fold of a task of RAFT.

    Args:
        name: as in the results.
        labels: all of them, in a fixed order.
        instruction: asks a language model for the label; stands before the text.
        written: whether an answer counts where each of its tokens is the likeliest, as greedy writing finds it; the
            likeliest of the labels counts otherwise.
    """

    name: str
    labels: tuple[str, ...]
    instruction: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    written: bool = False

    @property
    def digest(self) -> str:
        """Of the rows and how they are asked: runs over other rows, or asked otherwise, are other runs."""
        rows = [[(row.text, row.label) for row in part] for part in (self.train, self.validation, self.test)]
        content = (rows, self.labels, self.instruction, self.written)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def load(folder: Path, name: str, plan: Plan) -> Data:
    """A data set by its name in `PLANS`, but RAFT."""
    readers = {
        "phrasebank": _phrasebank,
        "tweets": _tweets,
        "banking77": _banking77,
        "clinc150": _clinc150,
        "orders": _orders,
    }
    return readers[name](folder, plan)


def load_raft(folder: Path, task: str, seed: int) -> Data:
    """A task of RAFT with the fold of this seed held out."""
    described = json.loads((folder / "raft" / task / "task.json").read_text("utf-8"))
    columns = [column for column in described["data_columns"] if column not in ("ID", "Paper link", "Url")]
    ((answer, labels),) = described["label_columns"].items()
    with (folder / "raft" / task / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            Row(
                "\n".join(f"{name}: {record[name].strip()}" for name in columns if record[name].strip()), record[answer]
            )
            for record in csv.DictReader(file)
        ]
    train, test = fold(rows, seed)
    asked = f"Is this {', '.join(labels[:-1])} or {labels[-1]}?"
    return Data(f"{RAFT}/{task}", tuple(labels), asked, train, (), test)


def fold(rows: list[Row], number: int, seed: int = 0) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Train and test rows where this fold is held out, the labels as evenly over the folds as can be."""
    order = sorted(random.Random(seed).sample(rows, len(rows)), key=lambda row: row.label)
    held_out = range(number % FOLDS, len(order), FOLDS)
    return tuple(row for at, row in enumerate(order) if at not in held_out), tuple(order[at] for at in held_out)


def split(rows: list[Row], sizes: Iterable[int], seed: int = 0) -> list[tuple[Row, ...]]:
    """Disjoint parts of at most these sizes, drawn at random, each text at most once."""
    distinct = list({row.text: row for row in reversed(rows)}.values())
    random.Random(seed).shuffle(distinct)
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(distinct[start : start + size]))
        start += size
    return parts


def _phrasebank(folder: Path, plan: Plan) -> Data:
    lines = (folder / "financial_phrasebank" / "Sentences_AllAgree.txt").read_text("utf-8").splitlines()
    rows = [Row(*line.rsplit("@", 1)) for line in lines if line.strip()]
    test, validation, train = split(rows, (plan.test, plan.validation, plan.train))
    instruction = "Is this news positive, negative or neutral for an investor?"
    return Data("phrasebank", ("negative", "neutral", "positive"), instruction, train, validation, test)


def _tweets(folder: Path, plan: Plan) -> Data:
    names = ("bearish", "bullish", "neutral")

    def read(name: str) -> list[Row]:
        with (folder / "twitter_financial_news" / name).open(encoding="utf-8", newline="") as file:
            return [Row(record["text"], names[int(record["label"])]) for record in csv.DictReader(file)]

    instruction = "Is this tweet bearish, bullish or neutral?"
    return _with_test("tweets", names, instruction, read("sent_train.csv"), read("sent_valid.csv"), plan)


def _banking77(folder: Path, plan: Plan) -> Data:
    def read(name: str) -> list[Row]:
        with (folder / "banking77" / name).open(encoding="utf-8", newline="") as file:
            return [Row(record["text"].strip(), record["category"]) for record in csv.DictReader(file)]

    labels = tuple(sorted(json.loads((folder / "banking77" / "categories.json").read_text("utf-8"))))
    return _with_test("banking77", labels, "What does the customer ask?", read("train.csv"), read("test.csv"), plan)


def _clinc150(folder: Path, plan: Plan) -> Data:
    parts = json.loads((folder / "clinc150" / "data_full.json").read_text("utf-8"))
    train, validation, test = ([Row(*each) for each in parts[name]] for name in ("train", "val", "test"))
    labels = tuple(sorted({row.label for row in train}))
    (tested,) = split(test, [plan.test])
    (chosen,) = split(_without(validation, tested), [plan.validation])
    (trained,) = split(_without(train, (*tested, *chosen)), [plan.train])
    return Data("clinc150", labels, "What is asked for?", trained, chosen, tested)


def _orders(folder: Path, plan: Plan) -> Data:
    """Orders in plain words, to be written as a form's line; each part has customers of its own."""

    def made(count: int, names: list[str], seed: int) -> tuple[Row, ...]:
        asked = ((each.text.removeprefix(f"{INSTRUCTION}\n"), each.label) for each in orders(count, names, seed))
        return tuple(Row(*each) for each in asked)

    train = made(plan.train, NAMES[:-12], 1)
    validation, test = made(plan.validation, NAMES[-12:-6], 2), made(plan.test, NAMES[-6:], 3)
    answers = tuple(sorted({row.label for row in (*train, *validation, *test)}))
    return Data("orders", answers, INSTRUCTION, train, validation, test, written=True)


def _with_test(
    name: str, labels: tuple[str, ...], instruction: str, train: list[Row], test: list[Row], plan: Plan
) -> Data:
    """Of a data set with a test file: the validation rows are some of the training file's."""
    (tested,) = split(test, [plan.test])
    validation, trained = split(_without(train, tested), (plan.validation, plan.train))
    return Data(name, labels, instruction, trained, validation, tested)


def _without(rows: list[Row], others: Iterable[Row]) -> list[Row]:
    seen = {row.text for row in others}
    return [row for row in rows if row.text not in seen]
