"""PEFT's import path: `from ia3.utils import …` gives what `from peft.utils import …` would."""

from __future__ import annotations

from typing import Any

import ia3
from ia3.elsewhere import IN_UTILS, why_not_here

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

_CONSTANTS = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]
__all__ = sorted([*_CONSTANTS, *IN_UTILS])


def __getattr__(name: str) -> Any:
    if name in IN_UTILS:
        return getattr(ia3, name)
    raise why_not_here(name, "ia3.utils", __all__)


def __dir__() -> list[str]:
    return __all__
