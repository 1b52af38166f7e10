"""The forward of an adapted model in training: its fused loss, and the rest of its output when that is read.

A training loop calls the model, takes the loss and goes backward. So the loss and its gradient are computed as in
`compile_step`: without padding, over fused weights, on a GPU captured. Logits and the like are computed by the
model's own forward when somebody reads them, with dropout as another draw. Who reads them reads them again, so the call
after such a reading goes through the model's own forward from the beginning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, wraps
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ia3.adapter import vectors
from ia3.fast import fused
from ia3.fast.batch import Packed
from ia3.fast.capture import GraphedCallable
from ia3.fast.draws import DrawsApart
from ia3.fast.graphed import Cuts, GraphedLoss, trained_besides, unsupported_reason
from ia3.fast.guard import OLD_CLASS, Guard, own_forward, version_of
from ia3.fast.ragged import IGNORE_INDEX
from ia3.fast.surroundings import SayOnce, unusual_call
from ia3.listening import LISTENS, listen
from ia3.sites import logger
from ia3.state import sole_active_adapter

_STATE = "_ia3_fused_loss"
# Of a batch: who computed it, how many labels it has, and what `GraphedLoss.graphed` leaves.
_Made = tuple[GraphedLoss, int, tuple[Tensor, ...]]


def with_fused_loss(old: type[nn.Module]) -> Callable[..., Any]:
    """A class's forward behind another that computes the fused loss where it can."""

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
    """Let go of what a model keeps for its fused loss, the fused weights among it."""
    model.__dict__.pop(_STATE, None)


def _output(model: Any, kwargs: Mapping[str, Any]) -> Any:
    """The output with its fused loss; None where the model's own forward must run."""
    if not (model.training and torch.is_grad_enabled()) or kwargs.get("labels") is None:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None  # where nothing may be noted
    state: _State = model.__dict__.setdefault(_STATE, _State())
    batch, kind = _batch_of(model, kwargs), _output_class(own_forward(type(model)))
    reason = unusual_call(model) or (batch if isinstance(batch, str) else None)
    if reason is not None or kind is None or isinstance(batch, str):
        state.say(reason or "its forward doesn't say what it returns")
        return None
    made = state.replay(batch)
    if made is None:
        loss = state.loss_for(model)
        if loss is None:
            return None
        if state.was_read:
            state.was_read = False
            state.say("more than the loss was read of the last output")
            return _watched(own_forward(type(model))(model, **kwargs), state)
        made = state.compute(batch)
        if made is None:
            return None
    loss, count, (found, flat, *gradients) = made
    found = _WithGradient.apply(found, gradients, state.vectors, *loss.others)  # type: ignore[no-untyped-call]
    items = kwargs.get("num_items_in_batch")
    if items is not None and loss.losses.architecture.mode == "causal":
        found = found * count / items
    return _unread(kind(loss=found), _Rest(model, state, loss, kwargs, flat))


def _batch_of(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor] | str:
    """The inputs and labels of a call that asks for no more than its loss; why it is another."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    ids, labels = given.pop("input_ids", None), given.pop("labels")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return "it has no input_ids [batch, length]"
    batch = {"input_ids": ids, "labels": labels}
    if "token_type_ids" in given:
        batch["token_type_ids"] = given.pop("token_type_ids")
    mask = given.pop("attention_mask", None)
    if mask is not None:
        if mask.shape != ids.shape or mask.is_floating_point():
            return "its attention_mask is not one of whole numbers, [batch, length]"
        batch["attention_mask"] = mask
    config = model.config
    if given.pop("return_dict", config.return_dict) is not True:
        return "it asks for a tuple"
    if config.output_attentions or config.output_hidden_states:
        return "it asks for attentions or hidden states"
    if "num_items_in_batch" in given and fused.front_of(model) and _divides_by_items(own_forward(type(model))):
        return "its own head divides the loss by num_items_in_batch"
    for beside in ("use_cache", "num_items_in_batch"):  # of the rest of the output, and of the loss afterwards
        given.pop(beside, None)
    if config.is_encoder_decoder and "decoder_input_ids" in given:
        batch["decoder_input_ids"] = given.pop("decoder_input_ids")
    return f"it is given {', '.join(sorted(given))}" if given else batch


@cache
def _divides_by_items(forward: Callable[..., Any]) -> bool:
    """Whether a model's own forward leaves its loss to `loss_function`, which alone heeds the number of items."""
    return "loss_function" in inspect.unwrap(forward).__code__.co_names


@cache
def _output_class(forward: Callable[..., Any]) -> type[Any] | None:
    """The class of what a model's own forward returns, which its signature names; None where it doesn't."""
    from transformers.utils import ModelOutput

    hint = get_type_hints(inspect.unwrap(forward)).get("return")
    kinds = (hint, *get_args(hint))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelOutput)), None)


class _State:
    """What a model keeps of its fused loss; a copy of the model begins anew.

    Attributes:
        loss: None where the model's own forward is the right one.
        computation: it and its gradients, captured.
        vectors: see `_Vectors`.
        guard: whether what was found of the model is still so.
        was_read: whether more than the loss of the last output was read.
        say: why calls like this one go through the model's own forward.
    """

    def __init__(self) -> None:
        self.loss: GraphedLoss | None = None
        self.computation: GraphedCallable | None = None
        self.vectors: Tensor | None = None
        self.guard: Guard | None = None
        self.was_read = False
        self.say = SayOnce("The loss of a call in training: the model's own forward")

    def __deepcopy__(self, memo: Any) -> _State:
        return _State()

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()

    def loss_for(self, model: Any) -> GraphedLoss | None:
        """The fused loss; None where the model as it is now has none."""
        if self.guard is None or not self.guard.is_valid():
            # Those of torch.func and of sharded or quantised models are others.
            if any(type(parameter) is not Parameter for parameter in model.parameters()):
                return None
            reason, self.loss, self.computation, self.vectors = unsupported_reason(model), None, None, None
            if reason is None:
                adapter = sole_active_adapter(model)
                assert adapter is not None
                self.loss = GraphedLoss(model, others=trained_besides(model, vectors(model, adapter)))
                self.computation = self.loss.graphed()
                self.vectors = _Vectors.apply(self.loss.cuts, *self.loss.vectors)  # type: ignore[no-untyped-call]
            self.guard = Guard(model) if self.loss is None else self.loss.guard
            logger.info("The loss in training: %s", f"the model's own forward, since {reason}" if reason else "fused")
        return self.loss if self.guard.in_one_mode else None

    def replay(self, batch: Mapping[str, Tensor]) -> _Made | None:
        """What a recorded graph makes of a batch, of a model that is looked at while a GPU is at it.

        The GPU would wait for a look that came first, which takes as long as a sixth of its step.

        Returns:
            None where the look comes first, or what it would have said is that the model is another.
        """
        loss, computation, guard = self.loss, self.computation, self.guard
        if loss is None or computation is None or guard is None or self.was_read or not computation.graphs:
            return None
        packed = self._packed(loss, batch)
        found = None if packed is None else loss.replay(computation, packed)
        if packed is None or found is None or not (guard.is_as_it_was() and guard.in_one_mode):
            return None
        return loss, _label_count(packed), found

    def compute(self, batch: Mapping[str, Tensor]) -> _Made | None:
        """The same of a model that was looked at; None where the model's own forward must run."""
        loss, computation = self.loss, self.computation
        assert loss is not None
        assert computation is not None
        packed = self._packed(loss, batch)
        if packed is None or self.steps_aside(loss.difference(batch, packed)):
            return None
        return loss, _label_count(packed), loss.run(computation, packed)

    def _packed(self, loss: GraphedLoss, batch: Mapping[str, Tensor]) -> Packed | None:
        """None for a batch that only the model's own forward takes, or one without labels."""
        try:
            packed = loss.pack(batch)
        except ValueError as error:
            self.say(str(error))
            return None
        return packed if _label_count(packed) else None

    def steps_aside(self, reason: str | None) -> bool:
        """Whether the model's own forward is the right one, which it then is until the model changes."""
        if reason is not None:
            logger.warning("The loss in training is the model's own forward's from now on: %s.", reason)
            self.loss = self.computation = self.vectors = None
        return reason is not None


def _label_count(packed: Packed) -> int:
    return int(torch.count_nonzero(packed["labels"] != IGNORE_INDEX))  # which may be bfloat16, and NumPy has none


class _Vectors(torch.autograd.Function):
    """All vectors as one tensor `[D]`, for its gradient alone: a part of the graph that all losses lead to.

    It is made once. Hundreds of vectors as inputs of each loss took longer than all else of that loss's graph.
    """

    @staticmethod
    def forward(ctx: Any, cuts: Cuts, *vectors: Parameter) -> Tensor:
        ctx.cuts = cuts
        return vectors[0].new_zeros(()).expand(sum(cuts.sizes))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.cuts.apart(grad)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are known already: that of `_Vectors`, and those of other parameters."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *trained: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph asks for a second derivative, which the fused loss has not: pass input_ids by "
                "position, model(input_ids, …), and the model's own forward computes it."
            )
        return None, None, *(gradient * grad for gradient in ctx.saved_tensors)


class _Rest:
    """What an output has besides its loss, computed for the call that made it, whenever it is read.

    Args:
        model: the model.
        state: its own, which takes note of the reading.
        loss: what computed the loss.
        kwargs: the call's.
        flat: the vectors that the loss was computed with, `[D]`.
    """

    def __init__(self, model: Any, state: _State, loss: GraphedLoss, kwargs: Mapping[str, Any], flat: Tensor) -> None:
        self.model, self.state, self.loss, self.kwargs, self.flat = model, state, loss, kwargs, flat
        self.versions = self._versions()

    def __call__(self) -> Mapping[str, Any]:
        """The model's own output.

        Raises:
            RuntimeError: the model or the inputs are others than when it was called.
        """
        self.state.was_read = True
        if self._versions() != self.versions or self.state.loss is not self.loss or not self.loss.guard.is_valid():
            raise RuntimeError(
                "What an output has besides its loss is computed when it is read, and since this model was called, it "
                "or its inputs were changed: read logits before, or call the model again."
            )
        without_autocast = torch.autocast(self.model.device.type, enabled=False)
        with torch.enable_grad(), without_autocast, _training(self.model), DrawsApart():
            found: Mapping[str, Any] = self._own_output()
        return found

    def _versions(self) -> list[int]:
        """Of what has changed where one of these has; vectors may change, since theirs were kept."""
        read = [value for value in self.kwargs.values() if isinstance(value, Tensor)]
        return [version_of(tensor) for tensor in (*read, *self.loss.others)]

    def _own_output(self) -> Any:
        """With the vectors of the call, which may have changed since."""
        loss, kwargs = self.loss, dict(self.kwargs)
        if torch.equal(loss.layout.flatten([vector.detach() for vector in loss.vectors]), self.flat):
            return own_forward(type(self.model))(self.model, **kwargs)
        slices = loss.layout.split(self.flat)
        views = [part.view(vector.shape) for part, vector in zip(slices, loss.vectors, strict=True)]
        named = dict(zip(loss.names, views, strict=False))  # the others' names come behind
        return torch.func.functional_call(self.model, named, (), kwargs)


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
