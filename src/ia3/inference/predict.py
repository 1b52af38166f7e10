"""Label words for sentences: batches sorted by length through `generate`, answers in the caller's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from ia3.auto import AutoPeftModelForSeq2SeqLM
from ia3.bundled import load_model, resolve_model
from ia3.config import PeftConfig


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
    folder = resolve_model(model_name)
    try:
        return auto_class.from_pretrained(folder, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"The {what} of the base model {model_name!r} cannot be read: expected a folder in transformers' format, "
            f"a model on the hub, or a bundled model. {_first_line(error)}"
        ) from error


def load_base(model_name: str) -> Any:
    """Load a seq2seq base model.

    Args:
        model_name: a hub name, a directory or a `bundled:` name.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
        ValueError: a model of another kind, or damaged weights.
    """
    config = load_config(model_name)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{model_name} is a {config.model_type} model, which has no encoder and decoder: label words need a "
            "seq2seq model, such as a T5 or a BART."
        )
    with reading_weights(model_name):
        return load_model(model_name, AutoModelForSeq2SeqLM)


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


def load_adapter(adapter: str | Path) -> tuple[Any, Any]:
    """Load a saved seq2seq adapter on its base model, and the base's tokenizer.

    Args:
        adapter: a directory written by `save_pretrained`, or a hub repository.

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
    loader: Any = AutoPeftModelForSeq2SeqLM
    tokenizer = load_tokenizer(config.base_model_name_or_path, revision=config.revision)
    with reading_weights(config.base_model_name_or_path):
        model = loader.from_pretrained(adapter)
    return model.eval(), tokenizer


def predict(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    max_new_tokens: int = 16,
    batch_size: int = 32,
) -> list[str]:
    """Generate the label word of each text, greedily.

    Args:
        model: a seq2seq model with its adapter.
        tokenizer: the base model's tokenizer.
        texts: the sentences.
        max_length: where longer inputs are cut, in tokens.
        max_new_tokens: the longest answer; generation ends earlier where every answer of a batch has.
        batch_size: sentences a batch; sorted by length, so that short ones aren't padded to long ones.

    Returns:
        One word or phrase a text, in the order of `texts`.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    words = [""] * len(rows)
    for indices in sorted_batches([len(row) for row in rows], batch_size):
        inputs = tokenizer.pad({"input_ids": [rows[i] for i in indices]}, return_tensors="pt")
        answers = generate_words(model, tokenizer, max_new_tokens, **inputs.to(model.device))
        for index, answer in zip(indices, answers, strict=True):
            words[index] = answer
    return words


def sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterable[list[int]]:
    """Indices in batches from the longest to the shortest, so that the first batch needs the most memory."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


@torch.inference_mode()
def generate_words(model: Any, tokenizer: Any, max_new_tokens: int, **inputs: Any) -> list[str]:
    """Decode what the model answers greedily, special tokens and outer spaces removed."""
    answers = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False)
    return [word.strip() for word in tokenizer.batch_decode(answers, skip_special_tokens=True)]
