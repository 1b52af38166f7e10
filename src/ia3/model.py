"""The facade: PEFT's classes and functions. An adapted model stays the base model's own object."""

from __future__ import annotations

import re
import reprlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ia3 import adapter as adapters
from ia3 import merging, storage
from ia3.architectures import is_described
from ia3.arithmetic import CombinationType, combine
from ia3.card import add_tags, update_card, write_card
from ia3.checkpoint import (
    Tensors,
    embeddings,
    get_peft_model_state_dict,
    is_adapters,
    load_peft_weights,
    own_tensors,
    save_adapter,
    saved_modules_in,
    set_peft_model_state_dict,
    tensors_of,
    with_names_of_today,
    write_tensors,
)
from ia3.config import IA3Config, PeftConfig, PeftType, TaskType
from ia3.fast.output import forget, with_fused_loss
from ia3.files import HUB_ARGUMENTS
from ia3.heads import check_brought, with_head, with_whole_head
from ia3.precision import prepare_model_for_gradient_checkpointing
from ia3.rows import Rows, acting, begin_forward, end_forward
from ia3.sites import VECTORS, logger
from ia3.status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from ia3.swap import SavedModule, Swapped, swap, swap_back

# What scripts pass along although it concerns the base model, which is loaded by then.
_BASE_ARGUMENTS = {"device_map", "dtype", "max_memory", "offload_dir", "offload_folder", "offload_index", "torch_dtype"}

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
    config = _checked(peft_config)
    config.base_model_name_or_path = _base_name(model, config)
    config.revision = revision or config.revision
    return _become(model, config, adapter_name, autocast_adapter_dtype, on_meta=low_cpu_mem_usage, loading=False)


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
    config = _checked(peft_config)
    adapter = adapters.attach(model, config, adapter_name, on_meta=low_cpu_mem_usage)
    if state_dict is not None:
        try:
            set_peft_model_state_dict(model, state_dict, adapter_name)
        except BaseException:
            adapters.detach(model, adapter_name)
            raise
    model.__dict__.setdefault("peft_config", {})[adapter_name] = adapter.config
    adapters.activate(model, [adapter_name], trainable=not config.inference_mode)
    return model


class PeftModel(Swapped):
    """A base model that carries (IA)³ adapters.

    `PeftModel(model, config)` is `get_peft_model(model, config)`. The instance is the base model itself, so
    everything that it could do it still does; `base_model` stays what transformers means by it.
    """

    peft_config: dict[str, IA3Config]
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
        """The base's forward, which in training gives its fused loss where that is right, its output head, and
        refusals of its adapter methods that would find nothing."""
        members = {"forward": with_fused_loss(old)} if is_described(old) else {}
        if hasattr(old, "get_output_embeddings"):
            members["get_output_embeddings"] = _with_acting_head(old)
        return members | {name: _refusing(name) for name in _INSTEAD if hasattr(old, name)}

    # Loading and saving

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
        _refuse_offload(ephemeral_gpu_offload)
        device, ignore_sizes, hub = _loading_arguments(kwargs)
        config = _for_class(cls, config or PeftConfig.from_pretrained(model_id, **hub))
        config.inference_mode = not is_trainable
        tensors = load_peft_weights(model_id, device, key_mapping, **hub)
        if key_mapping is None:
            tensors = with_names_of_today(model, tensors)
        _add_saved(config, tensors)
        warn_of_other_base(model, config)
        check_brought(model, config, tensors, adapter_name)
        peft_model = _become(model, config, adapter_name, autocast_adapter_dtype, on_meta=False, loading=True)
        try:
            set_peft_model_state_dict(peft_model, tensors, adapter_name, ignore_sizes)
        except BaseException:
            peft_model.unload()
            raise
        if not is_trainable:
            model.eval()
        return peft_model

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
        _refuse_offload(ephemeral_gpu_offload)
        _, ignore_sizes, hub = _loading_arguments(kwargs)
        tensors = load_peft_weights(model_id, torch_device, key_mapping, **hub)
        if key_mapping is None:
            tensors = with_names_of_today(self, tensors)
        new = adapter_name not in self.peft_config
        if new:
            config = _checked(PeftConfig.from_pretrained(model_id, **hub))
            config.inference_mode = not is_trainable
            _add_saved(config, tensors)
            check_brought(self, config, tensors, adapter_name)
            self._attach(adapter_name, config, autocast_adapter_dtype, on_meta=False, loading=True)
        try:
            result = set_peft_model_state_dict(self, tensors, adapter_name, ignore_sizes)
        except BaseException:
            if new:
                self.delete_adapter(adapter_name)
            raise
        if is_trainable:
            self.set_requires_grad(adapter_name)
        else:
            self.eval()
        return result

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Any = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write the adapters in PEFT's format, each file atomically, without touching the network.

        Args:
            save_directory: "default" goes into it, others into a folder of their name; a `README.md` is made
                or kept. In a Trainer's `checkpoint-N` folder a `model.safetensors` with the adapters alone
                stands beside, from which `Trainer` resumes and loads its best model.
            safe_serialization: safetensors; False writes a pickle.
            selected_adapters: names; all by default.
            save_embedding_layers: see `get_peft_model_state_dict`.
            is_main_process: False takes part in gathering sharded tensors and writes nothing.
            path_initial_model_for_weight_conversion: PEFT's, for other methods; refused.
            state_dict: see `get_peft_model_state_dict`.
            save_function: accepted because accelerate's users pass it; files are written atomically.
            max_shard_size: accepted because transformers passes it; an adapter is one file.

        Raises:
            ValueError: an unknown adapter, or none selected.
            NotADirectoryError: `save_directory` is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file; save_pretrained expects a directory.")
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError("path_initial_model_for_weight_conversion concerns other methods than IA3: leave it out.")
        if isinstance(selected_adapters, str):
            raise TypeError(f"selected_adapters takes a list of names: write [{selected_adapters!r}].")
        names = list(selected_adapters) if selected_adapters is not None else list(self.peft_config)
        if not self.peft_config:
            raise ValueError("There is no adapter to save: all were deleted. add_adapter(name, config) makes one.")
        if not names:
            raise ValueError(f"selected_adapters is empty: name some of {sorted(self.peft_config)}, or leave it out.")
        chosen = [adapters.get_adapter(self, name) for name in names]
        # Every process gathers the same tensors in the same order; one of them writes.
        files = {
            name: get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            for name in names
        }
        is_trainers = re.fullmatch(r"checkpoint-\d+", directory.name) is not None
        own = own_tensors(self, chosen) if is_trainers else {}
        if not is_main_process:
            return
        for adapter in chosen:
            folder = directory if adapter.name == "default" else directory / adapter.name
            save_adapter(type(self), adapter.config, files[adapter.name], folder, safe_serialization)
        if is_trainers:
            write_tensors(directory / "model.safetensors", own)
        write_card(directory, self.peft_config[names[0]])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        commit_description: str | None = None,
        tags: Sequence[str] | None = None,
        max_shard_size: int | str | None = None,
    ) -> Any:
        """Save the adapters into a temporary folder and upload it to the hub.

        Args:
            repo_id: the repository, made where it is missing.
            commit_message: "Upload (IA)³ adapter" by default.
            private: of a new repository.
            token: for the hub; the stored one by default.
            revision: the branch, made where it is missing.
            create_pr: open a pull request instead.
            safe_serialization: see `save_pretrained`.
            commit_description: the commit's text after its message.
            tags: more tags for the model card.
            max_shard_size: accepted because transformers takes it; an adapter is one file.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization)
            if tags:
                add_tags(Path(folder), tags)
            return api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message or "Upload (IA)³ adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Bring the card in a folder up to date, or make one; Trainer calls it after it has written its own.

        The text that stands there is kept, and how to load the adapter is added where it doesn't say so.

        Args:
            output_dir: the folder of `README.md`.
        """
        config = self.peft_config[self.active_adapters[0] if self._state.active else min(self.peft_config)]
        update_card(Path(output_dir), config, getattr(self, "model_tags", None) or ())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As any module's; a dictionary of adapters alone, loaded unstrictly, doesn't miss the base."""
        result: _IncompatibleKeys = super().load_state_dict(state_dict, strict, assign)
        if not strict and state_dict and all(is_adapters(key) for key in state_dict):
            result.missing_keys[:] = [key for key in result.missing_keys if is_adapters(key)]
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
        config = _checked(peft_config)
        config.base_model_name_or_path = _base_name(self, config)
        self._attach(adapter_name, config, autocast_adapter_dtype, on_meta=low_cpu_mem_usage, loading=False)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or several whose vectors multiply; only they train.

        Args:
            adapter_name: a name or names.
            inference_mode: activate without requiring a gradient.

        Raises:
            ValueError: an unknown adapter, or adapters that can't act together.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names:
            raise ValueError("set_adapter needs a name; disable_adapter() lets all adapters rest.")
        adapters.check_choice([adapters.get_adapter(self, name) for name in names])
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
        adapters.get_adapter(self, adapter_name)
        if adapter_name in self._state.merged:
            raise ValueError(f"{adapter_name!r} is merged: call unmerge_adapter() before deleting it.")
        adapters.detach(self, adapter_name, stay=self._state.table is None)
        del self.peft_config[adapter_name]
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
        for adapter in [adapters.get_adapter(self, name) for name in names]:
            adapters.require_grad(self, adapter, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the base, and the adapters require no gradient; afterwards it is as it was, merged
        weights included.

        It acts on the model, so on every thread that uses it.
        """
        state = self._state
        if not state.enabled:
            yield
            return
        originals = state.originals or {}
        merged = {name: self.get_parameter(name).detach().clone() for name in originals}
        self.disable_adapters()
        merging.restore(self, originals)
        try:
            yield
        finally:
            if state.originals is originals:  # nobody unmerged in between
                merging.restore(self, merged)
            self.enable_adapters()

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

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts, in the weights or beside them."""
        return self._state.enabled and bool(self._state.active)

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
        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        merging.check_copies(self, [adapters.get_adapter(self, name) for name in names])
        if self._state.originals is None or not set(names) <= set(self._state.merged):
            merging.merge(self, names, keep_originals=self._state.originals is not None)
        names = list(self._state.merged)
        for name in names:
            merging.install_copies(self, adapters.get_adapter(self, name))
        merging.write_untied(self)
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
        for name in list(self.peft_config):
            adapters.detach(self, name, stay=True)
        adapters.release(self)
        if state.table is not None:
            state.table.leave()
        storage.restore(self)
        return _become_base(self, state)

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
        _add_weighted(self, adapters, weights, adapter_name, combination_type, density)
        self.peft_config[adapter_name] = self._state.adapters[adapter_name].config

    # Looking

    def get_base_model(self) -> Self:
        """The base model, which is this very object; its adapters still act."""
        return self

    @property
    def active_adapters(self) -> list[str]:
        return list(self._state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

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

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, vectors included."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both counts and the share, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that carry a vector, in the model's order."""
        sites = {site.path for adapter in self._state.adapters.values() for site in adapter.layout.sites}
        return [path for path, _ in self.named_modules() if path in sites]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a product is no sum of a matrix."""
        return False

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let a model's embeddings give an output that requires a gradient, which reentrant checkpointing needs."""
        return prepare_model_for_gradient_checkpointing(model)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapted module."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the whole model."""
        return get_model_status(self)

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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with `adapter_names`, one an example, for a batch that mixes adapters.

        Raises:
            ValueError: unknown names, another number of them than examples, or names a token.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        if any(not isinstance(name, str) for name in names):
            raise ValueError(
                "generate continues one example a row, so it takes one name a row, not one a token: unpack the "
                "examples, and pass adapter_names as a list of names."
            )
        with acting(_rows_of(self, names, args, kwargs)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

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
    def _state(self) -> adapters.Attached:
        return adapters.attached(self)

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

    def _attach(self, name: str, config: IA3Config, half_to_fp32: bool, *, on_meta: bool, loading: bool) -> None:
        adapter = _attached(self, config, name, half_to_fp32, on_meta=on_meta, loading=loading)
        self.peft_config[name] = adapter.config


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


def _become(
    model: nn.Module, config: IA3Config, name: str, half_to_fp32: bool, *, on_meta: bool, loading: bool
) -> PeftModel:
    """Attach the first adapter, active, and give the model its new class."""
    adapter = _attached(model, config, name, half_to_fp32, on_meta=on_meta, loading=loading)
    adapters.activate(model, [name], trainable=not config.inference_mode)
    model = become_adapted(model, CLASS_FOR_TASK[config.task_type])
    model.peft_config[name] = adapter.config
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpoints and hasattr(model, "enable_input_require_grads") and not model.__dict__.get("_require_grads_hooks"):
        # Reentrant checkpointing gives no gradient to what lies behind an input that requires none.
        model.enable_input_require_grads()  # type: ignore[operator]
        model._state.input_gradients = True
    return model


def _attached(
    model: nn.Module, config: IA3Config, name: str, half_to_fp32: bool, *, on_meta: bool, loading: bool
) -> adapters.Adapter:
    """Attach an adapter with its head; a new one with all that the checkpoint lacks, which is told."""
    told = [] if loading else with_whole_head(model, config)
    if loading:
        with_head(model, config)
    adapter = adapters.attach(model, config, name, half_to_fp32=half_to_fp32, on_meta=on_meta, loading=loading)
    for line in told:
        logger.warning(line)
    return adapter


def become_adapted(model: nn.Module, cls: type[PeftModel]) -> PeftModel:
    """Give a base model its new class, and the hooks that take `adapter_names` off its arguments."""
    swap(model, cls)
    assert isinstance(model, PeftModel)
    model.peft_config = dict(model.__dict__.get("peft_config", {}))
    model.register_forward_pre_hook(_take_adapter_names, with_kwargs=True)
    model.register_forward_hook(_forget_adapter_names, always_call=True)
    model._hf_peft_config_loaded = True  # transformers then lets a quantised model train
    return model


def _with_acting_head(old: Any) -> Callable[..., Any]:
    def get_output_embeddings(self: PeftModel) -> Any:
        """The base's head, or the active adapter's copy where it trains it in full.

        Losses that read the head's weight instead of calling it then train the copy.
        """
        head = old.get_output_embeddings(self)
        return head.acting if isinstance(head, SavedModule) else head

    return get_output_embeddings


def _refusing(name: str) -> Callable[..., Any]:
    def refused(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name} works on PEFT's layers, of which a model of ia3 has none: call {_INSTEAD[name]}."
        )

    return refused


def _become_base(model: PeftModel, state: adapters.Attached) -> nn.Module:
    if state.input_gradients:
        model.disable_input_require_grads()  # type: ignore[operator]
        model.__dict__.pop("_require_grads_hooks", None)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _take_adapter_names]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    for key in [key for key, hook in model._forward_hooks.items() if hook is _forget_adapter_names]:
        del model._forward_hooks[key], model._forward_hooks_always_called[key]
    forget(model)
    del model._hf_peft_config_loaded, model.peft_config
    swap_back(model)
    return model


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
    config = _checked(config)
    if config.task_type is None:
        tasks = (task for task, for_task in CLASS_FOR_TASK.items() if task and issubclass(cls, for_task))
        config.task_type = next(tasks, None)
    return config


def _checked(config: PeftConfig) -> IA3Config:
    """A copy of the configuration.

    Raises:
        TypeError: not an `IA3Config`.
    """
    if not isinstance(config, IA3Config):
        raise TypeError(f"Expected an ia3.IA3Config, got {type(config).__module__}.{type(config).__name__}.")
    return deepcopy(config)


def _add_saved(config: IA3Config, tensors: Tensors) -> None:
    """Name the modules that the file holds in full and the configuration means by PEFT's rule alone."""
    if config.modules_to_save:
        more = saved_modules_in(tensors, config.modules_to_save)
        config.modules_to_save = sorted({*config.modules_to_save, *more})


def _base_name(model: nn.Module, config: IA3Config) -> str | None:
    name = model.__dict__.get("name_or_path") or None
    if config.base_model_name_or_path not in (None, name):
        logger.warning(
            "The configuration's base_model_name_or_path %r becomes %r, this model's name.",
            config.base_model_name_or_path,
            name,
        )
    return name


def warn_of_other_base(model: nn.Module, config: IA3Config) -> None:
    name, wanted = model.__dict__.get("name_or_path"), config.base_model_name_or_path
    if name and wanted and Path(name).name != Path(wanted).name:
        logger.warning("The adapter was made for the base model %r; this one is %r.", wanted, name)


def _refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise ValueError("ephemeral_gpu_offload is not supported: a vector is too small to be worth it.")


def _loading_arguments(kwargs: dict[str, Any]) -> tuple[Any, bool, dict[str, Any]]:
    """The device, whether to leave out mismatched sizes, and the hub's arguments.

    Raises:
        TypeError: anything else.
    """
    kwargs = dict(kwargs)
    device = kwargs.pop("torch_device", None)
    ignore_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    for name in sorted(set(kwargs) & _BASE_ARGUMENTS):
        del kwargs[name]
        logger.warning("%s does nothing here: the vectors follow their layers. Pass it when loading the base.", name)
    unknown = sorted(set(kwargs) - HUB_ARGUMENTS)
    if unknown:
        raise TypeError(f"Unknown arguments {unknown}: expected torch_device or {sorted(HUB_ARGUMENTS)}.")
    return device, ignore_sizes, {key: value for key, value in kwargs.items() if value is not None}


def _take_adapter_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Take `adapter_names` off a forward's arguments and let their rows act until it ends."""
    names = kwargs.get("adapter_names")
    if torch.compiler.is_compiling():
        if names is not None:
            raise ValueError(
                "A batch that mixes adapters runs without torch.compile: call the model that isn't compiled."
            )
        return None
    begin_forward(model, None if names is None else lambda: _rows_of(model, names, args, kwargs))
    if "adapter_names" not in kwargs:
        return None
    return args, {key: value for key, value in kwargs.items() if key != "adapter_names"}


def _forget_adapter_names(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        end_forward(model)


# Where a model's batch shows how many examples it has, besides its `main_input_name`; failing these any tensor does.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")


def _rows_of(
    model: nn.Module, names: Sequence[str] | Sequence[Sequence[str]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Rows:
    """The rows of a call.

    Raises:
        ValueError: another number of names than examples or tokens, names a token where they can't work, gradient
            checkpointing, or what `gather_rows` raises.
    """
    own: str = getattr(model, "main_input_name", None) or _INPUTS[0]
    held = (*args, *(kwargs.get(name) for name in (own, *_INPUTS)), *kwargs.values())
    tensors = [value for value in held if isinstance(value, torch.Tensor) and value.dim()]
    if isinstance(names, str) or not tensors or len(tensors[0]) != len(names):
        count = len(tensors[0]) if tensors else "no"
        raise ValueError(
            f"adapter_names is {reprlib.repr(names)} for {count} examples: pass a list with one name an example."
        )
    if any(not isinstance(name, str) for name in names):
        _check_packed(model, names, tensors[0])
    if torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()
    ):
        raise ValueError(
            "A batch that mixes adapters can't be trained with gradient checkpointing, whose second forward knows "
            "nothing of adapter_names: gradient_checkpointing_disable() first."
        )
    return adapters.gather_rows(model, names)


def _check_packed(model: nn.Module, names: Sequence[Any], batch: torch.Tensor) -> None:
    """Refuse names a token that are not `[batch][length]`, or a model that they can't work for."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "An encoder-decoder model takes one name an example, not one a token: its decoder's tokens are others than "
            "its encoder's. Pass one example a row."
        )
    if batch.dim() not in (2, 3):
        raise ValueError(f"adapter_names a token need a batch of tokens, not one of shape {tuple(batch.shape)}.")
    for place, row in enumerate(names):
        is_list = isinstance(row, list | tuple)
        if not is_list or len(row) != batch.shape[1]:
            got = f"{len(row)} names" if is_list else repr(row)
            raise ValueError(
                f"adapter_names[{place}] is {got} for {batch.shape[1]} tokens: pass one name a token in every row, "
                "padding included, or one name a row in all."
            )


def _add_weighted(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: CombinationType,
    density: float | None,
) -> None:
    chosen = [adapters.get_adapter(model, name) for name in names]
    vectors = [adapters.whole_vectors(model, adapter) for adapter in chosen]
    values = combine(vectors, weights, combination_type, density=density)
    if combination_type == "mean" and abs(sum(weights) - 1) > 1e-6:
        logger.warning(
            "add_weighted_adapter: the weights add up to %g and are divided by that; PEFT would scale every "
            "activation by it (combination_type='sum').",
            sum(weights),
        )
    adapters.attach_combined(model, new_name, chosen, values)
