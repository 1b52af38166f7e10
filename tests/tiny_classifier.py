"""Tokenizers that take words apart, and tasks that a tiny classifier can learn."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template

LABELS = ("negative", "neutral", "positive")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = ("the share rises", "it falls", "the company of the year stays", "a", "much of the share falls today", "rises")
_WORDS = ("the", "share", "rises", "falls", "stays")


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece of five words and the letters: most words are several tokens, and the vocabulary fits `tiny`."""
    pieces = ("[PAD]", "[CLS]", "[SEP]", *_WORDS, *string.ascii_lowercase, *(f"##{a}" for a in string.ascii_lowercase))
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[SEP]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", model_max_length=32)


def byte_tokenizer() -> RobertaTokenizerFast:
    """RoBERTa's kind, one token a byte: a word in the middle of a text begins with its blank."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(("<pad>", "<s>", "</s>", "<unk>", "<mask>", *alphabet))}
    return RobertaTokenizerFast(vocab=vocabulary, merges=[], model_max_length=64)


def names(labels: tuple[str, ...]) -> dict[str, dict]:
    """What the configuration of a head for these labels says."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def task(kind: TaskKind, max_length: int = 32) -> Task:
    labels = TAGS if kind is TaskKind.TOKEN_CLASSIFICATION else LABELS
    return Task(kind=kind, template=Template.of_column("text"), labels=labels, max_length=max_length)


def labelled(count: int) -> list[Example]:
    """Texts of different lengths whose last word tells the label."""
    telling = {"negative": "falls", "neutral": "stays", "positive": "rises"}
    rows = []
    for index in range(count):
        label = LABELS[index % 3]
        rows.append(Example(" ".join(["the", *["share"] * (index % 4), telling[label]]), label))
    return rows
