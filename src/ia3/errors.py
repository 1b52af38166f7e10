"""PEFT's classes of warnings and errors, which scripts catch by name, and how values stand in messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any


class PeftWarning(UserWarning):
    """A warning that PEFT gives in the same place."""


class PeftError(Exception):
    """What PEFT's own errors inherit from."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration matches no module of the model."""


class SettingError(ValueError):
    """Settings that are wrong. Their names stand between backticks, which the command line makes flags of."""


class MissingColumnError(SettingError):
    """Data lack a column that is asked for, `column`."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Say in an error what the input was that is wrong, where its message doesn't."""
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise said_again(f"{source}: {error}", error) from error


@contextmanager
def naming_its_base(adapter: object, base: str) -> Iterator[None]:
    """Say in an error about a base model which adapter it is that names this base."""
    try:
        yield
    except (OSError, ValueError) as error:
        if str(adapter) in str(error):
            raise
        raise said_again(f"{adapter} names the base model {shorten(base)}: {error}", error) from error


def said_again(message: str, error: Exception) -> Exception:
    """Another error of the kind that is caught by, with this message."""
    kinds = (NoMatchingPeftModuleError, SettingError, FileNotFoundError, OSError, ValueError)
    return next(kind for kind in kinds if isinstance(error, kind))(message)


def tokenizer_named(tokenizer: Any) -> str:
    """`tokenizer of 'some/model'`, for messages; `tokenizer` where it has no name."""
    name = getattr(tokenizer, "name_or_path", "")
    return f"tokenizer of {shorten(name)}" if name else "tokenizer"


def shorten(value: object, most: int = 100) -> str:
    """A value for a message: as Python writes it, so that control characters are escaped, and cut to `most` letters.

    Args:
        value: anything, however large or nested.
        most: the most characters.
    """
    try:
        written = _SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits
        written = "a number of thousands of digits"
    return written if len(written) <= most else f"{written[: most - 1]}…"


def listed(values: Iterable[object], most: int = 5) -> str:
    """`'a', 'b' and 3 more`: some of many values, each shortened."""
    given = list(values)
    first = ", ".join(map(shorten, given[:most]))
    return f"{first} and {len(given) - most:,} more" if len(given) > most else first


def printable(text: str) -> str:
    """A text without what commands a terminal: control characters and lone surrogates are escaped, line breaks stay."""
    return _COMMANDING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def fit_screen(message: str, most: int = 1500) -> str:
    """A message that is no longer than a screen: the middle is left out, since what to do stands at the end."""
    if len(message) <= most:
        return message
    return f"{message[: most * 2 // 3]} … {message[-most // 3 :]}"


class _Short(reprlib.Repr):
    """The standard library's, with an object's keys in their order."""

    def repr_dict(self, content: dict[Any, Any], level: int) -> str:
        if content and level <= 0:
            return "{...}"
        first = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(content.items(), _FEW)]
        return f"{{{', '.join([*first, '...'] if len(content) > _FEW else first)}}}"


_FEW = 4
_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _FEW
# What controls terminals, turns the direction of writing, or can't be encoded.
_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class RefusedElsewhereError(ValueError):
    """Of several processes the first one refuses the work, and says why."""
