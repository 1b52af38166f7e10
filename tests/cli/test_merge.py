from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import call, message, succeed, unwrapped
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ia3.inference.loading import load_adapter


def test_the_merged_model_answers_like_the_adapter(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "merged"
    result = succeed("merge", adapter, output)
    assert "640 numbers" in result.stdout
    merged, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(["the share falls"], return_tensors="pt")
    start = torch.zeros(1, 1, dtype=torch.long)
    model, _ = load_adapter(adapter)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=start).logits
        torch.testing.assert_close(merged(**inputs, decoder_input_ids=start).logits, expected)
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


def test_json(adapter: Path, tmp_path: Path) -> None:
    content = json.loads(succeed("merge", adapter, tmp_path / "merged", "--json").stdout)
    size = sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert content["bytes"] == size
    assert content["merged_numbers"] == 640


def test_nothing_is_replaced(adapter: Path, tmp_path: Path) -> None:
    result = call("merge", adapter, tmp_path)
    assert result.exit_code == 2
    assert "exists already, and a merged model replaces nothing" in message(result)


def test_a_folder_below_a_file(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("merge", adapter, tmp_path / "file" / "merged")
    assert result.exit_code == 2
    assert "is a file: name another" in message(result)


def test_a_failed_save_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", stop)
    result = call("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 2
    assert "No space left on device" in message(result)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_names_no_base(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    result = call("merge", tmp_path, tmp_path / "merged")
    assert result.exit_code == 2
    assert "names no base model" in message(result)


def test_a_base_that_cannot_be_read_is_said_with_the_adapter(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "not/there"}))
    result = call("merge", tmp_path, tmp_path / "merged")
    assert unwrapped(f"{tmp_path} names the base model 'not/there'") in unwrapped(message(result))
