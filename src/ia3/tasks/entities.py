"""Entities in tagged words, counted as conlleval counts them: right where type, beginning and end are right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Entity = tuple[str, int, int]
"""Its type, its first word and the word behind its last."""


@dataclass(frozen=True)
class EntityScores:
    """Precision, recall and F1 over the entities of all texts; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float


def are_iob2(tags: Iterable[str]) -> bool:
    """Whether tags mark entities: `O`, `B-type` and `I-type` alone, or `B` and `I` without types, and one that does."""
    marks = {tag if tag == "O" else tag.partition("-")[0] + "-" for tag in tags}
    return marks <= {"O", "B-", "I-"} and marks != {"O"} and bool(marks)


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one text, in order.

    One begins at each `B`, and at an `I` that follows `O` or another type; it goes on through the `I` of its type.

    Args:
        tags: one IOB2 tag a word.
    """
    entities: list[Entity] = []
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        goes_on = mark == "I" and bool(entities) and entities[-1][0] == kind and entities[-1][2] == place
        if goes_on:
            entities[-1] = (kind, entities[-1][1], place + 1)
        elif mark != "O":
            entities.append((kind, place, place + 1))
    return entities


def entity_scores(references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> EntityScores:
    """Compare the entities of texts.

    Args:
        references: the right IOB2 tags, one sequence a text.
        predictions: the model's, one a word as well.

    Raises:
        ValueError: texts or words without a counterpart, or tags that are not IOB2.
    """
    if [len(tags) for tags in references] != [len(tags) for tags in predictions]:
        raise ValueError("The predictions don't match the words: expected one tag for each word of each text.")
    other = sorted({tag for text in (*references, *predictions) for tag in text if not (tag == "O" or are_iob2([tag]))})
    if other:
        raise ValueError(f"The tags {other[:5]} mark no entities: expected O, B-type and I-type.")
    right = found = hits = 0
    for expected, answered in zip(references, predictions, strict=True):
        entities, guesses = set(find_entities(expected)), set(find_entities(answered))
        right, found, hits = right + len(entities), found + len(guesses), hits + len(entities & guesses)
    return EntityScores(_share(hits, found), _share(hits, right), _share(2 * hits, right + found))


def tag_scores(
    references: Sequence[Sequence[str]],
    predictions: Sequence[Sequence[str]],
    tags: Iterable[str],
    *,
    words_left_out: int,
) -> dict[str, float]:
    """What tags of words are judged by besides their accuracy, by name.

    Args:
        references: the right tags of the words that were read, one sequence a text.
        predictions: the model's.
        tags: all of the task's; of entities where they are IOB2.
        words_left_out: how many words had no token within the longest length allowed: these are in no other figure.
    """
    scores = {}
    if are_iob2(tags):
        found = entity_scores(references, predictions)
        scores = {"entity_f1": found.f1, "entity_precision": found.precision, "entity_recall": found.recall}
    if words_left_out:
        scores["words_left_out"] = float(words_left_out)
    return scores


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
