"""transformers' Trainer and accelerate around an adapted model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders import adapted, seq2seq_batch, t5, vector_gradients


@pytest.mark.parametrize("peft", ["installed", "absent"])
def test_trainer_trains_saves_resumes_and_loads_the_best(peft, tmp_path):
    script = Path(__file__).with_name("trainer_script.py")
    hide = ["hide-peft"] if peft == "absent" else []
    done = subprocess.run([sys.executable, script, tmp_path, *hide], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
    report = json.loads(line.removeprefix("REPORT "))
    assert report["peft"] is (peft == "installed")
    assert report["resumed equals whole, head False"]
    assert report["resumed equals whole, head True"]
    assert report["trained names, head False"] == ["ia3_l"]
    assert report["trained names, head True"] == ["default", "ia3_l"]
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(report["files"])
    assert all(size < 8_000 for size in report["weights bytes"].values())
    assert report["best"] == "checkpoint-2"
    assert report["best loaded"]
    assert report["predict_with_generate"][0] == 16
    assert "model.safetensors" not in report["final files"]
    assert "Traceback" not in done.stderr
    assert "missing keys" not in done.stderr


def test_accelerate_prepare():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = adapted(t5()).train()
    plain = adapted(t5()).train()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = seq2seq_batch()
    loss = prepared(**batch).loss
    accelerator.backward(loss)
    plain(**batch).loss.backward()
    for name, gradient in vector_gradients(plain).items():
        torch.testing.assert_close(vector_gradients(model)[name], gradient)
    optimizer.step()
    accelerator.unwrap_model(prepared).print_trainable_parameters()
