"""What a seq2seq model writes for sentences: batches sorted by length, answers in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ia3.fast.generate import Generate, compile_generate
from ia3.inference.tokens import TokenRows

AnswerT = TypeVar("AnswerT")

_TEXTS_AT_ONCE = 1000
_IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}

# Told after each batch how many of its rows are answered.
Beat = Callable[[int], None]


def predict(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    generate: Generate | None = None,
    beat: Beat | None = None,
    adapter_names: Sequence[str] | None = None,
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
        beat: called after each batch with its number of sentences.
        adapter_names: the adapter of each text, attached or in the model's table; the active ones where left out.

    Returns:
        One word or phrase a text, in the order of `texts`.
    """
    rows, written = tokenise_inputs(tokenizer, texts, max_length), generate or compile_words(model, max_new_tokens)

    def answer(indices: list[int]) -> list[str]:
        return write_words(tokenizer, [rows[i] for i in indices], written, names_of(adapter_names, indices))

    return answer_in_batches(sorted_batches(rows.lengths, batch_size), answer, beat)


def names_of(adapter_names: Sequence[str] | None, indices: Sequence[int]) -> list[str] | None:
    """The names of a batch's adapters; None where the active ones act."""
    return None if adapter_names is None else [adapter_names[i] for i in indices]


def tokenise_inputs(tokenizer: Any, texts: Sequence[str], max_length: int) -> TokenRows:
    """The tokens of each text, its end token included, cut at `max_length`."""
    rows = TokenRows()
    for some in _in_stretches(texts):
        rows.extend(tokenizer(some, truncation=True, max_length=max_length, **_IDS_ALONE)["input_ids"])
    return rows


def count_truncated(texts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """How many of `texts` have more than `max_length` tokens, special tokens included."""
    count = 0
    for some in _in_stretches(texts):
        encoded = tokenizer(some, truncation=False, padding=False, verbose=False, **_IDS_ALONE)
        count += sum(len(tokens) > max_length for tokens in encoded["input_ids"])
    return count


def _in_stretches(texts: Sequence[str]) -> Iterable[list[str]]:
    """So few texts at a time that what a tokenizer says of each token takes little room."""
    return (list(texts[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(texts), _TEXTS_AT_ONCE))


def write_words(
    tokenizer: Any, rows: Sequence[Sequence[int]], generate: Generate, adapter_names: list[str] | None = None
) -> list[str]:
    """What `compile_words` writes for one batch of `tokenise_inputs`, as words."""
    batch = pad_rows(rows, tokenizer.pad_token_id)
    answers = generate(batch["input_ids"], batch["attention_mask"], adapter_names=adapter_names)
    return [word.strip() for word in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def compile_words(model: Any, max_new_tokens: int) -> Generate:
    """What generates a model's label words greedily; see `compile_generate`."""
    # A summariser's own least length would make it write on after a label.
    return compile_generate(model, max_new_tokens=max_new_tokens, min_length=0, num_beams=1, do_sample=False)


def sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterable[list[int]]:
    """Indices in batches from the longest to the shortest, so that the first batch needs the most memory."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def answer_in_batches(
    batches: Iterable[list[int]], answer: Callable[[list[int]], Sequence[AnswerT]], beat: Beat | None = None
) -> list[AnswerT]:
    """Answer all batches.

    Args:
        batches: the indices 0, 1, … in any order.
        answer: answers one batch, in its order.
        beat: called after each batch with its number of rows; what it raises ends the work.

    Returns:
        One answer an index, in their order.
    """
    found: dict[int, AnswerT] = {}
    for indices in batches:
        found |= zip(indices, answer(indices), strict=True)
        if beat is not None:
            beat(len(indices))
    return [found[index] for index in range(len(found))]


def most_positions(model: Any) -> int | None:
    """How many tokens the model can read; None where its configuration sets no end, as XLNet's, which says -1."""
    limit: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    return limit if limit > 0 else None


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int | None = None, *, left: bool = False
) -> dict[str, Tensor]:
    """Stack rows of token ids, padded at the right, where no position before them moves.

    Args:
        rows: token ids.
        pad_token_id: what fills them up; the attention mask is 0 there.
        pad_to_multiple_of: round the length up to a multiple of this.
        left: pad at the left, so that all rows end where an answer begins.

    Returns:
        `input_ids` and `attention_mask` `[rows, length]`.
    """
    own = torch.tensor([len(row) for row in rows])
    length = int(own.max())
    if pad_to_multiple_of is not None:
        length += -length % pad_to_multiple_of

    def padded(row: Sequence[int]) -> list[int]:
        gap = [pad_token_id] * (length - len(row))
        return [*gap, *row] if left else [*row, *gap]

    place = torch.arange(length)
    seen = place >= length - own[:, None] if left else place < own[:, None]
    return {"input_ids": torch.tensor([padded(row) for row in rows]), "attention_mask": seen.long()}
