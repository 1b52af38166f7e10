"""An encoder-decoder's decoder alone: where the vectors are, what PEFT makes of the file, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import tiny_seq2seq
from ia3 import IA3Config, find_sites, get_peft_model, train

FAMILIES = ["t5", "mt5", "bart"]


def sites_of(model: nn.Module, **fields: Any) -> set[str]:
    return {site.path for site in find_sites(model, IA3Config(**fields)).layout.sites}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_halves_are_all_of_it(tiny, family) -> None:
    model = tiny(family)
    whole, encoder, decoder = (sites_of(model, towers=towers) for towers in (None, "encoder", ["decoder"]))
    assert whole == encoder | decoder
    assert not encoder & decoder
    assert all("decoder." in path for path in decoder)
    assert {path.rpartition(".")[2] for path in decoder} == {path.rpartition(".")[2] for path in whole}
    assert sites_of(model, towers=["encoder", "decoder"]) == whole


def test_some_layers_of_the_decoder(tiny) -> None:
    paths = sites_of(tiny("t5"), towers="decoder", layers_to_transform=[1])
    assert {path.split(".")[2] for path in paths} == {"1"}
    assert all(path.startswith("decoder.") for path in paths)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_peft_reads_the_file_as_it_is_meant(tiny, randomise, family, tmp_path: Path, recwarn: Any) -> None:
    model = randomise(get_peft_model(tiny(family).eval(), IA3Config(task_type="SEQ_2_SEQ_LM", towers="decoder")))
    model.save_pretrained(tmp_path)
    assert "towers" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert all("decoder." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(tiny(family).eval(), tmp_path)
    assert not [each for each in recwarn if "adapter" in str(each.message).lower()]
    batch = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 4, 9]])}
    with torch.no_grad():
        expected, base = theirs(**batch).logits, tiny(family).eval()(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected)
        assert (expected - base).abs().max() > 1e-4
        encoded = [each.get_encoder()(batch["input_ids"]).last_hidden_state for each in (model, tiny(family).eval())]
    assert torch.equal(*encoded)


def test_a_model_without_a_decoder_beside_an_encoder_is_refused(tiny) -> None:
    for family in ("llama", "bert"):
        with pytest.raises(ValueError, match=r"towers: \['decoder'\] are none of this model's.*no encoder beside"):
            sites_of(tiny(family), towers="decoder")


def test_training_takes_it(tmp_path: Path) -> None:
    base = tiny_seq2seq.save_base(tmp_path / "base")
    how: Any = {"test_size": 0.5, "steps": 1, "towers": "decoder", "console": Console(quiet=True)}
    run = train(base, tiny_seq2seq.examples(12), output=tmp_path / "run", **how)
    assert all("decoder." in key for key in load_file(run.adapter_dir / "adapter_model.safetensors"))
