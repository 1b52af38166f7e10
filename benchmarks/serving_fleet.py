"""What the benchmarks of `ia3 serve` share: folders of adapters, and words."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from ia3.tasks.task import Task, save_task

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WORDS = [f"w{number}" for number in range(200)]


def words_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose every word is a token."""
    names = ["<pad>", "</s>", "<unk>", *WORDS, "good", "bad", "neutral"]
    inner = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def texts(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """Texts of random words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(shortest, longest))) for _ in range(count)]


def multiply(first: Path, folder: Path, tasks: Sequence[Task], spread: float = 0.1) -> list[str]:
    """As many adapters as tasks like a first one, each with contents of its own; their names.

    Args:
        first: the folder of a saved adapter.
        folder: where folders are made.
        tasks: what each answers.
        spread: how far vectors lie around 1; modules trained in full have normal numbers.
    """
    chance = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in load_file(first / TENSORS).items()}
    names = [f"adapter-{number:04d}" for number in range(len(tasks))]
    for name, task in zip(names, tasks, strict=True):
        place = folder / name
        place.mkdir(parents=True)
        os.link(first / CONFIG, place / CONFIG)
        drawn = {key: torch.randn(shape, generator=chance) for key, shape in shapes.items()}
        tensors = {key: 1 + spread * x if "ia3_l" in key else 0.3 * x for key, x in drawn.items()}
        save_file(tensors, place / TENSORS, metadata={"format": "pt"})
        save_task(place, task)
    return names
