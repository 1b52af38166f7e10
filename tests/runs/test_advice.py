from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ia3.runs.report import result_table, write_report
from ia3.runs.run import Run, TrainerState, advise, compute_metrics
from ia3.runs.settings import TrainSettings
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template

LABELS = ("bad", "good")


def finished(
    right: int, total: int, losses: list[float], *, most: float = 0.5, kind: TaskKind = TaskKind.LABEL_WORDS
) -> Run:
    """A run that answers so many of the held-out rows right; its held-out losses, the first before training."""
    labels = LABELS if kind.has_labels else ()
    references = ["good"] * round(most * total) + ["bad"] * (total - round(most * total))
    other = {"good": "bad", "bad": "good"}
    predictions = [label if number < right else other[label] for number, label in enumerate(references)]
    return Run(
        output_dir=Path("nowhere"),
        settings=TrainSettings(),
        task=Task(kind=kind, template=Template("{text}"), labels=labels, max_length=9),
        shown=["text"] * total,
        references=references,
        progress=TrainerState(
            steps=[{"learning_rate": 1.0, "loss": 1.0, "step": step} for step in range(1, 10 * len(losses) - 9)],
            evaluations=[
                compute_metrics(10 * number, loss, references, predictions, labels, seconds=0.1)
                for number, loss in enumerate(losses)
            ],
            best=len(losses) - 1,
        ),
        train_examples=480,
        trainable_parameters=448,
        all_parameters=76_995_968,
    )


FLAT = [1.0, 0.5, 0.5, 0.5]
FALLING = [1.0, 0.5, 0.5, 0.4]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (finished(100, 200, FLAT), r"No better than the most frequent label for all \(50\.0%\): "),
        (finished(110, 200, FLAT), "Not clearly better than the most"),  # whose interval reaches down to it
        (finished(110, 200, FALLING), "Not clearly better than the most"),  # which comes first
        (finished(4, 10, FLAT), "No better than the most"),
        (finished(150, 200, FALLING), r"still falls \(0\.5 after two thirds, 0\.4 at the end\): train for more epochs"),
        (finished(9, 10, FALLING), "still falls"),
        (finished(9, 10, FLAT), r"10 held-out answers are too few to tell: 95 % intervals are 60% to 98% here"),
        (finished(7, 10, FLAT), "10 held-out answers are too few"),  # rather than no better, which nobody can tell
        (finished(10, 10, FALLING), "too few to tell"),  # nothing is left to learn
        (finished(150, 200, FALLING, kind=TaskKind.GENERATION), "still falls"),
    ],
)
def test_the_most_important_thing_is_said(run: Run, says: str) -> None:
    assert run.advice is not None
    assert "\n" not in run.advice
    assert re.search(says, run.advice)


@pytest.mark.parametrize(
    "run",
    [
        finished(150, 200, FLAT),
        finished(150, 200, [1.0, 0.5, 0.4, 0.39]),
        finished(150, 200, [1.0, 0.3, 0.5, 0.4]),  # it was better before
        finished(150, 200, [1.0, 0.4]),  # of one evaluation nobody knows
        finished(1, 10, FLAT, kind=TaskKind.GENERATION),  # where few answers are equal to the letter
    ],
)
def test_a_result_without_a_flaw_is_left_alone(run: Run) -> None:
    assert run.advice is None


def test_few_answers_tell_no_best_rate() -> None:
    assert advise(finished(9, 10, FLAT), "try 0.01, too") == finished(9, 10, FLAT).advice
    assert advise(finished(150, 200, FLAT), "try 0.01, too") == "try 0.01, too"


def test_what_was_stopped_falls_no_more() -> None:
    run = finished(150, 200, FALLING)
    assert replace(run, progress=replace(run.progress, stopped_early=True)).advice is None


def test_the_advice_is_in_the_runs_files(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    run = replace(finished(150, 200, FALLING), output_dir=tmp_path)
    assert run.summary()["advice"] == run.advice
    assert f"| advice | {run.advice} |" in write_report(run, "title").read_text()
    assert "advice" in [str(cell) for cell in result_table(run).columns[0].cells]
    assert "advice" not in write_report(replace(finished(150, 200, FLAT), output_dir=tmp_path), "title").read_text()
