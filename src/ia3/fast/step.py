"""One training step, forward to optimizer, over a model whose frozen weights are fused.

On a GPU each shape of batch is captured once as a CUDA graph and replayed; elsewhere the same computation runs as it
is. Where a model or an optimizer is not one that this is right for, or the first batch shows that the model's own
forward computes something else, the step is the ordinary one, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle

from ia3.adapter import vectors
from ia3.fast.batch import Packed
from ia3.fast.capture import GraphedCallable
from ia3.fast.graphed import GraphedLoss, trained_besides, unsupported_reason
from ia3.fast.linear import Precision, fp8_unsupported_reason
from ia3.fast.surroundings import SayOnce, unusual_call
from ia3.sites import VECTORS, logger
from ia3.state import attached, find_attached, sole_active_adapter


def compile_step(
    model: Any,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    max_gradient_norm: float | None = None,
    weight_decay: float = 0.0,
    recompute: bool = False,
    frozen: Precision | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
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
        reduce: where several processes each take a part of every batch: gives the sum over all of them of a flat
            tensor, as accelerate's `Accelerator.reduce`. Each process then calls the step the same number of times, and
            the update is that of the whole batch.

    Returns:
        The step: `loss = step(batch)` with a tensor that need not be looked at; `step.path` says which way it goes
        and `step.reason` why not the fast one. The first batch is also given to the model's own forward: where its
        loss or gradient is another than the fused one's, the step becomes the ordinary one. With `reduce` it is
        `step(batch, weight)`.

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
    in_group = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if in_group and reduce is None:
        logger.warning("compile_step without `reduce`: each of the processes trains an adapter of its own.")
    reason = _unsupported_reason(model, optimizer) or _unrecordable(model.device, scheduler)
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
        return _Eager(model, optimizer, scheduler, max_gradient_norm, weight_decay, reduce, reason)
    how = {"recompute": recompute, "frozen": frozen}
    return _Fast(model, optimizer, scheduler, max_gradient_norm, weight_decay, reduce, **how)


class Step:
    """A training step; `compile_step` makes it."""

    path: str
    reason: str | None = None

    def __call__(self, batch: Mapping[str, Tensor], weight: float | Tensor = 1.0) -> Tensor:
        """Forward, backward, clipping, optimizer, scheduler.

        Args:
            batch: what the model's forward takes, labels among it, best on the CPU.
            weight: where several processes add up their gradients, this batch's part of all targets.

        Returns:
            The loss before the update, of all processes, a scalar on the model's device.

        Raises:
            ValueError: a weight other than 1 without `reduce`.
        """
        raise NotImplementedError


def sum_gradients(
    parameters: Sequence[Parameter], loss: Tensor, reduce: Callable[[Tensor], Tensor], weight: float | Tensor = 1.0
) -> Tensor:
    """Put the sum over all processes into the gradients, by one transfer of all of them.

    Args:
        parameters: the same in the same order in every process. A gradient that no process has stays None.
        loss: of this process's batch, a scalar.
        reduce: see `compile_step`.
        weight: what this process's loss and gradients count.

    Returns:
        The sum of the losses.
    """
    has = [parameter.grad is not None for parameter in parameters]
    own = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in own), loss.detach().reshape(1)]) * weight
    flat = reduce(torch.cat([flat, flat.new_ones(len(has)) if all(has) else flat.new_tensor(has)]))
    *sums, total, owners = torch.split(flat, [*(each.numel() for each in parameters), 1, len(has)])
    # Only a process that lacks a gradient has to look whether another has it, for which a GPU's host waits.
    held = has if all(has) else [count > 0 for count in owners.tolist()]
    for parameter, found, is_held in zip(parameters, sums, held, strict=True):
        if parameter.grad is not None:
            parameter.grad.copy_(found.view_as(parameter))
        elif is_held:
            parameter.grad = found.view_as(parameter).to(parameter.dtype)
    return total.view(())


def _check_weight(weight: float | Tensor, reduce: Callable[[Tensor], Tensor] | None) -> None:
    if reduce is None and (isinstance(weight, Tensor) or weight != 1.0):
        raise ValueError(
            f"The step is given the weight {weight}, which is a batch's part of those of several processes: pass "
            "`reduce` to compile_step, or leave it out."
        )


def _unsupported_reason(model: Any, optimizer: Optimizer) -> str | None:
    reason = _wrapped(model) or unsupported_reason(model)
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
    return _hooked([parameter for parameter in model.parameters() if parameter.requires_grad], optimizer)


def _wrapped(model: Any) -> str | None:
    """That the model stands inside of another module, as in that of torch.compile or DDP; None where it doesn't."""
    if find_attached(model) is not None:
        return None
    inside = next((each for each in model.modules() if find_attached(each) is not None), None)
    if inside is None:
        return None
    return f"a {type(model).__name__} stands around the {type(inside).__name__}: pass the model itself"


def _unrecordable(device: torch.device, scheduler: Any) -> str | None:
    """Why a graph can't follow a scheduler, or one of those it is made of; None where it can, or there is no graph."""
    if device.type != "cuda":
        return None
    if getattr(scheduler, "cycle_momentum", False):
        name = type(scheduler).__name__
        return (
            f"{name} changes AdamW's betas at each step, and a recorded step has the first: pass cycle_momentum=False"
        )
    inner = getattr(scheduler, "_schedulers", ())
    return next((reason for each in inner if (reason := _unrecordable(device, each))), None)


def _hooked(parameters: Sequence[Parameter], optimizer: Optimizer) -> str | None:
    """Which hooks are called by autograd or the optimizer alone; None where there are none."""
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        return "a vector carries a hook, which autograd calls"
    of_one = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any((*of_one, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)):
        return "the optimizer carries a hook, which a recorded step would call once"
    return None


class _Eager(Step):
    """The ordinary step."""

    path = "eager"

    def __init__(
        self, model: Any, optimizer: Optimizer, scheduler: Any, norm: float | None, decay: float, reduce: Any,
        reason: str | None,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.scheduler, self.norm, self.decay = model, optimizer, scheduler, norm, decay
        self.reduce, self.reason = reduce, reason

    def __call__(self, batch: Mapping[str, Tensor], weight: float | Tensor = 1.0) -> Tensor:
        _check_weight(weight, self.reduce)
        device = self.model.device
        loss: Tensor = self.model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()  # type: ignore[no-untyped-call]
        trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        if self.reduce is not None:
            loss = sum_gradients(list(trained.values()), loss, self.reduce, weight)
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
        self, model: Any, optimizer: AdamW, scheduler: Any, norm: float | None, decay: float, reduce: Any, **how: Any
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.norm, self.decay = model, optimizer, scheduler, norm, decay
        self.reduce = reduce
        adapter = sole_active_adapter(model)
        assert adapter is not None
        self.adapter = adapter
        self.eager: _Eager | None = None
        self.say = SayOnce("A step like this: the ordinary one")
        loss = self.loss = GraphedLoss(model, others=trained_besides(model, vectors(model, adapter)), **how)
        flat = torch.zeros(loss.layout.size, dtype=loss.vectors[0].dtype, device=loss.device)
        self.gradients = [flat, *map(torch.zeros_like, loss.others)]
        views = [part.view_as(vector) for part, vector in zip(loss.layout.split(flat), loss.vectors, strict=True)]
        self.places = list(zip((*loss.vectors, *loss.others), (*views, *self.gradients[1:]), strict=True))
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Between two graphs the processes add up their gradients: each records its own shapes, when they come.
        whole = self._step if reduce is None else self._backward
        self.computation = GraphedCallable(whole, loss.device, warm_up=self._backward)
        self.update = GraphedCallable(self._update, loss.device)
        self.path = "captured" if self.computation.captures else "fused"
        if self.computation.captures:
            _make_capturable(optimizer, loss.device)
        self.settings, self.handles = _settings(optimizer), RemovableHandle.next_id

    def __call__(self, batch: Mapping[str, Tensor], weight: float | Tensor = 1.0) -> Tensor:
        if self.eager is not None:
            return self.eager(batch, weight)
        _check_weight(weight, self.reduce)
        self._expect_as_it_was()
        reason = unusual_call(self.model) or self._gradients_before()
        if reason is not None:
            return self._by_own_forward(batch, weight, reason)
        try:
            packed = self.loss.pack(batch)
        except ValueError as error:
            if not self.loss.losses.architecture.front:
                raise
            return self._by_own_forward(batch, weight, str(error))
        reason = self.loss.difference(batch, packed)
        if reason is not None:
            return self._step_aside(reason)(batch, weight)
        loss = self._by_fused_loss(packed, weight)
        if self.scheduler is not None:
            self.scheduler.step()
        return loss

    def _by_fused_loss(self, packed: Packed, weight: float | Tensor) -> Tensor:
        """The loss, whose gradients are in their places for the update alone."""
        for parameter, gradient in self.places:
            parameter.grad = gradient
        try:
            (loss,) = self.loss.run(self.computation, packed)
            if self.reduce is not None:
                loss = sum_gradients(self.trained, loss, self.reduce, weight)
                self.update()
        finally:  # else the next step would take them for somebody's
            for parameter, _ in self.places:
                parameter.grad = None
        return loss

    def _gradients_before(self) -> str | None:
        """That somebody's gradients are there, to which the ordinary step adds its own; None where there are none."""
        if all(parameter.grad is None for parameter in self.trained):
            return None
        return "there are gradients from before, to which it adds its own"

    def _by_own_forward(self, batch: Mapping[str, Tensor], weight: float | Tensor, reason: str) -> Tensor:
        """A step that only the model's own forward takes, such as an encoder's of questions and answers."""
        self.say(reason)
        return self._ordinary(reason)(batch, weight)

    def _ordinary(self, reason: str) -> _Eager:
        return _Eager(self.model, self.optimizer, self.scheduler, self.norm, self.decay, self.reduce, reason)

    def _step_aside(self, reason: str) -> _Eager:
        """The ordinary step from now on; what the fused one held is let go."""
        logger.warning("The step is the ordinary one from now on: %s.", reason)
        self.path, self.reason = "eager", reason
        self.eager = self._ordinary(reason)
        del self.loss, self.computation, self.update, self.gradients, self.places
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
        if self._has_new_hooks():
            raise RuntimeError(
                "A hook was registered at the optimizer or at a vector after compile_step, and the step would not call "
                "it: make the step again, which is the ordinary one then."
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

    def _has_new_hooks(self) -> bool:
        """Whether there are hooks that the step doesn't call; looked at where any hook was registered since."""
        if self.handles != RemovableHandle.next_id:
            if _hooked(self.trained, self.optimizer) is not None:
                return True
            self.handles = RemovableHandle.next_id
        return False

    def _step(self, *fixed: Any, **tensors: Tensor) -> tuple[Tensor]:
        found = self._backward(*fixed, **tensors)
        self._update()
        return found

    def _update(self) -> tuple[()]:
        """Clip, decay and step, from the gradients in their places."""
        if self.norm is not None:
            norms = [gradient.norm() for gradient in self.gradients]
            whole = norms[0] if len(norms) == 1 else torch.stack([norm.float() for norm in norms]).norm()
            for gradient in self.gradients:
                gradient.mul_((self.norm / (whole + 1e-6)).clamp(max=1.0))
        if self.decay:
            _decay(self.loss.vectors, self.optimizer, self.decay)
        self.optimizer.step()
        return ()

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
        # Those of one parameter stand for all of its group; a split by decay may leave a group without any.
        states = [optimizer.state[parameter] for parameter in group["params"][:1]]
        moments = [
            state[name].data_ptr() for state in states for name in sorted(state) if isinstance(state[name], Tensor)
        ]
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
