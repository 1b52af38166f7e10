"""An answer in pieces, as it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# What stands for one byte of a character that has no token.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# Which bytes are no character yet.
_HALF = "\ufffd"
# Tokenizers that clean up their text change no more than so many characters behind a blank, such as " n't".
_CLEANED = 8


class Pieces:
    """The text of tokens that become more, in pieces that join to the whole text without outer blanks.

    A piece is told once no later token can change it: half a character, blanks at the end, and what the tokenizer may
    still clean up wait.

    Args:
        tokenizer: the answer's.

    Attributes:
        told: what was told so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.told = tokenizer, ""
        self._special = frozenset(tokenizer.all_special_ids)

    def more(self, tokens: Sequence[int]) -> str:
        """What can be told since the last time.

        Args:
            tokens: all so far, without an end token.
        """
        settled = self._settled(tokens)
        piece = settled[len(self.told) :] if settled.startswith(self.told) else ""
        self.told += piece
        return piece

    def _settled(self, tokens: Sequence[int]) -> str:
        end = len(tokens)
        # Bytes in a row are one thing to a tokenizer, which knows what they are only at their end.
        while end and self._may_go_on(tokens[end - 1]):
            end -= 1
        text: str = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        text = text.strip().rstrip(_HALF).rstrip()
        if getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
            blank = re.search(r"\s", text[-_CLEANED:])
            if blank is not None:
                text = text[: max(0, len(text) - _CLEANED) + blank.start()].rstrip()
        return text

    def _may_go_on(self, token: int) -> bool:
        """Whether a row of bytes is not at its end behind this token: special ones leave no trace."""
        if token in self._special:
            return True
        return _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None
