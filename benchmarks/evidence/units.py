"""What is worked on at once: a method on a base and a data set, with its rates and seeds, skipping what there is."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import bench
import ia3
from evidence.bases import BASES, DATA_OF, Base
from evidence.data import FOLDS, RAFT, RAFT_TASKS, Data, Plan, load, load_raft, plan_of
from evidence.loop import LARGEST_NORM, Encoded, Outcome, Trainer, batches, encode, round_up, warmup_steps
from evidence.memory import Alive
from evidence.methods import CUSTOMARY, FROZEN, IA3, METHODS_OF
from evidence.results import (
    RAFT_REACH,
    RATES,
    REACH,
    SEEDS,
    Record,
    Results,
    accuracy,
    accuracy_by_task,
    best_rate,
    mean,
    pack_bits,
    rate_of_task,
    validation_scores,
    walk,
)

WAYS = {False: "eager", True: "captured"}
SWEPT_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Settings:
    """How all units are worked on.

    Args:
        folder: of the data sets.
        results: the file.
        device: cuda or cpu.
        captured: whether a GPU's steps are captured.
        small: few steps, two rates and one seed, to try everything.
        until: no run begins after this `time.time()`.
        processes: how many work side by side, which their seconds must be read with.
    """

    folder: Path
    results: Path
    device: str
    captured: bool
    small: bool
    until: float
    processes: int

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:1] if self.small else SEEDS

    def plan(self, base: str, data: str) -> Plan:
        return plan_of(base, data, small=self.small)


@dataclass(frozen=True)
class Unit:
    """One of the parts `runs`, `speed`, `memory`, `sweep` and `sweep-own`, of a base, its data and a method."""

    part: str
    base: str
    data: str
    method: str

    def __str__(self) -> str:
        return f"{self.part} {self.base} {self.data} {self.method}"


def units(parts: list[str], bases: list[str], data: list[str], methods: list[str]) -> list[Unit]:
    """All that are asked for, in the order of the bases; RAFT, whose runs are many, at the end."""
    asked = [
        *(Unit("runs", *each) for each in _cells(bases, data, methods) if "runs" in parts),
        *(
            Unit(part, base, DATA_OF[base][0], method)
            for part in ("speed", "memory")
            for base in bases
            for method in METHODS_OF[base]
            if part in parts
        ),
        *(Unit(part, *each) for part in ("sweep", "sweep-own") for each in _cells(bases, data, [IA3]) if part in parts),
    ]
    asked = [unit for unit in asked if unit.method in methods]
    asked = [unit for unit in asked if unit.part == "runs" or unit.method != FROZEN]
    asked = [u for u in asked if not u.part.startswith("sweep") or (u.base != "minilm" and u.data != RAFT)]
    return sorted(asked, key=lambda unit: unit.data == RAFT)


def _cells(bases: list[str], data: list[str], methods: list[str]) -> Iterator[tuple[str, str, str]]:
    for base in bases:
        for name in DATA_OF[base]:
            for method in METHODS_OF[base]:
                if name in data and method in methods:
                    yield base, name, method


def work(unit: Unit, settings: Settings) -> str:
    """Do what is missing of a unit; gives a line about it."""
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    started, worker = time.perf_counter(), Worker(unit, settings)
    try:
        found = {
            "runs": worker.runs,
            "speed": worker.speed,
            "memory": worker.memory,
            "sweep": worker.sweep,
            "sweep-own": worker.sweep,
        }[unit.part]()
    except OutOfTimeError:
        found = "stopped, out of time"
    worker.trainer = None
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return f"{unit}: {found}; {worker.made} runs made, {time.perf_counter() - started:.0f} s"


class OutOfTimeError(Exception):
    """No further run may begin."""


class Worker:
    """A unit being worked on."""

    def __init__(self, unit: Unit, settings: Settings) -> None:
        self.unit, self.settings, self.results = unit, settings, Results(settings.results)
        self.base, self.plan = _base(unit.base), settings.plan(unit.base, unit.data)
        self.trainer: Trainer | None = None
        self.made = 0

    # Runs ------------------------------------------------------------------------------------------------------------

    def runs(self) -> str:
        if self.unit.data == RAFT:
            return self._raft()
        data = load(self.settings.folder, self.unit.data, self.plan)
        if self.unit.method == FROZEN:
            return f"{self._run(data, 0.0, 0)['test_accuracy']:.1%} as it is"
        rate = self._chosen(data)
        final = [self._run(data, rate, seed) for seed in self.settings.seeds]
        return f"rate {rate:g}, test {mean([record['test_accuracy'] for record in final]):.2%}"

    def _chosen(self, data: Data) -> float:
        """The rate that is best on the validation set by the first seed."""

        def score(rate: float) -> float:
            return validation_scores([self._run(data, rate, self.settings.seeds[0])])[rate]

        return best_rate(self._walk(score, REACH))

    def _walk(self, score: Any, reach: int) -> dict[float, float]:
        customary = CUSTOMARY[self.unit.method]
        if not self.settings.small:
            return walk(customary, reach, score)
        return {rate: score(rate) for rate in (customary, RATES[RATES.index(customary) - 1])}

    def _raft(self) -> str:
        tasks = RAFT_TASKS[:1] if self.settings.small else RAFT_TASKS
        folds = range(1 if self.settings.small else FOLDS)
        if self.unit.method == FROZEN:
            every = self._tasks(0.0, tasks, folds)
            return f"{mean([*accuracy_by_task(every)[0.0].values()]):.1%} as it is"
        records: list[Record] = []

        def score(rate: float) -> float:
            found = self._tasks(rate, tasks, folds)
            records.extend(found)
            return mean([*accuracy_by_task(found)[rate].values()])

        self._walk(score, RAFT_REACH)
        by_task = accuracy_by_task(records)
        if len(tasks) == 1:
            return f"{max(mean([*scores.values()]) for scores in by_task.values()):.1%}"
        chosen = [by_task[rate_of_task(by_task, f"{RAFT}/{task}")][f"{RAFT}/{task}"] for task in tasks]
        return f"mean over tasks {mean(chosen):.2%}"

    def _tasks(self, rate: float, tasks: tuple[str, ...], folds: range) -> list[Record]:
        return [self._run(load_raft(self.settings.folder, task, fold), rate, fold) for task in tasks for fold in folds]

    def _run(self, data: Data, rate: float, seed: int) -> Record:
        """The record of a run, made now where there is none."""
        key = {
            "kind": "run",
            "base": self.unit.base,
            "data": data.name,
            "digest": data.digest,
            "method": self.unit.method,
            "rate": rate,
            "seed": seed,
            "steps": self.plan.steps,
            "batch_size": self.plan.batch_size,
            "max_length": self.plan.max_length,
        }
        if (known := self.results.find(**key)) is not None:
            return known
        if time.time() > self.settings.until:
            raise OutOfTimeError
        outcome = self._trainer(data).run(self._encoded(data, self.plan), rate, seed)
        record = key | self._record_of(outcome, data)
        self.results.add(record)
        self.made += 1
        print(
            f"  {self.unit.base} {data.name} {self.unit.method} rate {rate:g} seed {seed}: "
            f"{record['test_accuracy']:.1%}, {outcome.seconds:.1f} s",
            flush=True,
        )
        return record

    def _record_of(self, outcome: Outcome, data: Data) -> Record:
        assert self.trainer is not None
        validation = outcome.validation
        return {
            "captured": self.trainer.captured,
            "labels": len(data.labels),
            "last_loss": finite(outcome.last_loss),
            "machine": bench.machine(),
            "processes": self.settings.processes,
            "seconds": round(outcome.seconds, 3),
            "test_accuracy": accuracy(outcome.test.correct),
            "test_correct": pack_bits(outcome.test.correct),
            "test_loss": finite(outcome.test.loss),
            "test_rows": len(data.test),
            "train_rows": len(data.train),
            "trained": self.trainer.trained.count,
            "validation_accuracy": None if validation is None else accuracy(validation.correct),
            "validation_loss": None if validation is None else finite(validation.loss),
            "validation_rows": len(data.validation),
        }

    def _trainer(self, data: Data) -> Trainer:
        """Of so many classes, as a head has; made when a run is missing."""
        classes = len(data.labels)
        if self.trainer is None or (self.unit.base == "minilm" and self.trainer.classes != classes):
            self.trainer = None
            self.trainer = Trainer(
                self.base, self.unit.method, classes, self.settings.device, captured=self.settings.captured
            )
        return self.trainer

    def _encoded(self, data: Data, plan: Plan) -> Encoded:
        return _encoded(self.unit.base, data, plan, self.settings.device)

    # Speed -----------------------------------------------------------------------------------------------------------

    def speed(self) -> str:
        """Milliseconds of a step."""
        data, encoded, key = self._sixteen()
        ways = (False, True) if self.settings.device == "cuda" and self.settings.captured else (False,)
        known = self.results.find(**key)
        if known is not None and all(f"{WAYS[captured]}_ms" in known for captured in ways):
            return "known"
        measured: Record = {}
        for captured in ways:
            self.trainer = None
            gc.collect()
            self.trainer = Trainer(
                self.base, self.unit.method, len(data.labels), self.settings.device, captured=captured
            )
            measured |= self._measure(self.trainer, encoded, WAYS[captured])
        stored = {name: each.detach().cpu().contiguous() for name, each in self.trainer.trained.parameters.items()}
        measured |= {"trained": self.trainer.trained.count, "stored_bytes": len(save(stored))}
        if self.unit.method == IA3 and self.unit.base != "minilm":
            self.trainer = None
            measured["compile_step_ms"] = self._compiled(encoded)
        self.results.add(key | measured | {"machine": bench.machine(), "processes": self.settings.processes})
        return ", ".join(f"{name} {value}" for name, value in measured.items())

    def _sixteen(self) -> tuple[Data, Encoded, Record]:
        """Data in batches of sixteen, and what names this part's record."""
        data = load(self.settings.folder, self.unit.data, self.plan)
        encoded = self._encoded(data, replace(self.plan, batch_size=2 if self.settings.small else 16))
        return data, encoded, self._key(data)

    def _key(self, data: Data) -> Record:
        """What names a record of a part that is not of runs."""
        unit = self.unit
        return {
            "kind": unit.part,
            "base": unit.base,
            "data": data.name,
            "digest": data.digest,
            "method": unit.method,
        }

    def _measure(self, trainer: Trainer, encoded: Encoded, way: str) -> Record:
        cuda = self.settings.device == "cuda"
        rounds, steps = (2, 2) if self.settings.small or not cuda else (3, 20)
        trainer.run(replace(encoded, validation=None, test=_few(encoded)), 1e-5, 0, steps)
        taken = [
            trainer.run(replace(encoded, validation=None, test=_few(encoded)), 1e-5, 0, steps).seconds / steps
            for _ in range(rounds)
        ]
        return {f"{way}_ms": round(1e3 * statistics.median(taken), 3)}

    def _compiled(self, encoded: Encoded) -> float:
        """(IA)³ by this library's own step, over the same rows."""
        model: Any = self.base.model(0).to(self.settings.device)
        model = ia3.get_peft_model(model, ia3.IA3Config(task_type=self.base.task_type)).train()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        step = ia3.compile_step(model, optimizer)
        cuda = self.settings.device == "cuda"
        count = 2 if self.settings.small or not cuda else 40
        rows = [
            self._as_labelled(encoded, each)
            for each in batches(len(encoded.train.lengths), encoded.plan.batch_size, count, 0)
        ]
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            for row in rows:
                loss = step(row)
            float(loss)
            taken.append((time.perf_counter() - started) / count)
        return round(1e3 * statistics.median(taken), 3)

    def _as_labelled(self, encoded: Encoded, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch with `labels`, on the CPU."""
        lengths, rows_there = encoded.train.lengths, rows.to(self.settings.device)
        length = round_up(int(lengths[rows].max()), 8)
        ids, mask = self.base.take(encoded.train, rows_there, lengths.to(self.settings.device), length)
        labels = encoded.choices[encoded.train.correct[rows_there]]
        if self.base.left:
            ids, mask = torch.cat([ids, labels.clamp(min=0)], 1), torch.cat([mask, (labels != -100).long()], 1)
            labels = torch.cat([torch.full_like(ids[:, :length], -100), labels], 1)
        return {"input_ids": ids.cpu(), "attention_mask": mask.cpu(), "labels": labels.cpu()}

    # Memory ----------------------------------------------------------------------------------------------------------

    def memory(self) -> str:
        """Bytes of tensors that are alive at once in two steps over the longest training texts."""
        data, encoded, key = self._sixteen()
        if self.results.find(**key) is not None:
            return "known"
        self.trainer = Trainer(self.base, self.unit.method, len(data.labels), self.settings.device, captured=False)
        lengths = encoded.train.lengths
        rows = lengths.argsort(descending=True)[: encoded.plan.batch_size].to(self.settings.device)
        length = round_up(int(lengths.max()), 8)
        ids, mask = self.base.take(encoded.train, rows, lengths.to(self.settings.device), length)
        model = self.trainer.model.train()
        with Alive([*model.parameters(), *model.buffers(), ids, mask]) as alive:
            for _ in range(2):
                self.trainer.compute(ids, mask, encoded.choices, encoded.train.correct[rows])
        self.results.add(key | {"length": length, "peak_bytes": alive.peak, "machine": bench.machine()})
        return f"{alive.peak:,} bytes"

    # Sweep -----------------------------------------------------------------------------------------------------------

    def sweep(self) -> str:
        """The rate that `ia3.sweep` finds best on the validation set, and the grid's runs at that rate."""
        data = load(self.settings.folder, self.unit.data, self.plan)
        key = self._key(data) | {"steps": self.plan.steps}
        record = self.results.find(**key)
        if record is None:
            if time.time() > self.settings.until:
                raise OutOfTimeError
            record = key | self._swept(data) | {"machine": bench.machine()}
            record["processes"] = self.settings.processes
            self.results.add(record)
        final = [self._run(data, record["chosen"], seed) for seed in self.settings.seeds]
        return f"chose {record['chosen']:g}, test {mean([each['test_accuracy'] for each in final]):.2%}"

    def _swept(self, data: Data) -> Record:
        from rich.console import Console

        rates = SWEPT_RATES[1:3] if self.settings.small else SWEPT_RATES
        settings = {} if self.unit.part == "sweep-own" else as_the_runs(self.plan)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = ia3.sweep(
                self.base.source,
                self.base.examples(data, data.train),
                test_data=self.base.examples(data, data.validation),
                over={"learning_rate": list(rates)},
                steps=self.plan.steps,
                evaluate_every=self.plan.steps,
                batch_size=self.plan.batch_size,
                max_length=self.plan.max_length,
                **settings,
                seed=SEEDS[0],
                output=Path(folder) / "sweep",
                console=Console(quiet=True),
            )
            ranking = [
                {"rate": given["learning_rate"], "accuracy": run.best.accuracy, "loss": finite(run.best.loss)}
                for given, run in zip(found.settings, found.runs, strict=True)
            ]
        seconds = round(time.perf_counter() - started, 1)
        return {"chosen": ranking[0]["rate"], "ranking": ranking, "seconds": seconds, "settings": settings}


def as_the_runs(plan: Plan) -> dict[str, Any]:
    """What a sweep is told in order to train as `Trainer` does."""
    return {
        "warmup_steps": warmup_steps(plan.steps),
        "max_gradient_norm": LARGEST_NORM,
        "dropout": True,
        "group_by_length": False,
    }


def finite(number: float | None) -> float | None:
    """None for what JSON has no number for."""
    return number if number is not None and math.isfinite(number) else None


@cache
def _base(name: str) -> Base:
    return BASES[name]()


@cache
def _encoded(base: str, data: Data, plan: Plan, device: str) -> Encoded:
    return encode(_base(base), data, plan, device)


def _few(encoded: Encoded) -> Any:
    """Sixteen rows to answer, where only the steps are of interest."""
    return replace(
        encoded.test,
        ids=encoded.test.ids[:16],
        lengths=encoded.test.lengths[:16],
        correct=encoded.test.correct[:16],
    )
