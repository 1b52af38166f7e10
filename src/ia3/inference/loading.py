"""Base models, their tokenizers and saved adapters by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ia3.auto import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from ia3.bundled import load_model, resolve_model
from ia3.config import PeftConfig, TaskType
from ia3.gguf import from_gguf, is_gguf
from ia3.inference.classify import load_classifier
from ia3.tasks.task import TaskKind

# The precisions of recipes and task files.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_tokenizer(model_name: str, **hub: Any) -> Any:
    """The tokenizer of a base model.

    Args:
        model_name: a hub name, a directory or a `bundled:` name.
        hub: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
    """
    return _of_base("tokenizer", AutoTokenizer, model_name, **hub)


def load_config(model_name: str, **hub: Any) -> Any:
    """The configuration of a base model.

    Args:
        model_name: a hub name, a directory or a `bundled:` name.
        hub: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
    """
    return _of_base("configuration", AutoConfig, model_name, **hub)


def _of_base(what: str, auto_class: Any, model_name: str, **hub: Any) -> Any:
    if is_gguf(model_name):
        return from_gguf(auto_class, model_name, **hub)
    folder = resolve_model(model_name)
    try:
        return auto_class.from_pretrained(folder, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"The {what} of the base model {model_name!r} cannot be read: expected a folder in transformers' format, "
            f"a model on the hub, or a bundled model. {_first_line(error)}"
        ) from error


def default_kind(config: Any, model_name: str) -> TaskKind:
    """The kind of task that a base model is trained for where none is named.

    Args:
        config: its configuration.
        model_name: its name, for the error.

    Returns:
        Label words for an encoder-decoder, instructions for a causal model, classes of texts for an encoder.

    Raises:
        ValueError: a model whose architecture doesn't tell.
    """
    if config.is_encoder_decoder:
        return TaskKind.LABEL_WORDS
    if is_gguf(model_name):  # which holds a decoder and names no architecture
        return TaskKind.INSTRUCTIONS
    architectures = " ".join(getattr(config, "architectures", None) or ())
    for kind, pattern in _ARCHITECTURES.items():
        if re.search(pattern, architectures):
            return kind
    raise ValueError(
        f"{model_name} is a {config.model_type} of the architecture {architectures or 'unnamed'}, which doesn't say "
        f"what to train it for: name the task, one of {', '.join(TaskKind)}."
    )


_ARCHITECTURES = {
    TaskKind.INSTRUCTIONS: r"ForCausalLM|LMHeadModel",
    TaskKind.TOKEN_CLASSIFICATION: r"ForTokenClassification",
    TaskKind.SEQUENCE_CLASSIFICATION: r"ForMaskedLM|ForPreTraining|ForSequenceClassification|ForMultipleChoice|Model\b",
}


def load_base(
    model_name: str, kind: TaskKind, *, labels: Sequence[str] = (), dtype: Any = "auto", seed: int = 42
) -> Any:
    """Load a base model for a kind of task.

    Args:
        model_name: a hub name, a directory or a `bundled:` name.
        kind: what it is to be trained for.
        labels: the classes of a head, in order.
        dtype: its numbers' type; `"auto"` is the saved one.
        seed: decides a head that the model lacks.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
        ValueError: a model that can't do this, or damaged weights.
    """
    config = load_config(model_name)
    if kind.task_type is TaskType.SEQ_2_SEQ_LM and not config.is_encoder_decoder:
        raise ValueError(
            f"{model_name} is a {config.model_type} model, which has no encoder and decoder: {kind} needs a "
            "seq2seq model, such as a T5 or a BART."
        )
    if is_gguf(model_name) and not kind.writes:
        raise ValueError(f"{model_name} is a GGUF file, which has no head for {kind}: take a model folder.")
    with reading_weights(model_name):
        if not kind.writes:
            return load_classifier(model_name, kind, labels, dtype, seed=seed)
        auto_class = AutoModelForCausalLM if kind.task_type is TaskType.CAUSAL_LM else AutoModelForSeq2SeqLM
        return load_model(model_name, auto_class, dtype=dtype)


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
            f"The weights of the base model {model_name!r} cannot be read: copy or download it again. "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """The beginning of a message that may go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def load_adapter(adapter: str | Path, *, dtype: Any = None) -> tuple[Any, Any]:
    """Load a saved adapter on its base model, and the base's tokenizer, on the accelerator if there is one.

    Args:
        adapter: a directory written by `save_pretrained`, or a hub repository.
        dtype: the base model's numbers' type; None for that of its file.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: the adapter doesn't say which base model it belongs to or doesn't fit it, or the base's
            weights are damaged.
    """
    config = PeftConfig.from_pretrained(adapter)
    if config.base_model_name_or_path is None:
        raise ValueError(
            f"The adapter in {adapter} names no base model: set base_model_name_or_path in its configuration."
        )
    loader = _LOADERS.get(config.task_type)
    if loader is None:
        raise ValueError(f"The adapter in {adapter} is for the task {config.task_type}, which this can't answer.")
    tokenizer = load_tokenizer(config.base_model_name_or_path, revision=config.revision)
    with reading_weights(config.base_model_name_or_path):
        model = loader.from_pretrained(adapter, **({} if dtype is None else {"dtype": dtype}))
    return model.eval().to(torch.accelerator.current_accelerator() or "cpu"), tokenizer


_LOADERS: dict[str | None, Any] = {
    TaskType.SEQ_2_SEQ_LM: AutoPeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: AutoPeftModelForCausalLM,
    TaskType.SEQ_CLS: AutoPeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoPeftModelForTokenClassification,
}
