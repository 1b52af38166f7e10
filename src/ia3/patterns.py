"""Regular expressions of adapters' configurations, which may come from anywhere, matched within limits.

They mean what Python's `re` says that they mean, as in PEFT. `re` itself can't be stopped, and some expressions take it
for ever. The package `regex` stops after a time. It knows more than `re` does, so an expression must be one of `re`'s
first, and what the two read differently is written for it in a form that both read alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

from ia3.errors import shorten

# Characters, with repeats written out: enough for the paths of all linear layers of the largest models.
_MOST_CHARACTERS = 100_000
# Seconds for all of a model's paths; honest expressions take some hundredths.
_MOST_SECONDS = 1.0

_TOKEN = re.compile(
    r"(?P<escape>\\N\{[^}]*\}|\\.)"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<comment>\(\?#[^)]*\))"
    r"|(?P<flags>\(\?[a-zA-Z]*x)"
    r"|\{(?P<least>[0-9]*)(?P<to>,(?P<most>[0-9]*))?\}"
    r"|.",
    re.DOTALL,
)
_IN_SET = re.compile(r"\\.|\[", re.DOTALL)
_OUTSIDE_OF_ASCII = re.compile(r"[^\x00-\x7f]|\\[uUNx]")


def fully_matching(pattern: str, paths: Iterable[str], field: str) -> set[str]:
    """The paths that a regular expression matches in full.

    Args:
        pattern: as `re` reads it.
        paths: of modules.
        field: the configuration's field, for the error.

    Raises:
        ValueError: no regular expression, one that is too large, or one that takes too long.
    """
    try:
        compiled = _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        why = "its parentheses are too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{field}: {shorten(pattern)} is not a valid regular expression: {why}.") from error
    except ValueError as error:
        raise ValueError(f"{field}: the regular expression {shorten(pattern)} {error}.") from error
    end = time.monotonic() + _MOST_SECONDS
    try:
        return {path for path in paths if compiled.fullmatch(path, timeout=max(end - time.monotonic(), 1e-3))}
    except (TimeoutError, MemoryError) as error:
        raise ValueError(
            f"{field}: the regular expression {shorten(pattern)} takes longer than {_MOST_SECONDS:g} s to match the "
            "model's modules: write it without repeats inside of repeats, or name the modules."
        ) from error


@lru_cache(maxsize=32)
def _compiled(pattern: str) -> Any:
    """The expression for `regex`, once `re` took it; a ValueError's message follows the expression."""
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(f"has {len(pattern):,} characters: expected {_MOST_CHARACTERS:,} at most")
    if re.search(r"\(\?[a-zA-Z]*i", pattern) and _OUTSIDE_OF_ASCII.search(pattern):
        # `re` looks for the other case of each character of a set.
        raise ValueError("ignores case and names characters outside of ASCII: leave out one of the two")
    re.compile(pattern)
    return regex.compile(_as_regex_reads_it(pattern), flags=regex.V0, cache_pattern=False)


def _as_regex_reads_it(pattern: str) -> str:
    """The expression with braces that repeat nothing and brackets in sets escaped, which mean more to `regex`.

    It copies what is repeated a number of times, so that number is counted.
    """
    written: list[str] = []
    sizes, last = [0], 0  # of each group around, and of the item before
    for token in _TOKEN.finditer(pattern):
        text, times = token[0], 0
        if token["flags"]:
            raise ValueError("has the flag x, by which spaces and comments mean nothing: write it without")
        if token["least"] is not None and (token["least"] or token["to"]):
            least = token["least"] or "0"
            times = max(int(least[-9:]) if len(least) < 10 else 10**9, 1)
            text = f"{{{least}{token['to'] or ''}}}"
        elif text in "{}":
            text = rf"\{text}"
        elif token["set"]:
            text = text[0] + _IN_SET.sub(lambda found: found[0] if len(found[0]) > 1 else r"\[", text[1:])
        written.append(text)
        if times:
            sizes[-1] += last * (times - 1)
            last *= times
        elif text == "(":
            sizes.append(1)
            last = 0
        elif text == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            last = len(token[0])
            sizes[-1] += last
        if max(sizes[-1], last) > _MOST_CHARACTERS:
            raise ValueError(
                f"repeats so much that it has more than {_MOST_CHARACTERS:,} characters when the repeats are written "
                "out: repeat less"
            )
    return "".join(written)
