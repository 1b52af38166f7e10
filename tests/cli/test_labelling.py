"""An adapter answers as it was measured: in the precision of its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ia3.inference.labelling import Overrides, load_labeller


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_another_precision_than_that_of_the_training(
    adapter: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    task = folder / "ia3_task.json"
    task.write_text(json.dumps(json.loads(task.read_text()) | {"precision": precision}))
    labeller = load_labeller(str(folder), Overrides())
    assert labeller.model.get_input_embeddings().weight.dtype is dtype
