"""(IA)³ as DoRA: vectors at outputs are magnitudes, in a folder of PEFT's LoRA that every tool with DoRA reads.

DoRA (Liu et al. 2024, arXiv:2402.09353) computes W' = m ∘ (W + BA) / ‖W + BA‖, a norm for each row. With B = 0 and
m = l · ‖W‖ that is diag(l) W, which is what a vector l at the output of a layer without a bias does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ia3.adapter import whole_vectors
from ia3.checkpoint import get_peft_model_state_dict
from ia3.files import write_atomically
from ia3.peft_model import PeftModel
from ia3.sites import VECTORS, Site
from ia3.state import attached, get_adapter
from ia3.tensors import PREFIX, SAFETENSORS_NAME, write_tensors
from ia3.weights import Tensors


def save_as_dora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter as a LoRA of PEFT with DoRA's magnitudes and zero matrices.

    A vector at a feed-forward's second matrix multiplies columns, for which DoRA has no number. It is written as the
    magnitude of a matrix before it where that does the same: the one that a gate multiplies, or, with positive numbers,
    the one before a ReLU. Which one that is, is tried with the vector itself.

    Args:
        model: a model that carries the adapter, unmerged.
        folder: where to, made if missing.
        adapter_name: which one.

    Raises:
        ValueError: an unknown adapter, or a vector that no magnitude stands for: of a layer with a bias, which DoRA
            doesn't scale, of one that isn't linear in floating-point numbers, or of an input with no such matrix.
    """
    adapter = get_adapter(model, adapter_name)
    tensors: Tensors = {}
    with model.disable_adapter():
        for site, vector in whole_vectors(model, adapter).items():
            path = site.path if site.side == "output" else _matrix_before(model, site, vector.flatten())
            _add(tensors, path, model.get_submodule(path), vector.flatten())
    held = get_peft_model_state_dict(model, adapter_name=adapter_name)
    saved = {key: tensor for key, tensor in held.items() if not key.endswith(f".{VECTORS}")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / SAFETENSORS_NAME,
        {name: value.detach().cpu().contiguous() for name, value in (tensors | saved).items()},
    )
    paths = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    content = {
        **{"peft_type": "LORA", "use_dora": True, "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "bias": "none"},
        **{"target_modules": sorted(paths), "modules_to_save": sorted(adapter.saved) or None, "inference_mode": True},
        "task_type": adapter.config.task_type,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
    }
    write_atomically(folder / "adapter_config.json", json.dumps(content, indent=2).encode())


def _add(tensors: Tensors, path: str, module: nn.Module, vector: torch.Tensor) -> None:
    """The three tensors of a layer."""
    reason = _reason(module)
    if reason is not None:
        raise ValueError(f"{path} {reason}, so no magnitude of DoRA stands for its vector. Merge the adapter instead.")
    weight: Any = module.weight
    magnitude = vector.to(weight.device) * torch.linalg.norm(weight.detach().float(), dim=1)
    if f"{PREFIX}{path}.lora_A.weight" in tensors:
        raise ValueError(f"{path} would have two magnitudes, of its own output and of what it feeds: merge instead.")
    tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.zeros(1, weight.shape[1])
    tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.zeros(weight.shape[0], 1)
    tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitude


def _reason(module: nn.Module) -> str | None:
    """Why a layer's output can't be scaled by a magnitude, in words that follow its path."""
    forward = getattr(type(module), "_ia3_old_class", type(module)).forward
    if not isinstance(module, nn.Linear) or forward is not nn.Linear.forward or not module.weight.is_floating_point():
        return f"is a {type(module).__name__}, not a linear layer of floating-point numbers"
    if getattr(module, "bias", None) is not None:
        return "has a bias, which a vector multiplies and DoRA doesn't"
    if not torch.linalg.norm(module.weight.detach().float(), dim=1).all():
        return "has a row of zeros"
    return None


def _matrix_before(model: nn.Module, site: Site, vector: torch.Tensor) -> str:
    """The path of the matrix beside a feed-forward's second one whose output may be multiplied in place of its input.

    Raises:
        ValueError: there is none.
    """
    around = site.path.rpartition(".")[0]
    block, second = model.get_submodule(around), attached(model).placement.site_module(site.path)
    for name, module in block.named_children():
        if module is not second and _reason(module) is None and getattr(module, "out_features", 0) == len(vector):
            with _multiplied(second, vector, of_input=True):
                wanted = _answer(block, module)
            with _multiplied(module, vector, of_input=False):
                found = _answer(block, module)
            if wanted is not None and found is not None and torch.allclose(wanted, found, rtol=1e-4, atol=1e-5):
                return f"{around}.{name}"
    raise ValueError(
        f"{site.path} has a vector at its input, which multiplies columns, and no matrix before it whose rows may be "
        "multiplied instead: DoRA can't hold it. Merge the adapter instead."
    )


@contextmanager
def _multiplied(module: nn.Module, vector: torch.Tensor, *, of_input: bool) -> Iterator[None]:
    """Within it a layer's input or output is multiplied."""
    if of_input:
        hook = module.register_forward_pre_hook(lambda module, args: (args[0] * vector.to(args[0]), *args[1:]))
    else:
        hook = module.register_forward_hook(lambda module, args, output: output * vector.to(output))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _answer(block: nn.Module, first: nn.Module) -> torch.Tensor | None:
    """What a feed-forward answers some numbers; None where it is called otherwise."""
    weight: Any = first.weight
    inputs = torch.randn(1, 16, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    training = block.training
    try:
        answer = block.eval()(inputs)
    except Exception:  # whatever it raises, it takes something else
        return None
    finally:
        block.train(training)
    return answer if isinstance(answer, torch.Tensor) else None
