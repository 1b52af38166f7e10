"""The whole guide on a CPU, PEFT's as it is written and `ia3 train`'s: PhraseBank, 3 epochs, an evaluation after each.

    IA3_PHRASEBANK=…/Sentences_AllAgree.txt python benchmarks/guide_run.py [--steps 60]

flan-t5-small-titler in fp32, batch 8, AdamW 8e-3. PEFT's guide pads to 128 tokens and evaluates by a forward over all
held-out sentences. ia3 takes the step that leaves padding out, in the same kind of shuffled order, or (its default)
with sentences of like length together; it evaluates by loss and by generated words, which is more. The candidates take
turns of three steps; the whole is what the steps of three epochs and three evaluations of that would take.

Needs: CPU; peft, PhraseBank; 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSeq2SeqLM

import ia3
from bench import machine
from ia3.bundled import TITLER, load_model
from ia3.data.loading import load_examples
from ia3.inference.loading import load_tokenizer
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import split_examples
from ia3.tasks.task import Task
from ia3.tasks.template import Template
from ia3.training.collate import shuffled_batches
from ia3.training.learners.words import Words

RESULTS = Path(__file__).parent / "results" / "guide_run.json"
EPOCHS, BATCH, LENGTH, TURN = 3, 8, 128, 3


def learner_of(library: Any, tokenizer: Any) -> Words:
    config = library.IA3Config(task_type="SEQ_2_SEQ_LM")
    model = library.get_peft_model(load_model(TITLER, AutoModelForSeq2SeqLM), config).train()
    labels = ("negative", "neutral", "positive")
    task = Task(template=Template.of_column("text"), labels=labels, max_length=LENGTH, max_new_tokens=3)
    return Words(model, tokenizer, task, TrainSettings(answer_by="generation"))


def stepping(learner: Words, batches: Iterator[dict[str, torch.Tensor]]) -> Callable[[], object]:
    trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=8e-3)
    if isinstance(learner.model, ia3.PeftModel):
        fast = ia3.compile_step(learner.model, optimizer)
        assert fast.reason is None, fast.reason
        return lambda: fast(next(batches)).item()

    def step() -> None:
        learner.loss(next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batches_of(learner: Words, rows: list, *, grouped: bool, padded: bool) -> Iterator[dict[str, torch.Tensor]]:
    lengths = [len(row.input_ids) for row in rows]
    for epoch in range(EPOCHS):
        for indices in shuffled_batches(lengths, BATCH, seed=42, epoch=epoch, group_by_length=grouped):
            yield (
                to_128(learner.collate([rows[i] for i in indices]))
                if padded
                else learner.collate([rows[i] for i in indices])
            )


def to_128(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad as the guide does."""
    missing = LENGTH - batch["input_ids"].shape[1]
    return {
        name: tensor if name == "labels" else torch.nn.functional.pad(tensor, (0, missing))
        for name, tensor in batch.items()
    }


def guides_evaluation(learner: Words, rows: list) -> None:
    """A forward over all batches, as in PEFT's guide; the words are read off its logits."""
    learner.model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            learner.model(**to_128(learner.collate(rows[start : start + BATCH]))).logits.argmax(-1)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each candidate")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    training, test = split_examples(load_examples(os.environ["IA3_PHRASEBANK"]))
    tokenizer = load_tokenizer(TITLER)
    kinds = {
        "PEFT guide": (peft, {"grouped": False, "padded": True}),
        "ia3, shuffled": (ia3, {"grouped": False, "padded": False}),
        "ia3, grouped by length": (ia3, {"grouped": True, "padded": False}),
    }
    learners = {name: learner_of(library, tokenizer) for name, (library, _) in kinds.items()}
    rows = next(iter(learners.values())).tokenise(training)
    test_rows = next(iter(learners.values())).tokenise(test)
    steps = {
        name: stepping(learners[name], batches_of(learners[name], rows, **how)) for name, (_, how) in kinds.items()
    }
    taken = dict.fromkeys(kinds, 0.0)
    for turn in range(-1, arguments.steps // TURN):  # the first turn warms up
        for name, step in steps.items():
            seconds = seconds_of(lambda step=step: [step() for _ in range(TURN)])
            taken[name] += seconds if turn >= 0 else 0.0
    count = arguments.steps // TURN * TURN
    whole_steps = EPOCHS * math.ceil(len(rows) / BATCH)
    report: dict[str, Any] = {"machine": machine(), "steps_timed": count, "steps_of_the_guide": whole_steps, "runs": {}}
    for name, (library, _) in kinds.items():
        learner = learners[name]
        work = (lambda rows: None) if library is ia3 else None
        # Called before the loop goes on.
        evaluation = seconds_of(
            (lambda: learner.measure(test_rows, work)) if work else (lambda: guides_evaluation(learner, test_rows))  # noqa: B023
        )
        whole = whole_steps * taken[name] / count + EPOCHS * evaluation
        report["runs"][name] = {"step_s": taken[name] / count, "evaluation_s": evaluation, "whole_s": whole}
    peft_whole = report["runs"]["PEFT guide"]["whole_s"]
    for name, found in report["runs"].items():
        found["times_faster"] = peft_whole / found["whole_s"]
        print(f"{name:<24}" + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
