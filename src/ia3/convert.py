"""Other formats in: the checkpoints that T-Few's own code writes (github.com/r-three/t-few)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ia3.checkpoint import set_peft_model_state_dict
from ia3.config import IA3Config, TaskType
from ia3.peft_model import PeftModel, get_peft_model
from ia3.sites import VECTORS
from ia3.tensors import PREFIX, Tensors, read_tensors

# T-Few adapts T5 models alone. Its vectors are columns of a matrix that scales the weight: `multi_lora_b` the
# outputs, `multi_lora_a` the inputs.
_KEY = re.compile(r"(?:(?:module|model|transformer)\.)*((?:encoder|decoder)\..+)\.multi_lora_([ab])")


def convert_tfew(state_dict: Mapping[str, torch.Tensor]) -> tuple[IA3Config, Tensors]:
    """Turn the tensors of a T-Few checkpoint into a PEFT adapter.

    Each `<module>.multi_lora_b` multiplies its module's output: keys, values, and `wi_1` of a gated
    feed-forward. In a T5 without gates that is the output of `wi`, before the activation, as T-Few computes it.

    Args:
        state_dict: names as T-Few saves them, `encoder.block.0.layer.0.SelfAttention.k.multi_lora_b`, or with
            `model.`, `transformer.` or `module.` in front. `multi_lora_a` may be there if it is one throughout.

    Returns:
        A configuration whose vectors are all at outputs, and the tensors under PEFT's names, `(out, 1)` each.

    Raises:
        ValueError: no vectors, another kind of tensor (such as LoRA's), a repeated one, a vector of another
            shape than `(out, 1)`, inputs that are scaled too.
    """
    tensors: Tensors = {}
    for name, tensor in state_dict.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name} is no (IA)³ vector of T-Few, whose names are <module>.multi_lora_b in a T5's encoder "
                "or decoder: other methods' checkpoints can't be converted."
            )
        path, half = match.groups()
        if half == "a":
            _check_ones(name, tensor)
            continue
        if tensor.dim() != 2 or tensor.shape[1] != 1:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, expected (out, 1): this checkpoint was trained "
                "with another lora_scaling_rank than (IA)³'s 1, and can't be converted."
            )
        key = f"{PREFIX}{path}.{VECTORS}"
        if key in tensors:
            raise ValueError(f"The vector of {path} comes twice, with and without a prefix: remove one of them.")
        tensors[key] = tensor
    if not tensors:
        raise ValueError("There is no multi_lora_b here: expected the trainable tensors that T-Few saves.")
    targets = {key.removesuffix(f".{VECTORS}").rsplit(".", 1)[-1] for key in tensors}
    config = IA3Config(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=targets, feedforward_modules=[])
    return config, tensors


def load_tfew(
    model: nn.Module, path: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Attach a checkpoint of T-Few to its base model; `save_pretrained` then writes it in PEFT's format.

    Args:
        model: the base model, a T5 such as T0-3B, changed in place and returned.
        path: the file, `finish.pt` or `global_step….pt`; safetensors are read too.
        adapter_name: the adapter's name.
        is_trainable: go on training it; otherwise it is frozen and the model put in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what `read_tensors`, `convert_tfew`, `get_peft_model` and `set_peft_model_state_dict`
            raise. The model is then unchanged.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: expected a checkpoint of T-Few, such as finish.pt.")
    config, tensors = convert_tfew(read_tensors(file))
    config.inference_mode = not is_trainable
    peft_model = get_peft_model(model, config, adapter_name)
    try:
        set_peft_model_state_dict(peft_model, tensors, adapter_name)
    except BaseException:
        peft_model.unload()
        raise
    if not is_trainable:
        model.eval()
    return peft_model


def _check_ones(name: str, tensor: torch.Tensor) -> None:
    if not (tensor == 1).all():
        raise ValueError(
            f"{name} is not one throughout: this checkpoint scales the inputs too, which (IA)³ doesn't and one "
            "vector a module can't hold, so it can't be converted."
        )
