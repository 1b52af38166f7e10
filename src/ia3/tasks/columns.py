"""What columns are usually called: those with a part of the text, and those with the answer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from ia3.errors import MissingColumnError, listed, shorten

# What the model usually has to read: parts of a text, what comes beside it, and what is one by itself.
_TEXTS = ("instruction", "input", "context", "passage", "premise", "hypothesis", "question", "query", "prompt", "claim")
_BESIDE = ("system", "system_prompt", "history", "choices", "options", "evidence")
_WHOLE = ("text", "sentence", "document", "article", "dialogue", "messages", "conversation", "conversations")
_OF_THE_TEXT = {*_TEXTS, *_BESIDE, *_WHOLE, "inputs", "instructions", "contexts", "paragraph", "system_message"}
# What holds the answer, the likelier first.
_ANSWERS = ("label", "completion", "output", "response", "answer", "target", "ner_tags", "tags", "category", "intent")
_WORDS = "tokens"
# And what stands beside both.
_MORE = (
    *("id", "index", "date", "datum", "name", "title", "titel", "class", "labels", "sentiment", "topic", "rating"),
    *("score", "stars", "source", "review", "reviews", "comment", "kommentar", "message", "nachricht", "body"),
    *("content", "bewertung", "kategorie", "language", "sprache"),
)
_PARTS, _SHOWN = 5, 20  # at most so many columns are one text, and are listed
_COMPARED = 100  # so many characters of a name tell which was meant
_NUMBERED = re.compile(r"(.+?)_?[0-9ab]")


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]+", "_", column.strip().casefold())


def is_usual(column: str) -> bool:
    """Whether a column is often called so."""
    return _plain(column) in {*_OF_THE_TEXT, *_ANSWERS, *_MORE, _WORDS}


def belongs_to_text(column: str, read: Iterable[str]) -> bool:
    """Whether a column usually belongs to the text: by its name, or as `sentence2` beside a read `sentence1`."""
    return _plain(column) in _OF_THE_TEXT or _stem(column) in map(_stem, read)


def _stem(column: str) -> str:
    """What siblings share: a name without its number."""
    return match[1] if (match := _NUMBERED.fullmatch(_plain(column))) else _plain(column)


def template_of(columns: Sequence[str]) -> str:
    """The template that shows several columns one after the other, an instruction before what it is about."""
    ordered = sorted(columns, key=lambda column: _plain(column) != "instruction")
    return " ".join(f"{{{column}}}" for column in ordered)


def likely_columns(found: Sequence[str]) -> str:
    """What to name, as in "`text_column='prompt'` and `label_column='completion'`"; empty where names don't tell."""
    names = {_plain(column): column for column in found}
    answer = next((names[name] for name in _ANSWERS if name in names), None)
    texts = [column for column in found if _plain(column) in _TEXTS]
    if not texts:
        stems = {column: _stem(column) for column in found if _stem(column) != _plain(column)}
        siblings = Counter(stems.values())
        texts = [column for column, stem in stems.items() if 1 < siblings[stem] <= _PARTS]
    if not texts:
        texts = [names[name] for name in (_WORDS, "text", "sentence") if name in names][:1]
    if not texts or answer is None:
        return ""
    given = [f"`label_column={answer!r}`"] if answer != "label" else []
    if len(texts) > 1:
        given.insert(0, f"`template={template_of(texts)!r}`")
    elif texts != ["text"]:
        given.insert(0, f"`text_column={texts[0]!r}`")
    return " and ".join(given)


def as_text(value: Any, what: str) -> str:
    """A cell as text: None and NaN are empty, a number is its digits.

    Args:
        value: the cell.
        what: its name and place, for the error.

    Returns:
        The text without white space around it.

    Raises:
        ValueError: it holds anything else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        # A column of integers with a gap in it comes as floats.
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise ValueError(f"{what} is a {type(value).__name__}, expected a text or a number.")
    return str(value).strip()


def require_columns(
    source: str, found: Iterable[str], *wanted: str, labelled: bool = False, setting: str = "text_column"
) -> None:
    """Refuse a source that lacks a wanted column.

    Args:
        source: where the columns are.
        found: the columns.
        wanted: those that are needed.
        labelled: whether an answer is one of these.
        setting: what names them.

    Raises:
        ValueError: a column is missing; the message names those that are there, and the likely ones among them.
    """
    found = list(found)
    for column in wanted:
        if column not in found:
            likely = likely_columns(found) if labelled else ""
            how = "template" if likely.startswith("`template") else setting
            plain = {_plain(name): name for name in found[:_COMPARED] if len(name) <= _COMPARED}
            near = [
                f" Did you mean {shorten(plain[name])}?"
                for name in get_close_matches(_plain(column[:_COMPARED]), plain, 1, 0.75)
            ]
            raise MissingColumnError(
                f"{source} has no column {shorten(column)}; its columns are {listed(found, _SHOWN)}."
                f"{''.join(near)} Name the right {'ones' if labelled else 'one'} by `{how}`"
                f"{' and `label_column`' if labelled else ''}{f', such as {likely}' if likely else ''}.",
                column,
            )
