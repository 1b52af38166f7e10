"""PEFT's class of an adapted model, which stays the base model's own object, and `get_peft_model`, which makes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ia3 import adapter as adapters
from ia3 import factory, merging, storage
from ia3.arithmetic import CombinationType, add_weighted
from ia3.checkpoint import embeddings, get_peft_model_state_dict, set_peft_model_state_dict, tensors_of
from ia3.config import IA3Config, PeftConfig, PeftType, TaskType
from ia3.errors import naming
from ia3.factory import attach_first, become_base
from ia3.fast.output import forget
from ia3.interrupts import uninterrupted
from ia3.loading import fit_config, loading_arguments, own_copy, read_weights, refuse_offload, warn_of_other_base
from ia3.mixing import Mixing
from ia3.precision import prepare_model_for_gradient_checkpointing
from ia3.saving import Saved
from ia3.sites import VECTORS, logger
from ia3.state import Attached, Configurations, attached, find_attached, get_adapter
from ia3.status import Reporting
from ia3.swap import SavedModule
from ia3.weights import Tensors


class PeftModel(Saved, Reporting, Mixing):
    """A base model that carries (IA)³ adapters.

    `PeftModel(model, config)` is `get_peft_model(model, config)`. The instance is the base model itself, so
    everything that it could do it still does; `base_model` stays what transformers means by it.
    """

    _hf_peft_config_loaded: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        swapped = hasattr(cls, "_ia3_old_class")
        if swapped and ("_ia3_old_class" not in cls.__dict__ or not (args or kwargs)):
            return object.__new__(cls)  # a copy, made by torch's replicas or by a library that swapped the class again
        if swapped:  # type(model)(config): a fresh base model
            return cls._ia3_old_class(*args, **kwargs)
        return _construct(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: `__new__` returned a model that was made long ago."""

    @classmethod
    def members_over(cls, old: type[nn.Module]) -> dict[str, Any]:
        return factory.members_over(old)

    # Loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Attach a saved adapter to its base model.

        Args:
            model: the base model, changed in place and returned.
            model_id: a directory or a hub repository.
            adapter_name: the adapter's name here.
            is_trainable: go on training it; otherwise it is frozen and the model put in evaluation mode.
            config: a configuration to use instead of the saved one.
            autocast_adapter_dtype: hold the vectors of half-precision layers in fp32.
            ephemeral_gpu_offload: not supported; True is refused.
            low_cpu_mem_usage: accepted for PEFT's sake: the vectors take what their file takes.
            key_mapping: see `load_peft_weights`; by default the renamings that transformers knows for the model.
            kwargs: `torch_device`, `subfolder`, `revision`, `token`, `cache_dir` and the like.

        Raises:
            FileNotFoundError: no such adapter.
            ValueError: the base was loaded without something that the adapter doesn't bring either, or what
                `get_peft_model`, `load_peft_weights` and `set_peft_model_state_dict` raise. The model is then
                unchanged.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"from_pretrained takes the base model first, got {type(model).__name__}. To load the base too, "
                "use AutoPeftModelFor….from_pretrained(path)."
            )
        if isinstance(model, PeftModel):
            raise ValueError("The model carries an adapter already: use model.load_adapter(path, name).")
        refuse_offload(ephemeral_gpu_offload)
        device, ignore_sizes, hub = loading_arguments(kwargs)
        with naming(model_id):
            config = _for_class(cls, config or PeftConfig.from_pretrained(model_id, **hub))
            tensors = read_weights(model, model_id, device, key_mapping, hub)
            warn_of_other_base(model, config)
            fit_config(model, config, tensors, adapter_name, trainable=is_trainable)
            _attach_first(model, config, adapter_name, autocast_adapter_dtype, loading=True)
            assert isinstance(model, PeftModel)
            try:
                set_peft_model_state_dict(model, tensors, adapter_name, ignore_sizes)
            except BaseException:  # nothing of a failed load stays, and whatever came goes on
                model.unload()
                raise
        return model if is_trainable else model.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter beside the others, inactive; a name that exists takes the file's values.

        The arguments are those of `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`; the model is then unchanged.
        """
        refuse_offload(ephemeral_gpu_offload)
        _, ignore_sizes, hub = loading_arguments(kwargs)
        with naming(model_id):
            tensors = read_weights(self, model_id, torch_device, key_mapping, hub)
            new = adapter_name not in self._state.adapters
            if new:
                config = own_copy(PeftConfig.from_pretrained(model_id, **hub))
                fit_config(self, config, tensors, adapter_name, trainable=is_trainable)
                factory.attach(self, config, adapter_name, half_to_fp32=autocast_adapter_dtype, loading=True)
            try:
                result = set_peft_model_state_dict(self, tensors, adapter_name, ignore_sizes)
            except BaseException:  # nothing of a failed load stays, and whatever came goes on
                if new:
                    self.delete_adapter(adapter_name)
                raise
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        return result

    # Choosing adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach one more new adapter, inactive and frozen; the arguments are those of `get_peft_model`.

        Raises:
            ValueError: the name is taken, or what `find_sites` raises.
        """
        if not isinstance(adapter_name, str):
            raise TypeError("add_adapter takes the adapter's name first: add_adapter(name, config).")
        config = own_copy(peft_config)
        config.base_model_name_or_path = _base_name(self, config)
        factory.attach(self, config, adapter_name, half_to_fp32=autocast_adapter_dtype, on_meta=low_cpu_mem_usage)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or several whose vectors multiply; only they train.

        It acts on the model, so on all threads that use it, also in the middle of a forward. Threads that want
        different adapters name them in the call instead: `model(**batch, adapter_names=[…])`, one an example.

        Args:
            adapter_name: a name or names.
            inference_mode: activate without requiring a gradient.

        Raises:
            ValueError: an unknown adapter, or adapters that can't act together.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names:
            raise ValueError("set_adapter needs a name; disable_adapter() lets all adapters rest.")
        adapters.check_choice([get_adapter(self, name) for name in names])
        if self._state.originals is not None and set(names) != set(self._state.merged):
            logger.warning("set_adapter(%s): unmerging %s first.", names, list(self._state.merged))
            self.unmerge_adapter()
        adapters.activate(self, names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one, another becomes active.

        After the last one the model computes what its base does, stays frozen, and takes new ones by `add_adapter` and
        `set_adapter`; `unload` gives the base itself back.

        Raises:
            ValueError: an unknown adapter, or one that is merged.
        """
        get_adapter(self, adapter_name)
        if adapter_name in self._state.merged:
            raise ValueError(f"{adapter_name!r} is merged: call unmerge_adapter() before deleting it.")
        adapters.detach(self, adapter_name, stay=self._state.table is None)
        if not self._state.active and self.peft_config:
            other = min(self.peft_config)  # the one that PEFT takes
            logger.warning("delete_adapter(%r): %r is active now.", adapter_name, other)
            adapters.activate(self, [other], trainable=not self.peft_config[other].inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Thaw or freeze adapters.

        Raises:
            ValueError: an unknown adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter in [get_adapter(self, name) for name in names]:
            adapters.require_grad(self, adapter, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the base, and the adapters require no gradient; afterwards it is as it was, merged
        weights included.

        It acts on the model, so on every thread that uses it.
        """
        with merging.without_adapters(self):
            yield

    def disable_adapters(self) -> None:
        """Let the adapters rest until `enable_adapters`, without a gradient; merged weights stay merged, unlike in
        `disable_adapter`."""
        adapters.rest(self)

    def enable_adapters(self) -> None:
        """Let the active adapters act again, and train those that did before."""
        adapters.wake(self)

    def disable_adapter_layers(self) -> None:
        """As `disable_adapters`."""
        self.disable_adapters()

    def enable_adapter_layers(self) -> None:
        """As `enable_adapters`."""
        self.enable_adapters()

    # Merging and combining

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights, keeping the originals in CPU memory; see `merging.merge`.

        Adapters that are merged already stay so, with a `PeftWarning`: one after the other gives the bits of all at
        once.

        Args:
            adapter_names: the active ones by default.
            safe_merge: accepted for PEFT's sake; merging is always checked first.
        """
        merging.merge(self, adapter_names, keep_originals=True)

    def unmerge_adapter(self) -> None:
        """Put the very bits of the original weights back; see `merging.unmerge`."""
        merging.unmerge(self)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Fold adapters into the weights for good and give the base model back, with its own class.

        Args:
            progressbar: accepted for PEFT's sake; merging takes no time worth a bar.
            safe_merge: accepted for PEFT's sake; merging is always checked first.
            adapter_names: the active ones by default.

        Raises:
            ValueError: as `merging.merge`.
        """
        with ExitStack() as undo:
            names = self.active_adapters if adapter_names is None else adapter_names
            merging.merge_for_good(self, names, undo)
            storage.restore(self)
            with uninterrupted():
                undo.pop_all()
                return self.unload()

    def unload(self) -> nn.Module:
        """Remove every adapter, those of an `AdapterTable` too, and give the base model back: the same object with its
        own class and keys.

        What `merge_adapter` folded into the weights stays there, as in PEFT.

        Raises:
            ValueError: inside `disable_adapter`.
        """
        state = self._state
        if not state.enabled:
            raise ValueError("The adapters are disabled: unload after disable_adapter, or enable_adapters() first.")
        storage.restore(self)
        with uninterrupted():
            for name in list(state.adapters):
                adapters.detach(self, name, stay=True)
            adapters.release(self)
            if state.table is not None:
                state.table.leave()
            become_base(self, input_gradients=state.input_gradients)
        return self

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "mean",
        density: float | None = None,
    ) -> None:
        """Make a new adapter, inactive and frozen, of several; see `arithmetic.combine`.

        Args:
            adapters: names of the adapters.
            weights: one each.
            adapter_name: the new adapter's name.
            combination_type: `"mean"`, `"sum"` for PEFT's rule, `"task_arithmetic"`, `"ties"` or `"product"`.
            density: for `"ties"`, the share of an adapter's numbers that is kept.

        Raises:
            ValueError: an unknown adapter, a taken name, two that train the same module in full, or what
                `combine` raises.
        """
        add_weighted(self, adapters, weights, adapter_name, combination_type, density)

    # Looking

    def get_base_model(self) -> Self:
        """The base model, which is this very object; its adapters still act."""
        return self

    @property
    def peft_config(self) -> dict[str, IA3Config]:
        """The adapters' configurations by name; see `Configurations`."""
        return Configurations(find_attached(self))

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, IA3Config]) -> None:
        held = self.peft_config
        if set(configs) != set(held):
            raise ValueError(f"peft_config takes one configuration for each of {sorted(held)}, got {sorted(configs)}.")
        for name, config in configs.items():
            held[name] = config

    @property
    def active_peft_config(self) -> IA3Config:
        return self.peft_config[self._first_active]

    @property
    def peft_type(self) -> PeftType:
        return PeftType.IA3

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter trains in full; None where there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self, "dtype", None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a product is no sum of a matrix."""
        return False

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let a model's embeddings give an output that requires a gradient, which reentrant checkpointing needs."""
        return prepare_model_for_gradient_checkpointing(model)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> Tensors:
        """As `get_peft_model_state_dict`, of the active adapter by default."""
        return get_peft_model_state_dict(self, state_dict, adapter_name or self._first_active)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `resize_token_embeddings`, which puts new modules in the place of the old.

        Raises:
            ValueError: an adapter has vectors at the embeddings or trains them in full; they would be lost.
        """
        for path, module in embeddings(self):
            if VECTORS in module._modules or isinstance(module, SavedModule):
                raise ValueError(f"Resizing replaces {path}, which an adapter adapts: resize before you attach it.")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode, as of any module; that adapters loaded frozen won't train is said once."""
        state = self._state
        loaded_frozen = all(state.adapters[name].config.inference_mode for name in state.active)
        if mode and state.active and state.enabled and loaded_frozen and not state.told_frozen:
            state.told_frozen = True
            if not any(parameter.requires_grad for parameter in self.parameters()):
                logger.warning(
                    "This model is put in training mode, but nothing in it trains: %s were loaded frozen. To go on "
                    "training, load with is_trainable=True, or call set_adapter(%r).",
                    list(state.active),
                    state.active[0],
                )
        return super().train(mode)

    # Inside

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model, which leaves nothing of the weights that it had."""
        forget(self)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """As any module's, which leaves memory without values; the adapters keep theirs, which no checkpoint brings.

        Vectors that had no memory either begin as new ones do.
        """
        held = list(self._state.adapters.values())
        new = {a.name for a in held if any(vector.is_meta for vector in adapters.vectors(self, a))}
        own = {key: tensor for adapter in held for key, tensor in tensors_of(self, adapter).items()}
        kept = {key: tensor.clone() for key, tensor in own.items() if not tensor.is_meta}
        super().to_empty(device=device, recurse=recurse)
        super().load_state_dict(kept, strict=False)
        for adapter in held:
            for vector in adapters.vectors(self, adapter) if adapter.name in new else ():
                nn.init.ones_(vector) if adapter.config.init_ia3_weights else nn.init.normal_(vector)
        return self

    @property
    def _state(self) -> Attached:
        return attached(self)

    @property
    def _first_active(self) -> str:
        if not self._state.active:
            raise ValueError(
                f"No adapter is active: call set_adapter with one of {sorted(self.peft_config)} first."
                if self.peft_config
                else "No adapter is active, and there is no adapter here: add_adapter(name, config) makes one, "
                "set_adapter(name) activates it."
            )
        return self._state.active[0]


class PeftModelForSequenceClassification(PeftModel):
    """For `TaskType.SEQ_CLS`: the classification head is trained in full."""


class PeftModelForSeq2SeqLM(PeftModel):
    """For `TaskType.SEQ_2_SEQ_LM`."""


class PeftModelForCausalLM(PeftModel):
    """For `TaskType.CAUSAL_LM`."""


class PeftModelForTokenClassification(PeftModel):
    """For `TaskType.TOKEN_CLS`: the classification head is trained in full."""


class PeftModelForQuestionAnswering(PeftModel):
    """For `TaskType.QUESTION_ANS`: the answer head is trained in full."""


class PeftModelForFeatureExtraction(PeftModel):
    """For `TaskType.FEATURE_EXTRACTION`."""


CLASS_FOR_TASK: dict[str | None, type[PeftModel]] = {
    None: PeftModel,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task: cls for task, cls in CLASS_FOR_TASK.items() if task is not None}
"""PEFT's name for the classes by task."""


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze a model and attach a new (IA)³ adapter, active and trainable.

    What `from_pretrained` found in no file, such as a new classifier and a pooler, would be drawn anew with each
    loading: it is trained in full and saved beside the vectors. A warning says so, and names what can't be.

    Args:
        model: the base model, changed in place and returned: its class becomes a subclass of its own and of
            `PeftModel`.
        peft_config: an `IA3Config`; a copy with its defaults filled in is kept under `model.peft_config`.
        adapter_name: the adapter's name.
        mixed: PEFT's mixing of methods; there is one method here, so True is refused.
        autocast_adapter_dtype: hold the vectors of half-precision layers in fp32.
        revision: the base model's revision, recorded in the configuration.
        low_cpu_mem_usage: make the vectors without memory, to be filled by loading.

    Returns:
        The same object.

    Raises:
        ValueError: the model carries an adapter already, or what `find_sites` raises. The model is then
            unchanged.

    Example:
        >>> model = get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))
        >>> model.print_trainable_parameters()
    """
    if mixed:
        raise ValueError("mixed=True combines fine-tuning methods; ia3 has one. Leave it out.")
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model was compiled already: attach the adapter first, then call torch.compile.")
    if isinstance(model, PeftModel):
        what = f"the adapters {sorted(model.peft_config)}" if model.peft_config else "a table"
        raise ValueError(
            f"The model already carries {what}: use add_adapter(name, config) for one more, or unload() to begin anew."
        )
    config = own_copy(peft_config)
    config.base_model_name_or_path = _base_name(model, config)
    config.revision = revision or config.revision
    _attach_first(model, config, adapter_name, autocast_adapter_dtype, on_meta=low_cpu_mem_usage)
    assert isinstance(model, PeftModel)
    return model


def _attach_first(
    model: nn.Module, config: IA3Config, name: str, half_to_fp32: bool, *, on_meta: bool = False, loading: bool = False
) -> None:
    cls = CLASS_FOR_TASK[config.task_type]
    attach_first(model, config, name, cls, half_to_fp32=half_to_fp32, on_meta=on_meta, loading=loading)


def _construct(
    cls: type[PeftModel],
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    return get_peft_model(
        model,
        _for_class(cls, peft_config),
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def _for_class(cls: type[PeftModel], config: PeftConfig) -> IA3Config:
    """A copy of the configuration; where it names no task, with that of the class."""
    config = own_copy(config)
    if config.task_type is None:
        tasks = (task for task, for_task in CLASS_FOR_TASK.items() if task and issubclass(cls, for_task))
        config.task_type = next(tasks, None)
    return config


def _base_name(model: nn.Module, config: IA3Config) -> str | None:
    name = model.__dict__.get("name_or_path") or None
    if config.base_model_name_or_path not in (None, name):
        logger.warning(
            "The configuration's base_model_name_or_path %r becomes %r, this model's name.",
            config.base_model_name_or_path,
            name,
        )
    return name
