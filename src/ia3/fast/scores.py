"""The log-probabilities of answer choices by an encoder-decoder's fused forward, captured on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ia3.fast import fused
from ia3.fast.batch import FEW_PARTS, Packed, filled_examples
from ia3.fast.capture import GraphedCallable
from ia3.fast.compare import Numbers, difference, telling_examples
from ia3.fast.fused import FusedLoss, Readers
from ia3.fast.graphed import moved_by
from ia3.fast.guard import Guard, own_forward, unsupported_modules
from ia3.fast.ops.launch import next_power_of_2
from ia3.fast.ragged import IGNORE_INDEX
from ia3.mixing import make_rows
from ia3.rows import acting
from ia3.sites import Layout


def unsupported_reason(model: Any, layout: Layout) -> str | None:
    """Why choices can't be scored by the fused forward under vectors at these sites; None where they can."""
    return fused.seq2seq_unsupported_reason(model, layout.sites) or unsupported_modules(model)


class ChoiceScores:
    """The log-probability of each token of each choice after each input, without padding.

    Args:
        model: one in evaluation mode for which `unsupported_reason` has nothing to say; its weights are fused.
        choices: tokens `[choices, length]`, -100 after a choice's end.
        layout: the sites at which there may be vectors.

    What is found is right as long as `guard.is_valid()` and where `difference` has nothing to say.
    """

    def __init__(self, model: Any, choices: Tensor, layout: Layout) -> None:
        self.model, self.choices, self.layout = model, choices.to(model.device), layout
        self.losses = FusedLoss(model, layout)
        self.guard = Guard(model, self.losses.folded)
        # Vectors stay in one place for all batches of a size, so that a graph reads whichever are there.
        self.tables: dict[int, Tensor] = {}
        compute = partial(_log_probabilities, self.losses, self.choices, self.tables)
        self.computation = GraphedCallable(compute, model.device, repeatable=True)
        self.lock = threading.Lock()
        self.compared: set[tuple[bool, bool, bool]] = set()

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, flat: Tensor, readers: Sequence[int] | None = None
    ) -> Tensor:
        """`[answers, choices, length]` in fp32 at least; nothing is drawn.

        Args:
            input_ids: `[inputs, source]`, best on the CPU.
            attention_mask: the same.
            flat: the vectors of all answers or of each, `[1 or answers, D]`; those of one input's answers are the
                same in the encoder.
            readers: how many answers read each input, one after the other; None for one each.
        """
        nothing = torch.full((len(input_ids), 1), IGNORE_INDEX, device="cpu")
        packed = self.losses.pack({"input_ids": input_ids, "attention_mask": attention_mask, "labels": nothing})
        answers = sum(readers or [1] * len(input_ids))
        tensors = dict(packed.tensors)
        filled, most = answers, max(readers or [1])
        if self.computation.captures:
            fill = partial(filled_examples, tokens=self.choices.numel())
            packed = self.losses.round_up(packed, fill(len(input_ids)), FEW_PARTS)
            filled, most, tensors = fill(answers), next_power_of_2(most), dict(packed.tensors)
        if readers is not None:
            before = [*accumulate(readers, initial=0)]
            before += [answers] * (packed.examples - len(readers))
            tensors["before"] = torch.tensor(before, dtype=torch.int32, device="cpu")
        with self.lock:
            groups = self._hold(flat, filled)
            found: Tensor = self.computation(groups, filled, most, *packed.fixed, **tensors)
            return found[:answers].clone()

    @torch.no_grad()
    def _hold(self, flat: Tensor, answers: int) -> int:
        """Put vectors where they are read; how many there is room for."""
        groups = 1 if len(flat) == 1 else answers
        if groups not in self.tables:
            if not self.computation.captures:  # nothing is read there again
                self.tables.clear()
            like = {"dtype": torch.promote_types(self.model.dtype, torch.float32), "device": self.model.device}
            with torch.inference_mode(False):
                self.tables[groups] = torch.ones(groups, self.layout.size, **like)
        self.tables[groups][: len(flat)].copy_(flat)
        return groups

    # Comparing

    def difference(
        self, input_ids: Tensor, attention_mask: Tensor, flat: Tensor, readers: Sequence[int] | None = None
    ) -> str | None:
        """In what the first choice's log-probabilities are not the model's own, for a kind of batch that comes for the
        first time; None if in nothing.

        Args:
            input_ids, attention_mask, flat, readers: as in a call.
        """
        kind = (len(flat) > 1, readers is not None, bool(attention_mask.all()))
        if kind in self.compared:
            return None
        counts = [*(readers or [1] * len(input_ids))]
        chosen = telling_examples(attention_mask.sum(1), torch.tensor(counts, device="cpu") > 0)
        before = [*accumulate(counts, initial=0)]
        few = [min(counts[one], 2) for one in chosen]
        answers = [before[one] + place for one, count in zip(chosen, few, strict=True) for place in range(count)]
        some = {"input_ids": input_ids[chosen], "attention_mask": attention_mask[chosen]}
        vectors = flat if len(flat) == 1 else flat[answers]
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            reason = difference(
                self.model,
                lambda: _numbers(self(**some, flat=vectors, readers=None if readers is None else few)[:, 0]),
                partial(self._own_numbers, some, few, vectors),
                dtype=self.model.dtype,
            )
        self.compared.add(kind)
        return reason

    def _own_numbers(self, inputs: Mapping[str, Tensor], readers: Sequence[int], flat: Tensor, moved: float) -> Numbers:
        """By the model's own forward, each answer with an input of its own."""
        counts, device = torch.tensor(readers, device="cpu"), self.model.device
        batch = {name: tensor.repeat_interleave(counts, 0).to(device) for name, tensor in inputs.items()}
        labels = self.choices[:1].repeat(len(batch["input_ids"]), 1)
        vectors = moved_by(flat.detach(), moved).detach().expand(len(labels), -1)
        names = [f"answer {number}" for number in range(len(labels))]
        rows = acting(make_rows(self.model, names, self.layout, vectors)) if self.layout.sites else nullcontext()
        with rows:
            logits = own_forward(type(self.model))(self.model, **batch, labels=labels, return_dict=True).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        # A row a token: along columns PyTorch's sum over flan-t5's words had an error of 1e-4.
        losses = functional.cross_entropy(wide, labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
        return _numbers(-losses.view_as(labels))


def _numbers(log_probabilities: Tensor) -> Numbers:
    """Their mean, and all of them, where a training's comparison has a gradient; less one.

    That of a label of which a model is sure is near 0, and no more exact than the logits that it is made of: parts of
    itself would say nothing, parts of one are parts of the probability.
    """
    moved = log_probabilities - 1
    return moved.mean(), moved.flatten()


@torch.no_grad()
def _log_probabilities(
    losses: FusedLoss, choices: Tensor, tables: Mapping[int, Tensor], groups: int, answers: int, most: int, *fixed: Any,
    before: Tensor | None = None, **tensors: Tensor,
) -> Tensor:  # fmt: skip
    readers = None if before is None else Readers(before, answers, most)
    return losses.log_probabilities(Packed(tensors, *fixed), choices, tables[groups], readers)
