"""Steps of many runs in one batch: run r's examples are the batch's group r, and its vectors row r of one table.

All runs share the frozen base. A row has its own loss, clipping, decay, moments, count of steps and rate, so that it
moves as if it were trained alone. A step is arithmetic of tensors alone, so that a GPU can capture it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ia3.fast.batch import Packed
from ia3.fast.capture import GraphedCallable
from ia3.fast.compare import Numbers, difference, in_less_memory, telling_examples
from ia3.fast.graphed import GraphedLoss, moved_by, unsupported_at
from ia3.fast.ragged import IGNORE_INDEX
from ia3.hooks import SiteVectors
from ia3.rows import Rows, acting
from ia3.sites import Layout, Side, logger
from ia3.state import Adapter

# torch's defaults for AdamW.
_BETAS, _EPS = (0.9, 0.999), 1e-8


class GroupLosses(ABC):
    """The losses of a batch whose examples are divided into equal groups, each with a row of vectors of its own."""

    captured = False
    """Whether a GPU may capture it as a CUDA graph."""

    @abstractmethod
    def prepare(self, batch: Mapping[str, Tensor]) -> tuple[tuple[Hashable, ...], dict[str, Tensor]]:
        """What the losses are computed from: positional arguments that are no tensors, and tensors by name.

        Args:
            batch: tensors `[examples, …]` on the CPU, the examples of one group after those of another, equally many;
                `labels` among them, -100 where nothing is learned. An example without a label is none.
        """

    @abstractmethod
    def __call__(self, table: Tensor, *fixed: Any, **tensors: Tensor) -> Tensor:
        """The mean loss of each group's learned tokens, `[groups]`, 0 for a group without any.

        Args:
            table: a row of vectors a group, `[groups, D]`.
            fixed: from `prepare`.
            tensors: from `prepare`, on the model's device.
        """


class MixedLosses(GroupLosses):
    """By the model's own forward, whose sites take each example's vectors from the table.

    Args:
        model: the model with one adapter attached; its own vectors don't act.
        layout: the adapter's.
        token_losses: runs the model on a batch; gives the loss of each token and which are learned, both
            `[examples, tokens]`.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        token_losses: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
    ) -> None:
        self.layout, self.token_losses = layout, token_losses
        self.containers = {path: module for path, module in model.named_modules() if isinstance(module, SiteVectors)}

    def prepare(self, batch: Mapping[str, Tensor]) -> tuple[tuple[Hashable, ...], dict[str, Tensor]]:
        """The batch as it is: an example without a label must have inputs, since a mask of zeros alone may give NaN."""
        return (), dict(batch)

    def __call__(self, table: Tensor, *fixed: Any, **tensors: Tensor) -> Tensor:
        """See `GroupLosses`."""
        with acting(self.rows(table)):
            losses, learned = self.token_losses(tensors)
        return losses.reshape(len(table), -1).sum(1) / learned.reshape(len(table), -1).sum(1).clamp(min=1)

    def rows(self, table: Tensor) -> Rows:
        """The table's rows, each for an equal share of a batch's examples, in their order."""
        slices: dict[nn.Module, dict[Side, Tensor]] = {container: {} for container in self.containers.values()}
        for site, part in zip(self.layout.sites, self.layout.split(table), strict=True):
            if site.intervals is not None:
                ones = part.new_ones(len(part), site.width)
                part = ones.index_copy(1, site.channels().to(part.device), part)
            slices[self.containers[site.key]][site.side] = part
        return Rows(tuple(f"row {number}" for number in range(len(table))), slices)


class FusedLosses(GroupLosses):
    """The fused ones, over the tokens of all examples without padding.

    Args:
        model: one with a fused loss.
        adapter: its only one, whose own vectors don't act.
        mixed: the same by the model's own forward.
    """

    captured = True

    def __init__(self, model: Any, adapter: Adapter, mixed: MixedLosses) -> None:
        self.model, self.mixed, self.loss = model, mixed, GraphedLoss(model, adapter)

    def prepare(self, batch: Mapping[str, Tensor]) -> tuple[tuple[Hashable, ...], dict[str, Tensor]]:
        """Without padding; on a GPU filled up to one of few shapes."""
        has_label = (batch["labels"] != IGNORE_INDEX).any(1, keepdim=True)
        packed = self.loss.pack({**batch, "attention_mask": batch["attention_mask"] * has_label})
        packed = self.loss.round_up(packed, len(has_label))
        return packed.fixed, dict(packed.tensors)

    def __call__(self, table: Tensor, *fixed: Any, **tensors: Tensor) -> Tensor:
        """See `GroupLosses`."""
        return self.loss.losses(Packed(tensors, *fixed), table)

    def difference(self, batch: Mapping[str, Tensor], vectors: Tensor) -> str | None:
        """In what the loss of a group is not the model's own; None if in nothing.

        Args:
            batch: the group's examples.
            vectors: the group's, `[1, D]`.
        """
        examples = telling_examples(batch["attention_mask"].sum(1), (batch["labels"] != IGNORE_INDEX).any(1))

        def numbers(losses: GroupLosses, chosen: Mapping[str, Tensor], moved: float = 0.0) -> Numbers:
            fixed, tensors = losses.prepare(chosen)
            table = moved_by(vectors.detach(), moved)
            loss = losses(table, *fixed, **{name: tensor.to(table.device) for name, tensor in tensors.items()})[0]
            return loss, torch.autograd.grad(loss, table)[0].flatten()

        def compare(some: Sequence[int]) -> str | None:
            chosen = self.loss.telling_part(batch, some)
            fused, own = partial(numbers, self, chosen), partial(numbers, self.mixed, chosen)
            with self.loss.without_dropout():
                return difference(self.model, fused, own, dtype=self.model.dtype)

        return in_less_memory(compare, examples) if examples else None


def group_losses(
    model: Any, adapter: Adapter, token_losses: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
) -> tuple[GroupLosses, str | None]:
    """The fused losses, or else those by the model's own forward, with the reason.

    Args:
        model: the model with one adapter.
        adapter: it.
        token_losses: as in `MixedLosses`.
    """
    mixed = MixedLosses(model, adapter.layout, token_losses)
    reason = unsupported_at(model, adapter.layout)
    return (mixed, reason) if reason is not None else (FusedLosses(model, adapter, mixed), None)


# What a step changes of the rows.
_MOVING = ("table", "first", "second", "counts")


class SweepStep:
    """A training step of every row of a table at once; see the module.

    The first step compares fused losses with the model's own forward, by the first group that has a label: where they
    differ, the losses are those of the model's own forward from then on, and `reason` says why.

    Args:
        model: the model, on its device.
        losses: of a batch under a table.
        table: where the runs begin, `[R, D]`; copied.
        max_gradient_norms: what each row's gradient is scaled down to, infinite for none.
        weight_decays: how much of its way back to one each row goes a step, times its rate.
    """

    def __init__(
        self,
        model: Any,
        losses: GroupLosses,
        table: Tensor,
        *,
        max_gradient_norms: Sequence[float],
        weight_decays: Sequence[float],
    ) -> None:
        self.model, self.losses = model, losses
        self.reason: str | None = None
        self.compared = False
        self.table = table.detach().clone()
        self.first, self.second = torch.zeros_like(self.table), torch.zeros_like(self.table)
        self.counts = self.table.new_zeros(len(table), 1)
        self.norms = self.table.new_tensor(max_gradient_norms)[:, None]
        self.decays = self.table.new_tensor(weight_decays)[:, None]
        self.recorded = self._recorded()

    @property
    def records(self) -> bool:
        """Whether steps are captured as CUDA graphs and replayed, so that few shapes of batches save time."""
        return self.losses.captured and self.table.is_cuda

    def __call__(self, batch: Mapping[str, Tensor], rates: Sequence[float]) -> Tensor:
        """Losses, gradients, clipping, decay and AdamW; a group without a label keeps its vectors and its moments.

        Where a loss or a gradient is not finite, no row moves: a NaN may have reached its neighbours, whose padding is
        where its numbers are. `diverged` then says whose it is.

        Args:
            batch: as `GroupLosses.prepare` takes it, of R groups.
            rates: each row's learning rate.

        Returns:
            The losses before the update, `[R]`, on the model's device; NaN where it or its gradient is not finite.
        """
        self._compare(batch)
        fixed, tensors = self.losses.prepare(batch)
        has_label = (batch["labels"] != IGNORE_INDEX).view(len(self.table), -1).any(1, keepdim=True)
        tensors["learning"] = has_label.to(self.table.dtype)
        tensors["rates"] = torch.tensor(rates, dtype=self.table.dtype, device="cpu")[:, None]
        step = self.recorded or self._on_device
        losses: Tensor = step(self.model.training, *fixed, **tensors)
        return losses.clone()

    def _compare(self, batch: Mapping[str, Tensor]) -> None:
        """Once, fused losses with those of the model's own forward.

        Raises:
            RuntimeError: the model is another than it was when its losses were fused.
        """
        if not isinstance(self.losses, FusedLosses):
            return
        if not self.losses.loss.guard.is_valid():
            raise RuntimeError(
                "The model was moved, cast, hooked, patched or given other weights in the middle of a sweep: leave it "
                "as it is until the sweep has ended."
            )
        group = self._first_with_a_label(batch)
        if self.compared or group is None:
            return
        size = len(batch["labels"]) // len(self.table)
        part = {name: tensor[group * size : (group + 1) * size] for name, tensor in batch.items()}
        self.reason, self.compared = self.losses.difference(part, self.table[group : group + 1]), True
        if self.reason is not None:
            logger.warning("The sweep's losses are by the model's own forward from now on: %s.", self.reason)
            self.losses = self.losses.mixed
            self.recorded = self._recorded()

    def _first_with_a_label(self, batch: Mapping[str, Tensor]) -> int | None:
        has_label = (batch["labels"] != IGNORE_INDEX).view(len(self.table), -1).any(1).tolist()
        return next((group for group, labelled in enumerate(has_label) if labelled), None)

    def diverged(self, batch: Mapping[str, Tensor]) -> list[int]:
        """The rows whose loss or gradient on their part of a batch is not finite when they are alone."""
        found = []
        size = len(batch["labels"]) // len(self.table)
        for row in range(len(self.table)):
            own = {name: tensor[row * size : (row + 1) * size] for name, tensor in batch.items()}
            fixed, tensors = self.losses.prepare(own)
            tensors = {name: tensor.to(self.table.device) for name, tensor in tensors.items()}
            loss, gradient = self._gradients(self.table[row : row + 1], *fixed, **tensors)
            if not (loss.isfinite().all() and gradient.isfinite().all()):
                found.append(row)
        return found

    def state(self) -> dict[str, Any]:
        """Where the rows stand: vectors, moments and counts, and whether and why not the losses are fused."""
        return {
            "compared": self.compared,
            "reason": self.reason,
            "tensors": {name: getattr(self, name).cpu().clone() for name in _MOVING},
        }

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Take up the rows where `state` was asked, of as many rows as there are here.

        Raises:
            ValueError: they are others.
        """
        for name in _MOVING:
            own, saved = getattr(self, name), state["tensors"].get(name)
            if saved is None or saved.shape != own.shape:
                raise ValueError(f"The saved {name} is not that of {len(own)} rows of {self.table.shape[1]} numbers.")
            own.copy_(saved)
        self.compared, self.reason = state["compared"], state["reason"]
        if self.reason is not None and isinstance(self.losses, FusedLosses):
            self.losses = self.losses.mixed
            self.recorded = self._recorded()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        chosen = torch.tensor(rows, device=self.table.device)
        for name in ("table", "first", "second", "counts", "norms", "decays"):
            setattr(self, name, getattr(self, name)[chosen])
        self.recorded = self._recorded()

    def _recorded(self) -> GraphedCallable | None:
        """The step where it is captured, anew: graphs would go on with the tensors that they were captured with."""
        return GraphedCallable(self._step, self.table.device, warm_up=self._warm_up) if self.records else None

    def _on_device(self, training: bool, *fixed: Any, **tensors: Tensor) -> Tensor:
        return self._step(training, *fixed, **{name: tensor.to(self.table.device) for name, tensor in tensors.items()})

    def _step(self, training: bool, *fixed: Any, rates: Tensor, learning: Tensor, **tensors: Tensor) -> Tensor:
        """The mode is the model's own already; it only tells graphs apart."""
        losses, gradients = self._gradients(self.table, *fixed, **tensors)
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        finite = losses.isfinite() & norms[:, 0].isfinite()
        sound = finite.all()
        gradients, norms = gradients.where(sound, 0.0), norms.where(sound, 0.0)
        self._update(gradients, norms, rates, learning * sound)
        return losses.where(finite, torch.nan)

    def _warm_up(self, training: bool, *fixed: Any, rates: Tensor, learning: Tensor, **tensors: Tensor) -> None:
        self._gradients(self.table, *fixed, **tensors)

    def _gradients(self, table: Tensor, *fixed: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The losses, and the gradient of their sum, in which each row is that of its own loss."""
        leaf = table.detach().requires_grad_()
        losses = self.losses(leaf, *fixed, **tensors)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), gradients

    @torch.no_grad()
    def _update(self, gradients: Tensor, norms: Tensor, rates: Tensor, learning: Tensor) -> None:
        """`clip_grad_norm_`, `decay_vectors` and AdamW without its own decay, a row each.

        Args:
            gradients: `[R, D]`.
            norms: theirs, `[R, 1]`.
            rates: `[R, 1]`.
            learning: 1 for rows that move, 0 for others, `[R, 1]`.
        """
        gradients = gradients * (self.norms / (norms + 1e-6)).clamp(max=1)
        rates = rates * learning
        self.table.add_((1 - self.table) * (rates * self.decays))
        self.counts.add_(learning)
        self.first.lerp_(gradients, (1 - _BETAS[0]) * learning)
        self.second.lerp_(gradients.square(), (1 - _BETAS[1]) * learning)
        # 1 − βᵗ, without the digits that a difference from one would lose.
        first, second = (-torch.expm1(self.counts.clamp(min=1) * math.log(beta)) for beta in _BETAS)
        self.table.addcdiv_(self.first * (-rates / first), (self.second / second).sqrt_() + _EPS)
