"""Base models in GGUF files: `path/to/model.gguf`, or a file of a hub repository, `owner/name/model.gguf`.

transformers reads the file's tokenizer and configuration, and makes floats of its quantised weights.
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(SUFFIX)


def from_gguf(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """`AutoTokenizer` or `AutoConfig` from a GGUF file.

    Args:
        auto_class: whose `from_pretrained` to call.
        name: the file's path, or `owner/name/file.gguf` on the hub.
        kwargs: further arguments of `from_pretrained`.

    Returns:
        What the class loads, with `name` as its `name_or_path`.

    Raises:
        ImportError: the package `gguf` or `accelerate` is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of an architecture that transformers doesn't read.
    """
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ImportError(f"Reading {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    path = Path(name)
    if path.parent.is_dir() and not path.is_file():
        raise FileNotFoundError(f"There is no file {name}: check the path of the GGUF file.")
    try:
        loaded = auto_class.from_pretrained(path.parent.as_posix(), gguf_file=path.name, **kwargs)
    except (ValueError, LookupError, AttributeError, NotImplementedError, struct.error) as error:
        raise ValueError(
            f"{name} cannot be read as a GGUF model: copy or download it again, or take a model in transformers' "
            f"own format. {type(error).__name__}: {error}"
        ) from error
    loaded.name_or_path = name
    return loaded


def model_from_gguf(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """A model from a GGUF file as floats, which can be trained, merged and saved like any other.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        name: as for `from_gguf`.
        kwargs: further arguments of `from_pretrained`.

    Returns:
        The model, with `name` as its `name_or_path`, by which an adapter finds its base again.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `from_gguf`.
    """
    from transformers import GgufConfig

    # By default a model stays a quantised one to transformers, which is neither trained nor saved.
    model = from_gguf(auto_class, name, **{"quantization_config": GgufConfig(dequantize=True), **kwargs})
    model.config.name_or_path = name
    return model
