"""The table, the pictures and the summary of what the results' file holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from evidence.bases import DATA_OF
from evidence.data import FOLDS, RAFT, RAFT_TASKS, plan_of
from evidence.intervals import Answered, interval
from evidence.methods import CUSTOMARY, FROZEN, FULL, IA3, IA3_LINEAR, LORA, METHODS_OF, WORDS
from evidence.results import (
    RAFT_REACH,
    REACH,
    SEEDS,
    Record,
    Results,
    accuracy_by_task,
    best_rate,
    mean,
    next_rate,
    rate_of_task,
    unpack_bits,
    validation_scores,
    walk,
)

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
NAMES = {
    "minilm": "all-MiniLM-L6-v2",
    "titler": "flan-t5-small-titler",
    "smollm2": "SmolLM2-135M-Instruct",
    "phrasebank": "PhraseBank",
    "tweets": "tweets",
    "banking77": "BANKING77",
    "clinc150": "CLINC150",
    "orders": "orders",
    RAFT: "RAFT",
}
# How far below the best one a panel of rates goes, in points.
DEEPEST = 25


@dataclass
class Row:
    """A method on a base and a data set.

    Args:
        rates: the chosen one, or those of RAFT's tasks.
        accuracy, low, high: over all seeds and rows.
        seeds: how many; RAFT's folds.
        against: by method, how much more accurate this one is, and the interval of that.
        by_rate: the first seed's test accuracy at each rate; RAFT's mean over tasks.
        complete: whether no rate is left to try, and every seed was run.
    """

    base: str
    data: str
    method: str
    rates: list[float]
    accuracy: float
    low: float
    high: float
    seeds: int
    trained: int
    against: dict[str, tuple[float, float, float]]
    by_rate: dict[float, float]
    complete: bool
    costs: Record


def write(results: Path, folder: Path, images: Path) -> None:
    """Print the table, write evidence.json into a folder and pictures into another; name what isn't complete."""
    records = [*Results(results).records.values()]  # of a run that two processes made, one
    rows = [row for base, names in DATA_OF.items() for data in names for row in cell(records, base, data)]
    complete = {(row.base, row.data, row.method) for row in rows if row.complete}
    for base, names in DATA_OF.items():
        for place in product((base,), names, METHODS_OF[base]):
            if place not in complete:
                print("not complete:", *place)
    trained = {(row.base, row.data) for row in rows if row.complete and row.method != FROZEN}
    rows = [row for row in rows if row.complete and (row.base, row.data) in trained]
    swept = [*sweeps(records)]
    show(rows, swept)
    summary = {
        "machines": distinct(record["machine"] for record in records),
        "rows": [asdict(row) for row in rows],
        "runs": sum(record["kind"] == "run" for record in records),
        "run_seconds": round(sum(record.get("seconds", 0.0) for record in records if record["kind"] == "run")),
        "sweeps": swept,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if rows:
        pictures(rows, images)


def cell(records: list[Record], base: str, data: str) -> list[Row]:
    """Every method that has been run on a base and a data set, beside the others."""
    own = current(records, base, data)
    found = {}
    for method in METHODS_OF[base]:
        runs = [record for record in own if record["method"] == method]
        judged = raft(runs) if data == RAFT else ordinary(runs)
        if judged is not None:
            found[method] = judged
    costs: dict[str, Record] = {}
    digests = {record["digest"] for record in own}
    for each in records:
        if each["kind"] in ("speed", "memory") and each["base"] == base and each["digest"] in digests:
            own_costs = {name: value for name, value in each.items() if name.endswith(("_ms", "_bytes"))}
            costs[each["method"]] = costs.get(each["method"], {}) | own_costs
    complete = {method: is_complete(method, data, judged) for method, judged in found.items()}
    return [
        Row(
            base=base,
            data=data,
            method=method,
            rates=judged.rates,
            accuracy=judged.answers.accuracy,
            low=interval(judged.answers.drawn)[0],
            high=interval(judged.answers.drawn)[1],
            seeds=judged.seeds,
            trained=judged.trained,
            against={
                other: judged.answers.beside(found[other].answers)
                for other in (IA3, IA3_LINEAR, LORA, FULL)
                if complete.get(other) and other != method and found[other].answers.shapes == judged.answers.shapes
            },
            by_rate=judged.by_rate,
            complete=complete[method],
            costs=costs.get(method, {}),
        )
        for method, judged in found.items()
    ]


def current(records: list[Record], base: str, data: str) -> list[Record]:
    """The runs by today's plan; of several versions of the data, the last one's."""
    plan = plan_of(base, data)
    asked = {"kind": "run", "base": base}
    asked |= {name: getattr(plan, name) for name in ("steps", "batch_size", "max_length")}
    runs = [
        record for record in records if asked.items() <= record.items() and record["data"].partition("/")[0] == data
    ]

    def held_out(run: Record) -> tuple[str, int]:
        return run["data"], run["seed"] if data == RAFT else 0

    last = {held_out(run): run["digest"] for run in runs}
    return [run for run in runs if run["digest"] == last[held_out(run)]]


def is_complete(method: str, data: str, judged: Judged) -> bool:
    """Whether no rate is left to try, and every seed was run."""
    if method == FROZEN:
        return True
    reach = RAFT_REACH if data == RAFT else REACH
    return judged.seeds == len(SEEDS) and next_rate(judged.scores, CUSTOMARY[method], reach) is None


@dataclass
class Judged:
    """The runs that a method is judged by.

    Args:
        scores: of each rate, what it is chosen by.
    """

    answers: Answered
    rates: list[float]
    seeds: int
    trained: int
    by_rate: dict[float, float]
    scores: dict[float, float]


def ordinary(runs: list[Record]) -> Judged | None:
    """By the rate that validation chose, of those that the search came to."""
    if not runs:
        return None
    if runs[0]["method"] == FROZEN:
        return at_rate(runs, 0.0, {})
    scores = validation_scores(record for record in runs if record["seed"] == 0)
    scores = walk(CUSTOMARY[runs[0]["method"]], REACH, scores.get)
    return at_rate(runs, best_rate(scores), scores) if scores else None


def at_rate(runs: list[Record], rate: float, scores: dict[float, float]) -> Judged:
    final = sorted((record for record in runs if record["rate"] == rate), key=lambda record: record["seed"])
    by_rate = {record["rate"]: record["test_accuracy"] for record in runs if record["seed"] == 0}
    bits = np.array([unpack_bits(record["test_correct"], record["test_rows"]) for record in final])
    return Judged(Answered([bits]), [rate], len(final), final[0]["trained"], dict(sorted(by_rate.items())), scores)


def raft(runs: list[Record]) -> Judged | None:
    """By each task's rate, of those that all folds of all tasks were run with; the mean over tasks."""
    names = [f"{RAFT}/{task}" for task in RAFT_TASKS]
    runs = [record for record in runs if record["data"] in names]
    complete = [
        record for record in runs if sum(other["rate"] == record["rate"] for other in runs) == FOLDS * len(names)
    ]
    if not complete:
        return None
    by_task, method = accuracy_by_task(complete), complete[0]["method"]
    if method != FROZEN:
        means = {rate: mean([*tasks.values()]) for rate, tasks in by_task.items()}
        by_task = {rate: by_task[rate] for rate in walk(CUSTOMARY[method], RAFT_REACH, means.get)}
    if not by_task:
        return None
    groups, rates = [], []
    for name in names:
        rate = rate_of_task(by_task, name)
        folds = [record for record in complete if (record["data"], record["rate"]) == (name, rate)]
        folds = sorted(folds, key=lambda record: record["seed"])
        groups.append(np.array([[right for f in folds for right in unpack_bits(f["test_correct"], f["test_rows"])]]))
        rates.append(rate)
    by_rate = {rate: mean([*tasks.values()]) for rate, tasks in sorted(by_task.items())}
    return Judged(Answered(groups), rates, FOLDS, complete[0]["trained"], by_rate, by_rate)


def sweeps(records: list[Record]) -> Iterable[dict[str, Any]]:
    """What `ia3.sweep` chose, and how much is lost by that beside the rate that the runs' own validation chose."""
    for swept in (record for record in records if record["kind"] in ("sweep", "sweep-own")):
        same = ("digest", "method", "steps")
        runs = [
            record
            for record in current(records, swept["base"], swept["data"])
            if all(record[name] == swept[name] for name in same)
        ]
        if not any(record["rate"] == swept["chosen"] for record in runs):
            continue
        grid, chosen = ordinary(runs), at_rate(runs, swept["chosen"], {})
        assert grid is not None
        yield {
            "base": swept["base"],
            "data": swept["data"],
            "steps": swept["steps"],
            "part": swept["kind"],
            "seconds": swept["seconds"],
            "sweep_rate": swept["chosen"],
            "grid_rate": grid.rates[0],
            "sweep_accuracy": chosen.answers.accuracy,
            "grid_accuracy": grid.answers.accuracy,
            "difference": chosen.answers.beside(grid.answers) if chosen.answers.shapes == grid.answers.shapes else None,
        }


def show(rows: list[Row], swept: list[dict[str, Any]]) -> None:
    console = Console(width=190)
    for base, data in distinct((row.base, row.data) for row in rows):
        table = Table(title=f"{base}, {data}", title_justify="left")
        for name in ("method", "rate", "accuracy, 95 %", "beside LoRA", "beside all weights", "trained"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for name in ("MB stored", "ms a step", "GB at most"):
            table.add_column(name, justify="right")
        for row in rows:
            if (row.base, row.data) == (base, data):
                table.add_row(*cells_of(row))
        console.print(table)
    for each in swept:
        lost = each["difference"]
        console.print(
            f"{each['base']}, {each['data']}: {each['part']} chose {each['sweep_rate']:g} in {each['seconds']:.0f} s, "
            f"the runs {each['grid_rate']:g}; "
            f"test {each['sweep_accuracy']:.2%} and {each['grid_accuracy']:.2%}"
            + (f", difference {points(lost)}" if lost else ""),
            highlight=False,
        )


def cells_of(row: Row) -> list[str]:
    rates = f"{min(row.rates):g}" if len({*row.rates}) == 1 else f"{min(row.rates):g} to {max(row.rates):g}"
    costs = row.costs
    stored, memory = (costs.get(name) for name in ("stored_bytes", "peak_bytes"))
    step = costs.get("captured_ms", costs.get("eager_ms"))
    return [
        WORDS[row.method],
        "" if row.method == FROZEN else rates,
        f"{row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}] × {row.seeds}",
        *(points(row.against[other]) if other in row.against else "" for other in (LORA, FULL)),
        f"{row.trained:,}",
        "" if stored is None else f"{stored / 1e6:,.2f}",
        "" if step is None else f"{step:.2f}",
        "" if memory is None else f"{memory / 1e9:.2f}",
    ]


def points(found: tuple[float, float, float]) -> str:
    """A difference in percentage points."""
    here, low, high = (100 * number for number in found)
    return f"{here:+.1f} [{low:+.1f}, {high:+.1f}]"


def pictures(rows: list[Row], folder: Path) -> None:
    cells = distinct((row.base, row.data) for row in rows)
    colours = dict(zip(WORDS, matplotlib.colormaps["tab10"].colors, strict=False))

    def draw(name: str, panel: Any) -> None:
        with matplotlib.rc_context(STYLE):
            down = -(-len(cells) // 2)
            figure = Figure(figsize=(10, 3.4 * down + 0.8), dpi=110, layout="constrained")
            FigureCanvasAgg(figure)
            panels = figure.subplots(down, 2, squeeze=False).flatten()
            for axes in panels[len(cells) :]:
                axes.remove()
            for axes, (base, data) in zip(panels, cells, strict=False):
                own = [row for row in rows if (row.base, row.data) == (base, data)]
                panel(axes, [row for row in own if row.method != FROZEN])
                before = "".join(f"; before training {row.accuracy:.0%}" for row in own if row.method == FROZEN)
                axes.set_title(f"{NAMES[base]}, {NAMES[data]}{before}", loc="left", fontsize=11)
                axes.set_ylabel("test accuracy, %")
            labelled = {
                text: handle
                for axes in panels[: len(cells)]
                for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
            }
            figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=3, frameon=False)
            figure.savefig(folder / f"{name}.png")

    def by_size(axes: Axes, own: list[Row]) -> None:
        for row in own:
            spread = [[100 * (row.accuracy - row.low)], [100 * (row.high - row.accuracy)]]
            look = {"color": colours[row.method], "label": WORDS[row.method], "fmt": "o", "capsize": 3}
            axes.errorbar([row.trained], [100 * row.accuracy], yerr=spread, **look)
        axes.set_xscale("log")
        axes.set_xlabel("numbers trained")

    def by_rate(axes: Axes, own: list[Row]) -> None:
        for row in own:
            accuracies = [100 * each for each in row.by_rate.values()]
            look = {"color": colours[row.method], "label": WORDS[row.method], "marker": "."}
            axes.plot([*row.by_rate], accuracies, **look)
            if len({*row.rates}) == 1:
                axes.plot(row.rates[0], 100 * row.by_rate[row.rates[0]], "o", color=colours[row.method])
        best = max(100 * each for row in own for each in row.by_rate.values())
        axes.set_ylim(max(axes.get_ylim()[0], best - DEEPEST), best + 1)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate (large dot: chosen)")

    draw("evidence_size", by_size)
    draw("evidence_rate", by_rate)


def distinct(things: Iterable[Any]) -> list[Any]:
    """Each once, in their order."""
    found: list[Any] = []
    for thing in things:
        if thing not in found:
            found.append(thing)
    return found
