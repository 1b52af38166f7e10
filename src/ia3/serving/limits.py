"""How much a client may ask for, and who may ask: limits, and keys that are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ia3.files import read_file

_MOST_OF_KEYS = 1 << 20
_SHORTEST_KEY = 16


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that one request may bring and ask for.

    Args:
        body_bytes: the bytes of its body.
        body_s: seconds until its body is there.
        texts: its texts or prompts.
        models: the models that it names.
        answers: texts times models.
        characters: the characters of a text, and of the messages of a conversation together.
        messages: the messages of a conversation.
        new_tokens: the tokens that it may ask to be written.
        running: the requests that one key may have under way; of all clients together where there are no keys.
        answer_s: seconds until its answer, unless it gives itself fewer.
    """

    body_bytes: int = 2 << 20
    body_s: float = 30.0
    texts: int = 128
    models: int = 128
    answers: int = 1024
    characters: int = 100_000
    messages: int = 256
    new_tokens: int = 4096
    running: int = 256
    answer_s: float = 120.0


class Keys:
    """Keys by their sha256, so that comparing takes as long for any wrong one.

    Args:
        keys: what clients send as `Authorization: Bearer KEY`.

    Raises:
        ValueError: a key that could be guessed, or that no header can hold.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        for number, key in enumerate(keys, 1):
            if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"Key {number} can't be taken: expected {_SHORTEST_KEY} or more letters, digits and signs of "
                    'ASCII, such as `python -c "import secrets; print(secrets.token_urlsafe(32))"` prints.'
                )
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def read(cls, file: Path | None, variable: str) -> Keys:
        """Those of a file, one a line, without blank lines and those behind a #; else of an environment variable.

        Raises:
            OSError: the file can't be read.
            ValueError: it holds no keys, or some that can't be taken.
        """
        if file is None:
            return cls(os.environ.get(variable, "").split())
        try:
            lines = read_file(file, _MOST_OF_KEYS).decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: expected one key a line.") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{file} holds no key: expected one a line.")
        return cls(keys)

    def find(self, authorization: bytes | None) -> int | None:
        """The place of the key that a header brings; None for none of these.

        Args:
            authorization: the header's value.
        """
        scheme, _, key = (authorization or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        found = None
        for place, digest in enumerate(self._digests):  # all of them, whichever it is
            if hmac.compare_digest(digest, given):
                found = place
        return found if scheme.lower() == b"bearer" else None
