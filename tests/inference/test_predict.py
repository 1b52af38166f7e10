from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_seq2seq
from ia3.inference.loading import load_adapter
from ia3.inference.predict import predict, sorted_batches

TOKENIZER = tiny_seq2seq.tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with vectors far from one, on a base in a folder."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_seq2seq.save_base(folder / "base")
    model = tiny_seq2seq.adapted()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.normal_(1, 2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_answers_come_in_the_order_of_the_texts(saved: Path) -> None:
    model, tokenizer = load_adapter(saved)
    texts = tiny_seq2seq.examples(11).texts
    alone = [predict(model, tokenizer, [text], max_new_tokens=6)[0] for text in texts]
    assert len(set(alone)) > 1
    assert predict(model, tokenizer, texts, max_new_tokens=6, batch_size=3) == alone
    assert predict(model, tokenizer, texts, max_new_tokens=6, batch_size=32) == alone


def test_a_loaded_adapter_is_ready_to_use(saved: Path) -> None:
    model, tokenizer = load_adapter(saved)
    assert not model.training
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    vector = model.get_parameter("encoder.block.0.layer.0.SelfAttention.k.ia3_l.default")
    assert (vector - 1).abs().max() > 1


def test_long_texts_are_cut(saved: Path) -> None:
    model, tokenizer = load_adapter(saved)
    long = "the share of a company falls"
    assert predict(model, tokenizer, [long], max_length=4) == predict(model, tokenizer, ["the share of"])


def test_no_texts(saved: Path) -> None:
    assert predict(*load_adapter(saved), []) == []


def test_batches_from_long_to_short() -> None:
    assert list(sorted_batches([3, 9, 5, 9, 1], 2)) == [[1, 3], [2, 0], [4]]


def test_an_adapter_without_a_base_is_refused(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no base model: set base_model_name_or_path"):
        load_adapter(tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No adapter_config\.json"):
        load_adapter(tmp_path)
