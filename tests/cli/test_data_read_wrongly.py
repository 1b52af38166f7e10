"""Data that would be read otherwise than meant: said or refused before training, on the command line and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import openpyxl
import pytest
import yaml
from rich.console import Console
from running import call, message, succeed

import ia3
import tiny_causal
import tiny_classifier
import tiny_seq2seq
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import load_task
from ia3.tasks.template import Template

SPELLINGS = {
    "negative": ("negative", "Negative"),
    "neutral": ("NEUTRAL", "neutral"),
    "positive": ("positive", "positive "),
}


def quiet() -> Console:
    return Console(file=StringIO(), width=10_000)


def spelled(count: int, start: int = 0) -> Examples:
    """The tiny task with each fourth label in another spelling."""
    rows = []
    for number, row in enumerate(tiny_seq2seq.examples(count, start)):
        usual, other = SPELLINGS[row.label] if row.label != "neutral" else SPELLINGS[row.label][::-1]
        rows.append(Example(row.text, other if number % 4 == 3 else usual))
    return Examples(tuple(rows), tuple(sorted({row.label for row in rows})), "spelled", 0, 0)


def write(path: Path, rows: list[tuple[str, ...]], header: str = "text,label") -> Path:
    path.write_text(
        "\n".join([header, *(",".join(f'"{cell}"' for cell in row) for row in rows)]) + "\n", encoding="utf-8"
    )
    return path


def write_examples(path: Path, examples: Examples) -> Path:
    return write(path, [(row.text, row.label) for row in examples])


@pytest.fixture
def decoder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    folder = tmp_path / "decoder"
    tiny("llama", vocab_size=len(tiny_causal.WORDS), bos_token_id=3, tie_word_embeddings=False).save_pretrained(folder)
    tiny_causal.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    tiny("bert", initializer_range=0.3).save_pretrained(folder)
    tiny_classifier.tokenizer().save_pretrained(folder)
    return folder


class TestLabelsInSeveralSpellings:
    def test_are_one_class_in_training_and_held_out_data(self, base: Path, tmp_path: Path) -> None:
        data, test = write_examples(tmp_path / "data.csv", spelled(60)), tmp_path / "test.csv"
        write(test, [("the share rises", " Positive"), ("falls", "NEGATIVE"), ("a stays", "neutral")])
        how = (
            "--model",
            base,
            "--data",
            data,
            "--test-data",
            test,
            "--steps",
            1,
            "--output",
            tmp_path / "run",
            "--json",
        )
        result = succeed("train", *how)
        assert json.loads(result.stdout)["labels"] == list(tiny_seq2seq.LABELS)
        said = message(result)
        assert "60 rows (20 negative, 20 neutral, 20 positive)" in said
        assert "Spellings of one label are merged: " in said
        assert "3 rows (1 negative, 1 neutral, 1 positive)" in said
        assert "read as the training data's labels: 'Positive' as 'positive', 'NEGATIVE' as 'negative'." in said
        assert "balance" not in said
        task = load_task(tmp_path / "run" / "adapter")
        assert task is not None
        assert task.labels == tiny_seq2seq.LABELS
        assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["merge_labels"] is True

    def test_are_the_adapters_labels_in_an_evaluation(self, adapter: Path, data: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.csv"
        other.write_text(data.read_text().replace(",positive", ",Positive").replace(",neutral", ",NEUTRAL "))
        result = succeed("evaluate", adapter, "--data", other, "--json")
        assert "Other spellings are read as the adapter's labels: " in message(result)
        assert "'Positive' as 'positive'" in message(result)
        same = json.loads(succeed("evaluate", adapter, "--data", data, "--json").stdout)
        assert json.loads(result.stdout) == {**same, "data": str(other)}

    def test_stay_apart_where_asked_for(self, encoder: Path, tmp_path: Path) -> None:
        labels = ("Positive", "positive", "NEUTRAL")
        rows = [(f"the share {label.casefold()} {number}", label) for number in range(8) for label in labels]
        how = ("--model", encoder, "--data", write(tmp_path / "a.csv", rows), "--steps", 1, "--json")
        apart = succeed("train", *how, "--no-merge-labels", "--output", tmp_path / "apart")
        assert json.loads(apart.stdout)["labels"] == sorted(labels)
        merged = succeed("train", *how, "--output", tmp_path / "merged")
        assert json.loads(merged.stdout)["labels"] == ["NEUTRAL", "Positive"]
        found = call("evaluate", tmp_path / "apart" / "adapter", "--data", tmp_path / "a.csv", "--json")
        assert json.loads(found.stdout)["labels"] == sorted(labels)
        assert "Other spellings" not in message(found)

    def test_have_nothing_to_merge_in_other_tasks(self, base: Path, data: Path) -> None:
        refused = call("train", "--model", base, "--data", data, "--task", "generation", "--no-merge-labels")
        assert (
            "--no-merge-labels is for label-words and sequence-classification, and this task is generation"
            in message(refused)
        )

    def test_are_one_in_a_sweep_and_in_memory(self, base: Path, tmp_path: Path) -> None:
        more: dict[str, Any] = {"test_data": spelled(6, 60), "steps": 1, "console": quiet()}
        run = ia3.train(str(base), spelled(60), output=tmp_path / "run", **more)
        assert run.task.labels == tiny_seq2seq.LABELS
        found = ia3.sweep(str(base), spelled(60), over={"seed": [0, 1]}, output=tmp_path / "sweep", **more)
        assert found.best.task.labels == tiny_seq2seq.LABELS
        with pytest.raises(ValueError, match="spells the label"):
            ia3.train(str(base), spelled(60), output=tmp_path / "apart", merge_labels=False, **more)

    def test_a_tag_in_another_spelling_is_named(self, encoder: Path, tmp_path: Path) -> None:
        rows = [("rises in x", "O O B-LOC"), ("the y z falls", "O B-PER I-PER O"), ("x stays", "B-LOC O")]
        how = ("--task", "token-classification", "--steps", 1, "--test-size", 0.3, "--output", tmp_path / "run")
        succeed("train", "--model", encoder, "--data", write(tmp_path / "a.csv", rows), *how)
        other = write(tmp_path / "b.csv", [("rises in x", "O O b-loc")])
        refused = call("evaluate", tmp_path / "run" / "adapter", "--data", other)
        assert "Did you mean 'B-LOC' for 'b-loc'?" in message(refused)


class TestTablesAsTheyAreSaved:
    def test_without_a_header_from_training_to_predictions(self, base: Path, data: Path, tmp_path: Path) -> None:
        rows = [line.replace(",", ";") for line in data.read_text().splitlines()[1:]]
        table, run = tmp_path / "a.csv", tmp_path / "run"
        table.write_text("\n".join(rows) + "\n", encoding="utf-16")
        said = "column 1 is the text, column 2 the label (--text-column 1, --label-column 2)."
        trained = succeed("train", "--model", base, "--data", table, "--steps", 1, "--output", run)
        assert said in message(trained)
        assert f"{len(rows)} rows" in message(trained)
        evaluated = succeed("evaluate", run / "adapter", "--data", table, "--json")
        assert json.loads(evaluated.stdout)["examples"] == len(rows)
        assert said in message(evaluated)
        by_number = ("--text-column", 1, "--label-column", 2, "--steps", 1, "--output", tmp_path / "numbers")
        succeed("train", "--model", base, "--data", table, *by_number)
        found = [succeed("predict", folder / "adapter", "--file", table) for folder in (run, tmp_path / "numbers")]
        assert found[0].stdout == found[1].stdout
        assert len(found[0].stdout.splitlines()) == len(rows)

    def test_one_sheet_of_several(self, adapter: Path, data: Path, tmp_path: Path) -> None:
        book = openpyxl.Workbook()
        book.worksheets[0].append(["Notes"])
        page = book.create_sheet("Reviews 2024")
        for line in data.read_text().splitlines():
            page.append(line.split(","))
        book.save(tmp_path / "a.xlsx")
        plain = json.loads(succeed("evaluate", adapter, "--data", data, "--json").stdout)
        sheet = json.loads(succeed("evaluate", adapter, "--data", f"{tmp_path}/a.xlsx:Reviews 2024", "--json").stdout)
        assert {**sheet, "data": plain["data"]} == plain
        succeed("predict", adapter, "--file", f"{tmp_path}/a.xlsx:Reviews 2024", "--output", tmp_path / "o.xlsx")


class TestColumnsThatBelongToTheText:
    def sums(self, path: Path) -> Path:
        """Twenty questions whose instruction is the same, one that has no input, as one list in a file."""
        words = ("one", "two", "three", "four", "five", "six", "seven")
        rows = [
            {"instruction": "please say then", "input": words[n % 6], "output": words[n % 6 + 1]} for n in range(20)
        ]
        path.write_text(json.dumps([*rows, {"instruction": "say one", "input": "", "output": "one"}], indent=1))
        return path

    @pytest.mark.parametrize("named", [[], ["--text-column", "instruction", "--label-column", "output"]])
    def test_alpacas_input_is_read(self, decoder: Path, tmp_path: Path, named: list[str]) -> None:
        data, run = self.sums(tmp_path / "sums.json"), tmp_path / "run"
        how = ("--model", decoder, "--data", data, "--steps", 1, "--output", run, "--test-data", data, *named, "--json")
        said = message(succeed("train", *how))
        assert (
            "Read as Alpaca's rows: 'instruction', below it 'input' where there is one; the answer is 'output'" in said
        )
        task = load_task(run / "adapter")
        assert task is not None
        assert (task.template, task.label_column) == (Template("{instruction}{\n\ninput}"), "output")
        shown = [each["text"] for each in json.loads((run / "result.json").read_text())["predictions"]]
        assert shown[0] == "please say then\n\none"
        assert shown[-1] == "say one"
        evaluated = succeed("evaluate", run / "adapter", "--data", data, "--json")
        assert json.loads(evaluated.stdout)["examples"] == 21
        succeed("predict", run / "adapter", "say one")
        output = tmp_path / "out.jsonl"
        succeed("predict", run / "adapter", "--file", data, "--output", output)
        assert len(output.read_text().splitlines()) == 21

    @pytest.mark.parametrize(
        ("header", "named", "remedy"),
        [
            ("premise,hypothesis,label", ["--text-column", "premise"], '--template "{premise} {hypothesis}"'),
            ("input,question,label", ["--text-column", "input"], '--template "{input} {question}"'),
            ("sentence1,sentence2,label", ["--text-column", "sentence1"], '--template "{sentence1} {sentence2}"'),
        ],
    )
    def test_texts_that_tell_their_answer_by_them_are_refused(
        self, base: Path, tmp_path: Path, header: str, named: list[str], remedy: str
    ) -> None:
        telling = {"negative": "falls", "neutral": "stays", "positive": "rises"}
        rows = [
            ("the share " * (n // 3 + 1), telling[label], label) for n in range(30) for label in [[*telling][n % 3]]
        ]
        how = (
            "--model",
            base,
            "--data",
            write(tmp_path / "a.csv", rows, header),
            "--steps",
            1,
            "--output",
            tmp_path / "run",
        )
        refused = call("train", *how, *named)
        assert refused.exit_code == 2
        assert "30 of 30 rows have a text that also has other answers, such as 'the share' with 3" in message(refused)
        assert remedy in message(refused)
        assert not (tmp_path / "run").exists()
        alone = f"{{{named[1]}}}"
        assert f'To learn without, say so: --template "{alone}"' in message(refused)
        said = message(succeed("train", *how, "--template", alone))
        assert "A column is not read that may belong to the text" in said
        with pytest.raises(ValueError, match="rows have a text that also has other answers"):
            ia3.sweep(str(base), str(tmp_path / "a.csv"), text_column=named[1], steps=1, console=quiet())

    def test_of_examples_in_memory_they_are_said(self, base: Path, tmp_path: Path) -> None:
        from ia3.data.loading import load_examples

        path = write(tmp_path / "a.csv", [("the share", *row) for row in [("x", "positive"), ("y", "negative")] * 9],
                     "premise,hypothesis,label")  # fmt: skip
        examples = load_examples(path, template=Template("{premise}"))
        console = quiet()
        run = ia3.train(str(base), examples, test_data=examples, steps=1, output=tmp_path / "run", console=console)
        assert "'hypothesis' (18 of 18 rows)" in console.file.getvalue()  # type: ignore[attr-defined]
        assert run.task.template == Template("{premise}")


class TestAnswersThatAreNoClasses:
    FREE: ClassVar = [(f"text {n}", f"the share rises {'much ' * n}") for n in range(12)]
    NUMBERS: ClassVar = [(f"text {n}", f"{n / 37:.2f}") for n in range(40)]

    @pytest.mark.parametrize(
        ("rows", "said"), [(FREE, "12 different ones to 12 texts"), (NUMBERS, "decimal numbers, 40")]
    )
    @pytest.mark.parametrize("model", ["base", "encoder"])
    def test_are_refused_unless_the_task_is_named(
        self, rows: list[tuple[str, str]], said: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        data = write(tmp_path / "a.csv", rows)
        how = ("--model", request.getfixturevalue(model), "--data", data, "--steps", 1, "--test-data", data)
        refused = call("train", *how, "--output", tmp_path / "run")
        assert refused.exit_code == 2
        assert said in message(refused)
        assert "--task generation" in message(refused)
        assert "rows (" not in message(refused)  # not a line of all of them first
        assert not (tmp_path / "run").exists()
        if model == "encoder":
            assert "--task sequence-classification takes them as classes" in message(refused)
            succeed("train", *how, "--output", tmp_path / "run", "--task", "sequence-classification")
        else:
            assert "--task label-words takes them as classes" in message(refused)
            insisting = message(call("train", *how, "--output", tmp_path / "run", "--task", "label-words"))
            assert "a class of its own. Answers to write" not in insisting

    @pytest.mark.parametrize("rows", [FREE, NUMBERS])
    def test_are_refused_in_a_sweep_and_in_memory(self, base: Path, rows: list[tuple[str, str]]) -> None:
        examples = Examples(tuple(Example(*row) for row in rows), tuple({row[1] for row in rows}), "here", 0, 0)
        for train in (ia3.train, ia3.sweep):
            with pytest.raises(ValueError, match="`task='generation'`"):
                train(str(base), examples, console=quiet(), steps=1)

    def test_a_class_a_row_with_held_out_data_of_the_same_is_trained_on(self, base: Path, tmp_path: Path) -> None:
        words = ("the", "share", "of", "a", "company", "today", "much", "very", "falls", "rises")
        data = write(tmp_path / "a.csv", [(f"{word} stays", word) for word in words])
        test = write(tmp_path / "b.csv", [(f"{word} falls", word) for word in words])
        how = ("--model", base, "--data", data, "--test-data", test, "--steps", 1, "--output", tmp_path / "run")
        succeed("train", *how)
