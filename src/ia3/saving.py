"""How an adapted model is saved: its folder, its repository on the hub, its card, its keys in a state dictionary."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ia3.card import add_tags, update_card, write_card
from ia3.checkpoint import get_peft_model_state_dict, is_adapters, own_tensors
from ia3.publishing import name_bases
from ia3.state import attached, get_adapter
from ia3.swap import Swapped
from ia3.tensors import save_adapter, write_tensors


class Saved(Swapped):
    """The methods by which an adapted model is saved."""

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
        held = attached(self).adapters
        names = list(held) if selected_adapters is None else list(selected_adapters)
        if not held:
            raise ValueError("There is no adapter to save: all were deleted. add_adapter(name, config) makes one.")
        if not names:
            raise ValueError(f"selected_adapters is empty: name some of {sorted(held)}, or leave it out.")
        chosen = [get_adapter(self, name) for name in names]
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
        write_card(directory, chosen[0].config)

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

        A base model that is named by its path here is published by the path's last part, with a warning.

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
            for base, name in name_bases(Path(folder)).items():
                warnings.warn(
                    f"The base model is published as {name}, not as {base}: give the model its name on the hub, "
                    "model.name_or_path, for others to find it.",
                    stacklevel=2,
                )
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
        state = attached(self)
        adapter = state.adapters[state.active[0] if state.active else min(state.adapters)]
        update_card(Path(output_dir), adapter.config, getattr(self, "model_tags", None) or ())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As any module's; a dictionary of adapters alone, loaded unstrictly, doesn't miss the base."""
        result: _IncompatibleKeys = super().load_state_dict(state_dict, strict, assign)
        if not strict and state_dict and all(is_adapters(key) for key in state_dict):
            result.missing_keys[:] = [key for key in result.missing_keys if is_adapters(key)]
        return result
