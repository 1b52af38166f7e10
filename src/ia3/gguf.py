"""Base models in GGUF files: `path/to/model.gguf`, or a file of a hub repository, `owner/name/model.gguf`.

transformers reads the file's tokenizer and configuration, and makes floats of its quantised weights. That takes long,
so what it makes is kept in the cache, under the digest of the file.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ia3.cache import cached, digest
from ia3.files import HUB_ARGUMENTS, fetch
from ia3.pretrained import load_pretrained

SUFFIX = ".gguf"

_logger = logging.getLogger(__name__)

_Write = Callable[[Path, Path], None]


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
    file, kwargs = _find(name, kwargs)
    write, needed = _PARTS.get(auto_class.__name__, (None, ""))
    folder = None if write is None else _kept(file, auto_class.__name__, write)
    if folder is not None and (folder / needed).is_file():
        loaded = load_pretrained(auto_class, folder, **kwargs)
    else:
        loaded = _read(auto_class, file, **kwargs)
    loaded.name_or_path = name
    return loaded


def model_from_gguf(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """A model from a GGUF file as floats, which can be trained, merged and saved like any other.

    They are exactly those that transformers makes in the precision that is asked for, made once for each.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        name: as for `from_gguf`.
        kwargs: further arguments of `from_pretrained`.

    Returns:
        The model, with `name` as its `name_or_path`, by which an adapter finds its base again.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `from_gguf`.
    """
    from transformers import GenerationConfig, GgufConfig

    file, kwargs = _find(name, kwargs)
    dtype = None if "quantization_config" in kwargs else _precision(kwargs)
    folder = None if dtype is None else _kept(file, dtype, partial(_write_model, name=name, dtype=dtype))
    if folder is not None and (folder / "config.json").is_file():
        loaded = load_pretrained(auto_class, folder, **kwargs)
    else:
        # By default a model stays a quantised one to transformers, which is neither trained nor saved.
        loaded = _read(auto_class, file, **{"quantization_config": GgufConfig(dequantize=True), **kwargs})
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
    if model.can_generate() and "generation_config" not in kwargs:  # a folder's wouldn't follow the arguments
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.name_or_path = model.config.name_or_path = name
    return loaded


def _find(name: str, kwargs: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file on this machine, and the arguments that are not about finding it."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ImportError(f"Reading {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    path = Path(name)
    file = fetch(path.parent.as_posix(), path.name, **hub)
    if file is None:
        raise FileNotFoundError(f"There is no file {name}: check the path of the GGUF file.")
    return file, {key: value for key, value in kwargs.items() if key not in hub}


def _read(auto_class: Any, file: Path, **kwargs: Any) -> Any:
    """What transformers reads of the file itself."""
    try:
        return load_pretrained(auto_class, file.parent, gguf_file=file.name, **kwargs)
    except (ValueError, LookupError, AttributeError, NotImplementedError, struct.error) as error:
        raise ValueError(
            f"{file} cannot be read as a GGUF model: copy or download it again, or take a model in transformers' "
            f"own format. {type(error).__name__}: {error}"
        ) from error


def _kept(file: Path, part: str, write: _Write) -> Path | None:
    """The folder of the cache with a part of the file, empty where it can't be told in transformers' own format.

    Args:
        file: the GGUF file.
        part: the part's name.
        write: reads the file and fills the folder.

    Returns:
        None where the cache can't be written.
    """
    content = digest(file)

    def write_this(folder: Path) -> None:
        write(file, folder)
        if digest(file) != content:
            raise ValueError(f"{file} changed while it was read: wait until it is written, and start again.")

    # Another version may make other floats, or other tokens.
    made_of = (content, version("transformers"), version("gguf"))
    return cached(f"gguf-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}-{part}", write_this)


def _write_config(file: Path, folder: Path) -> None:
    from transformers import AutoConfig

    _read(AutoConfig, file).save_pretrained(folder)


def _write_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, file)
    tokenizer.save_pretrained(folder)
    if _facts(load_pretrained(AutoTokenizer, folder)) != _facts(tokenizer):
        # Some classes build the rules that split a text anew; such a tokenizer is read from the file each time.
        for path in folder.iterdir():
            path.unlink()


def _facts(tokenizer: Any) -> tuple[Any, ...]:
    """All that a tokenizer does, for comparison."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        type(tokenizer),
        None if backend is None else backend.to_str(),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
        tuple(tokenizer.model_input_names),
        tokenizer.clean_up_tokenization_spaces,
    )


# The class that loads a part, how it is written, and the file without which it isn't there.
_PARTS: dict[str, tuple[_Write, str]] = {
    "AutoConfig": (_write_config, "config.json"),
    "AutoTokenizer": (_write_tokenizer, "tokenizer.json"),
}


def _precision(kwargs: dict[str, Any]) -> str | None:
    """The name of the dtype that is asked for; None where it is not one for the whole model."""
    import torch

    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if asked is None:
        asked = torch.get_default_dtype()
    return str(asked).removeprefix("torch.") if isinstance(asked, str | torch.dtype) else None


def _write_model(file: Path, folder: Path, *, name: str, dtype: str) -> None:
    """The whole model that the file holds; nothing where it holds only a part of one, such as an encoder."""
    from transformers import AutoConfig, GgufConfig

    _logger.warning("Making a %s model of %s: this takes long, and is done once", dtype, name)
    config = from_gguf(AutoConfig, str(file))
    made = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True), "output_loading_info": True}
    model, info = _read(_whole_class(config), file, **made)
    if info["missing_keys"] or info["mismatched_keys"]:
        return
    model.save_pretrained(folder)
    # As transformers reads it of the file: without a class, a precision, settings for generation of its own.
    config.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    _logger.warning("It takes %.0f MB of the cache, %s", size / 1e6, folder.parent)


def _whole_class(config: Any) -> Any:
    """The automatic class with all weights that a file of this configuration may hold."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        if type(config) in auto_class._model_mapping:
            return auto_class
    return AutoModel
