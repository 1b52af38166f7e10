"""One loop for every method: the same batches, the same schedule, AdamW, fp32; a GPU replays captured steps.

A step is zero_grad, forward, backward, clipping to 1 and AdamW without decay; the rate rises over 6 % of the steps and
falls to zero. On a GPU products are in TF32 and a step is captured once for each length of batches: runs of other
rates, seeds and tasks then begin again in the same tensors. The loop knows nothing of the method, so its speed says
nothing of what a method's own library could do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evidence.bases import IGNORED, Base, Texts
from evidence.data import Data, Plan
from evidence.methods import FROZEN, T_FEW, adapt
from ia3.tasks.losses import choice_scores, tfew_losses, token_log_probabilities

WARMUP = 0.06
LARGEST_NORM = 1.0
EVALUATION_TOKENS = 16_384


@dataclass
class Encoded:
    """A data set as one base reads it."""

    data: Data
    plan: Plan
    choices: Tensor
    train: Texts
    validation: Texts | None
    test: Texts


def encode(base: Base, data: Data, plan: Plan, device: str) -> Encoded:
    parts = (
        base.texts(data, rows, plan.max_length, device) if rows else None
        for rows in (data.train, data.validation, data.test)
    )
    train, validation, test = parts
    assert train is not None
    assert test is not None
    choices = base.choices(data.labels) if not is_classifier(base) else torch.zeros(len(data.labels), 1).long()
    return Encoded(data, plan, choices.to(device), train, validation, test)


def is_classifier(base: Base) -> bool:
    return base.task_type == "FEATURE_EXTRACTION"


@dataclass
class Outcome:
    """What came of one training."""

    validation: Answers | None
    test: Answers
    last_loss: float | None
    seconds: float


@dataclass
class Answers:
    """Which rows were answered rightly, and the mean loss of the right answers."""

    correct: list[bool]
    loss: float


class Trainer:
    """One base with one method, trained again and again.

    Args:
        base: the base.
        method: its name.
        classes: of a classifier's head.
        device: cuda or cpu.
        captured: whether steps are captured, on a GPU.
    """

    def __init__(self, base: Base, method: str, classes: int, device: str, *, captured: bool = True) -> None:
        self.base, self.method, self.classes, self.device = base, method, classes, device
        self.model: Any = base.model(classes).to(device)
        self.trained = adapt(base, self.model, method)
        self.parameters = list(self.trained.parameters.values())
        self.captured = captured and device == "cuda" and method != FROZEN
        self.rate = torch.zeros((), device=device)
        self.optimizer: torch.optim.AdamW | None = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=self.rate, weight_decay=0.0, capturable=device == "cuda", foreach=device == "cuda"
            )
        self.loss = torch.zeros((), device=device)
        self._steps: dict[tuple[int, ...], CapturedStep] = {}
        # One for all of its graphs: what a step leaves behind is not in it, so that the next may have the memory.
        self.pool = torch.cuda.graph_pool_handle() if self.captured else None

    def run(self, encoded: Encoded, rate: float, seed: int, steps: int | None = None) -> Outcome:
        """Train from the beginning and answer the held-out rows.

        Args:
            encoded: the data.
            rate: the highest learning rate.
            seed: of what is drawn at first, the order and dropout.
            steps: other than the plan's.
        """
        plan, total = encoded.plan, steps or encoded.plan.steps
        order = batches(len(encoded.train.lengths), plan.batch_size, total, seed)
        # Rounded up, so that few shapes are captured.
        lengths = [round_up(int(encoded.train.lengths[rows].max()), 32 if self.captured else 8) for rows in order]
        if self.captured:
            for length in sorted(set(lengths)):
                self._capture(encoded, length)
        self._begin(seed)
        started = time.perf_counter()
        on_device = order.to(self.device)
        own_lengths = encoded.train.lengths.to(self.device)
        for number in range(total if self.method != FROZEN else 0):
            self.rate.fill_(rate * schedule(number, total))
            ids, mask = self.base.take(encoded.train, on_device[number], own_lengths, lengths[number])
            self._step(ids, mask, encoded.choices, encoded.train.correct[on_device[number]])
        last_loss = float(self.loss)
        seconds = time.perf_counter() - started
        validation = None if encoded.validation is None else self.answer(encoded, encoded.validation)
        test = self.answer(encoded, encoded.test)
        return Outcome(validation, test, None if self.method == FROZEN else last_loss, seconds)

    def _begin(self, seed: int) -> None:
        self.trained.reset(seed)
        for state in self.optimizer.state.values() if self.optimizer else ():
            for tensor in state.values():
                tensor.zero_()
        torch.manual_seed(seed)
        self.model.train()

    def _step(self, ids: Tensor, mask: Tensor, choices: Tensor, correct: Tensor) -> None:
        key = (*ids.shape, *choices.shape)
        if key in self._steps:
            self._steps[key](ids, mask, choices, correct)
        else:
            self.compute(ids, mask, choices, correct)

    def compute(self, ids: Tensor, mask: Tensor, choices: Tensor, correct: Tensor) -> None:
        """One step; no number leaves the device."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss = self._loss(ids, mask, choices, correct)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _loss(self, ids: Tensor, mask: Tensor, choices: Tensor, correct: Tensor) -> Tensor:
        if is_classifier(self.base):
            return cross_entropy(self.base.logits(self.model, ids, mask, choices), correct)
        if self.method == T_FEW:
            every = choices.expand(len(ids), -1, -1)
            return tfew_losses(self.base.logits(self.model, ids, mask, every), every, correct).total
        right = choices.index_select(0, correct)[:, None]
        logits = self.base.logits(self.model, ids, mask, right)
        # A mean over all the batch's tokens, as in the models' own losses.
        return -token_log_probabilities(logits, right).sum() / (right != IGNORED).sum()

    def _capture(self, encoded: Encoded, length: int) -> None:
        rows = torch.zeros(encoded.plan.batch_size, dtype=torch.long, device=self.device)
        ids, mask = self.base.take(encoded.train, rows, encoded.train.lengths.to(self.device), length)
        key = (*ids.shape, *encoded.choices.shape)
        if key not in self._steps:
            self.model.train()
            self._steps[key] = CapturedStep(self, ids, mask, encoded.choices, encoded.train.correct[rows])

    @torch.no_grad()
    def answer(self, encoded: Encoded, texts: Texts) -> Answers:
        """Answer held-out texts, in batches of like length."""
        self.model.eval()
        lengths = texts.lengths.to(self.device)
        correct, losses = torch.zeros(len(lengths), dtype=torch.bool), torch.zeros(len(lengths))
        written = encoded.data.written
        find = self._written if written else self._likeliest
        for rows in sorted_batches(texts.lengths, 1 if written or is_classifier(self.base) else len(encoded.choices)):
            length = round_up(int(texts.lengths[rows].max()), 8)
            chosen = rows.to(self.device)
            ids, mask = self.base.take(texts, chosen, lengths, length)
            right, loss = find(ids, mask, encoded.choices, texts.correct[chosen])
            correct[rows], losses[rows] = right.cpu(), loss.cpu()
        return Answers(correct.tolist(), float(losses.mean()))

    def _likeliest(self, ids: Tensor, mask: Tensor, choices: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """By the mean of each label's tokens' log-probabilities, or the classes' logits."""
        every = choices.expand(len(ids), -1, -1)
        scores = self.base.logits(self.model, ids, mask, every)
        if not is_classifier(self.base):
            scores = choice_scores(token_log_probabilities(scores, every), every)
        return scores.argmax(-1) == correct, cross_entropy(scores, correct, reduction="none")

    def _written(self, ids: Tensor, mask: Tensor, choices: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Whether greedy writing finds the answer: as long as it was right, it has read what is given here."""
        right = choices.index_select(0, correct)[:, None]
        logits = self.base.logits(self.model, ids, mask, right)
        hit = (logits.argmax(-1) == right) | (right == IGNORED)
        return hit.flatten(1).all(1), -choice_scores(token_log_probabilities(logits, right), right)[:, 0]


class CapturedStep:
    """A step as one CUDA graph, over tensors of its own that each batch is copied into."""

    def __init__(self, trainer: Trainer, *tensors: Tensor) -> None:
        self.given = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                trainer.compute(*self.given)
        torch.cuda.current_stream().wait_stream(stream)
        assert trainer.optimizer is not None
        trainer.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=trainer.pool):
            trainer.compute(*self.given)
        trainer.optimizer.zero_grad()  # the gradients are in the pool

    def __call__(self, *tensors: Tensor) -> None:
        for own, given in zip(self.given, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()


def batches(count: int, size: int, steps: int, seed: int) -> Tensor:
    """Rows of each step, `[steps, size]`: one shuffled order after another."""
    chance, order = random.Random(seed), []
    while len(order) < steps * size:
        order += chance.sample(range(count), count)
    return torch.tensor(order[: steps * size]).view(steps, size)


def schedule(step: int, steps: int) -> float:
    """The rate of a step as a part of the highest."""
    warmup = warmup_steps(steps)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def warmup_steps(steps: int) -> int:
    return max(1, round(WARMUP * steps))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def sorted_batches(lengths: Tensor, choices: int) -> Iterator[Tensor]:
    """Rows of like length, as many as fit a number of tokens with all their choices."""
    order, start = lengths.argsort(descending=True), 0
    while start < len(order):
        size = max(1, EVALUATION_TOKENS // (int(lengths[order[start]]) * choices))
        yield order[start : start + size]
        start += size
