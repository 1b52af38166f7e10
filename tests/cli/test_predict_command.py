from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import openpyxl
import pytest
from running import call, message, succeed

from ia3.cli.predict import predict
from ia3.inference.loading import load_adapter
from ia3.inference.rank import rank

LABELS = ["negative", "neutral", "positive"]


def test_sentences_need_no_flags(adapter: Path) -> None:
    texts = ["the share falls", "the share [of] a company rises"]
    lines = [line.split("\t") for line in succeed("predict", adapter, *texts).stdout.splitlines()]
    right = rank(*load_adapter(adapter), texts, LABELS)
    assert lines == [
        [each.label, f"{each.probabilities[each.label]:.4f}", text] for each, text in zip(right, texts, strict=True)
    ]


def test_standard_input_as_json(adapter: Path) -> None:
    result = succeed("predict", adapter, "--json", text="the share falls\n\n  a company rises\n")
    predictions = json.loads(result.stdout)["predictions"]
    assert [each["text"] for each in predictions] == ["the share falls", "a company rises"]
    for each in predictions:
        assert list(each["probabilities"]) == LABELS
        assert sum(each["probabilities"].values()) == pytest.approx(1)
        assert each["probability"] == max(each["probabilities"].values()) == each["probabilities"][each["label"]]
    assert "Blank lines left out: 1." in result.stderr


def test_an_adapter_without_a_task_writes_its_answers(adapter: Path, tmp_path: Path) -> None:
    for path in adapter.iterdir():
        if path.name != "ia3_task.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with_task = succeed("predict", adapter, "--answer-by", "generation", "--max-new-tokens", 4, "the share falls")
    assert succeed("predict", tmp_path, "--max-new-tokens", 4, "the share falls").stdout == with_task.stdout


def test_max_length_overrides_the_task(adapter: Path) -> None:
    cut = succeed("predict", adapter, "--json", "--max-length", 4, "the share of a company falls")
    short = succeed("predict", adapter, "--json", "the share of")
    probabilities = [json.loads(each.stdout)["predictions"][0]["probabilities"] for each in (cut, short)]
    assert probabilities[0] == probabilities[1]
    assert "Cut at 4 tokens: 1 of 1 texts." in cut.stderr
    assert "Cut" not in short.stderr


def test_csv_to_csv_keeps_every_row_and_column(adapter: Path, data: Path, tmp_path: Path) -> None:
    rows = list(csv.reader(data.open(newline="")))
    rows[3][0] = ""
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    output = tmp_path / "out.csv"
    result = succeed("predict", adapter, "--file", source, "--output", output)
    with output.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [[row["text"], row["label"]] for row in written] == rows[1:]
    assert written[2] == {**dict.fromkeys(written[2], ""), "label": rows[3][1]}
    for row in [*written[:2], *written[3:]]:
        shares = {label: float(row[f"probability_{label}"]) for label in LABELS}
        assert row["prediction"] == max(shares, key=shares.__getitem__)
        assert float(row["probability"]) == max(shares.values())
    assert "without prediction: 1 of 30 rows" in result.stderr
    assert "29 predictions are in" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_jsonl_to_jsonl_of_another_column(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 7, "review": "the share falls"}\n\n{"id": 8, "review": "a company rises", "more": [1]}\n')
    output = tmp_path / "out.jsonl"
    result = succeed("predict", adapter, "--file", source, "--text-column", "review", "--output", output, "--json")
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row.get("more")) for row in written] == [(7, None), (8, [1])]
    assert all(row["probability"] == row["probabilities"][row["prediction"]] for row in written)
    content = json.loads(result.stdout)
    assert (content["rows"], sum(content["labels"].values())) == (2, 2)


def test_generated_answers_have_no_probabilities(adapter: Path, data: Path, tmp_path: Path) -> None:
    for name in ("out.csv", "out.jsonl"):
        succeed("predict", adapter, "--answer-by", "generation", "--file", data, "--output", tmp_path / name)
    assert (tmp_path / "out.csv").read_text().startswith("text,label,prediction\n")
    assert set(json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])) == {"text", "label", "prediction"}


def test_a_text_file_is_a_text_a_line(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the share falls\n\na company, rises\n")
    lines = succeed("predict", adapter, "--file", tmp_path / "in.txt").stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["the share falls", "a company, rises"]


def test_an_interrupted_prediction_leaves_the_old_output(
    adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("old")

    def stop(*_: object, **__: object) -> None:
        raise OSError("No space left")

    monkeypatch.setattr("ia3.files.os.fsync", stop)
    assert call("predict", adapter, "--file", data, "--output", output).exit_code == 2
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_batches_change_neither_the_answers_nor_their_order(adapter: Path, data: Path) -> None:
    whole = succeed("predict", adapter, "--file", data).stdout
    assert succeed("predict", adapter, "--file", data, "--batch-size", 4).stdout == whole


def test_a_length_of_what_is_not_written_is_refused(adapter: Path) -> None:
    refused = call("predict", adapter, "--max-new-tokens", 4, "the share falls")
    assert "The labels are ranked here and nothing is written: leave --max-new-tokens out" in message(refused)


@pytest.mark.parametrize("more", [[], ["--answer-by", "generation"]])
def test_a_terminal_gets_a_table(
    more: list[str], adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    predict(str(adapter), ["the [red]share falls"], answer_by=more[1] if more else None)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["label", *([] if more else ["probability"]), "text"]
    assert row.rstrip().endswith("the [red]share falls")
    assert ("%" in row) == (not more)


def test_nothing_to_label_on_a_terminal(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(ValueError, match="There is nothing to label: give sentences"):
        predict(str(adapter), None)


def test_a_template_with_several_fields(base: Path, tmp_path: Path) -> None:
    pairs = ["the share,falls,negative", "the share,stays,neutral", "the share,rises,positive"]
    source = tmp_path / "pairs.csv"
    source.write_text("\n".join(["first,second,label", *pairs * 4]) + "\n")
    pattern = "{first} of a company {second}"
    run = tmp_path / "run"
    succeed(
        *("train", "--model", base, "--data", source, "--test-data", source, "--template", pattern),
        *("--output", run, "--epochs", 1),
    )
    texts = [each["text"] for each in json.loads((run / "result.json").read_text())["predictions"]]
    assert texts[0] == "the share of a company falls"
    printed = succeed("predict", run / "adapter", "--file", source).stdout.splitlines()
    assert [line.split("\t")[2] for line in printed] == texts
    assert "12 (95 % interval" in succeed("evaluate", run / "adapter", "--data", source).stdout
    refused = call("predict", run / "adapter", "the share falls")
    assert refused.exit_code == 2
    assert "reads the columns ['first', 'second'], so a sentence is not enough" in message(refused)
    replaced = call("predict", run / "adapter", "--file", source, "--text-column", "first")
    assert replaced.exit_code == 2
    assert "leave --text-column out" in message(replaced)


def test_a_template_is_not_shown(base: Path, data: Path, tmp_path: Path) -> None:
    succeed(
        *("train", "--model", base, "--data", data, "--template", "very {text}", "--epochs", 1, "--limit", 9),
        *("--output", tmp_path / "run"),
    )
    adapter = tmp_path / "run" / "adapter"
    label, share, text = succeed("predict", adapter, "a company rises").stdout.strip().split("\t")
    right = rank(*load_adapter(adapter), ["very a company rises"], LABELS)[0]
    assert (label, share, text) == (right.label, f"{right.probabilities[right.label]:.4f}", "a company rises")


def test_standard_input_in_another_encoding(adapter: Path) -> None:
    result = call("predict", adapter, text="Umsätze\n".encode("latin-1"))
    assert result.exit_code == 2
    assert "UTF-8" in message(result)


def test_a_hard_link_to_the_input_is_the_input(adapter: Path, data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    os.link(data, link)
    result = call("predict", adapter, "--file", data, "--output", link)
    assert result.exit_code == 2
    assert "is the input" in message(result)


def test_lines_of_a_text_file_are_the_templates_column(base: Path, data: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(data.read_text().replace("text,label", "review,label"))
    run = tmp_path / "run"
    succeed(*("train", "--model", base, "--data", renamed, "--text-column", "review", "--epochs", 1, "--output", run))
    lines = tmp_path / "lines.txt"
    lines.write_text("the share falls\na company rises\n")
    answered = json.loads(succeed("predict", run / "adapter", "--file", lines, "--json").stdout)["predictions"]
    assert [each["text"] for each in answered] == ["the share falls", "a company rises"]


def test_a_text_with_tabs_and_line_breaks_stays_on_its_line(adapter: Path) -> None:
    (line,) = succeed("predict", adapter, "the share\tfalls\nfar \\").stdout.splitlines()
    label, probability, text = line.split("\t")
    assert label in LABELS
    assert 0 < float(probability) <= 1
    assert text == r"the share\tfalls\nfar \\"


def test_a_file_as_excel_saves_it_in_germany(adapter: Path, data: Path, tmp_path: Path) -> None:
    rows = list(csv.reader(data.open(newline="")))
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", newline="", encoding="cp1252") as file:
        csv.writer(file, delimiter=";").writerows([*rows, ["the share fällt", "negative"]])
    result = succeed("predict", adapter, "--file", source, "--output", output)
    assert "in.csv is read with semicolons between the cells, as Windows-1252 (not UTF-8)." in message(result)
    with output.open(newline="", encoding="cp1252") as file:
        written = list(csv.reader(file, delimiter=";"))
    assert written[0][:4] == ["text", "label", "prediction", "probability"]
    assert [row[:2] for row in written[1:-1]] == rows[1:]
    assert written[-1][0] == "the share fällt"


def test_files_without_a_header_lose_no_row(adapter: Path, data: Path, tmp_path: Path) -> None:
    rows = list(csv.reader(data.open(newline="")))[1:]
    right = [line.split("\t")[0] for line in succeed("predict", adapter, "--file", data).stdout.splitlines()]
    layouts: list[tuple[list[int], tuple[object, ...]]] = [
        ([0], ("--text-column", 1)),
        ([0, 1], ()),
        ([1, 0, 1], ("--text-column", 2)),
    ]
    for number, (cells, more) in enumerate(layouts):
        source, output = tmp_path / f"{number}.csv", tmp_path / f"out{number}.csv"
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([row[cell] for cell in cells] for row in rows)
        result = succeed("predict", adapter, "--file", source, "--output", output, *more)
        assert f"{source.name} is read without a header: " in message(result)
        with output.open(newline="") as file:
            assert [row[len(cells)] for row in csv.reader(file)] == right
    refused = call("predict", adapter, "--file", tmp_path / "2.csv")
    assert refused.exit_code == 2
    assert "Name its columns by number, such as --text-column 1" in message(refused)


def test_sheets_of_excel(adapter: Path, data: Path, tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in csv.reader(data.open(newline="")):
        book.worksheets[0].append([*row, 7])
    book.worksheets[0].cell(1, 3, "id")
    book.save(tmp_path / "in.xlsx")
    succeed("predict", adapter, "--file", tmp_path / "in.xlsx", "--output", tmp_path / "out.xlsx")
    succeed("predict", adapter, "--file", data, "--output", tmp_path / "out.csv")
    (page,) = openpyxl.load_workbook(tmp_path / "out.xlsx").worksheets
    header, *rows = page.values
    assert header[:4] == ("text", "label", "id", "prediction")
    assert {row[2] for row in rows} == {7}
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row[3] for row in rows] == [row["prediction"] for row in csv.DictReader(file)]
