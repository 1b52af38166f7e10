"""What was found for a prompt, whoever computed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ia3.serving.requests import FinishReason


class Found(NamedTuple):
    """An answer.

    Args:
        text: the label or what was written.
        probabilities: of each label, where they were ranked.
        tokens: how many were written, the end's included.
        finish_reason: whether the answer came to its end.
        vector: the text's, where that was asked for.
    """

    text: str
    probabilities: dict[str, float] | None = None
    tokens: int = 0
    finish_reason: FinishReason = "stop"
    vector: Sequence[float] | None = None


def found_of(tokenizer: Any, ends: Sequence[int], written: Sequence[int]) -> Found:
    """The answer that these tokens are, which come to their end at the first end token."""
    own = before_end(ends, written)
    text: str = tokenizer.decode(own, skip_special_tokens=True).strip()
    ended = len(own) < len(written)
    return Found(text, None, len(own) + 1) if ended else Found(text, None, len(own), "length")


def before_end(ends: Sequence[int], written: Sequence[int]) -> Sequence[int]:
    """The tokens before the first end token."""
    return written[: next((place for place, token in enumerate(written) if token in ends), len(written))]
