"""Making a model one that carries adapters, and giving it back: its class, its first adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ia3 import adapter as adapters
from ia3.architectures import is_described
from ia3.checkpoint import set_peft_model_state_dict
from ia3.config import IA3Config, PeftConfig
from ia3.fast.output import forget, with_fused_loss
from ia3.heads import with_head, with_whole_head
from ia3.loading import own_copy
from ia3.sites import logger
from ia3.state import Adapter, attached
from ia3.swap import SavedModule, Swapped, swap, swap_back

# The adapter methods of transformers' and diffusers' models that no method of the same name stands before. They go
# through PEFT's layers, so they would do nothing, or forget the adapters that go on acting.
_INSTEAD = {
    "delete_adapters": "delete_adapter(name)",
    "disable_lora": "disable_adapters()",
    "enable_lora": "enable_adapters()",
    "enable_lora_hotswap": "load_adapter(path, name), which takes a name that is there",
    "enable_peft_hotswap": "load_adapter(path, name), which takes a name that is there",
    "fuse_lora": "merge_adapter()",
    "load_lora_adapter": "load_adapter(path, name), or unload() before you load a LoRA",
    "save_lora_adapter": "save_pretrained(folder)",
    "set_adapters": "set_adapter(name)",
    "unfuse_lora": "unmerge_adapter()",
    "unload_lora": "unload()",
}


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Attach a new adapter, active, and leave the model's class as it is.

    Args:
        peft_config: an `IA3Config`.
        model: any module, changed in place.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: make the vectors without memory.
        state_dict: load these tensors into it, as `set_peft_model_state_dict` does.

    Returns:
        The same object.

    Raises:
        ValueError: what `find_sites` or `set_peft_model_state_dict` raises. The model is then unchanged.
    """
    _refuse_wrapper(model)
    config = own_copy(peft_config)
    adapter = adapters.attach(model, config, adapter_name, on_meta=low_cpu_mem_usage)
    if state_dict is not None:
        try:
            set_peft_model_state_dict(model, state_dict, adapter_name)
        except BaseException:  # nothing of a failed attempt stays, and whatever came goes on
            adapters.detach(model, adapter_name)
            raise
    model.__dict__.setdefault("peft_config", {})[adapter_name] = adapter.config
    adapters.activate(model, [adapter_name], trainable=not config.inference_mode)
    return model


def attach_first(
    model: nn.Module,
    config: IA3Config,
    name: str,
    cls: type[Swapped],
    *,
    half_to_fp32: bool,
    on_meta: bool = False,
    loading: bool = False,
) -> None:
    """Attach a model's first adapter, active, and give the model its new class."""
    attach(model, config, name, half_to_fp32=half_to_fp32, on_meta=on_meta, loading=loading)
    adapters.activate(model, [name], trainable=not config.inference_mode)
    become_adapted(model, cls)
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpoints and hasattr(model, "enable_input_require_grads") and not model.__dict__.get("_require_grads_hooks"):
        # Reentrant checkpointing gives no gradient to what lies behind an input that requires none.
        model.enable_input_require_grads()  # type: ignore[operator]
        attached(model).input_gradients = True


def attach(
    model: nn.Module, config: IA3Config, name: str, *, half_to_fp32: bool, on_meta: bool = False, loading: bool = False
) -> Adapter:
    """Attach an adapter with its head; a new one with all that the checkpoint lacks, which is told."""
    _refuse_wrapper(model)
    told = [] if loading else with_whole_head(model, config)
    if loading:
        with_head(model, config)
    adapter = adapters.attach(model, config, name, half_to_fp32=half_to_fp32, on_meta=on_meta, loading=loading)
    for line in told:
        logger.warning(line)
    return adapter


def _refuse_wrapper(model: nn.Module) -> None:
    """Refuse PEFT's wrapper around a model, under whose paths nothing would be found again.

    Raises:
        ValueError: the model is a `peft.PeftModel`.
    """
    if any(f"{cls.__module__}.{cls.__name__}" == "peft.peft_model.PeftModel" for cls in type(model).__mro__):
        raise ValueError(
            "The model is a peft.PeftModel, a wrapper around the model: attach to model.get_base_model(), which keeps "
            "PEFT's layers and puts the vectors on top of them, or to model.merge_and_unload()."
        )


def become_adapted(model: nn.Module, cls: type[Swapped]) -> None:
    """Give a base model its new class."""
    swap(model, cls)
    held = model.__dict__.get("peft_config", {})
    if all(isinstance(config, IA3Config) for config in held.values()):
        model.__dict__.pop("peft_config", None)  # of adapters that were injected, which are its own now
    model._hf_peft_config_loaded = True  # type: ignore[assignment]  # transformers then lets a quantised model train


def become_base(model: nn.Module, *, input_gradients: bool) -> None:
    """Give a model without adapters its own class back."""
    if input_gradients:
        model.disable_input_require_grads()  # type: ignore[operator]
        model.__dict__.pop("_require_grads_hooks", None)
    forget(model)
    if "peft_config" not in model.__dict__:  # else another library's adapters stay
        del model._hf_peft_config_loaded
    swap_back(model)


# The class


def members_over(old: type[nn.Module]) -> dict[str, Any]:
    """What an adapted model's class has besides, by its base's.

    The base's forward, which in training computes the fused loss where that is right, its output head, and refusals of
    its adapter methods that would find nothing.
    """
    members: dict[str, Any] = {"forward": with_fused_loss(old)} if is_described(old) else {}
    if not members:
        logger.info("The loss in training: the model's own forward, since %s is not described.", old.__name__)
    if hasattr(old, "get_output_embeddings"):
        members["get_output_embeddings"] = _with_acting_head(old)
    return members | {name: _refusing(name) for name in _INSTEAD if hasattr(old, name)}


def _with_acting_head(old: Any) -> Callable[..., Any]:
    def get_output_embeddings(self: Any) -> Any:
        """The base's head, or the active adapter's copy where it trains it in full.

        Losses that read the head's weight instead of calling it then train the copy.
        """
        head = old.get_output_embeddings(self)
        return head.acting if isinstance(head, SavedModule) else head

    return get_output_embeddings


def _refusing(name: str) -> Callable[..., Any]:
    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name} works on PEFT's layers, of which a model of ia3 has none: call {_INSTEAD[name]}."
        )

    return refused
