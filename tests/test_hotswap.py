"""Another adapter's values come under an attached adapter's name, or nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ia3 import IA3Config, get_peft_model, hotswap_adapter


@pytest.fixture
def other(tiny: Any, randomise: Any, tmp_path: Path) -> tuple[Any, Path]:
    """An adapter on a model of its own, and its folder."""
    model = randomise(get_peft_model(tiny("t5"), IA3Config()), seed=7)
    model.save_pretrained(tmp_path / "other")
    return model, tmp_path / "other"


def test_an_adapter_saved_under_a_models_former_names(tiny: Any, randomise: Any, output: Any, other: Any) -> None:
    expected, folder = other
    file = folder / "adapter_model.safetensors"
    former = {key.replace(".encoder.", ".reader."): value for key, value in load_file(file).items()}
    assert former.keys() != load_file(file).keys()
    save_file(former, file)
    model = randomise(get_peft_model(tiny("t5"), IA3Config()))
    model._checkpoint_conversion_mapping = {r"^reader\.": "encoder."}
    hotswap_adapter(model, folder, "default")
    assert torch.equal(output(model), output(expected))


def test_an_adapter_of_another_method(tiny: Any, randomise: Any, output: Any, other: Any) -> None:
    _, folder = other
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LORA"}))
    model = randomise(get_peft_model(tiny("t5"), IA3Config()))
    before = output(model)
    with pytest.raises(ValueError, match="LORA"):
        hotswap_adapter(model, folder, "default")
    assert torch.equal(output(model), before)
