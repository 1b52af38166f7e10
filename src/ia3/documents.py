"""JSON that is read back: parsed within limits, each field of the type that it is declared with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ia3.errors import listed, shorten
from ia3.files import read_file

LIMIT = 16 << 20
"""The most bytes of a file in JSON: parsed, each can take some 25 of memory."""

_DEEPEST = 64
_MOST_LISTS = 1_000_000
_TOO_DEEP = f"lists or objects stand more than {_DEEPEST} deep within each other"
_LONE = re.compile(r"\\u[dD][89a-fA-F]")
_WORDS: dict[Any, str] = {
    None: "null",
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    set: "a list",
    str: "a text",
}


def read_json(path: str | Path, limit: int = LIMIT, *, finite: bool = True) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        limit: the most bytes that it may have.
        finite: refuse NaN and infinity.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what `read_file` and `parse_json` refuse.
    """
    return parse_json(read_file(Path(path), limit), path, finite=finite)


def parse_json(content: bytes | str, source: object, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object that a text holds, in UTF-8 with or without a byte order mark.

    Args:
        content: the text.
        source: where it stands, for the error.
        finite: refuse NaN and infinity.

    Raises:
        ValueError: no JSON, another value than an object, a key twice, half a character, a number that no float holds,
            or lists in lists without an end.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if text.count("[") + text.count("{") > _MOST_LISTS:
            raise ValueError(f"there are more than {_MOST_LISTS:,} lists and objects")
        found = json.loads(
            text,
            object_pairs_hook=_with_distinct_keys,
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite if finite else None,
        )
        expect_sound(found, text)
    except UnicodeDecodeError as error:
        reason = f"byte {error.object[error.start]:#04x} at position {error.start} is not UTF-8"
        raise ValueError(f"{source} is not valid JSON: {reason}. Save it as UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"{source} is not valid JSON: {_TOO_DEEP}. Copy or write it again.") from error
    except ValueError as error:  # of the parser, of a hook, or an integer of thousands of digits
        raise ValueError(f"{source} is not valid JSON: {error}. Copy or write it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds a {type(found).__name__}, not a JSON object.")
    return found


def expect_sound(found: Any, text: str) -> None:
    """Refuse what JSON may hold and nothing can be done with: lists in lists without an end, and half characters.

    Args:
        found: what was read.
        text: where it was read.

    Raises:
        ValueError: there is such.
    """
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(found):
        raise ValueError(_TOO_DEEP)
    if _LONE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = shorten(error.object[error.start])
            raise ValueError(f"{half} is half a character, which no text can be written with") from error


def wrong_field(content: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field whose value isn't of its type, as a sentence; None where all are.

    Args:
        content: names and values; names that are not in `fields` pass.
        fields: the types, written as Python's annotations.
    """
    for name, value in content.items():
        if name in fields and not fits(value, fields[name]):
            return f"{name} is {shorten(value)}, expected {describe(fields[name])}."
    return None


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that an annotation names; a list in JSON may be meant for a set."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str | int) and value in inner
    if origin in (list, set):
        is_list = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
        return is_list and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is Any:
        return True
    if kind is type(None):
        return value is None
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str) and value in [each.value for each in kind]
    if kind in (int, float):  # numpy's, too, and a bool is none
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """An annotation's types in words: "a list of texts, a text or null"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        words = list(dict.fromkeys(map(describe, inner)))
        return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    if origin is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return f"one of [{listed(map(str, inner or kind), 10)}]"
    if origin in (list, set):
        return f"a list of {_plural(inner[0])}"
    if origin is dict:
        return f"an object of {_plural(inner[1])}" if inner[1] is not Any else "an object"
    return _WORDS.get(None if kind is type(None) else kind, "anything")


def _plural(kind: Any) -> str:
    return f"{describe(kind).partition(' ')[2]}s"


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's content; the parser itself would keep the last of equal keys in silence."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)} stands there twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{shorten(digits)} is too large a number")
    return number


def _is_deep(value: Any) -> bool:
    """Whether lists and objects stand within each other deeper than any file of ours has them."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        contents = [each.values() if isinstance(each, dict) else each for each in level]
        level = [inner for content in contents for inner in content if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True
