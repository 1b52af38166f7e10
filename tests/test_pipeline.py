"""transformers' `pipeline` with an adapter's folder, whose base transformers looks for by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer, pipeline

from ia3 import AutoPeftModelForSequenceClassification, IA3Config, get_peft_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "day"]


@pytest.fixture
def folder(tiny: Any, randomise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter on a saved classifier, and the classifier's tokenizer."""
    base = tiny("bert")
    base.save_pretrained(tmp_path / "base")
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    randomise(get_peft_model(base, IA3Config(task_type="SEQ_CLS"))).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def scores(model: Any, **how: Any) -> list[float]:
    (answers,) = pipeline("text-classification", model=model, device="cpu", top_k=None, **how)(["good day"])
    return [answer["score"] for answer in sorted(answers, key=lambda answer: answer["label"])]


def test_a_folder_and_its_loaded_model_answer_alike(folder: Path) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base")
    loaded = scores(model, tokenizer=tokenizer)
    with torch.no_grad():
        expected = model(**tokenizer("good day", return_tensors="pt")).logits[0].softmax(-1).tolist()
    assert loaded == pytest.approx(expected)
    assert scores(str(folder)) == pytest.approx(loaded)


@pytest.mark.parametrize(
    ("name", "error"),
    [("bundled:flan-t5-small-titler", "Repo id must use"), ("model.gguf", "is not a valid JSON file")],
)
def test_a_name_that_transformers_does_not_know(name: str, error: str, folder: Path, monkeypatch) -> None:
    """As the page on the ecosystem says; where it no longer fails, the page is to be changed."""
    monkeypatch.chdir(folder.parent)
    Path("model.gguf").write_bytes(b"GGUF\x03\xff")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder.parent / "base"), name))
    with pytest.raises(OSError, match=error):
        pipeline("text-classification", model=str(folder), device="cpu")
