"""A `peft.PeftModel` around an adapted model, for libraries that ask for one by its class.

transformers' Trainer and TRL ask `isinstance(model, peft.PeftModel)` and then rely on PEFT's structure: names that
begin with `base_model.model.`, and `model.base_model.model` for the base. An adapted model is the base's own object,
whose `base_model` is what transformers means by it, so it can't be both. This wrapper is: it holds nothing of its own,
and all that is asked of it is asked of the model inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from ia3 import adapter as adapters
from ia3.checkpoint import PREFIX
from ia3.config import PeftConfig
from ia3.model import PeftModel
from ia3.sites import VECTORS

if TYPE_CHECKING:
    import peft


def as_peft_model(model: PeftModel) -> peft.PeftModel:
    """A `peft.PeftModel` that is the adapted model under another class, as TRL's trainers want it.

    Args:
        model: an adapted model. It stays what it is and is trained through the wrapper; save, merge or push either.

    Returns:
        An instance of a subclass of `peft.PeftModel`. Its parameters are the model's own, named as PEFT names them.

    Raises:
        TypeError: the model carries no adapter.
        ImportError: `peft` is not installed.

    Example:
        >>> model = ia3.get_peft_model(model, ia3.IA3Config(task_type="CAUSAL_LM"))
        >>> trainer = DPOTrainer(model=ia3.as_peft_model(model), ref_model=None, args=args, train_dataset=pairs)
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"as_peft_model takes an adapted model, got {type(model).__name__}: call get_peft_model first.")
    wrapper = _wrapper_class().__new__(_wrapper_class())
    nn.Module.__init__(wrapper)
    wrapper.base_model = _Tuner(model)
    return wrapper.train(model.training)


class _Tuner(nn.Module):
    """What stands between the wrapper and the model, where PEFT has its tuner."""

    prefix = f"{VECTORS.partition('_')[0]}_"

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


# Methods that the model has itself. Whatever peft's class doesn't define is found on the model anyway.
_METHODS = (
    *("forward", "generate", "save_pretrained", "push_to_hub", "create_or_update_model_card", "load_adapter"),
    *("set_adapter", "delete_adapter", "set_requires_grad", "disable_adapter", "get_base_model"),
    *("get_nb_trainable_parameters", "print_trainable_parameters", "get_layer_status", "get_model_status"),
)
_ATTRIBUTES = (
    *("peft_config", "peft_type", "active_adapters", "active_adapter", "active_peft_config", "modules_to_save"),
    *("base_model_torch_dtype", "has_active_enabled_adapter"),
)


@cache
def _wrapper_class() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "as_peft_model makes a peft.PeftModel, and peft is not installed: pip install peft. Without it Trainer and "
            "TRL can't ask for one either, so hand them the model itself."
        ) from error

    def method(name: str) -> Callable[..., Any]:
        def ask(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
            inner = wrapper.base_model.model
            return inner(*args, **kwargs) if name == "forward" else getattr(inner, name)(*args, **kwargs)

        ask.__name__, ask.__doc__ = name, getattr(getattr(PeftModel, name, None), "__doc__", None)
        return ask

    def attribute(name: str) -> property:
        return property(
            lambda wrapper: getattr(wrapper.base_model.model, name),
            lambda wrapper, value: setattr(wrapper.base_model.model, name, value),
        )

    members: dict[str, Any] = {name: method(name) for name in _METHODS}
    members |= {name: attribute(name) for name in _ATTRIBUTES}
    members |= {"add_adapter": _add_adapter, "load_state_dict": _load_state_dict}
    members |= {"__module__": __name__, "_is_prompt_learning": False, "_peft_config": None}
    return type("PeftModel", (peft.PeftModel,), members)


def _add_adapter(wrapper: Any, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
    """The model's own. Given the very configuration of one of its adapters, it copies that adapter.

    So TRL makes a reference of an adapter that was trained before, and copies itself what has `.default.` in its name;
    a vector's name ends with `.default`.
    """
    model = wrapper.base_model.model
    source = next((name for name, config in model.peft_config.items() if config is peft_config), None)
    model.add_adapter(adapter_name, peft_config, *args, **kwargs)
    if source is not None:
        old, new = (adapters.get_adapter(model, name) for name in (source, adapter_name))
        adapters.copy_values(model, old, new)


def _load_state_dict(wrapper: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Names with PEFT's prefix or, as in a checkpoint of the model without the wrapper, without it."""
    plain = {key.removeprefix(PREFIX): value for key, value in state_dict.items()}
    return wrapper.base_model.model.load_state_dict(plain, *args, **kwargs)
