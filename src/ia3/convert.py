"""Other formats in: T-Few's own checkpoints (github.com/r-three/t-few), and folders of AdapterHub's `adapters`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ia3.checkpoint import set_peft_model_state_dict
from ia3.config import IA3Config, TaskType
from ia3.documents import wrong_field
from ia3.errors import naming
from ia3.peft_model import PeftModel, get_peft_model
from ia3.sites import VECTORS, logger, matching
from ia3.structure import layer_widths
from ia3.tensors import PREFIX
from ia3.weights import Tensors, limits_of, read_tensors

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
    with naming(file):
        config, tensors = convert_tfew(read_tensors(file, limits_of(model)))
        return _attach(model, config, tensors, adapter_name, is_trainable)


def _attach(model: nn.Module, config: IA3Config, tensors: Tensors, adapter_name: str, is_trainable: bool) -> PeftModel:
    """Attach a converted adapter; whatever refuses it leaves the model as it was."""
    config.inference_mode = not is_trainable
    peft_model = get_peft_model(model, config, adapter_name)
    try:
        set_peft_model_state_dict(peft_model, tensors, adapter_name)
    except BaseException:  # nothing of a failed load stays, and whatever came goes on
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


# AdapterHub's layers hold a vector of their outputs as a column, beside a scale that its configuration calls alpha.
_HUB_KEY = re.compile(r"(.+?)\.loras\.(.+)\.lora_B")
_HUB_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
_HUB_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")


def convert_adapterhub(
    model: nn.Module, content: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> tuple[IA3Config, Tensors]:
    """Turn the (IA)³ adapter of AdapterHub's `adapters` into one for a base model.

    Each `<module>.loras.<name>.lora_B` multiplies its module's output. At the feed-forward that is the first matrix,
    before the activation (the second matrix's output for a Llama or Mistral, as that library has it). Where one matrix
    makes queries, keys and values, the file holds those of `attn_matrices` alone; the rest is one.

    Args:
        model: the base model, whose paths may have the model's prefix (`bert.`) where the file's have none, or the
            other way round.
        content: what its `adapter_config.json` holds.
        state_dict: the tensors of its file.

    Returns:
        A configuration whose vectors are all at outputs, and the tensors under PEFT's names, `(out, 1)` each.

    Raises:
        ValueError: another method's adapter, one with gates or a rank above 1, tensors that are no vectors, modules
            that the model lacks, a vector of another width.
    """
    settings = _hub_settings(content)
    vectors = {}
    for name, tensor in state_dict.items():
        match = _HUB_KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no (IA)³ vector of AdapterHub, whose names are <module>.loras.<name>.lora_B.")
        vectors[match[1]] = tensor
    if not vectors or len(vectors) < len(state_dict):
        raise ValueError(f"Expected the vectors of one adapter, got {len(state_dict)} for {len(vectors)} modules.")
    modules = dict(model.named_modules())
    tensors: Tensors = {}
    for path, there in _hub_paths(model, modules, vectors).items():
        whole = _hub_whole(there, modules[there], vectors[path], settings)
        tensors[f"{PREFIX}{there}.{VECTORS}"] = whole * settings.get("alpha", 1)
    paths = [key.removeprefix(PREFIX).removesuffix(f".{VECTORS}") for key in tensors]
    names = {path.rsplit(".", 1)[-1] for path in paths}
    alone = matching(names, modules) == set(paths)
    return IA3Config(
        target_modules=names if alone else "|".join(map(re.escape, paths)), feedforward_modules=[]
    ), tensors


def load_adapterhub(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Attach an (IA)³ adapter of AdapterHub to its base model; `save_pretrained` then writes it in PEFT's format.

    Args:
        model: the base model, changed in place and returned.
        folder: what `save_adapter` of `adapters` wrote: `adapter_config.json` and `pytorch_adapter.bin` or
            `adapter.safetensors`. A prediction head beside them is left out, and said.
        adapter_name: the adapter's name here.
        is_trainable: go on training it; otherwise it is frozen and the model put in evaluation mode.

    Raises:
        FileNotFoundError: no such files.
        ValueError: what `read_tensors`, `convert_adapterhub`, `get_peft_model` and `set_peft_model_state_dict`
            raise. The model is then unchanged.
    """
    folder = Path(folder)
    file = next((folder / name for name in _HUB_FILES if (folder / name).is_file()), None)
    if file is None or not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no adapter_config.json with one of {', '.join(_HUB_FILES)} beside it.")
    with naming(folder):
        content = IA3Config.from_json_file(folder / "adapter_config.json")
        config, tensors = convert_adapterhub(model, content, read_tensors(file, limits_of(model)))
    head = next((name for name in _HUB_HEADS if (folder / name).is_file()), None)
    if head is not None:
        logger.warning("%s holds a prediction head, which is left out: train one with the adapter.", folder / head)
    with naming(folder):
        return _attach(model, config, tensors, adapter_name, is_trainable)


def _hub_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an (IA)³ adapter."""
    settings = content.get("config")
    if settings == "ia3":
        settings = {"composition_mode": "scale"}
    if not isinstance(settings, dict) or settings.get("composition_mode") != "scale":
        raise ValueError(
            "This adapter_config.json describes no (IA)³ adapter of AdapterHub: its `config` must have the "
            '`composition_mode` "scale". Load it with `adapters`.'
        )
    if (wrong := wrong_field(settings, {"attn_matrices": list[str], "alpha": float})) is not None:
        raise ValueError(f"The adapter's `config`: {wrong}")
    if settings.get("use_gating") or settings.get("r", 1) != 1:
        raise ValueError("The adapter has gates (use_gating) or a rank above 1, which one vector a module can't hold.")
    return settings


def _hub_paths(model: nn.Module, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, str]:
    """The file's paths as this model has them: as they are, without the file's prefix, or with the model's."""
    paths, prefix = list(paths), getattr(model, "base_model_prefix", "")
    for there in (
        {path: path for path in paths},
        {path: path.partition(".")[2] for path in paths},
        {path: f"{prefix}.{path}" for path in paths},
        {path: f"{prefix}.{path.partition('.')[2]}" for path in paths},
    ):
        if set(there.values()) <= set(modules):
            return there
    lacking = [path for path in paths if path not in modules]
    raise ValueError(
        f"{type(model).__name__} has no module {lacking[0]} ({len(lacking)} of {len(paths)} are missing): this adapter "
        "was trained for another model."
    )


def _hub_whole(path: str, module: nn.Module, vector: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """The vector over every channel of a module, `(out, 1)`: one where the file has none of a fused projection."""
    width = (layer_widths(module) or (None, 0))[1]
    trained = [matrix in settings.get("attn_matrices", ["k", "v"]) for matrix in ("q", "k", "v")]
    if vector.numel() == width:
        return vector.reshape(-1, 1)
    if width % 3 or vector.numel() != width // 3 * sum(trained):
        raise ValueError(
            f"{path} has {width} outputs and the file's vector {vector.numel()} numbers: this adapter was trained for "
            "another model."
        )
    whole = vector.new_ones(3, width // 3)
    whole[torch.tensor(trained)] = vector.reshape(sum(trained), -1)
    return whole.reshape(-1, 1)
