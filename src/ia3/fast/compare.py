"""A fused loss beside the model's own forward, on the same few examples: the numbers must be the same to rounding.

Whatever makes a model compute something else than its fused loss does, a patched function or a module from elsewhere,
shows here without anybody having thought of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ia3.fast.draws import DrawsApart
from ia3.fast.guard import dropout_rates
from ia3.fast.ragged import IGNORE_INDEX
from ia3.sites import logger

Numbers = tuple[Tensor, Tensor]
"""A loss, a scalar, and its gradient, `[anything]`."""

# How far honest losses, and honest gradients by their norms, may be from each other. Measured on models of 6 to 24
# layers were 1e-7 and 8e-7 in float64 (transformers computes norms, rotations and causal losses in fp32), 2e-7 and 2e-6
# in float32 (more where products are allowed TF32), 1e-7 and 5e-3 in float16, 4e-3 and 4e-2 in bfloat16.
_TOLERANCES = {
    torch.float64: (1e-5, 1e-4),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (1e-2, 5e-2),
    torch.bfloat16: (3e-2, 1e-1),
}
_IN_TF32 = (1e-3, 1e-2)
# Eight bits are other numbers, with an error of 2⁻⁵ each: only what is plainly another loss shows beside them.
_IN_FP8 = (1e-1, 5e-1)
# Vectors that are moved by one rounding moved the model's own numbers 1 to 8 times as far as those. So where rounding
# alone makes much of a difference, a few times what it makes is rounding too, up to a limit.
_ROUNDINGS, _MOST = 4.0, 0.5
# Tokens of all examples that are compared, and the least of each. A model's own forward keeps some 300 KiB a token and
# layer of an 8B, which wait on the host: two texts of 4,096 tokens took two minutes.
_TOKENS, _LEAST = 1_024, 256
# Of two that put rates back, the second would put back the first one's zeros.
_one_at_a_time = threading.Lock()


def difference(
    model: nn.Module,
    fused: Callable[[], Numbers],
    own: Callable[[float], Numbers],
    *,
    dtype: torch.dtype,
    fp8: bool = False,
    saying: str = "its loss differs from the model's own forward by {0:.1e} (gradient {1:.1e})",
) -> str | None:
    """In what the numbers differ by more than rounding; None where they don't, or where the model has none itself.

    The random state, modes, rates of dropout and gradients are as they were afterwards; a forward of the same model in
    another thread meanwhile would have no dropout.

    Args:
        model: the model, without whose dropouts its own forward is called.
        fused: the numbers of the fused loss, without dropout.
        own: those of the model's own forward, with vectors that are moved this much of their length up and down.
        dtype: the precision of the model's activations.
        fp8: whether the fused loss multiplies in eight bits.
        saying: what is returned where they differ, with the parts by which losses and gradients do.

    Raises:
        torch.OutOfMemoryError: there is not enough for one of them.
    """
    limits = list(_IN_FP8 if fp8 else _TOLERANCES[dtype])
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        limits = list(_IN_TF32)
    with _one_at_a_time, DrawsApart(), _without_dropout(model):
        try:
            expected = _in_few_bytes(own)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # which whoever calls the model shall see
            return f"its own forward fails ({type(error).__name__}: {error})"
        if not expected[0].isfinite() or not expected[1].isfinite().all():
            return None  # there is nothing to be equal to
        found = fused()
        apart = _apart(found, expected)
        if all(one <= limit for one, limit in zip(apart, limits, strict=True)):
            return None
        moved = _apart(_in_few_bytes(own, torch.finfo(dtype).eps), expected)
    limits = [max(limit, min(_ROUNDINGS * one, _MOST)) for limit, one in zip(limits, moved, strict=True)]
    if all(one <= limit for one, limit in zip(apart, limits, strict=True)):
        return None
    return saying.format(*apart)


def _apart(found: Numbers, expected: Numbers) -> tuple[float, float]:
    """How far losses and gradients are from each other, in parts of the expected ones; infinite where not finite."""
    (loss, gradient), (own_loss, own_gradient) = (
        [each.detach().double() for each in numbers] for numbers in (found, expected)
    )
    tiny = torch.finfo(torch.float32).tiny
    numbers = (
        (loss - own_loss).abs() / own_loss.abs().clamp(min=tiny),
        (gradient - own_gradient).norm() / own_gradient.norm().clamp(min=tiny),
    )
    first, second = (float(each.nan_to_num(nan=torch.inf)) for each in numbers)
    return first, second


def _in_few_bytes(own: Callable[[float], Numbers], moved: float = 0.0) -> Numbers:
    """The model's own numbers; what its backward needs waits on the host, so that memory has no higher peak for it."""

    def is_weight(tensor: Tensor) -> bool:
        base = tensor if tensor._base is None else tensor._base
        return isinstance(base, nn.Parameter)

    def put_away(tensor: Tensor) -> Any:
        # On its way a mask would lose strides that a kernel is particular about.
        stays = is_weight(tensor) or not tensor.is_cuda or not tensor.is_contiguous()
        return tensor if stays else (tensor.device, tensor.cpu())

    def fetch(held: Any) -> Tensor:
        found: Tensor = held if isinstance(held, Tensor) else held[1].to(held[0])
        return found

    with torch.autograd.graph.saved_tensors_hooks(put_away, fetch):
        loss, gradient = own(moved)
    return loss.detach(), gradient.detach()


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """With rates of 0, in the modes that the modules are in."""
    rates = [(module, name, getattr(module, name)) for module in model.modules() for name in dropout_rates(module)]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


def telling_examples(lengths: Tensor, learned: Tensor) -> list[int]:
    """A few examples with labels that show a batch's kind: the first ones, the longest and the shortest.

    Args:
        lengths: how many tokens each has, `[examples]`.
        learned: whether each has a label, `[examples]`.
    """
    found: list[int] = learned.nonzero().flatten().tolist()
    if not found:
        return []
    by_length = sorted(found, key=lambda example: int(lengths[example]))
    return sorted({*found[:2], by_length[0], by_length[-1]})


def beginnings(
    batch: Mapping[str, Tensor], *, tokens: int | None = None, window: int | None = None
) -> dict[str, Tensor]:
    """A few examples, long ones cut, where each keeps a label and the batch its kind, with padding or without.

    Args:
        batch: `attention_mask` and `labels`, and others beside them, `[examples, …]`.
        tokens: about so many are left of all examples together; None for as many as tell.
        window: how far a token sees, where that is a part of the text; what is left is longer.
    """
    mask = batch["attention_mask"]
    most = max(_LEAST, (tokens or _TOKENS) // len(mask))
    if window is not None and window < mask.shape[1]:
        most = max(most, window + _LEAST)
    cut = {name: each[:, :most] if _has_columns(each, mask) else each for name, each in batch.items()}
    labels = cut["labels"]
    # What a causal model is asked for first stands in the second place.
    learns = labels is batch["labels"] or bool((labels[:, 1:] != IGNORE_INDEX).any(1).all())
    stays = bool(mask.all()) == bool(cut["attention_mask"].all())
    return cut if learns and stays else dict(batch)


def _has_columns(tensor: Tensor, mask: Tensor) -> bool:
    """Whether something of each token, and not of each class of a head."""
    return tensor.shape == mask.shape and not tensor.is_floating_point()


def surprising(labels: Tensor, classes: int) -> Tensor:
    """Others in the place of whole labels, so that what is compared is large, however sure a model is of its own.

    Of a label of which it is sure, loss and gradient are small differences of large numbers: in bfloat16 those of a
    trained adapter's own labels differ by half of themselves.

    Args:
        labels: `[examples, …]`; what is -100 stays.
        classes: how many there are.
    """
    if labels.is_floating_point():
        return labels
    return torch.where(labels == IGNORE_INDEX, labels, (labels + 1) % classes)


def in_less_memory(compare: Callable[[Sequence[int]], str | None], examples: Sequence[int]) -> str | None:
    """What a comparison of some examples says; of fewer, where memory doesn't suffice.

    Args:
        compare: of examples.
        examples: at least one.
    """
    count = len(examples)
    while count:
        try:
            return compare(examples[-count:])
        except torch.OutOfMemoryError:
            count //= 2
    logger.warning("The fused loss was not compared with the model's own forward, for which memory doesn't suffice.")
    return None
