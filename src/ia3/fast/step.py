"""One training step, forward to optimizer, over a model whose frozen weights are fused.

On a GPU each shape of batch is captured once as a CUDA graph and replayed; elsewhere the same computation runs as it
is. Where a model or an optimizer is not one that this is right for, or the first batch shows that the model's own
forward computes something else, the step is the ordinary one, with the reason.
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
from ia3.fast.capture import GraphedCallable
from ia3.fast.graphed import GraphedLoss, trained_besides, unsupported_reason
from ia3.fast.linear import Precision, fp8_unsupported_reason
from ia3.sites import VECTORS, logger
from ia3.state import attached, sole_active_adapter


def compile_step(
    model: Any,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    max_gradient_norm: float | None = None,
    weight_decay: float = 0.0,
    recompute: bool = False,
    frozen: Precision | None = None,
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
        and `step.reason` why not the fast one. The first batch is also given to the model's own forward: where its
        loss or gradient is another than the fused one's, the step becomes the ordinary one.

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
    reason = _unsupported_reason(model, optimizer)
    if reason is not None and (recompute or frozen):
        asked, instead = (
            ("recompute", "use gradient_checkpointing_enable()") if recompute else ("frozen", "leave it out")
        )
        raise ValueError(
            f"{asked} is the fast step's, and this takes the ordinary one, since {reason}: {instead} instead."
        )
    if frozen and (without := fp8_unsupported_reason(model)) is not None:
        raise ValueError(f"frozen='fp8' can't be had: {without}.")
    if reason is not None or not isinstance(optimizer, AdamW):
        logger.info("The step: the ordinary one, since %s.", reason)
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


def _unsupported_reason(model: Any, optimizer: Optimizer) -> str | None:
    reason = unsupported_reason(model)
    if reason is not None:
        return reason
    if type(optimizer) is not AdamW:
        return f"it is written for torch's AdamW, and this is {type(optimizer).__name__}"
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
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
    """The step over fused weights, captured on a GPU."""

    def __init__(
        self, model: Any, optimizer: AdamW, scheduler: Any, norm: float | None, decay: float, **how: Any
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.norm, self.decay = model, optimizer, scheduler, norm, decay
        adapter = sole_active_adapter(model)
        assert adapter is not None
        self.adapter = adapter
        self.eager: _Eager | None = None
        self.said: set[str] = set()
        loss = self.loss = GraphedLoss(model, others=trained_besides(model, vectors(model, adapter)), **how)
        flat = torch.zeros(loss.layout.size, dtype=loss.vectors[0].dtype, device=loss.device)
        self.gradients = [flat, *map(torch.zeros_like, loss.others)]
        views = [part.view_as(vector) for part, vector in zip(loss.layout.split(flat), loss.vectors, strict=True)]
        self.places = list(zip((*loss.vectors, *loss.others), (*views, *self.gradients[1:]), strict=True))
        self.computation = GraphedCallable(self._step, loss.device, warm_up=self._backward)
        self.path = "captured" if self.computation.captures else "fused"
        if self.computation.captures:
            _make_capturable(optimizer, loss.device)
        self.settings = _settings(optimizer)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.eager is not None:
            return self.eager(batch)
        try:
            packed = self.loss.pack(batch)
        except ValueError as error:
            if not self.loss.losses.architecture.front:
                raise
            return self._by_own_forward(batch, str(error))
        self._expect_as_it_was()
        reason = self.loss.difference(batch, packed)
        if reason is not None:
            return self._step_aside(reason)(batch)
        for parameter, gradient in self.places:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        (loss,) = self.loss.run(self.computation, packed)
        for parameter, _ in self.places:
            parameter.grad = None
        if self.scheduler is not None:
            self.scheduler.step()
        return loss

    def _by_own_forward(self, batch: Mapping[str, Tensor], reason: str) -> Tensor:
        """A step with a batch that only an encoder's own forward takes, such as one of questions and answers."""
        if reason not in self.said:
            self.said.add(reason)
            logger.info("The step of such a batch: the ordinary one, since %s", reason)
        return self._ordinary(reason)(batch)

    def _ordinary(self, reason: str) -> _Eager:
        return _Eager(self.model, self.optimizer, self.scheduler, self.norm, self.decay, reason)

    def _step_aside(self, reason: str) -> _Eager:
        """The ordinary step from now on; what the fused one held is let go."""
        logger.warning("The step is the ordinary one from now on: %s.", reason)
        self.path, self.reason = "eager", reason
        self.eager = self._ordinary(reason)
        del self.loss, self.computation, self.gradients, self.places
        return self.eager

    def _expect_as_it_was(self) -> None:
        state = attached(self.model)
        if state.active != (self.adapter.name,) or not state.enabled or state.originals is not None:
            raise RuntimeError(
                f"The step was made for the adapter {self.adapter.name!r} acting alone; now {list(state.active)} are "
                "active, disabled or merged: make it again by compile_step."
            )
        if not self.loss.guard.is_valid():
            raise RuntimeError(
                "The model was moved, cast, unloaded, hooked, patched or given other weights or vectors after "
                "compile_step: make the step again."
            )
        if not self.loss.guard.in_one_mode:
            raise RuntimeError(
                "Some dropouts are in training and others in evaluation mode, and the step has one mode for all: call "
                "model.train() or model.eval(), or train with the model's own forward."
            )
        if self.computation.captures and _settings(self.optimizer) != self.settings:
            raise RuntimeError(
                "The optimizer's rates, moments or other settings were replaced after compile_step, and a graph goes "
                "on with the old ones: change a rate in place (group['lr'].fill_(…)), or make the step again."
            )

    def _step(self, *fixed: Any, **tensors: Tensor) -> tuple[Tensor]:
        found = self._backward(*fixed, **tensors)
        if self.norm is not None:
            norms = [gradient.norm() for gradient in self.gradients]
            whole = norms[0] if len(norms) == 1 else torch.stack([norm.float() for norm in norms]).norm()
            for gradient in self.gradients:
                gradient.mul_((self.norm / (whole + 1e-6)).clamp(max=1.0))
        if self.decay:
            _decay(self.loss.vectors, self.optimizer, self.decay)
        self.optimizer.step()
        return found

    def _backward(self, *fixed: Any, **tensors: Tensor) -> tuple[Tensor]:
        """The loss of a batch; its gradients are left where the optimizer reads them."""
        loss, _, *gradients = self.loss.compute(*fixed, **tensors)
        for place, gradient in zip(self.gradients, gradients, strict=True):
            place.copy_(gradient)
        return (loss,)


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
