"""Which labels are one in several spellings, and which answers are no labels at all."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from ia3.errors import shorten

# Joiners are characters that nobody sees, as other format characters are, but they shape emoji and Persian words.
_JOINERS = "\u200c\u200d"
# How many spellings and labels a remark names.
_NAMED = 4


def label_key(label: str) -> str:
    """What the spellings of one label share: case, white space, invisible characters and Unicode's forms aside."""
    return unicodedata.normalize("NFC", _tidy(label).casefold())


def _tidy(label: str) -> str:
    """A label with single plain blanks, without invisible characters, in Unicode's composed form."""
    visible = "".join(letter for letter in label if letter in _JOINERS or unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFC", visible).split())


def merge_spellings(labels: Iterable[str]) -> dict[str, str]:
    """The spellings that give way to another one, the most frequent or among equals the first.

    Blanks and Unicode's form don't make the choice: no tokenizer gives back two blanks or one that doesn't break.

    Args:
        labels: the label of each row.

    Returns:
        Spelling to label; empty where each label has one spelling.
    """
    found, tidy = Counter(labels), Counter[str]()
    for label, count in found.items():
        tidy[_tidy(label)] += count
    kept: dict[str, str] = {}
    for label, _ in tidy.most_common():  # among equals in the order of the rows
        kept.setdefault(label_key(label), label)
    return {label: kept[label_key(label)] for label in found if kept[label_key(label)] != label}


def match_spellings(labels: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """The labels that aren't known, each with the one known label of which it is another spelling.

    A known label stays as it is, and one that could be several known ones does, too.
    """
    by_key = _by_key(known)
    unknown = [label for label in dict.fromkeys(labels) if label not in known]
    return {label: by_key[label_key(label)][0] for label in unknown if len(by_key.get(label_key(label), ())) == 1}


def spellings_apart(labels: Iterable[str]) -> list[list[str]]:
    """The groups of labels that are spellings of one."""
    return [group for group in _by_key(dict.fromkeys(labels)).values() if len(group) > 1]


def _by_key(labels: Iterable[str]) -> dict[str, list[str]]:
    by_key: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        by_key[label_key(label)].append(label)
    return by_key


def describe_spellings(replaced: Mapping[str, str]) -> str:
    """`'Good' and 'GOOD' as 'good', 'Bad' as 'bad'`: what is read as what."""
    groups: dict[str, list[str]] = defaultdict(list)
    for spelling, label in replaced.items():
        groups[label].append(spelling)
    parts = [f"{quote_labels(spellings)} as {_quoted(label)}" for label, spellings in groups.items()]
    return ", ".join([*parts[:_NAMED], *(["…"] if len(parts) > _NAMED else [])])


def quote_labels(labels: Sequence[str]) -> str:
    """`'a', 'b' and 'c'`, some of them where there are many."""
    if len(labels) > _NAMED:
        return f"{', '.join(map(_quoted, labels[:_NAMED]))} and {len(labels) - _NAMED:,} more"
    *first, last = map(_quoted, labels)
    return f"{', '.join(first)} and {last}" if first else last


def _quoted(label: str) -> str:
    """In quotes; by its code points where its letters would look like another spelling's."""
    return shorten(label) if unicodedata.is_normalized("NFC", label) else ascii(label[:100])


# Where answers cease to be classes. Real classes mostly stay below: of 50 rows of BANKING77 74 % have different
# intents, of 50 rows of CLINC150 86 %; and names of classes seldom have more than six words.
_FEWEST_ANSWERS = 5
_NEARLY_ALL = 0.95
_MOSTLY = 0.5
_LONGEST_NAME = 6
_MOST_GRADES = 20
# card_arrival, sci.med, DESC:manner, E11.9, AddToPlaylist: names of classes, and no words of an answer.
_IDENTIFIER = re.compile(r"[^\W\d_][^\W_]*([_.:/>#-][^\W_]+)+|[^\W\d_]+\d[\w.]*|[A-Za-z][a-z]+([A-Z][a-z]+)+")
_NUMBER = re.compile(r"[-+]?[$€£]?\s?\d*[.,]?\d+(e[-+]?\d+)?\s?[%€]?", re.IGNORECASE)


def why_no_classes(answers: Sequence[str]) -> str | None:
    """What tells that answers are free text or measured numbers; None where they may be classes.

    Args:
        answers: the answer to each text, training and held-out ones together.
    """
    counts = Counter(answers)
    different = len(counts)
    if different < _FEWEST_ANSWERS:
        return None
    shown = quote_labels(list(counts)[:3])
    share = different / len(answers)
    if _are_measurements(counts) and (different > _MOST_GRADES or share > _MOSTLY):
        return (
            f"the answers are decimal numbers, {different:,} different ones to {len(answers):,} texts, such as {shown}"
        )
    words = median(len(answer.split()) for answer in answers)
    if words > _LONGEST_NAME and share > _MOSTLY:
        return (
            f"the answers are texts of {words:.0f} words, {different:,} different ones to {len(answers):,} texts, "
            f"such as {next(iter(counts))[:60]!r}"
        )
    names = sum(bool(_IDENTIFIER.fullmatch(answer)) for answer in counts)
    if share >= _NEARLY_ALL and names < different / 3:
        return f"{different:,} of {len(answers):,} answers are different, such as {shown}"
    return None


def doubt_classes(answers: Sequence[str]) -> str:
    """A remark on classes that may be none, though they are trained on; empty where nothing is odd."""
    counts = Counter(answers)
    if len(counts) >= _FEWEST_ANSWERS and _are_measurements(counts):
        return "the labels are decimal numbers, and each is a class of its own (`task: generation` writes numbers)"
    single = sum(count == 1 for count in counts.values())
    if single > max(2 * _FEWEST_ANSWERS, _MOSTLY * len(answers)):
        return f"{single:,} labels have a single row (`task: generation` is for free text)"
    return ""


def _are_measurements(counts: Counter[str]) -> bool:
    """Whether nearly all are numbers and most of these have decimals; halves are grades."""
    numbers = {answer: _number(answer) for answer in counts}
    numeric = sum(counts[answer] for answer, number in numbers.items() if number is not None)
    decimals = sum(number is not None and not (2 * number).is_integer() for number in numbers.values())
    return numeric >= 0.9 * counts.total() and decimals > len(counts) / 2


def _number(answer: str) -> float | None:
    if not _NUMBER.fullmatch(answer):
        return None
    return float(re.sub(r"[$€£%\s]", "", answer).replace(",", "."))
