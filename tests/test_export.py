"""Adapted models for other runtimes: the exported program or file computes what the model does, at any length."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import tiny_seq2seq
from builders import CAUSAL, SEQ2SEQ, adapted, llama, randomise, seq2seq_batch, t5
from ia3 import IA3Config, get_peft_model

KINDS = {"t5": (t5, SEQ2SEQ), "llama": (llama, CAUSAL)}
PAGE = Path(__file__).parents[1] / "docs" / "export.md"


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    batch = seq2seq_batch()
    if kind == "llama":
        return {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": torch.tensor([[0, 5, 6]] * 3),
    }


def shorter(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:2, :-1].contiguous() for name, tensor in inputs.items()}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


def exported(model: nn.Module, inputs: dict[str, torch.Tensor], **how: Any) -> torch.export.ExportedProgram:
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs}
    named = {**inputs, "use_cache": False}
    return torch.export.export(model, (), named, dynamic_shapes={**shapes, "use_cache": None}, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_of_a_stored_program_can_be_replaced(kind: str, tmp_path: Path) -> None:
    build, config = KINDS[kind]
    model, inputs = adapted(build(), "other", **config).eval(), inputs_of(kind)
    torch.export.save(exported(model, inputs), tmp_path / "model.pt2")
    running: Any = torch.export.load(tmp_path / "model.pt2").module()
    short = shorter(inputs)
    torch.testing.assert_close(logits(running, short), logits(model, short))
    before = logits(model, short)
    vectors = {name: p for name, p in running.named_parameters() if ".ia3_l." in name}
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in vectors.items():
            parameter.copy_(own[name.replace(".default", ".other")])
    model.set_adapter("other")
    expected = logits(model, short)
    torch.testing.assert_close(logits(running, short), expected)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "attached"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("newer", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_computes_what_the_model_does(kind: str, merged: bool, newer: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    if newer:
        pytest.importorskip("onnxscript", reason="torch's newer exporter needs onnxscript")
    from onnx.reference import ReferenceEvaluator

    build, config = KINDS[kind]
    model, inputs = adapted(build(), **config).eval(), inputs_of(kind)
    short = shorter(inputs)
    expected = logits(model, short).numpy()
    if merged:
        model = model.merge_and_unload()
    path = tmp_path / "model.onnx"
    open_shapes: dict[str, Any] = (
        {"dynamic_shapes": (tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in inputs),)}
        if newer
        else {"dynamic_axes": {name: {0: "batch", 1: f"{name}_length"} for name in inputs}}
    )
    torch.onnx.export(
        Logits(model.requires_grad_(False), list(inputs)).eval(),
        tuple(inputs.values()),
        path,
        input_names=list(inputs),
        output_names=["logits"],
        dynamo=newer,
        **open_shapes,
    )
    feeds = {name: tensor.numpy() for name, tensor in short.items()}
    np.testing.assert_allclose(ReferenceEvaluator(str(path)).run(None, feeds)[0], expected, atol=1e-5)
    runtime = _installed("onnxruntime")
    if runtime is not None:
        np.testing.assert_allclose(runtime.InferenceSession(path).run(None, feeds)[0], expected, atol=1e-5)


class Logits(nn.Module):
    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), use_cache=False).logits


def _installed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None


def block_of_the_page(title: str) -> str:
    (found,) = re.findall(rf'^```text title="{title}"\n(.*?)^```$', PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return found


def test_ctranslate2_scores_as_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of this T5 is its own, so its output is not scaled, which transformers' configuration no longer says."""
    pytest.importorskip("ctranslate2", reason="CTranslate2 is not part of the extra dev")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny_seq2seq.base(), IA3Config(**SEQ2SEQ))
    randomise(model)
    tokenizer = tiny_seq2seq.tokenizer()
    encoded = tokenizer("the share rises today", return_tensors="pt")
    answer = tokenizer("very positive", return_tensors="pt").input_ids
    with torch.no_grad():
        own = model.eval()(input_ids=encoded.input_ids, labels=answer).logits.log_softmax(-1)
    expected = own.gather(2, answer[..., None]).flatten().numpy()
    model.merge_and_unload().save_pretrained("plain-model")
    tokenizer.save_pretrained("plain-model")
    names = SimpleNamespace()
    exec(block_of_the_page("to_ctranslate2.py"), names.__dict__)
    source = tokenizer.convert_ids_to_tokens(encoded.input_ids[0])
    target = tokenizer.convert_ids_to_tokens(answer[0, :-1])
    (scored,) = names.translator.score_batch([source], [target])
    np.testing.assert_allclose(scored.log_probs, expected, atol=1e-5)
