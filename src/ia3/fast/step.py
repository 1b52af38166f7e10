"""One training step, forward to optimizer, over a model whose frozen weights are laid out anew.

On a GPU each shape of batch is captured once as a CUDA graph and replayed; elsewhere the same computation runs as it
is. Where a model or an optimizer is not one that this is right for, the step is the ordinary one, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ia3.adapter import vectors
from ia3.fast import families
from ia3.fast.capture import Captured, Standing
from ia3.fast.families import family_of, is_shifted, loss_and_gradient
from ia3.fast.products import Frozen, why_not_fp8
from ia3.sites import VECTORS
from ia3.state import attached, sole_active_adapter


def compile_step(
    model: Any,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    max_gradient_norm: float | None = None,
    weight_decay: float = 0.0,
    recompute: bool = False,
    frozen: Frozen | None = None,
) -> Step:
    """Make a function that does a whole training step of a model with one active adapter.

    Args:
        model: the model with its adapter, on its device.
        optimizer: over the adapter's vectors. On a GPU its state moves there and its rate becomes a tensor.
        scheduler: stepped after each step.
        max_gradient_norm: scale a gradient of a larger norm down to this.
        weight_decay: how much of its way back to one a vector goes a step, times the rate.
        recompute: keep of each layer the residual stream alone, and compute its inside again in the backward: less
            memory, about a third more time.
        frozen: `"fp8"` multiplies the layers' frozen weights in eight bits, which large batches gain by on a GPU that
            has it: other numbers, within rounding, for two more bytes of memory a weight.

    Returns:
        The step: `loss = step(batch)` with a tensor that need not be looked at; `step.path` says which way it goes
        and `step.reason` why not the fast one.

    Raises:
        ValueError: recompute or frozen for a model that takes the ordinary step, recompute for one with attention
            dropout, fp8 for a GPU without it, a model that isn't bfloat16 there, or widths that are no multiples of 16.

    Example:
        >>> step = ia3.compile_step(model, optimizer, scheduler)
        >>> for batch in loader:
        ...     loss = step(batch)
    """
    if frozen not in (None, "fp8"):
        raise ValueError(f"frozen is {frozen!r}: expected 'fp8', or None for the model's own precision.")
    reason = _why_not(model, optimizer)
    if reason is not None and (recompute or frozen):
        asked, instead = (
            ("recompute", "use gradient_checkpointing_enable()") if recompute else ("frozen", "leave it out")
        )
        raise ValueError(
            f"{asked} is the fast step's, and this takes the ordinary one, since {reason}: {instead} instead."
        )
    if frozen and (without := why_not_fp8(model)) is not None:
        raise ValueError(f"frozen='fp8' can't be had: {without}.")
    if reason is not None or not isinstance(optimizer, AdamW):
        return _Eager(model, optimizer, scheduler, max_gradient_norm, weight_decay, reason)
    return _Fast(model, optimizer, scheduler, max_gradient_norm, weight_decay, recompute=recompute, frozen=frozen)


class Step:
    """A training step; `compile_step` makes it."""

    path: str
    reason: str | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forward, backward, clipping, optimizer, scheduler.

        Args:
            batch: what the model's forward takes, labels among it, best on the CPU.

        Returns:
            The loss before the update, a scalar on the model's device.
        """
        raise NotImplementedError


def _why_not(model: Any, optimizer: Optimizer) -> str | None:
    reason = families.why_not(model)
    if reason is not None:
        return reason
    if type(optimizer) is not AdamW:
        return f"it is written for torch's AdamW, and this is {type(optimizer).__name__}"
    trained = {id(vector) for vector in model.parameters() if vector.requires_grad}
    groups = optimizer.param_groups
    if {id(p) for group in groups for p in group["params"]} != trained:
        return "the optimizer's parameters are not the adapter's vectors"
    if any(group["amsgrad"] or group["maximize"] for group in groups):
        return "it is written for plain AdamW, without amsgrad or maximize"
    return None


class _Eager(Step):
    """The ordinary step."""

    path = "eager"

    def __init__(
        self, model: Any, optimizer: Optimizer, scheduler: Any, norm: float | None, decay: float, reason: str | None
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.norm, self.decay = model, optimizer, scheduler, norm, decay
        self.reason = reason

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        device = self.model.device
        loss: Tensor = self.model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()  # type: ignore[no-untyped-call]
        trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        if self.norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), self.norm)
        if self.decay:
            _decay([each for name, each in trained.items() if f".{VECTORS}." in name], self.optimizer, self.decay)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()


class _Fast(Step):
    """The step over weights laid out anew, captured on a GPU."""

    def __init__(
        self, model: Any, optimizer: AdamW, scheduler: Any, norm: float | None, decay: float, **how: Any
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.norm, self.decay = model, optimizer, scheduler, norm, decay
        adapter, family = sole_active_adapter(model), family_of(model)
        assert adapter is not None
        assert family is not None
        self.adapter, self.layout, self.vectors = adapter, adapter.layout, vectors(model, adapter)
        self.family, self.loss_of = family, family.loss(model, self.layout, **how)
        self.gradient = torch.zeros(self.layout.size, dtype=self.vectors[0].dtype, device=model.device)
        slices = self.layout.split(self.gradient)
        self.views = [view.view_as(vector) for view, vector in zip(slices, self.vectors, strict=True)]
        self.computation = Captured(self._step, model.device, rehearsal=self._backward)
        self.path = "captured" if self.computation.records else "laid out"
        self.examples = 0
        if self.computation.records:
            _make_capturable(optimizer, model.device)
        self.standing = Standing(model, self.loss_of.baked)
        self.settings = _settings(optimizer)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        packed = self.family.pack(self._checked(batch))
        self._expect_as_it_was()
        self._point_gradients()
        if self.computation.records:
            self.examples = max(self.examples, len(packed.starts) - 1)
            packed = self.family.round_up(packed, self.examples, self.model.config.pad_token_id or 0)
        fixed = (self.model.training, packed.longest, packed.uniform)
        loss: Tensor = self.computation(*fixed, **packed.tensors)
        for vector in self.vectors:
            vector.grad = None
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.clone()

    def _checked(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With a mask, and without a decoder's inputs, which must be those that the labels make."""
        batch = dict(batch)
        if "input_ids" in batch:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        given = batch.pop("decoder_input_ids", None)
        if given is not None and not is_shifted(self.model, given, batch["labels"]):
            raise ValueError(
                "The batch's decoder_input_ids are not its labels moved by one, which this step takes: leave them "
                "out, or train with the model's own forward."
            )
        return batch

    def _expect_as_it_was(self) -> None:
        state = attached(self.model)
        if state.active != (self.adapter.name,) or not state.enabled or state.originals is not None:
            raise RuntimeError(
                f"The step was made for the adapter {self.adapter.name!r} acting alone; now {list(state.active)} are "
                "active, disabled or merged: make it again by compile_step."
            )
        if not self.standing.holds():
            raise RuntimeError(
                "The model was moved, cast, unloaded, hooked or given other weights or vectors after compile_step: "
                "make the step again."
            )
        if not self.standing.in_one_mode:
            raise RuntimeError(
                "Some dropouts are in training and others in evaluation mode, and the step has one mode for all: call "
                "model.train() or model.eval(), or train with the model's own forward."
            )
        if self.computation.records and _settings(self.optimizer) != self.settings:
            raise RuntimeError(
                "The optimizer's rates, moments or other settings were replaced after compile_step, and a graph goes "
                "on with the old ones: change a rate in place (group['lr'].fill_(…)), or make the step again."
            )

    def _point_gradients(self) -> None:
        """Each vector's gradient is a view of the one flat gradient."""
        for vector, view in zip(self.vectors, self.views, strict=True):
            if vector.grad is not view:
                vector.grad = view

    def _step(self, training: bool, longest: int, uniform: bool, **tensors: Tensor) -> Tensor:
        loss = self._backward(training, longest, uniform, **tensors)
        if self.norm is not None:
            self.gradient.mul_((self.norm / (self.gradient.norm() + 1e-6)).clamp(max=1.0))
        if self.decay:
            _decay(self.vectors, self.optimizer, self.decay)
        self.optimizer.step()
        return loss

    def _backward(self, training: bool, longest: int, uniform: bool, **tensors: Tensor) -> Tensor:
        """The loss of a batch; its gradient is left in the flat one. The mode is the model's own already."""
        loss, gradient, _ = loss_and_gradient(
            self.loss_of, self.family, self.layout, self.vectors, longest, uniform, **tensors
        )
        self.gradient.copy_(gradient)
        return loss


def _decay(vectors: Sequence[Parameter], optimizer: Optimizer, decay: float) -> None:
    """Each vector some of its way back to one, at its own group's rate."""
    wanted = {id(vector) for vector in vectors}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for vector in group["params"]:
                if id(vector) in wanted:
                    vector.add_((1 - vector) * (group["lr"] * decay))


def _settings(optimizer: Optimizer) -> list[Any]:
    """What a graph was recorded with: the settings by value, rates and moments by where they are."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        plain = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        state = optimizer.state[group["params"][0]]
        moments = [state[name].data_ptr() for name in sorted(state) if isinstance(state[name], Tensor)]
        rate = group["lr"]
        found.append((plain, rate.data_ptr() if isinstance(rate, Tensor) else rate, moments))
    return found


def _make_capturable(optimizer: AdamW, device: torch.device) -> None:
    """Let a graph read the rate, and let the state live on the GPU from the beginning."""
    for group in optimizer.param_groups:
        group["capturable"], group["fused"], group["foreach"] = True, True, False
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)
