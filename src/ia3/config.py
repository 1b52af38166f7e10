"""The adapter's configuration: PEFT's fields and PEFT's JSON on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from ia3.files import fetch, write_atomically

CONFIG_NAME = "adapter_config.json"

# A key that another library wrote and this one doesn't know may be dropped only where it says nothing.
_SAYS_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


class PeftType(StrEnum):
    """The fine-tuning methods that this library knows: (IA)³ alone."""

    IA3 = "IA3"


class TaskType(StrEnum):
    """What the base model is used for; decides which `PeftModelFor…` class it becomes."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """What every adapter's configuration holds. `from_pretrained` gives the class that the file names.

    Args:
        task_type: a `TaskType` or its name; None for a model used in no particular task.
        base_model_name_or_path: the base model's name; filled in when the adapter is attached.
        revision: the base model's revision.
        inference_mode: whether the adapter is attached frozen.
        auto_mapping: class and module of a base model without a task type (written on saving).
        peft_version: the version of PEFT that wrote the file, if any; kept as read.

    Raises:
        ValueError: an unknown `task_type`, or another `peft_type` than IA3.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.peft_type not in (None, *PeftType):
            raise ValueError(f"peft_type {self.peft_type!r}: ia3 has one method, IA3. Use `peft` for others.")
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(f"Unknown task_type {self.task_type!r}: expected one of {', '.join(TaskType)}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, sets as they are."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | Path, auto_mapping_dict: dict[str, str] | None = None) -> None:
        """Write `adapter_config.json` into `save_directory`, keys and lists sorted, atomically.

        Raises:
            NotADirectoryError: `save_directory` is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file; save_pretrained expects a directory.")
        content = {
            key: sorted(value) if isinstance(value, set | list) else value
            for key, value in self.to_dict().items()
            if not (key == "peft_version" and value is None)
        }
        if auto_mapping_dict is not None:
            content["auto_mapping"] = auto_mapping_dict
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_atomically(directory / CONFIG_NAME, text.encode())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **hub: Any,
    ) -> PeftConfig:
        """Read an adapter's configuration from a directory or from the hub.

        Args:
            pretrained_model_name_or_path: a directory or a hub repository.
            subfolder: a folder in it, as for an adapter with a name of its own.
            hub: arguments of `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, …).

        Raises:
            FileNotFoundError: there is no `adapter_config.json`.
            ValueError: not JSON, another method than IA3, a field unknown here that says something.
        """
        path = fetch(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        if path is None:
            raise FileNotFoundError(
                f"No {CONFIG_NAME} in {pretrained_model_name_or_path}"
                f"{f'/{subfolder}' if subfolder else ''}: expected an adapter saved by `save_pretrained`."
            )
        return cls.from_dict(cls.from_json_file(path), source=str(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """Read the JSON object in a configuration file, unchecked."""
        try:
            content = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path_json_file} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path_json_file} holds a {type(content).__name__}, not a JSON object.")
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "the configuration") -> PeftConfig:
        """Build the configuration from a JSON object; see `from_pretrained` for what is refused."""
        peft_type = content.get("peft_type")
        if peft_type not in list(PeftType):
            raise ValueError(
                f"{source} describes a {peft_type!r} adapter; ia3 reads IA3 adapters. Load it with `peft`."
            )
        known = {f.name for f in fields(IA3Config)}
        unknown = {key: value for key, value in content.items() if key not in known}
        telling = {key: value for key, value in unknown.items() if value not in _SAYS_NOTHING}
        if telling:
            raise ValueError(
                f"{source} has fields that this version of ia3 doesn't know and won't ignore: {telling}. "
                "Upgrade ia3, or remove them if they don't matter."
            )
        return IA3Config(**{key: value for key, value in content.items() if key in known})


@dataclass
class IA3Config(PeftConfig):
    """Where the vectors of an (IA)³ adapter go (Liu et al. 2022, section 3.3). PEFT's fields.

    Args:
        target_modules: names (a module matches when its path is the name or ends with `.name`), a regular
            expression for the full path, or `"all-linear"`; None takes the model family's default.
        exclude_modules: names or a regular expression for modules that are left alone: they get no vector, and are
            not trained in full unless named in `modules_to_save` or part of the head that PEFT trains for the task.
        feedforward_modules: those of the targets whose vector multiplies the input instead of the output;
            None takes the family's default, `[]` means none.
        fan_in_fan_out: accepted for PEFT's sake: how a layer stores its weight is read off the layer.
        modules_to_save: names of modules trained in full and saved beside the vectors. Attaching adds what the base's
            checkpoint lacked and, for a task with a head, the head.
        init_ia3_weights: start at one (the identity); False draws the vectors from a standard normal.

    Raises:
        ValueError: a list of feed-forward names that are not among the target names, or an empty target list.
    """

    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    feedforward_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    _NAME_FIELDS: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        for name in self._NAME_FIELDS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save takes a list of names: write [{self.modules_to_save!r}].")
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt, or leave it None.")
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            # `wo` is among the full paths that "all-linear" stands for, and `mlp.wo` among what `wo` means.
            stray = sorted(name for name in self.feedforward_modules if not _is_among(name, self.target_modules))
            if stray:
                raise ValueError(
                    f"feedforward_modules {stray} are not among target_modules "
                    f"{sorted(self.target_modules)}: every feed-forward module must also be a target."
                )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> Self:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **hub)
        assert isinstance(config, cls)
        return config


def _is_among(name: str, targets: set[str]) -> bool:
    return any(f".{target}".endswith(f".{name}") or f".{name}".endswith(f".{target}") for target in targets)
