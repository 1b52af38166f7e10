"""Tokenizers that take words apart, and tasks that a tiny classifier can learn."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, RobertaTokenizerFast

from ia3 import IA3Config, get_peft_model
from ia3.inference.classify import load_classifier
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind, save_task
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


def randomise(model: torch.nn.Module, seed: int, low: float, high: float) -> None:
    """Draw the vectors of an adapter between two numbers, and its head."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(low, high)
            elif "modules_to_save" in name:
                parameter.normal_(std=0.3)


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


def save_adapter(folder: Path) -> Path:
    """A BERT, 16 wide, with an adapter of a head for `LABELS` whose answers are not all one; the adapter's folder."""
    base, adapter = folder / "base", folder / "adapter"
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.5},
    )
    BertForMaskedLM(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    torch.manual_seed(1)
    kind = TaskKind.SEQUENCE_CLASSIFICATION
    model = load_classifier(str(base), kind, LABELS)
    torch.nn.init.normal_(model.classifier.weight)
    peft = get_peft_model(model, IA3Config(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    peft.save_pretrained(adapter)
    save_task(adapter, task(kind))
    return adapter
