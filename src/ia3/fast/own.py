"""A model's own forward around the block: its embeddings and its head, with one module's call answered for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ia3.fast.guard import own_forward

# Of a packed batch, what the model's own forward doesn't take.
_OURS = ("cu_seqlens", "token_at", "slot_of")


class Answered:
    """A module as its own forward sees it, with some of its children replaced; the module itself stays as it is.

    Another thread may call the module meanwhile, and nothing of it need be put back.
    """

    def __init__(self, module: nn.Module, children: Mapping[str, Any], forward: Callable[..., Any]) -> None:
        self._module, self._children, self._forward = module, children, forward

    def __getattr__(self, name: str) -> Any:
        children = self.__dict__["_children"]
        return children[name] if name in children else getattr(self.__dict__["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def answered(model: nn.Module, path: str, answer: Callable[[Tensor], Tensor]) -> Any:
    """A model whose module at a path answers with something else.

    Args:
        model: the model.
        path: the module's.
        answer: from its first argument `[batch, length, width]` to what it returns, the same shape.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=answer(hidden_states))

    name, _, rest = path.partition(".")
    child: Any = answered(model.get_submodule(name), rest, answer) if rest else call
    # Of a weak proxy the model's class; without what transformers wraps around its forward, which asks for a module.
    return Answered(model, {name: child}, inspect.unwrap(own_forward(model.__class__)))


def own_loss(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """The loss of a model's own forward over what of a packed batch it takes; without a mask, which the block has."""
    loss: Tensor = model(**{name: tensor for name, tensor in tensors.items() if name not in _OURS}).loss
    return loss


class Gather(torch.autograd.Function):
    """Rows by an index, whose backward gathers by the way back, where autograd would add atomically.

    What the way back doesn't come from gets no gradient: padded places on the way to tokens, padding tokens on the way
    to places.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        came = there[back] == torch.arange(len(back), device=grad.device)
        return grad.index_select(0, back).masked_fill(~came[:, None], 0), None, None
