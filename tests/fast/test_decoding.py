"""A generation by kernels, on a GPU or in Triton's interpreter: the tokens of the model's own `generate`."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import builders
from described import FORMS, batch_for, described
from ia3 import IA3Config
from ia3.fast.generate import Decoder
from ia3.rows import BASE

CUDA = torch.cuda.is_available()
DEVICE = "cuda:0" if CUDA else "cpu"
_RUNS = importlib.util.find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
pytestmark = pytest.mark.skipif(not _RUNS, reason="no GPU with Triton, nor Triton with TRITON_INTERPRET=1")
WRITES = [form for form, (_, task, _) in FORMS.items() if task != "SEQ_CLS"]
CHOSEN = WRITES if CUDA else ["flan-t5", "llama", "gemma2 with soft caps", "gpt2"]


@pytest.mark.parametrize("form", CHOSEN)
def test_the_tokens_of_generate(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3.fast.fused.backend_for", lambda *_: "triton")
    task = FORMS[form][1]
    model = described(form, torch.float32).eval().to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.add_adapter("a", IA3Config(task_type=task))
    builders.randomise(model, spread=1.0)
    settings = {"max_new_tokens": 4, "eos_token_id": [3], "forced_eos_token_id": None, "min_length": 0}
    settings |= {"num_beams": 1, "no_repeat_ngram_size": 0, "bos_token_id": 1, "do_sample": False}
    decoder = Decoder(model, **settings)
    batch = {
        name: tensor.to(DEVICE)
        for name, tensor in batch_for(form, left=task == "CAUSAL_LM").items()
        if name != "labels"
    }
    for names in (None, ["a", BASE, "default", "a"]):
        more = {} if names is None else {"adapter_names": names}
        assert torch.equal(decoder(**batch, **more), model.generate(**batch, **settings, **more))
    assert len(decoder.fused) == 2
