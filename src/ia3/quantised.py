"""Layers that hold their weight in few bits: what holds it, folding a scale of its channels in, and its backward.

A weight in few bits is integers and scales. A factor for each output goes into scales that stand for outputs, and the
integers stay; a factor for each input can't, and the weight is rounded anew. A format is told by what a layer carries,
so none of the packages is imported before its own layers are there, and a fold is believed because the layer answers
by it, not because a name says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Parts = dict[str, Tensor]
"""What a layer computes with: plain tensors by name, written in place."""

# A GPU's products of integers take more than 16 rows.
_ROWS = 32
# So far from its vector's a layer's answer may be, in parts of it, to have taken the vector: bf16 rounds that much.
_NEAR = 1 / 32


class Held:
    """What holds a layer's weight; this one can be read and is rounded by nobody.

    Args:
        module: the layer, with `in_features` and `out_features`.
        name: the format's, in words.
    """

    # Parts that are multiplied where a row of the weight is: the first names that the layer answers by are right.
    multiplied: tuple[tuple[str, ...], ...] = ()

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name

    def parts(self) -> Parts:
        """The tensors that the layer computes with, its bias among them."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The weight, `[out, in]` in fp32."""
        raise NotImplementedError

    def rounded(self, values: Tensor) -> Parts:
        """The parts that hold another weight as nearly as the format can.

        Raises:
            NotImplementedError: nobody can tell.
        """
        raise NotImplementedError

    def _with_bias(self, parts: Parts) -> Parts:
        bias = getattr(self.module, "bias", None)
        return {**parts, "bias": bias} if isinstance(bias, Tensor) else parts


class _EightBit(Held):
    """bitsandbytes' Linear8bitLt: a scale a row, in `weight` until the first forward moves it to `state`."""

    multiplied = (("SCB",),)

    def parts(self) -> Parts:
        state, weight = self.module.state, self.module.weight
        scales = weight.SCB if state.SCB is None else state.SCB
        return self._with_bias({"weight": weight.data if state.CB is None else state.CB, "SCB": scales})

    def values(self) -> Tensor:
        parts = self.parts()
        return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127)

    def rounded(self, values: Tensor) -> Parts:
        largest = values.abs().amax(1)
        steps = torch.where(largest > 0, largest, 1)[:, None] / 127
        return {"weight": (values / steps).round().to(torch.int8), "SCB": largest}


class _FourBit(Held):
    """bitsandbytes' Linear4bit, nf4 or fp4: a scale a block of neighbours in a row."""

    multiplied = (("absmax",),)

    def parts(self) -> Parts:
        state = self._unpacked().quant_state
        parts = {"weight": self.module.weight.data, "absmax": state.absmax}
        if state.nested:
            parts |= {"nested absmax": state.state2.absmax, "offset": state.offset}
        return self._with_bias(parts)

    def _unpacked(self) -> Any:
        """The weight, out of the form that this CPU's kernel reads: it is undone where the layer is saved."""
        if getattr(self.module.weight.quant_state, "packing_format_for_cpu", False):
            self.module.state_dict()
        return self.module.weight

    def values(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = self._unpacked()
        values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return values.float()

    def rounded(self, values: Tensor) -> Parts:
        from bitsandbytes.functional import quantize_4bit

        old = self._unpacked().quant_state
        data, new = quantize_4bit(
            values.to(old.dtype),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=self.module.weight.dtype,
        )
        parts = {"weight": data, "absmax": new.absmax}
        return parts | ({"nested absmax": new.state2.absmax, "offset": new.offset} if old.nested else {})


class _OfTensors(Held):
    """A weight that is a tensor of a class of its own, made of others: torchao's and quanto's."""

    def __init__(self, module: Any, name: str) -> None:
        super().__init__(module, name)
        floating = [key for key, part in self.parts().items() if part.is_floating_point() and part.dtype.itemsize > 1]
        own = [key for key in floating if not key.startswith(("act", "bias"))]
        scales = tuple(key for key in own if "scale" in key)
        # A shift in floats is added to what was scaled, or subtracted from what will be.
        shifts = tuple(key for key in own if "shift" in key or "zero" in key)
        self.multiplied = ((*scales, *shifts), scales) if shifts else (scales,)

    def parts(self) -> Parts:
        return self._with_bias(dict(_plain_tensors(self.module.weight)))

    def values(self) -> Tensor:
        weight: Any = self.module.weight
        return weight.dequantize().float()  # type: ignore[no-any-return]

    def rounded(self, values: Tensor) -> Parts:
        weight = self.module.weight
        if hasattr(type(self.module), "qweight"):  # quanto's modules quantise what they hold
            tried = copy(self.module)
            tried._parameters = {**self.module._parameters, "weight": nn.Parameter(values.to(weight.dtype), False)}
            return dict(_plain_tensors(tried.qweight))
        parts = self.parts()
        if not {"qdata", "scale"} <= {*parts} or parts["qdata"].shape != values.shape:
            raise NotImplementedError
        zero = parts.get("zero_point")
        if zero is not None and zero.any():
            raise NotImplementedError
        return _on_grid(values, "qdata", parts["qdata"], "scale", parts["scale"], getattr(weight, "target_dtype", None))


class _HalfQuadratic(Held):
    """HQQ's HQQLinear: (integer - zero) · scale, a pair a group."""

    multiplied = (("scale",),)

    def parts(self) -> Parts:
        meta = self.module.meta
        return self._with_bias({"W_q": self.module.W_q.data, "scale": meta["scale"], "zero": meta["zero"]})

    def values(self) -> Tensor:
        return self.module.dequantize().float()  # type: ignore[no-any-return]

    def rounded(self, values: Tensor) -> Parts:
        from hqq.core.quantize import Quantizer

        how, meta = self.module.quant_config["weight_quant_params"], self.module.meta
        data, new = Quantizer.quantize(
            values.to(meta["compute_dtype"]),
            **how,
            device=str(values.device),
            compute_dtype=meta["compute_dtype"],
        )
        return {"W_q": data.data, "scale": new["scale"].to(meta["scale"]), "zero": new["zero"].to(meta["zero"])}


class _WithScales(Held):
    """A layer whose scales are tensors of its own: GPTQ, AWQ, EETQ, compressed-tensors, transformers' fp8."""

    names = ("weight_scale", "weight_scales", "scales", "weight_scale_inv")

    def __init__(self, module: Any, name: str) -> None:
        super().__init__(module, name)
        self.multiplied = tuple((each,) for each in self.names if isinstance(getattr(module, each, None), Tensor))

    def parts(self) -> Parts:
        own = {**self.module._parameters, **self.module._buffers}
        return {key: part.data for key, part in own.items() if part is not None}

    def values(self) -> Tensor:
        (name,), weight = self.multiplied[0], self._integers()
        return weight.float() * _over_blocks(getattr(self.module, name).float(), weight)

    def rounded(self, values: Tensor) -> Parts:
        ((name,), weight) = self.multiplied[0], self._integers()
        return _on_grid(values, "weight", weight, name, getattr(self.module, name))

    def _integers(self) -> Tensor:
        weight: Tensor | None = getattr(self.module, "weight", None)
        plain = weight is not None and weight.dim() == 2 and weight.dtype.itemsize == 1
        if weight is None or not plain or getattr(self.module, "weight_zero_point", None) is not None:
            raise NotImplementedError
        return weight


def held_by(module: nn.Module) -> Held | None:
    """What holds a layer's weight in few bits; None for a layer that doesn't, or in a way that nobody knows."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return None
    weight: Any = module._parameters.get("weight")
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "Linear8bitLt" in kinds:
        return _EightBit(module, "int8 of bitsandbytes") if weight.dtype is torch.int8 else None
    if "Linear4bit" in kinds:
        state = getattr(weight, "quant_state", None)
        return None if state is None else _FourBit(module, f"{state.quant_type} of bitsandbytes")
    if "HQQLinear" in kinds:
        meta: Any = module.meta
        return _HalfQuadratic(module, f"{meta['nbits']} bits of HQQ") if {"scale", "zero"} <= {*meta} else None
    if hasattr(type(weight), "__tensor_flatten__") and type(weight).dequantize is not Tensor.dequantize:
        return _OfTensors(module, f"a {type(weight).__name__} of {type(weight).__module__.split('.')[0]}")
    is_packed = weight is None or weight.dtype.itemsize == 1
    if is_packed and any(isinstance(getattr(module, name, None), Tensor) for name in _WithScales.names):
        return _WithScales(module, f"a {type(module).__name__}")
    return None


def first_quantised(model: nn.Module) -> tuple[str, str] | None:
    """The path and the format of a model's first layer in few bits."""
    found = ((path, held_by(module)) for path, module in model.named_modules())
    return next(((path, held.name) for path, held in found if held is not None), None)


@dataclass(frozen=True)
class Folded:
    """A scale of channels folded into a layer.

    Args:
        parts: what changes.
        rounded_anew: whether the weight was rounded anew, against integers that stay.
        error: by how much the layer's answers to random inputs differ from the vector's, in parts of these (norms).
    """

    parts: Parts
    rounded_anew: bool
    error: float


@torch.no_grad()
def fold(held: Held, path: str, scales: Mapping[Any, Tensor], before: Mapping[str, Tensor]) -> Folded:
    """What folding vectors into a layer would make of its parts, which are left as they are.

    Args:
        held: of the layer.
        path: its path, for the error.
        scales: by side, `"input"` or `"output"`, the factor of each channel.
        before: parts that were others before an earlier merge, from which the new ones are made.

    Raises:
        ValueError: the format takes them neither into its scales nor by rounding.
    """
    with _holding(held.parts(), before):
        try:
            return _into_scales(held, scales) or _into_weight(held, scales)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            why = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
            raise ValueError(
                f"{path} holds its weight as {held.name}, which has no scale for each {' and '.join(scales)} channel "
                f"and which ia3 can't round anew{why}: merge into a plain copy of the base, or leave the adapter "
                "unmerged."
            ) from error


def _into_scales(held: Held, scales: Mapping[Any, Tensor]) -> Folded | None:
    if "input" in scales:
        return None
    own = held.parts()
    ramp = torch.linspace(0.5, 2.0, held.module.out_features, device=scales["output"].device)
    for names in held.multiplied:
        for spread in (_over_first, _over_last, _over_rows):
            tried = _multiplied(own, names, partial(spread, ramp))
            # A real vector is so near to one that a wrong axis would hardly show.
            if tried is not None and _error(held, {"output": ramp}, tried) <= _NEAR:
                found = _multiplied(own, names, partial(spread, scales["output"]))
                assert found is not None
                return Folded(found, rounded_anew=False, error=_error(held, scales, found))
    return None


def _multiplied(own: Parts, names: tuple[str, ...], spread: Any) -> Parts | None:
    """The named parts and the bias times a scale; None where one of them has no place for it."""
    new: Parts = {}
    for name in (*names, *(name for name in own if name == "bias")):
        part = own[name]
        over = spread(part) if part.is_floating_point() and part.dtype.itemsize > 1 else None
        if over is None:
            return None
        new[name] = (part.to(over) * over).to(part)
    return new if names else None


def _over_first(scale: Tensor, part: Tensor) -> Tensor | None:
    scale = scale.to(part.device)
    return scale.view(-1, *(1,) * (part.dim() - 1)) if part.dim() and len(part) == len(scale) else None


def _over_last(scale: Tensor, part: Tensor) -> Tensor | None:
    """Over the last dimension of that width, as where groups come first."""
    scale = scale.to(part.device)
    fitting = [place for place, size in enumerate(part.shape) if size == len(scale)]
    return scale.view(-1, *(1,) * (part.dim() - 1 - fitting[-1])) if fitting else None


def _over_rows(scale: Tensor, part: Tensor) -> Tensor | None:
    """Over equally many numbers a row, one row after the other."""
    count, rest = divmod(part.numel(), len(scale))
    return None if rest or not count else scale.to(part.device).repeat_interleave(count).view(part.shape)


def _into_weight(held: Held, scales: Mapping[Any, Tensor]) -> Folded:
    values, own = held.values(), held.parts()
    if "output" in scales:
        values = values * scales["output"].to(values)[:, None]
    if "input" in scales:
        values = values * scales["input"].to(values)
    parts = held.rounded(values)
    if "output" in scales and "bias" in own:
        parts["bias"] = (own["bias"] * scales["output"].to(own["bias"].device)).to(own["bias"])
    if any(parts[name].shape != own[name].shape or parts[name].dtype != own[name].dtype for name in parts):
        raise NotImplementedError
    return Folded(parts, rounded_anew=True, error=_error(held, scales, parts))


def _error(held: Held, scales: Mapping[Any, Tensor], parts: Parts) -> float:
    inputs = _example(held)
    before = _answer(held, _times(inputs, scales.get("input")))
    wanted = _times(before, scales.get("output")).double()
    with _holding(held.parts(), parts):
        found = _answer(held, inputs).double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _times(activation: Tensor, scale: Tensor | None) -> Tensor:
    return activation if scale is None else activation * scale.to(activation)


def _answer(held: Held, inputs: Tensor) -> Tensor:
    """The layer's own forward, without hooks, as in training: some layers take another form where nothing trains."""
    with torch.enable_grad():
        found: Tensor = type(held.module).forward(held.module, inputs.detach().requires_grad_())
    return found.detach()


def _example(held: Held) -> Tensor:
    """Random inputs `[32, in]` in the precision that the layer takes."""
    parts, module = held.parts(), held.module
    weight = getattr(module, "weight", None)
    candidates = (
        getattr(module, "compute_dtype", None),
        *(each.dtype for each in (parts.get("bias"), weight) if isinstance(each, Tensor)),
    )
    floats = (torch.float32, torch.bfloat16, torch.float16)
    device = next((part.device for part in parts.values()), torch.device("cpu"))
    dtype = next((each for each in candidates if each in floats), torch.float16 if device.type == "cuda" else floats[0])
    drawn = torch.randn(_ROWS, module.in_features, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, dtype)


@contextmanager
def _holding(own: Parts, others: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it a layer's parts have other values."""
    now = {name: own[name].detach().clone() for name in others}
    try:
        _write(own, others)
        yield
    finally:
        _write(own, now)


def _write(own: Parts, others: Mapping[str, Tensor]) -> None:
    for name, value in others.items():
        own[name].data.copy_(value)


def _plain_tensors(tensor: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that one of a class of its own is made of, by their attributes."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, inner), f"{name}.{inner}" if name else inner)


def _over_blocks(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale `[out / a, in / b]`, or one a row, or one alone, over the weight `[out, in]`."""
    if scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() == 0:
        return scale.expand(weight.shape)
    if any(size % blocks for size, blocks in zip(weight.shape, scale.shape, strict=True)):
        raise NotImplementedError
    rows, columns = (size // blocks for size, blocks in zip(weight.shape, scale.shape, strict=True))
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _on_grid(
    values: Tensor, data_name: str, data: Tensor, scale_name: str, scale: Tensor, kind: torch.dtype | None = None
) -> Parts:
    """Values rounded to multiples of scales, one a block, of which the largest has the type's largest number."""
    kind = data.dtype if kind is None else kind
    blocks = (scale.numel() // (scale.shape[-1] if scale.dim() > 1 else 1), scale.shape[-1] if scale.dim() > 1 else 1)
    if any(size % count for size, count in zip(values.shape, blocks, strict=True)):
        raise NotImplementedError
    rows, columns = (size // count for size, count in zip(values.shape, blocks, strict=True))
    largest = values.view(blocks[0], rows, blocks[1], columns).abs().amax((1, 3))
    top = torch.finfo(kind).max if kind.is_floating_point else _largest_integer(kind)
    new = (torch.where(largest > 0, largest, 1) / top).to(scale.dtype)
    found = (values / _over_blocks(new.float(), values)).clamp(-top, top)
    return {
        data_name: (found if kind.is_floating_point else found.round()).to(data.dtype),
        scale_name: new.view(scale.shape),
    }


def _largest_integer(kind: torch.dtype) -> int:
    # torch knows no limits of its types of fewer than 8 bits, such as torch.int4.
    return (1 << int(str(kind).removeprefix("torch.int")) - 1) - 1


def layer_without_backward(model: nn.Module) -> tuple[str, str] | None:
    """The path and the format of the first layer in few bits through which no gradient comes; each is tried once."""
    for path, module in model.named_modules():
        held = held_by(module) or _of_nobody(module)
        if held is not None and not _passes_gradients(held):
            return path, held.name
    return None


class _OfNobody(Held):
    """A layer whose weight nobody knows: torch's own dynamic int8, and what is written by anybody."""

    def parts(self) -> Parts:
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}


def _of_nobody(module: nn.Module) -> Held | None:
    """A linear layer without a weight in numbers; None for others, and for what only stands around a linear layer."""
    weight = module._parameters.get("weight")
    if not hasattr(module, "in_features") or (
        weight is not None and (weight.is_floating_point() or weight.is_complex())
    ):
        return None
    is_around = any(hasattr(child, "in_features") for child in module.children())
    return None if is_around else _OfNobody(module, f"a {type(module).__name__}")


def _passes_gradients(held: Held) -> bool:
    if any(part.is_meta for part in held.parts().values()):
        return True  # where it runs nobody knows
    if getattr(held.module, "support_avx512bf16_for_cpu", False):
        # Without gradients bitsandbytes packs the weight for such a CPU's kernel, which has no backward, and for good.
        held.module.support_avx512bf16_for_cpu = False
    inputs = _example(held).requires_grad_()
    try:
        with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
            answer = type(held.module).forward(held.module, inputs)
            (gradient,) = torch.autograd.grad(answer, inputs, torch.ones_like(answer), allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return gradient is not None
