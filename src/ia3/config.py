"""The adapter's configuration: PEFT's fields and PEFT's JSON on disk."""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

from ia3.documents import read_json, wrong_field
from ia3.errors import PeftWarning, listed, shorten
from ia3.files import fetch, write_atomically

CONFIG_NAME = "adapter_config.json"

# The most characters of a module's path; a pattern may have more.
_LONGEST_NAME = 1000

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose format this library writes, and against which it is compared."""


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
        peft_version: the version of PEFT that wrote the file; kept as read. A new configuration gets the version
            whose format this library writes, so that PEFT takes no branch for older files.

    Raises:
        TypeError: a value of another type than its field's.
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
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION
        if (wrong := wrong_field(vars(self), _types())) is not None:
            raise TypeError(wrong)
        if self.peft_type not in (None, *PeftType):
            raise ValueError(f"peft_type {shorten(self.peft_type)}: ia3 has one method, IA3. Use `peft` for others.")
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(f"Unknown task_type {shorten(self.task_type)}: expected one of {', '.join(TaskType)}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, sets as they are."""
        return asdict(self)

    @property
    def is_prompt_learning(self) -> bool:
        """False: (IA)³ adds no words to the prompt."""
        return False

    @property
    def trainable_token_indices(self) -> None:
        """A field of other methods. `peft.get_peft_model_state_dict` asks for it after it has looked for PEFT's layers,
        found none, and would give an empty dictionary.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "PEFT's functions see no adapter in a model of ia3: call ia3's of the same name, such as "
            "ia3.get_peft_model_state_dict(model)."
        )

    @property
    def is_adaption_prompt(self) -> bool:
        """False, as `is_prompt_learning`."""
        return False

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's place for checks before a configuration is built from a file: here `from_dict` makes them."""
        return kwargs

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the configuration that `peft_type` names, this class where it is left out.

        Raises:
            ValueError: another method than IA3, or fields unknown here that say something.
        """
        return PeftConfig.from_dict(kwargs) if "peft_type" in kwargs else cls(**kwargs)

    def _on_disk(self) -> dict[str, Any]:
        """The fields that the file holds."""
        return self.to_dict()

    def save_pretrained(self, save_directory: str | Path, auto_mapping_dict: dict[str, str] | None = None) -> None:
        """Write `adapter_config.json` into `save_directory`, keys and lists sorted, atomically.

        Raises:
            NotADirectoryError: `save_directory` is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file; save_pretrained expects a directory.")
        content = {
            key: sorted(value) if isinstance(value, set | list) else value for key, value in self._on_disk().items()
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
            raise FileNotFoundError(_no_adapter(Path(pretrained_model_name_or_path), subfolder))
        return cls.from_dict(cls.from_json_file(path), source=str(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """Read the JSON object in a configuration file, unchecked; settings of a run that PEFT left in it are dropped
        with a warning."""
        content = read_json(path_json_file)
        if content.pop("runtime_config", None):
            warnings.warn(f"{path_json_file} has a runtime_config, which holds for a run.", PeftWarning, stacklevel=2)
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "the configuration") -> PeftConfig:
        """Build the configuration from a JSON object; see `from_pretrained` for what is refused."""
        peft_type = content.get("peft_type")
        if peft_type not in list(PeftType):
            if isinstance(content.get("config"), dict) and content["config"].get("composition_mode") == "scale":
                raise ValueError(
                    f"{source} is AdapterHub's: read the folder by ia3.convert.load_adapterhub(model, folder)."
                )
            raise ValueError(
                f"{source} describes a {shorten(peft_type)} adapter; ia3 reads IA3 adapters. Load it with `peft`."
            )
        known = {f.name for f in fields(IA3Config)}
        unknown = {key: value for key, value in content.items() if key not in known}
        telling = {key: value for key, value in unknown.items() if not _says_nothing(value)}
        # Other methods of PEFT have these fields and write them empty; layer 0 is not empty.
        for key in ("layers_to_transform", "layers_pattern"):
            if isinstance(content.get(key), bool | str | list | dict) and not content[key]:
                known.discard(key)
        if telling:
            raise ValueError(
                f"{source} has fields that this version of ia3 doesn't know and won't ignore: "
                f"{shorten(telling, 300)}. Upgrade ia3, or remove them if they don't matter."
            )
        given = {key: value for key, value in content.items() if key in known}
        try:
            return IA3Config(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error


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
        layers_to_transform: numbers of the layers that are adapted, all by default. A layer's number is the first
            one in a module's path. Attaching turns it, with `target_modules`, into one regular expression, which is
            what PEFT reads; its own IA3 has no such field.
        layers_pattern: names of the lists of layers that `layers_to_transform` counts, such as `"decoder.block"`,
            where a path has several numbers or a model several lists; any by default.
        towers: sub-models that the default is for, named as in the model's configuration (`"vision"`, `"audio"`), an
            encoder-decoder's `"decoder"` or `"encoder"`, or `"all"`; the language model alone by default. Attaching
            turns it into names of modules or a pattern, which is what PEFT reads.

    Raises:
        ValueError: `layers_to_transform` with a regular expression, `layers_pattern` without it, a list of feed-forward
            names that are not among the target names, or an empty target list.
    """

    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    feedforward_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    towers: list[str] | str | None = None

    _NAME_FIELDS: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules")

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save takes a list of names: write [{shorten(self.modules_to_save)}].")
        super().__post_init__()
        self.peft_type = PeftType.IA3
        for name in self._NAME_FIELDS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
            elif isinstance(value, str) and value.lower() == "all-linear":  # PEFT takes any case
                setattr(self, name, "all-linear")
            self._check_lengths(name, getattr(self, name))
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        if isinstance(self.towers, str):
            self.towers = [self.towers]
        if self.towers is not None and self.target_modules is not None:
            raise ValueError("towers says which sub-models the default is for: leave out target_modules, or towers.")
        self._check_layers()
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt, or leave it None.")
        if isinstance(self.target_modules, set) and "all-linear" in {str(name).lower() for name in self.target_modules}:
            raise ValueError("target_modules: all-linear is no module's name and stands alone: 'all-linear', no list.")
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            # `wo` is among the full paths that "all-linear" stands for, and `mlp.wo` among what `wo` means.
            stray = sorted(_not_among(self.feedforward_modules, self.target_modules))
            if stray:
                raise ValueError(
                    f"feedforward_modules [{listed(stray)}] are not among target_modules "
                    f"[{listed(sorted(self.target_modules), 10)}]: every feed-forward module must also be a target."
                )

    def _check_lengths(self, field: str, names: set[str] | list[str] | str | None) -> None:
        longest = max(names or (), key=len, default="") if not isinstance(names, str) else ""
        if len(longest) > _LONGEST_NAME:
            raise ValueError(f"{field} has the name {shorten(longest)} of {len(longest):,} characters: name modules.")

    def _check_layers(self) -> None:
        if self.layers_to_transform == []:
            raise ValueError("layers_to_transform is empty: name the numbers of layers, or leave it None for all.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says which lists layers_to_transform counts: pass that too.")
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and pattern:
            raise ValueError(
                "layers_to_transform can't be used with a regular expression in target_modules: let the expression "
                "choose the layers, or name the modules."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, sets as they are; those that PEFT's IA3 hasn't only where they are used."""
        content = super().to_dict()
        own = ("layers_to_transform", "layers_pattern", "towers")
        return {key: value for key, value in content.items() if value is not None or key not in own}

    def _on_disk(self) -> dict[str, Any]:
        """The fields that the file holds, in PEFT's terms where the targets are named."""
        if self.layers_to_transform is None or not isinstance(self.target_modules, set):
            return self.to_dict()
        chosen = replace(self, target_modules=in_layers(self), layers_to_transform=None, layers_pattern=None)
        return chosen.to_dict()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> Self:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **hub)
        assert isinstance(config, cls)
        return config


@cache
def _types() -> dict[str, Any]:
    """The types of all fields."""
    hints = get_type_hints(IA3Config)
    return {each.name: hints[each.name] for each in fields(IA3Config)}


PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]] = {PeftType.IA3: IA3Config}


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration of a dictionary with `peft_type` and the fields.

    Raises:
        ValueError: another method than IA3, or fields unknown here that say something.
    """
    return PeftConfig.from_dict(config_dict)


def chosen_layers(config: IA3Config) -> list[int]:
    """The numbers in `layers_to_transform`."""
    numbers = config.layers_to_transform
    return [numbers] if isinstance(numbers, int) else sorted(numbers or ())


def in_layers(config: IA3Config) -> str:
    """The regular expression for `target_modules`, names or a pattern, in the layers of `layers_to_transform` alone."""
    assert config.target_modules is not None
    numbers = "|".join(str(number) for number in chosen_layers(config))
    if config.layers_pattern:
        patterns = config.layers_pattern
        lists = patterns if isinstance(patterns, str) else "|".join(patterns)
        # Up to the first such list; in it the first number.
        before = rf"(?:(?!(?:{lists})\.\d+\.)[^.]+\.)*(?:{lists})\."
    else:
        before = r"(?:(?!\d+\.)[^.]+\.)*"
    if isinstance(config.target_modules, str):
        return rf"(?={before}(?:{numbers})\.)(?:{config.target_modules})"
    names = "|".join(re.escape(name) for name in sorted(config.target_modules))
    # A name may be a path that holds the number itself, as those that "all-linear" stands for.
    return rf"(?={before}(?:{numbers})\.).*?(?<![^.])(?:{names})"


def _no_adapter(directory: Path, subfolder: str | None) -> str:
    """The error for a folder without a configuration, which may have adapters with names of their own."""
    where = directory / subfolder if subfolder else directory
    inside = sorted(path.parent.name for path in where.glob(f"*/{CONFIG_NAME}")) if where.is_dir() else []
    if inside:
        prefix = f"{subfolder}/" if subfolder else ""
        return f"No {CONFIG_NAME} in {where}, but one in [{listed(inside)}]: pass subfolder={prefix + inside[0]!r}."
    return f"No {CONFIG_NAME} in {where}: expected an adapter saved by `save_pretrained`."


def _not_among(names: set[str], targets: set[str]) -> list[str]:
    """The names that end no target's path, and whose path no target ends."""
    backwards = sorted(f".{target}"[::-1] for target in targets)

    def ends_one(name: str) -> bool:
        start = f".{name}"[::-1]
        place = bisect_left(backwards, start)
        return place < len(backwards) and backwards[place].startswith(start)

    def is_ended(name: str) -> bool:
        return any(name[at + 1 :] in targets for at, letter in enumerate(f".{name}"[:-1], start=-1) if letter == ".")

    return [name for name in names if not ends_one(name) and not is_ended(name)]


def _says_nothing(value: Any) -> bool:
    """Whether a field that this library doesn't know may be dropped: a number, 0 too, says something."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
