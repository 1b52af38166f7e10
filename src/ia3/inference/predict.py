"""Label words for sentences: batches sorted by length through `generate`, answers in the caller's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ia3.fast.decode import Generate, compile_generate


def predict(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    generate: Generate | None = None,
) -> list[str]:
    """Generate the label word of each text, greedily.

    Args:
        model: a seq2seq model with its adapter.
        tokenizer: the base model's tokenizer.
        texts: the sentences.
        max_length: where longer inputs are cut, in tokens.
        max_new_tokens: the longest answer; generation ends earlier where every answer of a batch has.
        batch_size: sentences a batch; sorted by length, so that short ones aren't padded to long ones.
        generate: what `compile_words` made for the model and `max_new_tokens`, to use it again; made here otherwise.

    Returns:
        One word or phrase a text, in the order of `texts`.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    words = [""] * len(rows)
    generate = generate or compile_words(model, max_new_tokens)
    for indices in sorted_batches([len(row) for row in rows], batch_size):
        inputs = tokenizer.pad({"input_ids": [rows[i] for i in indices]}, return_tensors="pt")
        answers = as_words(tokenizer, generate(inputs["input_ids"], inputs["attention_mask"]))
        for index, answer in zip(indices, answers, strict=True):
            words[index] = answer
    return words


def compile_words(model: Any, max_new_tokens: int) -> Generate:
    """What generates a model's label words greedily; see `compile_generate`."""
    return compile_generate(model, max_new_tokens=max_new_tokens, **_GREEDILY)


# A summariser's own least length would make it write on after a label.
_GREEDILY: dict[str, Any] = {"min_length": 0, "num_beams": 1, "do_sample": False}


def sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterable[list[int]]:
    """Indices in batches from the longest to the shortest, so that the first batch needs the most memory."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


@torch.inference_mode()
def generate_words(model: Any, tokenizer: Any, max_new_tokens: int, **inputs: Any) -> list[str]:
    """Decode what the model answers greedily, special tokens and outer spaces removed."""
    return as_words(tokenizer, model.generate(**inputs, max_new_tokens=max_new_tokens, **_GREEDILY))


def as_words(tokenizer: Any, answers: Tensor) -> list[str]:
    """Decoded, special tokens and outer spaces removed."""
    return [word.strip() for word in tokenizer.batch_decode(answers, skip_special_tokens=True)]
