"""The forward of an adapted model in training: its loss by hand, and the rest of its output when that is read.

A training loop calls the model, takes the loss and goes backward. So the loss and its gradient are computed as in
`compile_step`: without padding, over weights laid out anew, on a GPU recorded. Logits and the like are computed by the
model's own forward when somebody reads them, with dropout as another draw. Who reads them reads them again, so the call
after such a reading goes through the model's own forward from the beginning.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from ia3.adapter import vectors
from ia3.fast import families
from ia3.fast.bypassing import OLD_CLASS, own_forward
from ia3.fast.capture import Captured, Standing
from ia3.fast.families import family_of, is_shifted, loss_and_gradient
from ia3.fast.packing import IGNORED
from ia3.listening import LISTENS, listen
from ia3.rows import act_here
from ia3.sites import Layout, logger
from ia3.state import sole_active_adapter

_STATE = "_ia3_loss_by_hand"


def with_loss_by_hand(old: type[nn.Module]) -> Callable[..., Any]:
    """A class's forward behind another that computes the loss by hand where it can."""

    @wraps(old.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = None if args else _output(self, kwargs)
        if output is None:
            listen(self)
            return old.forward(self, *args, **kwargs)
        return output

    setattr(forward, OLD_CLASS, old)
    setattr(forward, LISTENS, True)
    return forward


def forget(model: nn.Module) -> None:
    """Let go of what a model keeps for its loss by hand, the weights laid out anew among it."""
    model.__dict__.pop(_STATE, None)


def _output(model: Any, kwargs: Mapping[str, Any]) -> Any:
    """The output with its loss by hand; None where the model's own forward must run."""
    if not (model.training and torch.is_grad_enabled()) or kwargs.get("labels") is None:
        return None
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    # A replica of DataParallel shares its original's attributes, and has no parameters.
    hooked = _has_any_global_hook()  # type: ignore[no-untyped-call]
    if traced or hooked or act_here() or getattr(model, "_is_replica", False):
        return None
    # torch.func's tensors can't be asked where they are.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    device = model.device.type
    if torch.is_autocast_enabled(device) or (device == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    batch = _batch_of(model, kwargs)
    if batch is None:
        return None
    state: _State = model.__dict__.setdefault(_STATE, _State())
    loss = state.loss_for(model)
    if loss is None:
        return None
    if state.was_read:
        state.was_read = False
        return _watched(own_forward(type(model))(model, **kwargs), state)
    try:
        packed = loss.family.pack(batch)
    except ValueError as error:  # a batch that only the model's own forward takes
        logger.debug("The model's own forward: %s", error)
        return None
    count = int((packed.labels != IGNORED).sum())
    if not count:
        return None
    found, flat = loss(packed)
    items = kwargs.get("num_items_in_batch")
    if items is not None and loss.family.takes_items:
        found = found * count / items
    output = loss.family.output()(loss=found)
    return _unread(output, _Rest(model, state, loss, kwargs, flat))


def _batch_of(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The inputs and labels of a call that asks for no more than its loss; None for others."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    ids, labels = given.pop("input_ids", None), given.pop("labels")
    if not (isinstance(ids, Tensor) and ids.dim() == labels.dim() == 2):
        return None
    mask = given.pop("attention_mask", None)
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape or mask.is_floating_point():
        return None
    config = model.config
    if given.pop("return_dict", config.return_dict) is not True:
        return None
    if config.output_attentions or config.output_hidden_states:
        return None
    for beside in ("use_cache", "num_items_in_batch"):  # of the rest of the output, and of the loss afterwards
        given.pop(beside, None)
    shifted = given.pop("decoder_input_ids", None) if config.is_encoder_decoder else None
    if given or (shifted is not None and not is_shifted(model, shifted, labels)):
        return None
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _State:
    """What a model keeps of its loss by hand; a copy of the model begins anew.

    Attributes:
        loss: None where the model's own forward is the right one.
        standing: how the model stood when that was found.
        was_read: whether more than the loss of the last output was read.
    """

    def __init__(self) -> None:
        self.loss: _Loss | None = None
        self.standing: Standing | None = None
        self.was_read = False

    def __deepcopy__(self, memo: Any) -> _State:
        return _State()

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()

    def loss_for(self, model: Any) -> _Loss | None:
        """The loss by hand; None where the model as it is now has none."""
        if self.standing is None or not self.standing.holds():
            # Those of torch.func and of sharded or quantised models are others.
            if any(type(parameter) is not Parameter for parameter in model.parameters()):
                return None
            reason = families.why_not(model)
            self.loss = None if reason else _Loss(model)
            self.standing = Standing(model, self.loss.by_hand.baked if self.loss else ())
            logger.info("The loss in training: %s", f"the model's own forward, since {reason}" if reason else "by hand")
        return self.loss if self.standing.in_one_mode else None


class _Loss:
    """The loss and its gradient.

    Args:
        model: one for which `families.why_not` has nothing to say; it is not kept alive.
    """

    def __init__(self, model: Any) -> None:
        adapter, family = sole_active_adapter(model), family_of(model)
        assert adapter is not None
        assert family is not None
        self.model: Any = weakref.proxy(model)
        self.family = family
        self.layout, self.vectors = adapter.layout, vectors(model, adapter)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(vector)] for vector in self.vectors]
        self.by_hand = family.loss(self.model, self.layout)
        # Not a method, which would keep this alive in a circle until garbage is collected.
        compute = partial(_in_a_mode, partial(loss_and_gradient, self.by_hand, family, self.layout, self.vectors))
        self.computation = Captured(compute, model.device, rehearsal=compute)
        self.examples = 0
        self.lock = threading.Lock()

    def __call__(self, packed: Any) -> tuple[Tensor, Tensor]:
        """The loss, from which backward reaches the vectors, and the vectors that it was computed with, `[D]`."""
        with self.lock:  # a graph has one place for its inputs
            if self.computation.records:
                self.examples = max(self.examples, len(packed.starts) - 1)
                packed = self.family.round_up(packed, self.examples, self.model.config.pad_token_id or 0)
            fixed = (self.model.training, packed.longest, packed.uniform)
            loss, gradient, flat = (each.clone() for each in self.computation(*fixed, **packed.tensors))
        found: Tensor = _WithGradient.apply(loss, gradient, self.layout, *self.vectors)  # type: ignore[no-untyped-call]
        return found, flat

    def own_output(self, model: Any, kwargs: Mapping[str, Any], flat: Tensor) -> Any:
        """The model's own output, with vectors `[D]` that may have changed since."""
        if torch.equal(self.layout.flatten([vector.detach() for vector in self.vectors]), flat):
            return own_forward(type(model))(model, **kwargs)
        slices = self.layout.split(flat)
        views = [part.view(vector.shape) for part, vector in zip(slices, self.vectors, strict=True)]
        return torch.func.functional_call(model, dict(zip(self.names, views, strict=True)), (), dict(kwargs))


def _in_a_mode(compute: Callable[..., Any], training: bool, *fixed: Any, **tensors: Tensor) -> Any:
    """The mode is the model's own already; it only tells graphs apart."""
    return compute(*fixed, **tensors)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: Tensor, layout: Layout, *vectors: Tensor) -> Tensor:
        ctx.layout, ctx.shapes = layout, [vector.shape for vector in vectors]
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph asks for a second derivative, which the loss by hand has not: pass input_ids by "
                "position, model(input_ids, …), and the model's own forward computes it."
            )
        (gradient,) = ctx.saved_tensors
        slices = ctx.layout.split(gradient * grad)
        return None, None, None, *(part.view(shape) for part, shape in zip(slices, ctx.shapes, strict=True))


class _Rest:
    """What an output has besides its loss, computed for the call that made it, whenever it is read.

    Args:
        model: the model.
        state: its own, which takes note of the reading.
        loss: what computed the loss.
        kwargs: the call's.
        flat: the vectors that the loss was computed with, `[D]`.
    """

    def __init__(self, model: Any, state: _State, loss: _Loss, kwargs: Mapping[str, Any], flat: Tensor) -> None:
        self.model, self.state, self.loss, self.kwargs, self.flat = model, state, loss, kwargs, flat
        self.versions = [value._version for value in kwargs.values() if isinstance(value, Tensor)]

    def __call__(self) -> Mapping[str, Any]:
        """The model's own output.

        Raises:
            RuntimeError: the model or the inputs are others than when it was called.
        """
        self.state.was_read = True
        versions = [value._version for value in self.kwargs.values() if isinstance(value, Tensor)]
        if versions != self.versions or self.state.loss is not self.loss or not self._stands():
            raise RuntimeError(
                "What an output has besides its loss is computed when it is read, and since this model was called, it "
                "or its inputs were changed: read logits before, or call the model again."
            )
        device = self.model.device
        unmoved = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), _training(self.model), unmoved:
            found: Mapping[str, Any] = self.loss.own_output(self.model, self.kwargs, self.flat)
        return found

    def _stands(self) -> bool:
        return self.state.standing is not None and self.state.standing.holds()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """In training mode, as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


_READERS = (
    "__eq__", "__iter__", "__len__", "__or__", "__reduce__", "__repr__", "__reversed__", "__ror__", "__setitem__",
    "copy", "items", "keys", "move_to_end", "popitem", "to_tuple", "values",
)  # fmt: skip


def _unread(output: Any, rest: Callable[[], Mapping[str, Any]]) -> Any:
    """The output, whose loss is there already, and whose rest comes when it is read."""
    output.__dict__["_rest"] = rest
    output.__class__ = _unread_class(type(output))  # type: ignore[arg-type]
    return output


def _watched(output: Any, state: _State) -> Any:
    """A whole output, of which is noted whether more than its loss is read."""

    def rest() -> Mapping[str, Any]:
        state.was_read = True
        return whole

    whole = dict(output.items())
    return _unread(type(output)(loss=output.loss), rest)


@cache
def _unread_class(kind: type[Any]) -> type[Any]:
    """A subclass of an output's class; its instance becomes one of that class when more than the loss is asked for."""

    def read(output: Any) -> Any:
        rest = output.__dict__["_rest"]()
        del output.__dict__["_rest"]
        output.__class__ = kind
        for name, value in rest.items():
            if name != "loss":
                output[name] = value
        return output

    def field(name: str) -> property:
        return property(
            lambda output: getattr(read(output), name),
            lambda output, value: setattr(read(output), name, value),
        )

    def method(name: str) -> Callable[..., Any]:
        return lambda output, *args, **kwargs: getattr(read(output), name)(*args, **kwargs)

    def get_item(output: Any, key: Any) -> Any:
        return output.loss if key in ("loss", 0) else read(output)[key]

    def get(output: Any, key: Any, default: Any = None) -> Any:
        return output.loss if key == "loss" else read(output).get(key, default)

    members: dict[str, Any] = {name: method(name) for name in _READERS}
    members |= {each.name: field(each.name) for each in fields(kind) if each.name != "loss"}
    members |= {"__getitem__": get_item, "get": get, "__module__": kind.__module__}
    members["__contains__"] = lambda output, key: key == "loss" or key in read(output)
    members["__bool__"] = lambda output: True
    # Whoever makes another of the same class makes one of that class itself.
    members["__new__"] = lambda cls, *args, **kwargs: kind(*args, **kwargs)
    return type(kind.__name__, (kind,), members)
