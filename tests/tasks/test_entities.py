"""Entity scores: every span looked at by its definition, and cases by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia3.tasks.entities import EntityScores, are_iob2, entity_scores, find_entities

TAG = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
PAIRS = st.lists(st.lists(st.tuples(TAG, TAG), max_size=9), max_size=4)


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """Each span of each type that begins an entity, stays in it and can't be longer."""

    def is_entity(kind: str, start: int, end: int) -> bool:
        inside = (f"B-{kind}", f"I-{kind}")
        begins = tags[start] == inside[0] or (
            tags[start] == inside[1] and (start == 0 or tags[start - 1] not in inside)
        )
        return begins and all(tag == inside[1] for tag in tags[start + 1 : end]) and tags[end : end + 1] != [inside[1]]

    return {
        (kind, start, end)
        for kind in ("PER", "LOC")
        for start in range(len(tags))
        for end in range(start + 1, len(tags) + 1)
        if is_entity(kind, start, end)
    }


@given(PAIRS)
def test_scores_count_the_spans_that_both_have(texts):
    references, predictions = ([[pair[side] for pair in text] for text in texts] for side in (0, 1))
    expected = {(number, *span) for number, tags in enumerate(references) for span in spans(tags)}
    answered = {(number, *span) for number, tags in enumerate(predictions) for span in spans(tags)}
    hits = len(expected & answered)
    scores = entity_scores(references, predictions)
    assert scores.precision == (hits / len(answered) if answered else 0)
    assert scores.recall == (hits / len(expected) if expected else 0)
    total = scores.precision + scores.recall
    assert scores.f1 == pytest.approx(2 * scores.precision * scores.recall / total if total else 0)


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("I-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("B I O B", [("", 0, 2), ("", 3, 4)]),
        ("B-made-up I-made-up", [("made-up", 0, 2)]),
        ("O O", []),
    ],
)
def test_entities_by_hand(tags, entities):
    assert find_entities(tags.split()) == entities


def test_an_entity_counts_whole_or_not_at_all():
    references = [["B-PER", "I-PER", "O", "B-LOC", "B-LOC"], ["O", "B-PER"]]
    answers = [["B-PER", "O", "O", "B-LOC", "I-LOC"], ["O", "B-PER"]]
    # 4 entities, 3 answered, 1 of them right: of the others none ends where it should.
    assert entity_scores(references, answers) == EntityScores(1 / 3, 1 / 4, 2 / 7)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER", True),
        ("B-PER", True),
        ("O B I", True),
        ("O", False),
        ("", False),
        ("NOUN VERB", False),
        ("O B-PER E-PER", False),
    ],
)
def test_which_tags_mark_entities(tags, expected):
    assert are_iob2(tags.split()) is expected


def test_other_tags_and_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\['E-PER'\] mark no entities"):
        entity_scores([["B-PER", "E-PER"]], [["O", "O"]])
    with pytest.raises(ValueError, match="one tag for each word"):
        entity_scores([["O"], ["O", "O"]], [["O", "O"], ["O"]])
