"""What layers take and answer: the one tensor that a vector multiplies, and layers in which none could act or learn.

Most layers take a tensor and answer with one. Others are called by keyword, answer with a tuple, fold their channels
into several dimensions, or choose (an expert, a token) without a gradient. What a vector would mean there is decided
here, when an adapter is attached, by what the layer is and by one call of a copy of it.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

# Forwards that take a tensor, answer with one of their channels and are linear in their weight.
_PLAIN = (
    *(nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NoSingleTensorError(TypeError):
    """A layer's arguments or its answer hold no tensor that is the only one."""


def find_tensor(values: Mapping[Any, Any]) -> Any:
    """The key of the only tensor among a call's values; the others may be None, flags or numbers.

    Raises:
        NoSingleTensorError: there is none, or more than one.
    """
    keys = [key for key, value in values.items() if isinstance(value, Tensor)]
    if len(keys) != 1:
        kinds = ", ".join(type(value).__name__ for value in values.values()) or "nothing"
        raise NoSingleTensorError(f"{len(keys)} tensors ({kinds}), of which a vector can't choose one")
    return keys[0]


def take_tensor(answer: Any) -> tuple[Tensor, Any]:
    """The tensor of a layer's answer, and its place: None for the answer itself, else an index of a tuple.

    Raises:
        NoSingleTensorError: the answer is no tensor and no tuple or list with exactly one.
    """
    if isinstance(answer, Tensor):
        return answer, None
    if type(answer) not in (tuple, list):
        raise NoSingleTensorError(f"a {type(answer).__name__}, in which a vector finds no tensor")
    place = find_tensor(dict(enumerate(answer)))
    return answer[place], place


def put_tensor(answer: Any, place: Any, tensor: Tensor) -> Any:
    """The answer with another tensor in its place."""
    if place is None:
        return tensor
    return type(answer)(tensor if index == place else part for index, part in enumerate(answer))


def channel_dims(shape: Sequence[int], width: int, *, spatial: int = 0) -> tuple[int, ...]:
    """The dimensions that hold an activation's channels: the last, or several that a grouped layer folds them into.

    Args:
        shape: the activation's, `[…, width]`, `[…, groups, width / groups]` or, of a convolution, `[…, width, …]`.
        width: the vector's.
        spatial: how many dimensions follow the channels.

    Returns:
        The sizes of these dimensions, whose product is the width.

    Raises:
        NoSingleTensorError: no dimensions in that place hold so many channels.
    """
    whole = tuple(shape)[: len(shape) - spatial]
    if whole and whole[-1] == width:
        return whole[-1:]
    size = 1
    for count in range(1, len(whole)):  # what is folded leaves a dimension for the tokens
        size *= whole[-count]
        if size == width:
            return whole[-count:]
    raise NoSingleTensorError(f"the shape {tuple(shape)}, in which no {width} channels stand where they should")


def check_numbers(activation: Tensor) -> None:
    """Refuse an activation of integers.

    Raises:
        TypeError: it is not of floating-point or complex numbers.
    """
    if not (activation.is_floating_point() or activation.is_complex()):
        raise TypeError(
            f"ia3 multiplies floating-point activations; this layer's is {activation.dtype}. Load the model so that "
            "its activations stay floating"
        )


def refusal(module: nn.Module, side: str, widths: tuple[int | None, int]) -> str | None:
    """Why a layer can't carry a vector at this side, in words that follow its path; None where it can.

    Args:
        module: a layer with channels.
        side: "input" or "output".
        widths: its channels.
    """
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return (
            f"is a {type(module).__name__} that has no weights yet, so its channels aren't known: call the model once "
            "on a batch before you attach an adapter"
        )
    if side == "input" or is_plain(module):
        return None
    answer = _answer(module, widths)
    if answer is None:
        return None
    try:
        tensor, _ = take_tensor(answer)
        spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
        channel_dims(tensor.shape, widths[1], spatial=spatial)
    except NoSingleTensorError as error:
        return (
            f"is a {type(module).__name__} that answers with {error}: leave it to exclude_modules, or name it in "
            "feedforward_modules to multiply its input"
        )
    return None


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer with a transposed weight, recognised without importing transformers."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf")


def is_plain(module: nn.Module) -> bool:
    """Whether a layer's forward is torch's own, linear in its weight."""
    forward = getattr(type(module), "_ia3_old_class", type(module)).forward
    return any(isinstance(module, kind) and forward is kind.forward for kind in _PLAIN)


@torch.no_grad()
def _answer(module: nn.Module, widths: tuple[int | None, int]) -> Any:
    """What a copy of a layer of floating-point weights answers; None where it can't be asked."""
    parameters = list(module.parameters())
    tried = copy.copy(module)
    tried._forward_hooks, tried._forward_pre_hooks = OrderedDict(), OrderedDict()
    tried._buffers, tried.training, tried._compiled_call_impl = dict(module._buffers), False, None
    plain = all(type(parameter) is nn.Parameter and parameter.dtype in _FLOATING for parameter in parameters)
    if not parameters or not plain or "forward" in vars(module):
        return None  # quantised, sharded or offloaded: its own forward says what it can't do
    kernel = tuple(4 * size for size in getattr(module, "kernel_size", ()))
    for shape in ((1, 2), (2,)):  # one example of two tokens, or two tokens
        try:
            if widths[0] is None:
                return tried(torch.zeros(shape, dtype=torch.long, device=parameters[0].device))
            return tried(parameters[0].new_zeros((*shape[:1], widths[0], *kernel) if kernel else (*shape, widths[0])))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a foreign layer raises, it may be called otherwise
            continue
    return None


def why_nothing_learns(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Why a vector at a path gets no gradient, in words that follow the path; None where it may.

    Sparse attention chooses tokens by an indexer, whose answer are places: no gradient comes back through it.
    """
    for around in paths_around(path):
        kind = type(modules[around]) if around in modules else nn.Module
        without = _runs_without_gradients(kind)
        if without or kind.__name__.endswith("Indexer"):
            how = "computes without gradients" if without else "chooses places, through which no gradient comes back"
            name = around.rpartition(".")[2]
            return (
                f"is inside {around}, a {kind.__name__}, which {how}: a vector there would never learn. Leave it out "
                rf"by exclude_modules, for example r'(.*\.)?{re.escape(name)}\..*'"
            )
    return None


def paths_around(path: str) -> Iterator[str]:
    """The paths of the modules around one, from the nearest to the outermost."""
    parts = path.split(".")
    yield from (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))


def is_inside(path: str, parent: str) -> bool:
    """Whether a module is another or in it."""
    return path == parent or path.startswith(f"{parent}.")


def _runs_without_gradients(cls: type[nn.Module]) -> bool:
    """Whether a class's forward is decorated by `torch.no_grad` or `torch.inference_mode`."""
    forward: Any = cls.forward
    while hasattr(forward, "__wrapped__"):
        names = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        factory = names["ctx_factory"].cell_contents if "ctx_factory" in names else None
        if factory is not None and isinstance(factory(), torch.no_grad | torch.inference_mode):
            return True
        forward = forward.__wrapped__
    return False
