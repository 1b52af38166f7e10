"""A tiny seq2seq base with a word tokenizer, and a task that it can learn: the label stands in the text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from ia3 import IA3Config, get_peft_model
from ia3.tasks.examples import Example, Examples

LABELS = ("negative", "neutral", "positive")
_TELLING = {"negative": "falls", "neutral": "stays", "positive": "rises"}
_FILLERS = ("the", "share", "of", "a", "company", "today", "much")
_WORDS = ("<pad>", "</s>", "<unk>", *LABELS, *_TELLING.values(), *_FILLERS, "very")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and the end token behind."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def base(dropout: float = 0.1) -> T5ForConditionalGeneration:
    """A random T5 whose vocabulary is the tokenizer's."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(_WORDS),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


def save_base(folder: Path) -> Path:
    """The base and its tokenizer as a transformers folder."""
    base().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapted(dropout: float = 0.1, *, head: bool = False):
    """The base with an adapter; with `head`, the output layer is trained too, so that it learns in a few steps."""
    saved = ["lm_head"] if head else None
    return get_peft_model(base(dropout), IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=saved))


def examples(count: int, start: int = 0) -> Examples:
    """Balanced texts of different lengths, each telling its label."""
    rows = []
    for index in range(start, start + count):
        label = LABELS[index % 3]
        fillers = [_FILLERS[(index * 5 + place) % len(_FILLERS)] for place in range(1 + index % 6)]
        rows.append(Example(" ".join([*fillers, _TELLING[label]]), label))
    return Examples(tuple(rows), LABELS, "sentences", 0, 0)


def write_csv(path: Path, count: int = 30) -> Path:
    lines = ["text,label", *(f"{row.text},{row.label}" for row in examples(count))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
