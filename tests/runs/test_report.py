from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console

import tiny_seq2seq
from ia3 import IA3Config, get_peft_model
from ia3.adapter import site_vectors
from ia3.runs.adapters import VectorMap, vector_maps
from ia3.runs.report import draw_report, result_table, write_report
from ia3.runs.run import Run, TrainerState, compute_metrics
from ia3.runs.settings import TrainSettings
from ia3.state import get_adapter
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template


def finished(folder: Path, predictions: list[str], kind: TaskKind = TaskKind.LABEL_WORDS) -> Run:
    references = ["negative", "neutral", "positive", "positive"]
    labels = tiny_seq2seq.LABELS if kind.has_labels else ()
    return Run(
        output_dir=folder,
        settings=TrainSettings(),
        task=Task(kind=kind, template=Template("{text}"), labels=labels, max_length=9),
        shown=["text | 1\n", "text 2", "text 3", "long " * 99],
        references=references,
        progress=TrainerState(
            steps=[{"learning_rate": 1.0, "loss": 2.0 / step, "step": step} for step in range(1, 61)],
            evaluations=[
                compute_metrics(0, 3.0, references, ["a title"] * 4, labels, seconds=0.1),
                compute_metrics(30, 0.25, references, references, labels, seconds=0.1),
                compute_metrics(60, 0.5, references, predictions, labels, seconds=0.1),
            ],
            best=1,
            seconds=12.3,
        ),
        train_examples=480,
        trainable_parameters=448,
        all_parameters=76_995_968,
    )


def moved(model: Any, by: float = 0.25) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.add_(by)
    return model


def maps_of(model: Any) -> list[VectorMap]:
    return vector_maps(dict(site_vectors(model, get_adapter(model, "default"))))


def test_vectors_of_an_encoder_and_a_decoder() -> None:
    model = tiny_seq2seq.adapted()
    with torch.no_grad():
        model.get_parameter("decoder.block.1.layer.1.EncDecAttention.v.ia3_l.default").sub_(0.5)
    encoder, decoder = maps_of(model)
    assert (encoder.title, encoder.blocks, encoder.columns) == ("Encoder", ["0", "1"], ["k", "v", "ff"])
    assert (decoder.title, decoder.columns) == ("Decoder", ["k", "v", "cross k", "cross v", "ff"])
    assert encoder.distances == [[0, 0, 0], [0, 0, 0]]
    assert decoder.distances == [[0, 0, 0, 0, 0], [0, 0, 0, 0.5, 0]]


def test_distance_is_absolute() -> None:
    model = tiny_seq2seq.adapted()
    with torch.no_grad():
        vector = model.get_parameter("encoder.block.0.layer.0.SelfAttention.k.ia3_l.default")
        vector[::2] += 0.5
        vector[1::2] -= 0.5
    assert maps_of(model)[0].distances[0][0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bart", {"Encoder": {"k", "v", "ff"}, "Decoder": {"k", "v", "cross k", "cross v", "ff"}}),
        ("mt5", {"Encoder": {"k", "v", "wi_1"}, "Decoder": {"k", "v", "cross k", "cross v", "wi_1"}}),
        ("llama", {"Model": {"k", "v", "ff"}}),
        ("bert", {"Encoder": {"k", "v", "ff"}}),
    ],
)
def test_vectors_of_other_families(tiny: Any, family: str, expected: dict[str, set[str]]) -> None:
    maps = maps_of(get_peft_model(tiny(family), IA3Config()))
    assert {each.title: set(each.columns) for each in maps} == expected
    assert all(each.blocks == ["0", "1"] for each in maps)


@pytest.mark.parametrize("predictions", [["negative", "neutral", "positive", "rises"], ["neutral"] * 4])
def test_the_picture(tmp_path: Path, predictions: list[str]) -> None:
    path = draw_report(finished(tmp_path, predictions), moved(tiny_seq2seq.adapted()), tmp_path / "report.png")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] > 1500
    assert pixels.std() > 0.1


def test_the_picture_of_vectors_that_never_moved(tmp_path: Path) -> None:
    path = draw_report(finished(tmp_path, ["neutral"] * 4), tiny_seq2seq.adapted(), tmp_path / "report.png")
    assert path.stat().st_size > 10_000


def test_the_picture_of_a_decoder_alone_with_gaps(tmp_path: Path, tiny: Any) -> None:
    config = IA3Config(
        target_modules=r".*layers\.0\..*(k_proj|down_proj)|.*layers\.1\..*k_proj", feedforward_modules=[]
    )
    model = moved(get_peft_model(tiny("llama"), config))
    path = draw_report(finished(tmp_path, ["neutral"] * 4), model, tmp_path / "report.png")
    assert path.stat().st_size > 10_000


def test_the_table(tmp_path: Path) -> None:
    tiny_seq2seq.adapted().save_pretrained(tmp_path / "adapter")
    run = finished(tmp_path, ["negative", "neutral", "positive", "rises"])
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "screen").open("w"))
    console.print(result_table(run, tmp_path / "report.png"))
    shown = console.export_text()
    assert "75.0% of 4 held out (95 % interval 30.1% to 95.4%)" in shown
    assert "50.0%" in shown
    assert "0.500 (perplexity 1.649)" in shown
    assert "100.0%, loss 0.250, after step 30" in shown
    assert "12 s, 60 steps, 480 examples" in shown
    assert "448 of 76,995,968 (0.001%)" in shown
    assert f"{run.adapter_bytes:,} bytes" in shown
    assert str(tmp_path / "report.png") in shown


def test_the_report_of_labels(tmp_path: Path) -> None:
    report = write_report(finished(tmp_path, ["neutral", "neutral", "rises", "rises"]), "a title").read_text()
    assert report.startswith("# a title\n\n| | |\n|---|---|\n| accuracy | 25.0% of 4 held out")
    assert "| majority class | 50.0% |" in report
    assert "## Wrong answers: 3 of 3" in report
    assert "| text \\| 1 | negative | neutral |" in report
    assert f"| {('long ' * 99)[:159]}… | positive | rises |" in report


def test_the_report_of_free_text_without_mistakes(tmp_path: Path) -> None:
    references = ["negative", "neutral", "positive", "positive"]
    run = finished(tmp_path, references, TaskKind.GENERATION)
    report = write_report(run, "a title").read_text()
    assert "majority" not in report
    assert "Wrong answers" not in report
    assert draw_report(run, tiny_seq2seq.adapted(), tmp_path / "report.png").stat().st_size > 10_000
