"""Getting a base model ready for training: precision, and gradients through layers that are computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Of these kinds of quantisation PEFT leaves what is not quantised in its precision.
_KEPT_IN_HALF = {"gptq", "aqlm", "eetq", "hqq", "torchao"}
_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base model, hold what is not quantised in fp32, and compute the layers of a quantised one again.

    Args:
        model: a transformers model, changed in place.
        use_gradient_checkpointing: of a quantised model, compute each layer again in the backward.
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`.
        auto_clear_cache: give the GPU's memory of the half-precision weights back.

    Returns:
        The same object.
    """
    method = _quantisation(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if method not in _KEPT_IN_HALF and parameter.dtype in _HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if method and use_gradient_checkpointing:
        arguments = gradient_checkpointing_kwargs or {}
        if arguments.get("use_reentrant", True):
            _require_input_gradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)  # type: ignore[operator]
    return model


def prepare_model_for_gradient_checkpointing(model: nn.Module) -> nn.Module:
    """Let the embeddings' output require a gradient, unless the model is quantised, as PEFT does.

    Reentrant checkpointing gives no gradient to what lies behind an input that requires none.
    """
    if not _quantisation(model):
        _require_input_gradients(model)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype` and what is trained to fp32, in place.

    Args:
        model: a model with adapters.
        dtype: `torch.float16` or `torch.bfloat16`.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _quantisation(model: nn.Module) -> str:
    """The kind of quantisation; empty where there is none."""
    method = getattr(model, "quantization_method", None)
    if method:
        return str(getattr(method, "value", method))
    loaded = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    return "bitsandbytes" if loaded else "hqq" if getattr(model, "hqq_quantized", False) else ""


def _require_input_gradients(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def infer_device() -> str:
    """The kind of device that models are put on: the first accelerator that is there, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> torch.Tensor:
    """A decoder's inputs for its labels: moved by one place, -100 as padding.

    Args:
        input_ids: labels, `[batch, length]`.
        pad_token_id: what stands for -100.
        decoder_start_token_id: what comes first.

    Returns:
        `[batch, length]`.

    Raises:
        ValueError: no `pad_token_id`.
    """
    if pad_token_id is None:
        raise ValueError("shift_tokens_right needs a pad_token_id: set model.config.pad_token_id.")
    first = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([first, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
