"""The models whose loss is written by hand, and why a model is none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ia3.adapter import vectors
from ia3.fast import llama, packing, t5
from ia3.fast.bypassing import NOT_ALONE
from ia3.sites import Layout
from ia3.state import sole_active_adapter


@dataclass(frozen=True)
class Family:
    """Models whose loss is written by hand.

    Args:
        classes: the names of the classes of transformers.
        why_not: why a model with an adapter at these sites is none of them, after all.
        loss: of a model and a layout; it takes a packed batch and a table of vectors.
        packed: the packed batch's class.
        pack: makes one from a batch.
        round_up: to one of few shapes, for a number of examples and a filler's token.
        output_class: the name of what the models' own forward returns.
        takes_items: whether the models' own forward divides its loss by `num_items_in_batch`.
    """

    classes: tuple[str, ...]
    why_not: Callable[..., str | None]
    loss: Callable[..., Any]
    packed: Callable[..., Any]
    pack: Callable[..., Any]
    round_up: Callable[..., Any]
    output_class: str
    takes_items: bool

    def output(self) -> type[Any]:
        """The class of what the models' own forward returns."""
        from transformers import modeling_outputs

        kind: type[Any] = getattr(modeling_outputs, self.output_class)
        return kind


_T5 = Family(
    classes=t5.CLASSES,
    why_not=t5.why_not,
    loss=t5.T5Loss,
    packed=packing.Packed,
    pack=packing.pack,
    round_up=packing.round_up,
    output_class="Seq2SeqLMOutput",
    takes_items=False,
)
_LLAMA = Family(
    classes=llama.CLASSES,
    why_not=llama.why_not,
    loss=llama.LlamaLoss,
    packed=llama.PackedTexts,
    pack=llama.pack,
    round_up=llama.round_up,
    output_class="CausalLMOutputWithPast",
    takes_items=True,
)
_FAMILIES = {"t5": _T5, "mt5": _T5, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA}


def family_of(model: Any) -> Family | None:
    return _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def may_be_by_hand(cls: type[Any]) -> bool:
    """Whether a class has the name of one whose loss is written by hand, or derives from such a one."""
    names = {base.__name__ for base in cls.__mro__}
    return any(names & set(family.classes) for family in (_T5, _LLAMA))


def why_not(model: Any) -> str | None:
    """Why the loss of a model in training can't be computed by hand; None where it can.

    Args:
        model: one with adapters.
    """
    adapter = sole_active_adapter(model)
    if adapter is None:
        return NOT_ALONE
    family = family_of(model)
    if family is None:
        return f"it is written for {', '.join(_FAMILIES)}, and this is a {type(model).__name__}"
    reason = family.why_not(model, adapter.layout.sites)
    if reason is not None:
        return reason
    own = {id(vector) for vector in vectors(model, adapter)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (id(parameter) in own):
            return f"{name} is {'trained' if parameter.requires_grad else 'not trained'}"
    return None


def is_shifted(model: Any, decoder_input_ids: Tensor, labels: Tensor) -> bool:
    """Whether a decoder's inputs are those that the labels make, moved by one."""
    return torch.equal(decoder_input_ids, model._shift_right(labels.to(decoder_input_ids.device)))


def loss_and_gradient(
    by_hand: Callable[..., Tensor], family: Family, layout: Layout, held: Sequence[Tensor], longest: int, uniform: bool,
    **tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of a packed batch, its gradient `[D]`, and the vectors `[D]` that it was computed with.

    Args:
        by_hand: the family's loss of a model.
        family: the model's.
        layout: the adapter's.
        held: its vectors, one a site.
        longest: the packed batch's, as `uniform`.
        uniform: see `Spans`.
        tensors: the packed batch's.
    """
    flat = layout.flatten([vector.detach() for vector in held]).requires_grad_()
    losses = by_hand(family.packed(**tensors, longest=longest, uniform=uniform), flat[None])
    (gradient,) = torch.autograd.grad(losses.sum(), flat)
    return losses[0].detach(), gradient, flat.detach()
