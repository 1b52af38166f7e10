from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ia3 import IA3Config, get_peft_model
from ia3.adapter import vectors
from ia3.fast.sweep import FusedLosses, GroupLosses, MixedLosses, SweepStep, group_losses
from ia3.state import get_adapter
from ia3.training.optimise import decay_vectors, trainable_parameters

RATES = [0.02, 0.005, 0.05]
NORMS = [float("inf"), 0.05, 1.0]
DECAYS = [0.0, 0.1, 0.02]
Tiny = Callable[..., Any]


def adapted(tiny: Tiny, family: str, randomise: Any) -> Any:
    model = tiny(family, dtype=torch.float64)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return randomise(get_peft_model(model, IA3Config(task_type=kind)), spread=0.1)


def token_losses(model: Any) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    def run(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = model(**batch).logits, batch["labels"]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        return losses.view_as(labels), labels != -100

    return run


def losses_by(way: str, model: Any) -> GroupLosses:
    adapter = get_adapter(model, "default")
    if way == "mixed":
        return MixedLosses(model, adapter.layout, token_losses(model))
    losses, reason = group_losses(model, adapter, token_losses(model))
    assert isinstance(losses, FusedLosses), reason
    return losses


def flat(model: Any) -> Tensor:
    adapter = get_adapter(model, "default")
    return adapter.layout.flatten([vector.detach() for vector in vectors(model, adapter)])


def batch_of(model: Any, counts: list[int], seed: int) -> dict[str, Tensor]:
    """One batch of as many groups, filled up to the largest by examples without a label; lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    size = max(counts)
    rows = size * len(counts)
    ids = torch.randint(2, 64, (rows, 7), generator=generator)
    lengths = torch.randint(3, 8, (rows, 1), generator=generator)
    mask = (torch.arange(7) < lengths).long()
    if model.config.is_encoder_decoder:
        labels = torch.randint(2, 64, (rows, 4), generator=generator)
        labels[torch.arange(4) >= torch.randint(1, 5, (rows, 1), generator=generator)] = -100
    else:
        labels = ids.masked_fill((mask == 0) | (torch.arange(7) == 0), -100)
    for group, count in enumerate(counts):
        labels[group * size + count : (group + 1) * size] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def group_of(batch: dict[str, Tensor], group: int, counts: list[int]) -> dict[str, Tensor]:
    start = group * max(counts)
    return {name: tensor[start : start + counts[group]] for name, tensor in batch.items()}


def sweep_step(model: Any, way: str, rows: int = 3) -> SweepStep:
    table = flat(model).expand(rows, -1)
    return SweepStep(model, losses_by(way, model), table, max_gradient_norms=NORMS[:rows], weight_decays=DECAYS[:rows])


class Alone:
    """One run in the ordinary way: the model's own loss, torch's clipping, AdamW."""

    def __init__(self, model: Any, run: int) -> None:
        self.model, self.run = model, run
        self.trainable = trainable_parameters(model)
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=RATES[run], weight_decay=0.0)

    def step(self, batch: dict[str, Tensor], rate: float) -> float:
        losses, learned = token_losses(self.model)(batch)
        loss = losses.sum() / learned.sum()  # a causal model's own would be summed in fp32
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), NORMS[self.run])
        self.optimizer.param_groups[0]["lr"] = rate
        decay_vectors(self.trainable, rate, DECAYS[self.run])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


@pytest.mark.parametrize(
    ("family", "way", "tolerance"),
    [
        ("t5", "hand", 1e-8),
        ("t5-gated", "hand", 1e-8),
        ("llama", "hand", 1e-6),  # the base's angles are fp32, and rounded once less
        ("mt5", "mixed", 1e-8),
        ("bart", "mixed", 1e-8),
        ("gpt2", "mixed", 1e-8),
        ("llama", "mixed", 1e-8),
    ],
)
def test_each_row_moves_as_if_it_were_alone(
    tiny: Tiny, randomise: Any, family: str, way: str, tolerance: float
) -> None:
    steps = 100 if family in ("t5", "mt5") else 20
    step = sweep_step(adapted(tiny, family, randomise), way)
    alone = [Alone(adapted(tiny, family, randomise), run) for run in range(3)]
    for number in range(steps):
        counts = [[4, 2, 3], [2, 2, 2], [1, 4, 2]][number % 3]
        batch = batch_of(step.model, counts, number)
        rates = [rate * (1 - number / steps) for rate in RATES]
        expected = [each.step(group_of(batch, r, counts), rates[r]) for r, each in enumerate(alone)]
        losses = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(step(batch, rates), losses, rtol=0, atol=tolerance)
    tables = torch.stack([flat(each.model) for each in alone])
    torch.testing.assert_close(step.table, tables, rtol=0, atol=tolerance)
    assert float((step.table[0] - step.table[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2"])
def test_dropout_is_no_difference_from_the_models_own_forward(tiny: Tiny, randomise: Any, family: str) -> None:
    """Compared without it, the losses stay fused; in the steps it drops."""
    step = sweep_step(adapted(tiny, family, randomise).train(), "hand")
    batch = batch_of(step.model, [2, 2, 2], 0)
    before = step.table.clone()
    first = step(batch, RATES)
    assert step.reason is None
    assert isinstance(step.losses, FusedLosses)
    step.table.copy_(before)
    assert (step(batch, RATES) - first).abs().min() > 1e-6


@pytest.mark.parametrize("way", ["hand", "mixed"])
def test_rows_that_leave_change_nothing_for_the_others(tiny: Tiny, randomise: Any, way: str) -> None:
    whole, shrinking = (sweep_step(adapted(tiny, "t5", randomise), way) for _ in range(2))
    counts = [2, 2, 2]
    for number in range(3):
        batch = batch_of(whole.model, counts, number)
        torch.testing.assert_close(whole(batch, RATES), shrinking(batch, RATES))
    shrinking.keep([2, 0])
    for number in range(3, 6):
        batch = batch_of(whole.model, counts, number)
        chosen = torch.tensor([4, 5, 0, 1])
        losses = shrinking({name: tensor[chosen] for name, tensor in batch.items()}, [RATES[2], RATES[0]])
        torch.testing.assert_close(losses, whole(batch, RATES)[[2, 0]], rtol=0, atol=1e-12)
    torch.testing.assert_close(shrinking.table, whole.table[[2, 0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["hand", "mixed"])
def test_a_group_without_labels_stays_where_it_is(tiny: Tiny, randomise: Any, way: str) -> None:
    step = sweep_step(adapted(tiny, "t5", randomise), way)
    other = sweep_step(adapted(tiny, "t5", randomise), way)
    step(batch_of(step.model, [2, 2, 2], 0), RATES)
    other(batch_of(step.model, [2, 2, 2], 0), RATES)
    before = [tensor[1].clone() for tensor in (step.table, step.first, step.second, step.counts)]
    losses = step(batch_of(step.model, [2, 0, 2], 1), RATES)
    assert losses[1] == 0
    assert losses[0] > 0
    after = [tensor[1] for tensor in (step.table, step.first, step.second, step.counts)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    # It counts its own steps: the next one is its second.
    batch = batch_of(step.model, [2, 2, 2], 2)
    step(batch, RATES)
    other(batch, RATES)
    torch.testing.assert_close(step.table[1], other.table[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["hand", "mixed"])
def test_where_a_row_diverges_no_row_moves(tiny: Tiny, randomise: Any, way: str) -> None:
    step, other = (sweep_step(adapted(tiny, "t5", randomise), way) for _ in range(2))
    step.table[1] = torch.inf
    before = step.table.clone()
    batch = batch_of(step.model, [2, 2, 2], 0)
    assert step(batch, RATES)[1].isnan()
    assert torch.equal(step.table[[0, 2]], before[[0, 2]])
    assert step.diverged(batch) == [1]
    step.keep([0, 2])
    other.keep([0, 2])
    chosen = {name: tensor[[0, 1, 4, 5]] for name, tensor in batch.items()}
    rates = [RATES[0], RATES[2]]
    torch.testing.assert_close(step(chosen, rates), other(chosen, rates), rtol=0, atol=0)
    torch.testing.assert_close(step.table, other.table, rtol=0, atol=0)


def test_the_model_keeps_its_own_vectors(tiny: Tiny, randomise: Any) -> None:
    step = sweep_step(adapted(tiny, "bart", randomise), "mixed")
    before = flat(step.model)
    step(batch_of(step.model, [2, 2, 2], 0), RATES)
    assert torch.equal(flat(step.model), before)
    assert all(parameter.grad is None for parameter in step.model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("family", ["t5-gated", "llama"])
def test_captured_steps_are_those_of_the_cpu(tiny: Tiny, randomise: Any, family: str) -> None:
    def step_on(device: str) -> SweepStep:
        kind = "CAUSAL_LM" if family == "llama" else "SEQ_2_SEQ_LM"
        model = randomise(get_peft_model(tiny(family), IA3Config(task_type=kind)), spread=0.1).to(device)
        return sweep_step(model, "hand")

    cpu, gpu = step_on("cpu"), step_on("cuda")
    assert gpu.records
    for number in range(12):
        counts = [[4, 2, 3], [2, 2, 2], [1, 4, 2]][number % 3]
        if number == 8:
            cpu.keep([2, 0])
            gpu.keep([2, 0])
        counts, rates = (counts, RATES) if number < 8 else (counts[:2], RATES[:2])
        batch = batch_of(cpu.model, counts, number % 4)
        rates = [rate * (1 - number / 12) for rate in rates]
        torch.testing.assert_close(gpu(batch, rates).cpu(), cpu(batch, rates), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gpu.table.cpu(), cpu.table, rtol=0, atol=2e-3)
