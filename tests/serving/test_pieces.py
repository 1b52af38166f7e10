"""Pieces of an answer join to the answer, whatever its tokens are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ia3.serving.pieces import Pieces

TEXTS = [
    "the quick  brown fox .",
    "Ähnliches: naïve — 你好吗 🙂🙂 ok",
    "  it 's n't  so , they 've  said !  ",
    "ab\ufffdc 1 . 2 ? ",
    "",
]


def by_bytes(*, cleans: bool) -> Any:
    """A token a byte, as BART's and GPT-2's are, so that characters come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=cleans)


def by_sentence_piece(*, cleans: bool) -> Any:
    """Letters and blanks as SentencePiece writes them, and single bytes of what has no token."""
    letters = "▁abcdefghijklmnopqrstuvwxyz.,!?'"
    vocabulary = {"</s>": 0, "<unk>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    vocabulary |= {letter: number + 258 for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=cleans)


def told(tokenizer: Any, tokens: Sequence[int]) -> tuple[list[str], str]:
    """The pieces with what comes at the end, and the answer."""
    pieces = Pieces(tokenizer)
    found = [pieces.more(tokens[:count]) for count in range(1, len(tokens) + 1)]
    whole = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert whole.startswith(pieces.told)
    return [*found, whole.removeprefix(pieces.told)], whole


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("make", [by_bytes, by_sentence_piece])
class TestPieces:
    def test_join_to_the_text(self, make: Any, cleans: bool) -> None:
        tokenizer = make(cleans=cleans)
        for text in TEXTS:
            found, whole = told(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
            assert "".join(found) == whole
            assert len([piece for piece in found if piece]) >= len(whole) // 8  # not all of it at the end

    def test_join_whatever_the_tokens(self, make: Any, cleans: bool) -> None:
        tokenizer, draw = make(cleans=cleans), random.Random(7)
        telling = tokenizer(" . 'n'ts ve 好", add_special_tokens=False)["input_ids"]
        for _ in range(300):
            likely = draw.choice([range(len(tokenizer)), telling])
            found, whole = told(tokenizer, [draw.choice(likely) for _ in range(draw.randint(1, 24))])
            assert "".join(found) == whole


def test_a_character_is_told_whole() -> None:
    tokenizer = by_bytes(cleans=False)
    found, _ = told(tokenizer, tokenizer("a好 b", add_special_tokens=False)["input_ids"])
    assert found == ["a", "", "", "好", "", " b", ""]


def test_a_row_of_bytes_is_told_at_its_end() -> None:
    """Of bytes that are a character until another follows, none is told."""
    tokenizer = by_sentence_piece(cleans=False)
    tokens = tokenizer.convert_tokens_to_ids(["▁", "a", *(f"<0x{byte:02X}>" for byte in b"\xe5\xa5\xbd\xff"), "b"])
    found, whole = told(tokenizer, tokens)
    assert whole.startswith("a\ufffd")
    assert "".join(found) == whole
