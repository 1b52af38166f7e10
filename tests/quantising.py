"""Models whose linear layers are held in few bits, by the packages that are there."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn


@dataclass(frozen=True)
class Kind:
    """A way to hold weights.

    Args:
        package: what makes it.
        quantise: a linear layer to one in few bits.
        keeps_integers: whether a vector at the output leaves the integers.
        rounding: by how much of its answers a layer may differ where its weight is rounded anew.
    """

    package: str
    quantise: Callable[[nn.Linear], nn.Module]
    keeps_integers: bool = True
    rounding: float = 0.12


def _eight_bit(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    bias = layer.bias is not None
    made = Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _four_bit(layer: nn.Linear, kind: str = "nf4", nested: bool = False) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    shape, dtype = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.dtype
    made = Linear4bit(*shape, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def _torchao(layer: nn.Linear, config: str, **settings: object) -> nn.Module:
    from torchao import quantization

    for name in ("granularity", "weight_granularity"):
        if name in settings:
            settings[name] = quantization.PerGroup(settings[name])
    around = nn.Sequential(layer)
    quantization.quantize_(around, getattr(quantization, config)(**settings))
    return around[0]


def _quanto(layer: nn.Linear, kind: str) -> nn.Module:
    from optimum import quanto

    around = nn.Sequential(layer)
    quanto.quantize(around, weights=getattr(quanto, kind))
    quanto.freeze(around)
    return around[0]


def _hqq(layer: nn.Linear, bits: int, axis: int = 1) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    return HQQLinear(layer, quant_config=how, compute_dtype=layer.weight.dtype, device="cpu")


class Scaled(nn.Module):
    """The stand-in: integers and a scale a row in tensors of its own, as checkpoints hold them; no package makes it."""

    def __init__(self, layer: nn.Linear, name: str = "weight_scale") -> None:
        super().__init__()
        self.in_features, self.out_features, self.name = layer.in_features, layer.out_features, name
        weight = layer.weight.detach()
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer(name, scale.to(weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * getattr(self, self.name).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class Packed(nn.Module):
    """The other stand-in: packed integers and scales `[groups, out]`, as GPTQ's and AWQ's layers have them."""

    def __init__(self, layer: nn.Linear, groups: int = 2) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().t().reshape(groups, -1, layer.out_features)
        scales = weight.abs().amax(1) / 7
        self.register_buffer("qweight", (weight / scales[:, None]).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.qweight * self.scales[:, None]).flatten(0, 1).to(x.dtype)
        return nn.functional.linear(x, weight.t(), self.bias)


_STAND_IN = "torch"
KINDS = {
    "stand-in": Kind(_STAND_IN, Scaled, rounding=0.02),
    "int8 of bitsandbytes": Kind("bitsandbytes", _eight_bit, rounding=0.04),
    "nf4": Kind("bitsandbytes", _four_bit),
    "nf4, its scales rounded": Kind("bitsandbytes", partial(_four_bit, nested=True), keeps_integers=False),
    "fp4": Kind("bitsandbytes", partial(_four_bit, kind="fp4"), rounding=0.15),
    "int8 of torchao": Kind("torchao", partial(_torchao, config="Int8WeightOnlyConfig"), rounding=0.02),
    "int8 of torchao in groups": Kind(
        "torchao", partial(_torchao, config="Int8WeightOnlyConfig", granularity=16), rounding=0.02
    ),
    "int4 of torchao": Kind(
        "torchao", partial(_torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=32)
    ),
    "fp8 of torchao": Kind("torchao", partial(_torchao, config="Float8WeightOnlyConfig"), rounding=0.05),
    "int8 of quanto": Kind("optimum.quanto", partial(_quanto, kind="qint8"), rounding=0.02),
    "int4 of quanto": Kind("optimum.quanto", partial(_quanto, kind="qint4"), rounding=0.15),
    "fp8 of quanto": Kind("optimum.quanto", partial(_quanto, kind="qfloat8"), rounding=0.05),
    "4 bits of HQQ": Kind("hqq", partial(_hqq, bits=4)),
    "8 bits of HQQ": Kind("hqq", partial(_hqq, bits=8), rounding=0.02),
    "4 bits of HQQ along columns": Kind("hqq", partial(_hqq, bits=4, axis=0), keeps_integers=False, rounding=0.25),
}
DYNAMIC = {
    "dynamic int8": partial(_torchao, config="Int8DynamicActivationInt8WeightConfig"),
    "dynamic int8, int4 weights": partial(
        _torchao, config="Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4, weight_granularity=32
    ),
}


def expect(package: str) -> None:
    """Skip a test where the package is missing or doesn't import, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = importlib.util.find_spec(package)
            reason = None if found else f"{package} is not installed"
            if found:
                importlib.import_module(package)
        except Exception as error:  # a package that is there and broken fails in any way
            reason = f"{package} doesn't import: {error}"
    if reason:
        pytest.skip(reason)


def quantised(model: nn.Module, quantise: Callable[[nn.Linear], nn.Module], leave: tuple[str, ...] = ()) -> nn.Module:
    """The model with its linear layers in few bits, but the head's and those whose paths end with a name of `leave`."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not path.endswith(("lm_head", *leave)):
            model.set_submodule(path, quantise(layer.requires_grad_(False)))
    return model.train(model.training)
