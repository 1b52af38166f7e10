"""The models that have a fused loss; `graphed` alone asks here, and `output` for what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ia3.fast import llama, packing, t5


@dataclass(frozen=True)
class Family:
    """Models with a fused loss.

    Args:
        classes: the names of the classes of transformers.
        why_not: why a model with an adapter at these sites is none of them, after all.
        loss: of a model and a layout; it takes a packed batch and a table of vectors.
        packed: the packed batch's class.
        pack: makes one from a batch.
        round_up: to one of few shapes, for a number of examples and a filler's token.
        output_class: the name of what the models' own forward returns.
        takes_items: whether the models' own forward divides its loss by `num_items_in_batch`.
        trains_others: whether the loss has gradients of trained parameters that are no vectors.
    """

    classes: tuple[str, ...]
    why_not: Callable[..., str | None]
    loss: Callable[..., Any]
    packed: Callable[..., Any]
    pack: Callable[..., Any]
    round_up: Callable[..., Any]
    output_class: str
    takes_items: bool
    trains_others: bool = False

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
NAMES = tuple(_FAMILIES)


def family_of(model: Any) -> Family | None:
    return _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def has_fused_loss(cls: type[Any]) -> bool:
    """Whether a class has the name of one with a fused loss, or derives from such a one."""
    names = {base.__name__ for base in cls.__mro__}
    return any(names & set(family.classes) for family in _FAMILIES.values())
