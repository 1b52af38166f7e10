"""Label words for sentences: batches sorted by length through `generate`, answers in the caller's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ia3.auto import AutoPeftModelForSeq2SeqLM
from ia3.bundled import resolve_model
from ia3.config import PeftConfig


def load_tokenizer(model_name: str, **hub: Any) -> Any:
    """The tokenizer of a base model.

    Args:
        model_name: a hub name, a directory or a `bundled:` name.
        hub: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
    """
    folder = resolve_model(model_name)
    try:
        return AutoTokenizer.from_pretrained(folder, **hub)
    except OSError as error:
        raise FileNotFoundError(
            f"The tokenizer of the base model {model_name!r} cannot be read: expected a folder in transformers' "
            f"format, a model on the hub, or a bundled model. {error}"
        ) from error


def load_adapter(adapter: str | Path) -> tuple[Any, Any]:
    """Load a saved seq2seq adapter on its base model, and the base's tokenizer.

    Args:
        adapter: a directory written by `save_pretrained`, or a hub repository.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: the adapter doesn't say which base model it belongs to.
    """
    config = PeftConfig.from_pretrained(adapter)
    if config.base_model_name_or_path is None:
        raise ValueError(
            f"The adapter in {adapter} names no base model: set base_model_name_or_path in its configuration."
        )
    loader: Any = AutoPeftModelForSeq2SeqLM
    model = loader.from_pretrained(adapter)
    tokenizer = load_tokenizer(config.base_model_name_or_path, revision=config.revision)
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
