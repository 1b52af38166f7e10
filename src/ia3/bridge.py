"""An adapted model as an object of PEFT's own class, for libraries that ask for one.

An adapted model is the base's own object, and its `base_model` is what transformers means by it. Libraries that ask
`isinstance(model, peft.PeftModel)` go on to read `model.base_model.model` and parameters named after it, so the answer
can't be made true of that object alone: a thin one around it has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ia3.adapter import copy_values
from ia3.config import PeftConfig
from ia3.peft_model import PeftModel
from ia3.state import get_adapter
from ia3.tensors import PREFIX


def as_peft_model(model: PeftModel) -> Any:
    """Wrap an adapted model in an instance of `peft.PeftModel`, for TRL and others that ask for one.

    The wrapper holds nothing: weights, adapters, their configuration and their methods are the model's, so what is done
    to one is done to both. `get_base_model()` gives the adapted model back.

    Args:
        model: a model made by `get_peft_model` or `PeftModel.from_pretrained`.

    Returns:
        A `peft.PeftModel`, of PEFT's class for the adapter's task, whose parameters are named
        `base_model.model.<name in the model>`.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: the model carries no adapter.

    Example:
        >>> model = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
        >>> trainer = DPOTrainer(as_peft_model(model), args=arguments, train_dataset=data)
    """
    if isinstance(model, _Bridge):
        return model
    if not isinstance(model, PeftModel) or not model.peft_config:
        raise TypeError(
            f"as_peft_model takes a model with an adapter, got {type(model).__name__}: call ia3.get_peft_model(model, "
            "config) or ia3.PeftModel.from_pretrained(model, path) first."
        )
    return _bridge_class(model._ia3_mixin.__name__)(model)


class _FromModel:
    """An attribute that is the adapted model's, method or property; it can be set where the model's can."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, bridge: Any, owner: type) -> Any:
        return self if bridge is None else getattr(bridge.get_base_model(), self.name)

    def __set__(self, bridge: Any, value: Any) -> None:
        setattr(bridge.get_base_model(), self.name, value)


class _Tuner(nn.Module):
    """What PEFT's wrapper calls `base_model`: the object whose `model` is the model."""

    prefix = "ia3_"  # by which vectors are told from weights in parameters' names

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class _Bridge(nn.Module):
    """The members of PEFT's class, each given by the adapted model. Mixed into PEFT's classes by `_bridge_class`."""

    base_model: _Tuner
    _is_prompt_learning = False

    def __init__(self, model: PeftModel) -> None:
        nn.Module.__init__(self)
        self.base_model = _Tuner(model)
        self.training = model.training

    def get_base_model(self) -> Any:
        """The adapted model."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return as_peft_model, (self.get_base_model(),)

    # The model's own

    active_adapter = _FromModel()
    active_adapters = _FromModel()
    active_peft_config = _FromModel()
    add_weighted_adapter = _FromModel()
    base_model_torch_dtype = _FromModel()
    create_or_update_model_card = _FromModel()
    delete_adapter = _FromModel()
    disable_adapter = _FromModel()
    generate = _FromModel()
    get_layer_status = _FromModel()
    get_model_status = _FromModel()
    get_nb_trainable_parameters = _FromModel()
    merge_adapter = _FromModel()
    merge_and_unload = _FromModel()
    modules_to_save = _FromModel()
    peft_config = _FromModel()
    peft_type = _FromModel()
    prepare_inputs_for_generation = _FromModel()
    print_trainable_parameters = _FromModel()
    push_to_hub = _FromModel()
    set_adapter = _FromModel()
    set_requires_grad = _FromModel()
    unload = _FromModel()
    unmerge_adapter = _FromModel()

    @property
    def has_active_enabled_adapter(self) -> bool:
        state = self.get_base_model()._state
        return state.enabled and bool(state.active)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # vectors multiply; LoRA adds

    # With a word of their own

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """As the model's; "ref", added with the very configuration of "default", begins as a copy of it.

        That is how TRL makes the reference of an adapter that it trains on. It copies parameters with ".default." in
        their names, where the name of a vector ends with "default".
        """
        model = self.get_base_model()
        model.add_adapter(adapter_name, peft_config, *args, **kwargs)
        if adapter_name == "ref" and peft_config is model.peft_config.get("default"):
            copy_values(model, get_adapter(model, "default"), get_adapter(model, "ref"))

    def get_output_embeddings(self) -> Any:
        """The model's output head.

        Raises:
            ValueError: an adapter has a vector there. Who asks for the head multiplies by its weight instead of calling
                it, so the vector would neither act nor be trained.
        """
        model = self.get_base_model()
        head = model.get_output_embeddings()
        for name, adapter in model._state.adapters.items():
            held = {site.path: model._state.placement.site_module(site.path) for site in adapter.layout.sites}
            at_head = [path for path, module in held.items() if module is head]
            if at_head:
                raise ValueError(
                    f"The adapter {name!r} has a vector at the output head {at_head[0]}, and this trainer reads the "
                    "head's weight instead of calling it: the vector would neither act nor be trained. Leave "
                    f"{at_head[0]} out of target_modules."
                )
        return head

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As the model's; of a Trainer's `checkpoint-N`, which holds all adapters, the one of that name."""
        own = Path(model_id, adapter_name)
        is_trainers = Path(model_id).name.startswith("checkpoint-") and own.is_dir()
        return self.get_base_model().load_adapter(own if is_trainers else model_id, adapter_name, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As the model's; `state_dict` is the wrapper's."""
        if state_dict is not None:
            kwargs["state_dict"] = {key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
        self.get_base_model().save_pretrained(save_directory, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; keys without the prefix, as a Trainer's `model.safetensors` has them, are the model's."""
        if state_dict and not any(key.startswith(PREFIX) for key in state_dict):
            return self.get_base_model().load_state_dict(state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)

    @classmethod
    def from_pretrained(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return as_peft_model(PeftModel.from_pretrained(model, *args, **kwargs))


@cache
def _bridge_class(name: str) -> Any:
    """The bridge to PEFT's class of that name.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "as_peft_model makes an instance of PEFT's class, and peft is not installed: pip install peft."
        ) from error
    return type(name, (_Bridge, getattr(peft, name)), {"__module__": __name__, "__doc__": _Bridge.__doc__})
