"""Reading labelled text: each source, what is counted, what is refused, and how it is split."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer

from ia3.bundled import TITLER, resolve_model
from ia3.data import records, tables
from ia3.data.loading import bundled_tweets, load_examples
from ia3.data.records import SENTIMENTS
from ia3.inference.predict import count_truncated
from ia3.tasks.example import Example, _normalised
from ia3.tasks.examples import Examples, split_examples
from ia3.tasks.task import TaskKind
from ia3.tasks.template import Template

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    """Write a file and give its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def examples(*rows, labels=SENTIMENTS, source="here"):
    rows = tuple(Example(text, label) for text, label in rows)
    return Examples(rows, labels, source, len(rows) - len({row.text for row in rows}), 0)


def pairs(found):
    return [(row.text, row.label) for row in found]


class TestExamples:
    def test_is_a_sequence(self):
        found = examples(("a", "neutral"), ("b", "positive"), ("c", "negative"))
        assert len(found) == 3
        assert found[1] == Example("b", "positive")
        assert found[-1].text == "c"
        assert [row.text for row in found] == found.texts == ["a", "b", "c"]

    def test_a_slice_is_examples_that_count_their_own(self):
        found = examples(("a", "neutral"), ("a", "neutral"), ("b", "positive"))
        assert found.duplicates == 1
        part = found[1:]
        assert isinstance(part, Examples)
        assert pairs(part) == [("a", "neutral"), ("b", "positive")]
        assert part.duplicates == 0
        assert part.labels == SENTIMENTS

    def test_describe_counts_classes(self):
        found = examples(("a", "neutral"), ("b", "positive"))
        assert found.describe() == "here: 2 rows (0 negative, 1 neutral, 1 positive)"

    def test_describe_says_what_is_odd(self, write):
        content = "text,label\nA  b,x\na B,y\na b,x\nc,x\n,\n ,x\nd,x\nD,y\n"
        found = load_examples(write("odd.csv", content))
        assert found.describe().endswith(
            "odd.csv: 6 rows (4 x, 2 y); 3 duplicates kept; 2 texts with different labels; 2 empty rows dropped"
        )

    def test_describe_one_of_each(self, write):
        found = load_examples(write("odd.csv", "text,label\na,x\na,y\n,\n"))
        assert "; 1 duplicate kept; 1 text with different labels; 1 empty row dropped" in found.describe()


class TestPhraseBank:
    LINES = "Profit fell .@negative\nIt met @ noon .@neutral\nSales in Köln rose .@positive\n"
    ROWS = (
        ("Profit fell .", "negative"),
        ("It met @ noon .", "neutral"),
        ("Sales in Köln rose .", "positive"),
    )

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "iso-8859-1"])
    @pytest.mark.parametrize("line_end", ["\n", "\r\n"])
    def test_txt(self, write, encoding, line_end):
        content = self.LINES.replace("\n", line_end).encode(encoding)
        found = load_examples(str(write("bank.txt", content)))
        assert pairs(found) == list(self.ROWS)
        assert found.labels == ("negative", "neutral", "positive")
        assert (found.duplicates, found.empty) == (0, 0)

    def test_no_line_break_at_the_end(self, write):
        assert len(load_examples(write("bank.txt", self.LINES.rstrip()))) == 3

    def test_a_sentence_may_hold_what_unicode_calls_a_line_break(self, write):
        found = load_examples(write("bank.txt", "a\x85b\u2028c@neutral\n"))
        assert pairs(found) == [("a\x85b\u2028c", "neutral")]

    def test_counts_empty_lines_and_sentences(self, write):
        found = load_examples(write("bank.txt", "a@neutral\n\n  \r\n@positive\nb@neutral\n"))
        assert len(found) == 2
        assert found.empty == 3

    @pytest.mark.parametrize("line", ["no label here", "a@glad", "write to me@example.com", "a@"])
    def test_names_the_line_without_a_label(self, write, line):
        with pytest.raises(ValueError, match=r"bank.txt, line 3 does not end in @ and one of negative, neutral"):
            load_examples(write("bank.txt", f"a@neutral\n\n{line}\n"))

    def test_refuses_utf_16_without_a_mark(self, write):
        with pytest.raises(ValueError, match="zero byte at position 1"):
            load_examples(write("bank.txt", self.LINES.encode("utf-16-le")))

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_refuses_a_file_without_rows(self, write, content):
        with pytest.raises(ValueError, match=r"bank.txt has no rows: expected at least one"):
            load_examples(write("bank.txt", content))

    def make_zip(self, path, name="FinancialPhraseBank-v1.0/Sentences_AllAgree.txt"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/FinancialPhraseBank-v1.0/._Sentences_AllAgree.txt", b"\0\1")
            archive.writestr("FinancialPhraseBank-v1.0/Sentences_50Agree.txt", "other@neutral\n")
            archive.writestr(name, self.LINES.replace("\n", "\r\n").encode("iso-8859-1"))
        return path

    def test_zip(self, tmp_path):
        assert pairs(load_examples(self.make_zip(tmp_path / "bank.zip"))) == list(self.ROWS)

    def test_zip_without_the_file(self, tmp_path):
        path = self.make_zip(tmp_path / "bank.zip", "other.txt")
        with pytest.raises(ValueError, match=r"holds no Sentences_AllAgree.txt; it holds .*other.txt"):
            load_examples(path)

    def test_broken_zip(self, write):
        with pytest.raises(ValueError, match=r"bank.zip is not a whole .zip file"):
            load_examples(write("bank.zip", b"PK\x03\x04 cut"))

    @pytest.mark.parametrize("name", ["financial_phrasebank", "takala/financial_phrasebank"])
    def test_hub(self, tmp_path, monkeypatch, name):
        asked = []

        def download(*arguments, **options):
            asked.append((arguments, options))
            return str(self.make_zip(tmp_path / "bank.zip"))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        found = load_examples(name)
        assert pairs(found) == list(self.ROWS)
        assert found.source == name
        assert asked == [
            (
                ("takala/financial_phrasebank", "data/FinancialPhraseBank-v1.0.zip"),
                {"repo_type": "dataset"},
            )
        ]

    def test_hub_out_of_reach(self, monkeypatch):
        def download(*arguments, **options):
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(FileNotFoundError, match=r"\(offline\).*give the path of its .zip"):
            load_examples("financial_phrasebank")

    def test_the_real_one(self):
        path = os.environ.get("IA3_PHRASEBANK")
        if not path:
            pytest.skip("IA3_PHRASEBANK is not set: the path of PhraseBank's Sentences_AllAgree.txt")
        found = load_examples(path)
        assert len(found) == 2264
        assert Counter(row.label for row in found) == {"neutral": 1391, "positive": 570, "negative": 303}
        assert (found.duplicates, found.empty) == (5, 0)
        assert "2,264 rows (303 negative, 1,391 neutral, 570 positive); 5 duplicates kept" in found.describe()
        train, test = split_examples(found)
        assert (len(train), len(test)) == (2037, 227)
        assert not {_normalised(text) for text in train.texts} & {_normalised(text) for text in test.texts}


class TestCsv:
    def test_reads_named_columns_and_quotes(self, write):
        content = 'id,body,class\n1,"a, b",good\n2,"two\nlines ""quoted""",bad\n'
        found = load_examples(write("a.csv", content), text_column="body", label_column="class")
        assert pairs(found) == [("a, b", "good"), ('two\nlines "quoted"', "bad")]
        assert found.labels == ("bad", "good")

    def test_byte_order_mark_and_crlf(self, write):
        found = load_examples(write("a.csv", "\ufefftext,label\r\nä,x\r\n"))
        assert pairs(found) == [("ä", "x")]

    def test_numbers_stay_text_and_sort_as_numbers(self, write):
        found = load_examples(write("a.csv", "text,label\na,10\nb,2\nc,0\n"))
        assert [row.label for row in found] == ["10", "2", "0"]
        assert found.labels == ("0", "2", "10")

    def test_empty_rows_are_dropped_and_counted(self, write):
        found = load_examples(write("a.csv", "text,label\na,x\n\n,y\n,\n"))
        assert pairs(found) == [("a", "x")]
        assert found.empty == 3

    def test_missing_column_names_those_there_are(self, write):
        with pytest.raises(ValueError, match=r"a.csv has no column 'text'; its columns are 'sentence', 'label'"):
            load_examples(write("a.csv", "sentence,label\na,x\n"))
        with pytest.raises(ValueError, match=r"a.csv has no column 'class'"):
            load_examples(write("a.csv", "text,label\na,x\n"), label_column="class")

    @pytest.mark.parametrize("label", ["", "  ", "nan", "NaN"])
    def test_missing_label_names_the_line(self, write, label):
        with pytest.raises(ValueError, match=r"a.csv, line 3: the text has no label \('second'\)"):
            load_examples(write("a.csv", f"text,label\nfirst,x\nsecond,{label}\n"))

    def test_a_row_of_another_width(self, write):
        with pytest.raises(ValueError, match=r"a.csv, line 2 has 3 cells, and the header 2"):
            load_examples(write("a.csv", "text,label\na, b,x\n"))

    def test_broken_quotes(self, write):
        with pytest.raises(ValueError, match=r"a.csv, line \d is not CSV"):
            load_examples(write("a.csv", 'text,label\n"a" b,x\n'))

    def test_empty_file(self, write):
        with pytest.raises(
            ValueError, match=r"a.csv is empty; expected a header with the columns' names, such as 'text' and 'l"
        ):
            load_examples(write("a.csv", ""))

    def test_header_alone(self, write):
        with pytest.raises(ValueError, match=r"a.csv has no rows: expected at least one"):
            load_examples(write("a.csv", "text,label\n"))

    def test_another_encoding_is_said(self, write):
        found = load_examples(write("a.csv", "text,label\nKöln,x\n".encode("iso-8859-1")))
        assert pairs(found) == [("Köln", "x")]
        assert found.remarks == ("a.csv is read as Windows-1252 (not UTF-8).",)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no file .*none.csv. The data may be 'bundled:tweets'"):
            load_examples(tmp_path / "none.csv")

    def test_has_no_splits(self, write):
        path = write("a.csv", "text,label\na,x\n")
        assert len(load_examples(path, split="train")) == 1
        with pytest.raises(ValueError, match=r"a.csv has no splits; split='test'"):
            load_examples(path, split="test")


class TestJson:
    @staticmethod
    def lines(*records):
        return "".join(json.dumps(record) + "\n" for record in records)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
    def test_reads_lines(self, write, name):
        content = self.lines({"text": "a\u2028b", "label": "x", "more": 1}, {"label": 1, "text": 2.5})
        found = load_examples(write(name, content + "\n"))
        assert pairs(found) == [("a\u2028b", "x"), ("2.5", "1")]

    def test_integers_that_came_as_floats(self, write):
        found = load_examples(write("a.jsonl", self.lines({"text": "a", "label": 1.0})))
        assert found.labels == ("1",)

    @pytest.mark.parametrize("empty", [None, "", " ", float("nan")])
    def test_empty_text(self, write, empty):
        content = self.lines({"text": empty, "label": "x"}, {"text": "b", "label": "x"})
        assert load_examples(write("a.jsonl", content)).empty == 1

    @pytest.mark.parametrize("missing", [None, "", float("nan")])
    def test_missing_label(self, write, missing):
        with pytest.raises(ValueError, match=r"a.jsonl, line 1: the text has no label"):
            load_examples(write("a.jsonl", self.lines({"text": "a", "label": missing})))

    def test_a_list_is_no_text(self, write):
        with pytest.raises(ValueError, match=r"line 1: the text is a list, expected a text or a number"):
            load_examples(write("a.jsonl", self.lines({"text": ["a"], "label": "x"})))

    def test_missing_key(self, write):
        content = self.lines({"text": "a", "label": "x"}, {"text": "b", "class": "x"})
        with pytest.raises(ValueError, match=r"a.jsonl, line 2 has no column 'label'; its columns are 'text', 'cl"):
            load_examples(write("a.jsonl", content))

    def test_not_json(self, write):
        with pytest.raises(ValueError, match=r"a.jsonl, line 2 is not JSON: .*; expected one object a line"):
            load_examples(write("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n'))

    def test_a_whole_list_in_one_file(self, write):
        rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
        for content in (json.dumps(rows), json.dumps(rows, indent=2) + "\n"):
            assert pairs(load_examples(write("a.json", content))) == [("a", "x"), ("b", "y")]
        with pytest.raises(ValueError, match=r"a.json, row 2 has no column 'label'"):
            load_examples(write("a.json", json.dumps([rows[0], {"text": "b"}])))

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (
                '[\n{"text": "a", "label": "x"},\n]',
                "a.json is a list that is not JSON: .*line 3.*; expected one list of",
            ),
            ("[1, 2]\n", "line 1 is a list; expected one JSON object a line"),
            ('["a", "x"]\n["b", "y"]\n', "line 1 is a list; expected one JSON object a line"),
            ("[]", "has no rows"),
        ],
    )
    def test_a_list_that_cannot_be_read(self, write, content, said):
        with pytest.raises(ValueError, match=said):
            load_examples(write("a.json", content))


class TestParquet:
    def test_reads_columns(self, tmp_path):
        path = tmp_path / "a.parquet"
        Dataset.from_dict({"n": [1, 2], "text": ["a", "b"], "label": ["y", "x"]}).to_parquet(path)
        found = load_examples(path)
        assert pairs(found) == [("a", "y"), ("b", "x")]
        assert found.labels == ("x", "y")

    def test_class_labels_become_names(self, tmp_path):
        path = tmp_path / "a.parquet"
        features = Features({"text": Value("string"), "label": ClassLabel(names=["up", "down", "flat"])})
        Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(path)
        found = load_examples(path)
        assert pairs(found) == [("a", "down"), ("b", "up")]
        assert found.labels == ("up", "down", "flat")

    def test_missing_label_names_the_row(self, tmp_path):
        path = tmp_path / "a.parquet"
        Dataset.from_dict({"text": ["a", "b"], "label": ["x", None]}).to_parquet(path)
        with pytest.raises(ValueError, match=r"a.parquet, row 2: the text has no label"):
            load_examples(path)

    def test_missing_column(self, tmp_path):
        path = tmp_path / "a.parquet"
        Dataset.from_dict({"text": ["a"], "label": ["x"]}).to_parquet(path)
        with pytest.raises(ValueError, match=r"has no column 'body'; its columns are 'text', 'label'"):
            load_examples(path, text_column="body")

    def test_broken_file(self, write):
        with pytest.raises(ValueError, match=r"a.parquet is not a whole parquet file"):
            load_examples(write("a.parquet", b"PAR1 cut"))

    def test_without_the_extra(self, write, monkeypatch):
        monkeypatch.setattr(tables, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r'a.parquet needs `datasets`: pip install "ia3\[train\]"'):
            load_examples(write("a.parquet", b""))


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch):
        """Let `load_dataset` give three rows, one of them hidden; what it was asked for."""
        features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
        dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
        asked = []

        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            return dataset

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    def test_class_labels_become_names(self, asked):
        found = load_examples("someone/reviews")
        assert pairs(found) == [("a", "good"), ("b", "bad")]
        assert found.labels == ("bad", "good")
        assert found.source == "someone/reviews"
        assert asked == [(("someone/reviews",), {"split": "train"})]

    def test_split(self, asked):
        load_examples("someone/reviews", split="validation")
        assert asked == [(("someone/reviews",), {"split": "validation"})]

    def test_missing_column(self, asked):
        with pytest.raises(ValueError, match=r"someone/reviews has no column 'sentence'; its columns are 'text'"):
            load_examples("someone/reviews", text_column="sentence")

    def test_a_hidden_label(self, monkeypatch):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
        dataset = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: dataset)
        with pytest.raises(ValueError, match=r"someone/test, row 1: the text has no label"):
            load_examples("someone/test")

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (ConnectionError("offline"), FileNotFoundError),
            (ValueError("Unknown split"), ValueError),
            (RuntimeError("Dataset scripts are no longer supported"), ValueError),
        ],
    )
    def test_what_it_cannot_load(self, monkeypatch, error, kind):
        def load_dataset(*arguments, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(kind, match=rf"someone/gone could not be loaded.*{error}.*The data may be 'bundled:tw"):
            load_examples("someone/gone")

    def test_a_file_of_another_kind(self, write):
        with pytest.raises(ValueError, match=r"a.yaml is a file of a kind that is not read"):
            load_examples(write("a.yaml", "text\tlabel\n"))


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestTemplate:
    ROWS = (
        {"a": "one", "b": "two", "label": "yes"},
        {"a": "", "b": "", "label": "no"},
        {"a": "3", "b": "", "label": "no"},
    )

    def write(self, path):
        if path.suffix == ".csv":
            path.write_text("a,b,label\n" + "".join(",".join(row.values()) + "\n" for row in self.ROWS))
        elif path.suffix == ".jsonl":
            path.write_text(jsonl(*self.ROWS))
        else:
            Dataset.from_list(list(self.ROWS)).to_parquet(path)
        return path

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_several_fields(self, kind, tmp_path):
        path = self.write(tmp_path / f"pairs.{kind}")
        found = load_examples(path, template=Template("{a}, {b}?"))
        assert pairs(found) == [("one, two?", "yes"), ("3, ?", "no")]
        assert (found.empty, found.labels, found.source) == (1, ("no", "yes"), str(path))

    @pytest.mark.parametrize("field", ["text", "review"])
    def test_one_field_reads_sources_without_columns(self, field, write):
        plain = load_examples("bundled:tweets")
        found = load_examples("bundled:tweets", template=Template(f"Tweet: {{{field}}}"), label_column="tone")
        assert found.texts == [f"Tweet: {text}" for text in plain.texts]
        assert ([row.label for row in found], found.labels) == ([row.label for row in plain], SENTIMENTS)
        bank = load_examples(write("bank.txt", "a@neutral\n"), template=Template(f"{{{field}}}!"), label_column="tone")
        assert pairs(bank) == [("a!", "neutral")]

    def test_a_row_without_a_column(self, write):
        path = write("pairs.jsonl", jsonl({"a": 1, "b": 2, "label": "x"}, {"a": 1, "b": 2}))
        with pytest.raises(ValueError, match="line 2 has no column 'label'"):
            load_examples(path, template=Template("{a} {b}"))
        path = write("pairs.jsonl", jsonl({"a": 1, "b": 2, "label": "x"}, {"a": 1, "label": "x"}))
        with pytest.raises(ValueError, match="line 2 has no column 'b'"):
            load_examples(path, template=Template("{a} {b}"))

    def test_that_shows_the_label(self):
        with pytest.raises(ValueError, match="shows the label column 'label' to the model"):
            load_examples("bundled:tweets", template=Template("{text} {label}"))
        with pytest.raises(ValueError, match="shows the label column 'tone' to the model"):
            load_examples("bundled:tweets", text_column="tone", label_column="tone")

    def test_and_a_text_column(self):
        with pytest.raises(ValueError, match="so leave `text_column` out"):
            load_examples("bundled:tweets", template=Template("{text}"), text_column="tweet")


OPEN_KINDS = [TaskKind.GENERATION, TaskKind.INSTRUCTIONS]


class TestFreeText:
    @pytest.mark.parametrize("kind", OPEN_KINDS)
    def test_completions_keep_their_lines(self, kind, write):
        rows = [{"prompt": "a\nb", "completion": "1.\n\n 2. \n"}, {"prompt": "c", "completion": 7.0}]
        rows += [{"prompt": "c", "completion": "nan"}, {"prompt": " ", "completion": "x"}]
        path = write("a.jsonl", jsonl(*rows))
        found = load_examples(path, text_column="prompt", label_column="completion", kind=kind)
        assert pairs(found) == [("a\nb", "1.\n\n 2."), ("c", "7"), ("c", "nan")]
        assert (found.labels, found.kind) == ((), kind)
        assert found.describe().split("\n") == [
            f"{path}: 3 rows; 1 duplicate kept; 1 empty row dropped",
            "Read as prompts and completions: 'prompt'; the answer is 'completion'.",
        ]

    @pytest.mark.parametrize("kind", OPEN_KINDS)
    def test_a_missing_completion(self, kind, write):
        with pytest.raises(ValueError, match=r"a.csv, line 3: the text has no completion \('b'\); every row needs one"):
            load_examples(write("a.csv", "text,label\na,x\nb, \n"), kind=kind)

    def test_names_of_classes_are_texts_of_no_closed_set(self, tmp_path):
        features = Features({"text": Value("string"), "label": ClassLabel(names=["up", "down"])})
        Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
        found = load_examples(tmp_path / "a.parquet", kind=TaskKind.GENERATION)
        assert (pairs(found), found.labels) == ([("a", "down")], ())

    def test_a_missing_column_names_the_likely_pair(self, write):
        path = write("a.csv", "question,answer\na,b\n")
        with pytest.raises(
            ValueError, match=r"a.csv has no column 'text'.*`text_column='question'` and `label_column='answ"
        ):
            load_examples(path, kind=TaskKind.INSTRUCTIONS)


def said(*contents):
    """A conversation of a system's and a user's message, and so on by turns."""
    roles = ["system", *["user", "assistant"] * len(contents)][: len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


class TestConversations:
    def load(self, path, **how):
        return load_examples(path, kind=TaskKind.INSTRUCTIONS, **how)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    def test_the_last_answer_is_the_label(self, name, tmp_path):
        conversations = [said("Be short.", "Hi", "Hello\n\nyou", "Bye", "So long"), said("", "Hi", "Hey"), []]
        rows = [{"id": number, "messages": messages} for number, messages in enumerate(conversations)]
        if name == "a.jsonl":
            (tmp_path / name).write_text(jsonl(*rows))
        else:
            Dataset.from_list(rows).to_parquet(tmp_path / name)
        found = self.load(tmp_path / name)
        assert list(found) == [
            Example("Bye", "So long", (("system", "Be short."), ("user", "Hi"), ("assistant", "Hello\n\nyou"))),
            Example("Hi", "Hey", (("system", ""),)),
        ]
        assert (found.empty, found.labels) == (1, ())

    def test_a_conversation_with_another_beginning_is_no_duplicate(self, write):
        rows = [
            said("s", "one", "1", "more", "2"),
            said("s", "two", "2", "more", "3"),
            said("s", "TWO", "2", "more", "3"),
        ]
        found = self.load(write("a.jsonl", jsonl(*({"messages": messages} for messages in rows))))
        assert found.duplicates == 1
        for seed in range(5):
            train, test = split_examples(found, 0.5, seed=seed)
            assert {len(train), len(test)} == {1, 2}

    def test_named_columns_and_text_with_label_come_first(self, write):
        row = {"messages": said("s", "u", "a"), "prompt": "p", "text": "t", "label": "l"}
        path = write("a.jsonl", jsonl(row))
        assert pairs(self.load(path)) == [("t", "l")]
        assert pairs(self.load(path, text_column="prompt")) == [("p", "l")]
        assert pairs(self.load(path, template=Template("{prompt}!"))) == [("p!", "l")]
        del row["label"]
        assert pairs(self.load(write("a.jsonl", jsonl(row)))) == [("u", "a")]
        with pytest.raises(ValueError, match="has no column 'promt'"):
            self.load(path, text_column="promt")

    @pytest.mark.parametrize(
        ("messages", "error"),
        [
            (said("s", "u"), r"line 1: the conversation ends in system and user, expected a user's message and the"),
            (said("s", "u", "a")[2:], "line 1: the conversation ends in assistant, expected a user's message"),
            (said("s", "u", "", "v", "a"), r"line 1: the text has no completion \('u'\)"),
            (said("s", "u", "a", "", "a"), "line 1: a user's message is empty"),
            (said("s", "u", "a") + said("s", "u", "a")[2:], "ends in assistant and assistant, expected"),
            ("u: hi", "line 1: 'messages' is a str, expected a list of objects with role and content"),
            (["hi"], "line 1: message 1 is 'hi', expected an object with role and content"),
            (
                [{"from": "human", "content": "hi"}],
                r"message 1 is \{'from': 'human'.*with role and content, or w",
            ),
            (
                [{"role": "tool", "content": "x"}],
                "message 1 has the role 'tool', expected one of system, developer",
            ),
            ([{"from": "observation", "value": "x"}], "message 1 has the role 'observation', expected one of"),
            ([{"role": "user", "content": None}], r"message 1 has no content \('content' is None\)"),
            ([{"role": "user", "content": float("nan")}], r"message 1 has no content \('content' is nan\)"),
            (
                [{"role": "user", "content": {"text": "x"}}],
                "message 1: the content is a dict, expected a text or",
            ),
            (
                [{"role": "user", "content": ["x"]}],
                "message 1: the content, part 1 is 'x', expected .*nothing but",
            ),
            (
                [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "u"}]}],
                r"line 1: message 1: the content, part 2 is \{'type': 'image_url'",
            ),
            ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}], r"\['weight'\]"),
            ([*said("s", "u", "a"), {"role": "assistant", "content": None, "tool_calls": [1]}], r"\['tool_calls'\]"),
            (
                [{"role": "user", "content": "x", "tool_calls": [1], "name": None}],
                r"message 1 has \['tool_calls'\], wh",
            ),
            (said("s", "u", " "), r"line 1: the text has no completion \('u'\)"),
            (said("s", "", "a"), r"no rows with a text \(1 empty\)"),
        ],
    )
    def test_wrong_shapes_are_named_with_their_place(self, messages, error, write):
        with pytest.raises(ValueError, match=error):
            self.load(write("a.jsonl", jsonl({"messages": messages})))

    def test_a_row_without_messages(self, write):
        path = write("a.jsonl", jsonl({"messages": said("s", "u", "a")}, {"message": "x"}))
        with pytest.raises(ValueError, match="line 2 has no column 'messages'; its columns are 'message'"):
            self.load(path)


class TestTaggedWords:
    def load(self, path, **how):
        how = {"text_column": "tokens", "label_column": "tags", **how}
        return load_examples(path, kind=TaskKind.TOKEN_CLASSIFICATION, **how)

    def test_lists_and_texts(self, write):
        rows = [{"tokens": ["New", "York", 7], "tags": ["B-LOC", "I-LOC", "O"]}, {"tokens": [], "tags": []}]
        path = write("a.jsonl", jsonl(*rows, {"tokens": "in  Ulm\t.", "tags": "O B-LOC O"}))
        found = self.load(path)
        assert pairs(found) == [("New York 7", "B-LOC I-LOC O"), ("in Ulm .", "O B-LOC O")]
        assert (found.labels, found.empty) == (("O", "B-LOC", "I-LOC"), 1)
        assert found.describe() == f"{path}: 2 rows of 6 words (3 O, 2 B-LOC, 1 I-LOC); 1 empty row dropped"

    def test_names_of_classes_keep_their_order(self, tmp_path):
        tags = List(ClassLabel(names=["B-LOC", "O", "B-PER"]))
        features = Features({"tokens": List(Value("string")), "tags": tags})
        dataset = Dataset.from_dict({"tokens": [["in", "Ulm"]], "tags": [[1, 0]]}, features=features)
        dataset.to_parquet(tmp_path / "a.parquet")
        found = self.load(tmp_path / "a.parquet")
        assert (pairs(found), found.labels) == ([("in Ulm", "O B-LOC")], ("B-LOC", "O", "B-PER"))

    @pytest.mark.parametrize(
        ("tokens", "tags", "error"),
        [
            (["a", "b"], ["O"], r"line 1 has 2 words and 1 tags \('a b'\): expected one tag a word"),
            ("a b", None, "line 1 has 2 words and 0 tags"),
            (["New York"], ["O"], "line 1: number 1 of 'tokens' is 'New York', expected one word without white space"),
            (["a", "b\xa0c"], ["O", "O"], r"number 2 of 'tokens' is 'b\\xa0c', expected one word"),
            (["a", " "], ["O", "O"], "number 2 of 'tokens' is '', expected one word"),
            (["a", "b"], ["O", None], "number 2 of 'tags' is '', expected one word"),
            ([["a"]], ["O"], "number 1 of 'tokens' is a list, expected a text or a number"),
            ({"a": 1}, ["O"], "line 1: 'tokens' is a dict, expected a text or a number"),
        ],
    )
    def test_what_cannot_be_aligned(self, tokens, tags, error, write):
        with pytest.raises(ValueError, match=error):
            self.load(write("a.jsonl", jsonl({"tokens": tokens, "tags": tags})))

    @pytest.mark.parametrize("pattern", ["Words: {tokens}", "{tokens} {more}"])
    def test_a_template_is_one_column(self, pattern, write):
        with pytest.raises(ValueError, match=r"has more than the words of one column.* such as '{tokens}'"):
            self.load(write("a.jsonl", ""), text_column="text", template=Template(pattern))


class TestBalance:
    @pytest.mark.parametrize("kind", [TaskKind.LABEL_WORDS, TaskKind.SEQUENCE_CLASSIFICATION])
    def test_a_remark_from_five_times_on(self, kind, write):
        rows = [f"text {number},often\n" for number in range(10)]
        rare = load_examples(write("a.csv", "".join(["text,label\n", *rows, "a,rare\n", "b,rare\n"])), kind=kind)
        assert rare.describe().endswith(
            "12 rows (10 often, 2 rare); "
            "often is 5 times as frequent as rare (`balance` draws each label equally often)"
        )
        assert "balance" not in rare[1:].describe()

    def test_classes_without_a_row_cannot_be_drawn(self):
        assert "balance" not in examples(("a", "neutral"), ("b", "positive")).describe()

    @pytest.mark.parametrize("kind", OPEN_KINDS)
    def test_free_text_is_never_balanced(self, kind, write):
        path = write("a.csv", "text,label\n" + "a,x\nb,x\nc,x\nd,x\ne,x\nf,y\n")
        assert load_examples(path, kind=kind).describe() == f"{path}: 6 rows"

    def test_tags_are_never_balanced(self, write):
        path = write("a.csv", "text,label\na b c d e f,O O O O O B-X\n")
        found = load_examples(path, kind=TaskKind.TOKEN_CLASSIFICATION)
        assert found.describe() == f"{path}: 1 rows of 6 words (5 O, 1 B-X)"


class TestDigest:
    ROWS = (Example("Köln\n", "a"), Example("\ud83d", "b", (("system", "Be short."),)))

    def test_is_that_of_the_rows_alone(self):
        found = Examples(self.ROWS, ("a", "b"), "here", 0, 0)
        lines = b'["K\\u00f6ln\\n","a",[]]\n["\\ud83d","b",[["system","Be short."]]]\n'
        assert found.digest() == hashlib.sha256(lines).hexdigest()
        assert found.digest() == "ea0fa429b4f64bbf00de354969a7cfacddd6fe1629c7b23871e4e73c821facf3"
        assert Examples(self.ROWS, (), "there", 1, 1, TaskKind.INSTRUCTIONS).digest() == found.digest()

    def test_tells_rows_apart(self):
        a, b = self.ROWS
        orders = [(a, b), (b, a), (a,), (), (Example("Köln\na", ""), b), (a, Example("\ud83d", "b"))]
        assert len({Examples(rows, (), "here", 0, 0).digest() for rows in orders}) == len(orders)


class TestSplit:
    def test_sizes_and_seed(self):
        found = examples(*((f"text {i}", "neutral") for i in range(95)))
        train, test = split_examples(found, 0.1, seed=1)
        assert (len(train), len(test)) == (85, 10)
        assert {*train.texts, *test.texts} == set(found.texts)
        assert split_examples(found, 0.1, seed=1) == (train, test)
        assert split_examples(found, 0.1, seed=2)[1].texts != test.texts
        assert train.labels == test.labels == SENTIMENTS
        assert train.kind is test.kind is found.kind

    @pytest.mark.parametrize("seed", range(10))
    def test_duplicates_never_straddle(self, seed):
        rows = [(f"Text {i % 20}" if i % 2 else f"text   {i % 20}", "neutral") for i in range(50)]
        train, test = split_examples(examples(*rows), 0.3, seed=seed)
        assert len(train) + len(test) == 50
        assert not {_normalised(text) for text in train.texts} & {_normalised(text) for text in test.texts}
        assert len(test) <= 15

    def test_rows_are_shuffled(self):
        found = examples(*((str(i), "neutral") for i in range(100)))
        train, test = split_examples(found, 0.2)
        assert train.texts != sorted(train.texts, key=int)
        assert test.texts != sorted(test.texts, key=int)

    @pytest.mark.parametrize("size", [0, 1, -0.1, 227, float("nan")])
    def test_refuses_what_is_no_fraction(self, size):
        with pytest.raises(ValueError, match=r"test_size is .*; expected a fraction between 0 and 1"):
            split_examples(examples(("a", "neutral"), ("b", "neutral")), size)

    @pytest.mark.parametrize("rows", [[("a", "neutral")], [("a", "neutral")] * 5])
    def test_refuses_an_empty_part(self, rows):
        with pytest.raises(ValueError, match=r"here cannot be split: .* of its 1 different texts"):
            split_examples(examples(*rows), 0.1)


class TestTweets:
    def test_counts(self):
        train, test = bundled_tweets()
        assert Counter(row.label for row in train) == dict.fromkeys(SENTIMENTS, 1200)
        assert Counter(row.label for row in test) == dict.fromkeys(SENTIMENTS, 100)
        assert train.labels == test.labels == SENTIMENTS
        assert train.duplicates == test.duplicates == train.empty == test.empty == 0

    def test_no_text_on_both_sides_and_no_link(self):
        train, test = bundled_tweets()
        texts = [_normalised(row.text) for row in (*train, *test)]
        assert len(set(texts)) == 3900
        assert not any("http" in text for text in texts)
        assert all(row.text == " ".join(row.text.split()) for row in (*train, *test))

    @pytest.mark.parametrize("first", [3, 30, 100, 720, 721, 3600])
    def test_any_first_rows_are_balanced(self, first):
        counts = Counter(row.label for row in bundled_tweets()[0][:first])
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_by_name(self):
        train, test = bundled_tweets()
        assert load_examples("bundled:tweets") == load_examples("bundled:tweets", split="train") == train
        assert load_examples("bundled:tweets", split="test") == test
        assert train.describe() == (
            "bundled:tweets (train): 3,600 rows (1,200 negative, 1,200 neutral, 1,200 positive)"
        )

    def test_unknown_names(self):
        with pytest.raises(ValueError, match=r"No bundled data 'bundled:toots'; there is 'bundled:tweets'"):
            load_examples("bundled:toots")
        with pytest.raises(ValueError, match=r"has no split 'validation'; expected 'train' or 'test'"):
            load_examples("bundled:tweets", split="validation")

    def test_source_and_licence_are_beside(self):
        assert "MIT License" in (records.TWEETS_FOLDER / "LICENSE").read_text()
        assert "zeroshot/twitter-financial-news-sentiment" in (records.TWEETS_FOLDER / "SOURCE.md").read_text()

    def test_the_generator_cleans_and_draws(self, tmp_path):
        """On a made-up source: links, duplicates, conflicts and texts of the other split go."""
        for name, extra in (("sent_train.csv", 1300), ("sent_valid.csv", 120)):
            with (tmp_path / name).open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                rows = [(f"{name} {i}  of {k} https://t.co/x{i}", k) for i in range(extra) for k in range(3)]
                writer.writerows([*rows, *rows[:50], ("both", 0), ("BOTH", 1), ("https://t.co/y", 2)])
        script = ROOT / "benchmarks" / "make_tweets.py"
        output = tmp_path / "out"
        subprocess.run([sys.executable, script, tmp_path, "--output", output], check=True)
        train, test = load_examples(output / "train.csv"), load_examples(output / "test.csv")
        assert Counter(row.label for row in train) == dict.fromkeys(SENTIMENTS, 1200)
        assert Counter(row.label for row in test) == dict.fromkeys(SENTIMENTS, 100)
        assert train.duplicates == test.duplicates == train.empty == 0
        of_class = {"negative": "0", "positive": "1", "neutral": "2"}
        for row in (*train, *test):
            assert "http" not in row.text
            assert row.text.casefold() != "both"
            assert row.text.endswith(f" of {of_class[row.label]}")


class TestTruncation:
    def test_counts_with_special_tokens(self):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(TITLER))
        texts = ["one two three", "one two", "one"]
        assert count_truncated(texts, tokenizer, 4) == 0
        assert count_truncated(texts, tokenizer, 3) == 1
        assert count_truncated(texts, tokenizer, 1) == 3
        assert count_truncated([], tokenizer, 4) == 0

    def test_ignores_what_the_tokenizer_would_cut(self):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(TITLER))
        tokenizer(["a"], truncation=True, max_length=2, padding="max_length")
        assert count_truncated(["one two three"], tokenizer, 2) == 1


def test_a_line_of_megabytes_is_read(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"text,label\n{'word ' * 400_000},good\nshort,bad\n")
    assert len(load_examples(str(path))) == 2


def test_a_rare_label_stays_in_training() -> None:
    rows = [Example(f"text {index}", "common") for index in range(30)] + [Example("the one", "rare")]
    examples = Examples(tuple(rows), ("common", "rare"), "rows", 0, 0)
    for seed in range(60):
        train, test = split_examples(examples, 0.2, seed)
        assert {row.label for row in train} == {"common", "rare"}
        assert {row.label for row in test} == {"common"}
        assert len(train) + len(test) == 31
