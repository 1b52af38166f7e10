"""Labels in several spellings, and answers that are no labels: what is merged, what stays apart, what is refused."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from ia3.data.loading import load_examples
from ia3.tasks.examples import Example, Examples, match_labels, merge_labels_of
from ia3.tasks.labels import (
    describe_spellings,
    doubt_classes,
    label_key,
    match_spellings,
    merge_spellings,
    why_no_classes,
)
from ia3.tasks.task import TaskKind

CAFE = "café"
INTENTS = [f"{verb}_{what}" for verb in ("block", "order", "top_up", "find") for what in ("card", "pin", "cash")]


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text,label\n" + "".join(f'{text},"{label}"\n' for text, label in rows), encoding="utf-8")
    return str(path)


def in_memory(labels: list[str], kind: TaskKind = TaskKind.LABEL_WORDS) -> Examples:
    rows = tuple(Example(f"text {number}", label) for number, label in enumerate(labels))
    return Examples(rows, tuple(sorted({*labels})), "here", 0, 0, kind)


class TestOneLabelInSeveralSpellings:
    @pytest.mark.parametrize(
        "other",
        [
            "Not Sure",
            "NOT SURE",
            "not  sure",
            " not sure ",
            "not\u00a0sure",
            "not\tsure",
            "not sure\u200b",
            "\ufeffnot sure",
        ],
    )
    def test_case_blanks_and_what_nobody_sees(self, other: str) -> None:
        assert label_key(other) == label_key("not sure")

    def test_unicode_forms(self) -> None:
        assert label_key(unicodedata.normalize("NFD", CAFE).upper()) == label_key(CAFE)
        assert label_key("STRASSE") == label_key("Straße")

    @pytest.mark.parametrize(("one", "other"), [("cafe", CAFE), ("not sure", "not_sure"), ("1", "²"), ("a", "b")])
    def test_other_letters_are_other_labels(self, one: str, other: str) -> None:
        assert label_key(one) != label_key(other)

    def test_the_most_frequent_spelling_wins(self) -> None:
        labels = ["Good", "good", "GOOD", "good", "bad"]
        assert merge_spellings(labels) == {"Good": "good", "GOOD": "good"}

    def test_the_first_of_equals_wins(self) -> None:
        assert merge_spellings(["Good", "good", "good", "Good", "bad"]) == {"good": "Good"}

    def test_plain_blanks_and_composed_letters_win(self) -> None:
        apart = unicodedata.normalize("NFD", CAFE)
        assert merge_spellings(["not\u00a0sure", "not  sure", "Not sure", apart]) == {
            "not\u00a0sure": "not sure",
            "not  sure": "not sure",
            "Not sure": "not sure",
            apart: CAFE,
        }

    def test_known_labels_stay_and_ambiguous_ones_too(self) -> None:
        known = ["Good", "BAD", "us", "US"]
        assert match_spellings(["good", "Good", "bad", "Us", "us", "poor"], known) == {"good": "Good", "bad": "BAD"}

    def test_the_line_names_them(self) -> None:
        replaced = {"Good": "good", "GOOD": "good", unicodedata.normalize("NFD", CAFE): CAFE}
        assert describe_spellings(replaced) == r"'Good' and 'GOOD' as 'good', 'cafe\u0301' as 'café'"
        many = {f"L{number}": f"l{number}" for number in range(9)}
        assert describe_spellings(many).endswith("'L3' as 'l3', …")


class TestReadingSpellings:
    ROWS = [*[(f"a {n}", "positive") for n in range(10)], ("b", "Positive"), ("c", "POSITIVE "), ("d", "negative")] + [
        (f"e {n}", "Negative") for n in range(4)
    ]

    @pytest.mark.parametrize("kind", [TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION])
    def test_are_merged_and_said(self, tmp_path: Path, kind: TaskKind) -> None:
        found = load_examples(write(tmp_path / "a.csv", self.ROWS), kind=kind)
        assert found.labels == ("Negative", "positive")
        assert Counter(row.label for row in found) == {"positive": 12, "Negative": 5}
        counts, said = found.describe().split("\n")
        assert counts.endswith("a.csv: 17 rows (5 Negative, 12 positive)")
        assert said.startswith(
            "Spellings of one label are merged: 'Positive' and 'POSITIVE' as 'positive', 'negative' as"
        )
        assert "`merge_labels=False` keeps" in said

    def test_stay_apart_where_asked_for_and_are_no_rare_classes(self, tmp_path: Path) -> None:
        found = load_examples(write(tmp_path / "a.csv", self.ROWS), merge_labels=False)
        assert found.labels == ("Negative", "POSITIVE", "Positive", "negative", "positive")
        said = found.describe()
        assert "balance" not in said
        assert "stay apart: 'positive', 'Positive' and 'POSITIVE', 'negative' and 'Negative'." in said

    def test_rare_classes_are_still_said(self, tmp_path: Path) -> None:
        rows = [*self.ROWS, *[(f"f {n}", "Positive") for n in range(20)]]
        assert (
            "positive is 6.4 times as frequent" in load_examples(write(tmp_path / "a.csv", rows)).describe().casefold()
        )
        said = load_examples(write(tmp_path / "a.csv", rows), merge_labels=False).describe().casefold()
        assert "positive is 6.4 times as frequent as negative" in said

    def test_the_names_of_a_class_label_are_its_own(self, tmp_path: Path) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["us", "US"])})
        Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "a.parquet")
        found = load_examples(tmp_path / "a.parquet")
        assert (found.labels, [row.label for row in found]) == (("us", "US"), ["us", "US"])
        assert merge_labels_of(found) is found
        # Held out, they aren't made one of training's either.
        assert match_labels(found, ["Us"], "the adapter's") is found
        assert [row.label for row in match_labels(in_memory(["Us"]), found.labels, "…")] == ["Us"]

    def test_tags_stay_apart_and_it_is_said(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.csv", [("one two", "H h"), ("three", "O")])
        found = load_examples(path, kind=TaskKind.TOKEN_CLASSIFICATION)
        assert set(found.labels) == {"H", "h", "O"}
        assert "stay apart: 'H' and 'h'." in found.describe()

    @pytest.mark.parametrize("kind", [TaskKind.GENERATION, TaskKind.INSTRUCTIONS])
    def test_free_text_stays(self, tmp_path: Path, kind: TaskKind) -> None:
        found = load_examples(write(tmp_path / "a.csv", self.ROWS), kind=kind)
        assert [row.label for row in found] == [label.strip() for _, label in self.ROWS]
        assert "\n" not in found.describe()

    def test_in_memory_their_order_stays(self) -> None:
        examples = Examples(in_memory(["Up", "down", "up", "up"]).rows, ("Up", "up", "flat", "down"), "here", 0, 0)
        assert merge_labels_of(examples).labels == ("up", "flat", "down")

    def test_held_out_ones_are_trainings(self) -> None:
        found = match_labels(
            in_memory([" Positive", "negative", "new"]), ["positive", "negative"], "the training data's"
        )
        assert [row.label for row in found] == ["positive", "negative", "new"]
        assert found.remarks == ("Other spellings are read as the training data's labels: ' Positive' as 'positive'.",)


class TestAnswersThatAreNoClasses:
    @pytest.mark.parametrize(
        ("answers", "said"),
        [
            ([f"answer {n}" for n in range(12)], "12 of 12 answers are different, such as 'answer 0', 'answer 1'"),
            ([str(n * n) for n in range(12)], "12 of 12 answers are different"),
            (
                [f"{n / 37:.2f}" for n in range(12)],
                "decimal numbers, 12 different ones to 12 texts, such as '0.00', '0.03'",
            ),
            ([f"{n / 37:.2f}".replace(".", ",") for n in range(12)], "decimal numbers"),
            ([f"${n}.99" for n in range(12)], "decimal numbers"),
            ([f"{n % 50 / 10}" for n in range(1000)], "decimal numbers, 50 different ones to 1,000 texts"),
            ([*(f"{n / 37:.2f}" for n in range(30)), "unknown"], "decimal numbers"),
            (
                [f"the number {n % 8} is the one that you asked for" for n in range(12)],
                "texts of 10 words, 8 different ones to 12",
            ),
        ],
    )
    def test_are_named(self, answers: list[str], said: str) -> None:
        assert said in str(why_no_classes(answers))

    @pytest.mark.parametrize(
        "answers",
        [
            ["positive", "negative", "neutral"],
            ["1", "2", "3", "4"],
            [str(n % 77) for n in range(150)],
            [f"{n % 8}.5" for n in range(11)],  # grades in halves
            [f"3.{n % 12}" for n in range(60)],  # few decimals, often
            ["0.1", "0.9"] * 6,
            INTENTS,  # one row each, which are names
            ["sci.med", "DESC:manner", "E11.9", "AddToPlaylist", "cs-AI", "I10"],
            # Answers in a few wordings are classes, however long.
            [f"thank you for writing to us, our team number {n % 4} will answer soon" for n in range(40)],
        ],
    )
    def test_classes_are_left_alone(self, answers: list[str]) -> None:
        assert why_no_classes(answers) is None

    @pytest.mark.parametrize(("classes", "rows"), [(77, 50), (77, 150), (150, 60), (150, 150), (150, 1000)])
    @pytest.mark.parametrize("name", ["intent {}", "{}", "find_{}"])
    def test_many_classes_in_few_rows_are_left_alone(self, classes: int, rows: int, name: str) -> None:
        for seed in range(20):
            drawn = random.Random(seed).choices(range(classes), k=rows)
            assert why_no_classes([name.format(number) for number in drawn]) is None

    def test_doubtful_ones_are_said(self) -> None:
        assert doubt_classes([f"{n % 11 / 10}" for n in range(100)]).startswith("the labels are decimal numbers")
        assert doubt_classes([*map(str, range(20)), *["0", "1"] * 4]).startswith("18 labels have a single row")
        assert doubt_classes([str(n % 77) for n in range(150)]) == ""
        assert "Are these labels? 18 labels have" in in_memory([*map(str, range(20)), *["0", "1"] * 4]).describe()
