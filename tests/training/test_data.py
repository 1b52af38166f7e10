"""Reading labelled text: each source, what is counted, what is refused, and how it is split."""

import csv
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
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer

from ia3.bundled import TITLER, resolve_model
from ia3.training import data
from ia3.training.data import (
    SENTIMENTS,
    Example,
    Examples,
    bundled_tweets,
    count_truncated,
    load_examples,
    split_examples,
)

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

    def test_refuses_utf_16(self, write):
        with pytest.raises(ValueError, match="zero bytes"):
            load_examples(write("bank.txt", self.LINES.encode("utf-16")))

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_refuses_a_file_without_rows(self, write, content):
        with pytest.raises(ValueError, match=r"bank.txt has no rows with a text"):
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
        assert not {data._normalised(text) for text in train.texts} & {data._normalised(text) for text in test.texts}


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
        with pytest.raises(ValueError, match=r"a.csv is empty; expected a header with 'text' and 'label'"):
            load_examples(write("a.csv", ""))

    def test_header_alone(self, write):
        with pytest.raises(ValueError, match=r"a.csv has no rows with a text"):
            load_examples(write("a.csv", "text,label\n"))

    def test_another_encoding(self, write):
        with pytest.raises(ValueError, match=r"a.csv is not UTF-8 \(byte 0xf6 at position 12\); save it as UTF-8"):
            load_examples(write("a.csv", "text,label\nKöln,x\n".encode("iso-8859-1")))

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
        with pytest.raises(ValueError, match=r"a.json, line 1 is a list; expected one JSON object a line"):
            load_examples(write("a.json", '[{"text": "a", "label": "x"}]'))


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
        monkeypatch.setattr(data, "find_spec", lambda name: None)
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
        with pytest.raises(ValueError, match=r"a.tsv is a file of a kind that is not read"):
            load_examples(write("a.tsv", "text\tlabel\n"))


class TestSplit:
    def test_sizes_and_seed(self):
        found = examples(*((f"text {i}", "neutral") for i in range(95)))
        train, test = split_examples(found, 0.1, seed=1)
        assert (len(train), len(test)) == (85, 10)
        assert {*train.texts, *test.texts} == set(found.texts)
        assert split_examples(found, 0.1, seed=1) == (train, test)
        assert split_examples(found, 0.1, seed=2)[1].texts != test.texts
        assert train.labels == test.labels == SENTIMENTS

    @pytest.mark.parametrize("seed", range(10))
    def test_duplicates_never_straddle(self, seed):
        rows = [(f"Text {i % 20}" if i % 2 else f"text   {i % 20}", "neutral") for i in range(50)]
        train, test = split_examples(examples(*rows), 0.3, seed=seed)
        assert len(train) + len(test) == 50
        assert not {data._normalised(text) for text in train.texts} & {data._normalised(text) for text in test.texts}
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
        texts = [data._normalised(row.text) for row in (*train, *test)]
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
        assert "MIT License" in (data._TWEETS_FOLDER / "LICENSE").read_text()
        assert "zeroshot/twitter-financial-news-sentiment" in (data._TWEETS_FOLDER / "SOURCE.md").read_text()

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
