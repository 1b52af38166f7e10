"""Figures that differ: one adapter and the same rows, by training, evaluating, predicting and sweeping."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running import call, message, succeed

import tiny_causal
import tiny_classifier
import tiny_seq2seq
from ia3.inference.labelling import Overrides, load_labeller
from ia3.tasks.examples import Example
from ia3.tasks.task import load_task

# Of different lengths in tokens, so that their order hangs on how scores are normalised.
_LABELS = {"negative": "negative", "neutral": "much of the neutral", "positive": "very positive"}
_TAGS = ("O", "?", "B-PER")


@dataclass(frozen=True)
class Case:
    """A kind of task: its base, its rows, and how it is trained."""

    base: Callable[[Callable[..., Any], Path], Any]
    rows: Callable[[int], list[Example]]
    flags: tuple[str | int | float, ...]
    method: str
    swept: bool = True
    recipe: str = "seed: 42"


def _seq2seq(tiny: Callable[..., Any], folder: Path) -> None:
    # A base in bf16, which is trained in fp32: answers must be in fp32, too.
    tiny_seq2seq.base().to(torch.bfloat16).save_pretrained(folder)
    tiny_seq2seq.tokenizer().save_pretrained(folder)


def _causal(tiny: Callable[..., Any], folder: Path) -> None:
    shape = {"vocab_size": len(tiny_causal.WORDS), "bos_token_id": 3, "tie_word_embeddings": False}
    tiny("llama", **shape).to(torch.bfloat16).save_pretrained(folder)
    tiny_causal.tokenizer().save_pretrained(folder)


def _causal_of_few_positions(tiny: Callable[..., Any], folder: Path) -> None:
    shape = {"vocab_size": len(tiny_causal.WORDS), "bos_token_id": 3, "n_positions": 16, "initializer_range": 0.7}
    tiny("gpt2", **shape).save_pretrained(folder)
    tiny_causal.tokenizer().save_pretrained(folder)


def _encoder(tiny: Callable[..., Any], folder: Path) -> None:
    tiny("bert", initializer_range=0.3).to(torch.bfloat16).save_pretrained(folder)
    tiny_classifier.tokenizer().save_pretrained(folder)


def _sentences(count: int) -> list[Example]:
    return [Example(row.text, _LABELS[row.label]) for row in tiny_seq2seq.examples(count)]


def _tagged(count: int) -> list[Example]:
    """Some are cut; `?` is a tag of its own."""
    texts = [row.text.split() for row in tiny_classifier.labelled(count)]
    return [
        Example(" ".join(words), " ".join(_TAGS[(place + len(word)) % 3] for place, word in enumerate(words)))
        for words in texts
    ]


_WRITTEN = "written answers, exact match"
_SHORT = ("--max-length", 5)  # which cuts some of the texts
CASES = {
    "labels ranked": Case(_seq2seq, _sentences, ("--lr", 0.05, *_SHORT), "the likeliest label"),
    "labels written": Case(_seq2seq, _sentences, ("--lr", 0.05, "--answer-by", "generation"), _WRITTEN),
    "free text": Case(_seq2seq, _sentences, ("--lr", 0.05, "--task", "generation"), _WRITTEN),
    "instructions": Case(_causal, tiny_causal.examples, ("--max-length", 32), _WRITTEN, recipe="system: be brief"),
    "instructions, few positions": Case(_causal_of_few_positions, tiny_causal.examples, ("--max-length", 16), _WRITTEN),
    "classes of texts": Case(
        _encoder,
        tiny_classifier.labelled,
        ("--lr", 0.05, "--epochs", 6, *_SHORT),
        "the head's likeliest label",
        swept=False,
    ),
    "classes of words": Case(
        _encoder,
        _tagged,
        ("--task", "token-classification", "--lr", 0.05, "--epochs", 2, *_SHORT),
        "the head's likeliest tag of each word",
        swept=False,
    ),
}


@dataclass(frozen=True)
class Trained:
    """A run, the rows that it was measured on, and the base and flags that it was made by."""

    case: Case
    base: Path
    data: Path
    flags: tuple[str | int | float | Path, ...]
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("case")
    case.base(tiny, folder / "base")
    data = folder / "rows.csv"
    rows = case.rows(70)
    data.write_text("\n".join(["text,label", *(f"{row.text},{row.label}" for row in rows)]) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(case.recipe)
    flags = ("--recipe", folder / "recipe.yaml", "--test-data", data, "--epochs", 1, "--no-dropout", *case.flags)
    succeed("train", "--model", folder / "base", "--data", data, *flags, "--output", folder / "run")
    return Trained(case, folder / "base", data, flags, folder / "run")


def figures(content: dict[str, Any]) -> dict[str, Any]:
    """What training and evaluating both say."""
    scores = content.get("scores", content)
    kept = ("accuracy_by_rank", "entity_f1", "entity_precision", "entity_recall", "words_left_out")
    return {
        "accuracy": content["accuracy"],
        "interval": content["accuracy_interval_95"],
        "macro_f1": content.get("macro_f1"),
        "majority_baseline": content.get("majority_baseline"),
        "method": content["method"],
        "examples": content.get("test_examples", content.get("examples")),
        **{name: scores[name] for name in kept if name in scores},
    }


def evaluated(adapter: Path, data: Path, *more: str) -> dict[str, Any]:
    return json.loads(succeed("evaluate", adapter, "--data", data, *more, "--json").stdout)


def predicted(adapter: Path, data: Path, output: Path) -> list[str]:
    """One answer a row, or a word."""
    succeed("predict", adapter, "--file", data, "--output", output)
    answers = [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]
    task = load_task(adapter)
    assert task is not None
    if task.kind != "token-classification":
        return answers
    read = max(1, task.max_length - 2)  # what the special tokens leave
    return [tag for answer in answers for tag in answer.split()[:read]]


def test_evaluating_says_what_training_said(trained: Trained) -> None:
    found, said = evaluated(trained.folder / "adapter", trained.data), trained.result
    assert figures(found) == figures(said)
    assert found["method"] == trained.case.method
    assert 0 < said["accuracy"] < 1 or trained.case.method == _WRITTEN  # which a difference would show in
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines if "evaluation" in line} == {trained.case.method}
    for name in ("report.md", "adapter/README.md"):
        assert f"| asked for | {trained.case.method} |" in (trained.folder / name).read_text()


def test_predicting_says_what_training_said(trained: Trained, tmp_path: Path) -> None:
    said = [each["prediction"] for each in trained.result["predictions"]]
    assert predicted(trained.folder / "adapter", trained.data, tmp_path / "out.jsonl") == said
    assert len(set(said)) > 1


def test_a_sweep_says_what_training_says(trained: Trained, tmp_path: Path) -> None:
    flags = ["--over", "seed=42,7", *trained.flags, "--output", tmp_path / "sweep", "--json"]
    if not trained.case.swept:
        assert "A sweep trains a row of vectors a run" in message(call("sweep", trained.base, trained.data, *flags))
        return
    content = json.loads(succeed("sweep", trained.base, trained.data, *flags).stdout)
    assert content["method"] == trained.case.method
    for run in content["runs"]:
        folder = Path(run["folder"])
        result = json.loads((folder / "result.json").read_text())
        assert run["accuracy"] == result["accuracy"]
        assert figures(evaluated(folder / "adapter", trained.data)) == figures(result)
        said = [each["prediction"] for each in result["predictions"]]
        assert predicted(folder / "adapter", trained.data, tmp_path / "out.jsonl") == said
        if run["settings"]["seed"] == 42:
            assert figures(result) == figures(trained.result)
            assert said == [each["prediction"] for each in trained.result["predictions"]]
    best = evaluated(Path(content["best"]["adapter"]), trained.data)
    assert best["accuracy"] == content["runs"][0]["best"]["accuracy"]


def test_the_base_answers_in_the_precision_of_the_training(trained: Trained) -> None:
    labeller = load_labeller(str(trained.folder / "adapter"), Overrides())
    dtypes = {name: value.dtype for name, value in labeller.model.named_parameters() if value.dtype != torch.float32}
    assert dtypes == {}


def test_the_other_way_is_asked_for_by_a_flag(trained: Trained) -> None:
    adapter = trained.folder / "adapter"
    if "labels" not in evaluated(adapter, trained.data) or not trained.case.swept:
        for command in (("evaluate", adapter, "--data", trained.data), ("predict", adapter, "the share falls")):
            refused = message(call(*command, "--answer-by", "rank"))
            assert "--answer-by: Answers by rank are for label-words" in refused
        return
    written = evaluated(adapter, trained.data, "--answer-by", "generation")
    ranked = evaluated(adapter, trained.data, "--answer-by", "rank")
    assert (written["method"], ranked["method"]) == (_WRITTEN, "the likeliest label")
    assert written["accuracy_by_rank"] == ranked["accuracy"] != written["accuracy"]
    shown = succeed("evaluate", adapter, "--data", trained.data, "--answer-by", "generation").stdout
    assert f"accuracy by rank {ranked['accuracy']:.1%}" in " ".join(shown.split())
    own = trained.result
    assert own["accuracy"] == (ranked if trained.case.method != _WRITTEN else written)["accuracy"]
