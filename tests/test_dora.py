"""An adapter as a LoRA folder with DoRA's magnitudes: PEFT, as the oracle, computes the same from it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5ForConditionalGeneration

import builders
from ia3.dora import save_as_dora


def relu_t5() -> nn.Module:
    torch.manual_seed(0)
    config = deepcopy(builders.t5().config)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "relu", False, "relu"
    return T5ForConditionalGeneration(config).eval()


def answers(model: Any, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(
    ("make", "config"), [(builders.llama, builders.CAUSAL), (builders.t5, builders.SEQ2SEQ)], ids=["llama", "t5"]
)
def test_peft_computes_the_same(make: Any, config: dict[str, Any], tmp_path: Path) -> None:
    """Vectors of both signs, at outputs and at a gated feed-forward's second matrix."""
    batch = builders.seq2seq_batch() if make is builders.t5 else {"input_ids": torch.arange(6)[None]}
    model = builders.adapted(make(), **config)
    builders.randomise(model, spread=1.0)
    expected, plain = answers(model, **batch), answers(make(), **batch)
    save_as_dora(model, tmp_path)
    assert torch.equal(answers(model, **batch), expected)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert theirs.peft_config["default"].use_dora
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(answers(theirs, **batch), expected, rtol=0, atol=2e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(answers(merged, **batch), expected, rtol=0, atol=2e-5)


def test_before_a_relu_positive_vectors_alone(tmp_path: Path) -> None:
    model, batch = builders.adapted(relu_t5(), **builders.SEQ2SEQ), builders.seq2seq_batch()
    vectors = [parameter for name, parameter in model.named_parameters() if ".ia3_l." in name]
    with torch.no_grad():
        for vector in vectors:
            vector.abs_().add_(0.1)
    save_as_dora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(relu_t5(), tmp_path).eval()
    torch.testing.assert_close(answers(theirs, **batch), answers(model, **batch), rtol=0, atol=2e-5)
    with torch.no_grad():
        for vector in vectors:
            vector.neg_()
    with pytest.raises(ValueError, match=r"wo has a vector at its input.*DoRA can't hold it"):
        save_as_dora(model, tmp_path)


def test_modules_trained_in_full_come_along(tmp_path: Path) -> None:
    model = builders.adapted(builders.llama(), **builders.CAUSAL, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    save_as_dora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(builders.llama(), tmp_path).eval()
    batch = {"input_ids": torch.arange(6)[None]}
    torch.testing.assert_close(answers(theirs, **batch), answers(model, **batch), rtol=0, atol=2e-5)


def test_a_bias_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=64, **shape)).eval()
    model = builders.adapted(base, target_modules=["key", "value"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"key has a bias, which a vector multiplies and DoRA doesn't.*Merge"):
        save_as_dora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'nobody'"):
        save_as_dora(model, tmp_path, "nobody")


def test_another_layer_is_refused(tmp_path: Path) -> None:
    model = builders.adapted(builders.gpt2(), target_modules=["c_attn"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"c_attn is a Conv1D, not a linear layer"):
        save_as_dora(model, tmp_path)
