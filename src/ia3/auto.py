"""Loading an adapter together with the base model that its configuration names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from ia3.bundled import load_model, resolve_model
from ia3.config import PeftConfig, TaskType
from ia3.documents import read_json, wrong_field
from ia3.errors import naming, naming_its_base, shorten
from ia3.files import HUB_ARGUMENTS, fetch
from ia3.gguf import from_gguf, is_gguf
from ia3.peft_model import CLASS_FOR_TASK, PeftModel
from ia3.pretrained import load_pretrained, make_model
from ia3.tensors import load_peft_weights, plain_tensors

# A configuration can name a class to import; only from here unless the caller trusts more.
_TRUSTED = ("transformers", "diffusers")

# Tasks whose base comes with all that it needs; None is among the others, since a class with a head may be named.
_HEADLESS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.FEATURE_EXTRACTION)


class AutoPeftModel:
    """Loads any adapter whose configuration names the class of its base model."""

    _task: ClassVar[TaskType | None] = None
    _auto_class: ClassVar[str] = ""

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is not made by calling it: use from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter names, and attach the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's directory or hub repository.
            adapter_name: its name in the model.
            is_trainable: go on training it.
            config: a configuration to use instead of the saved one.
            revision: the adapter's revision; the base's stands in the configuration.
            import_allowlist: packages besides transformers that a configuration without a task may name.
            kwargs: hub arguments for both, the rest for the base model's `from_pretrained`; without
                `trust_remote_code=True` no code of the base's runs, nor is it asked for.

        Raises:
            FileNotFoundError: no such adapter.
            ValueError: an adapter for another task, a configuration that names no base model, a class outside
                the allowed packages, or what `PeftModel.from_pretrained` raises.
        """
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        subfolder = hub.pop("subfolder", None)
        for_base = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
        here = {**hub, "revision": revision, "subfolder": subfolder}
        config = config or PeftConfig.from_pretrained(
            pretrained_model_name_or_path, **{key: value for key, value in here.items() if value is not None}
        )
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{pretrained_model_name_or_path} names no base model: load that yourself and use "
                "PeftModel.from_pretrained(base, path)."
            )
        with naming(pretrained_model_name_or_path):
            base_class = cls._base_class(config, import_allowlist)
        with naming_its_base(pretrained_model_name_or_path, config.base_model_name_or_path):
            if config.task_type in _HEADLESS:
                base = _load_base(base_class, config, {**hub, **for_base})
            else:
                base = _load_headed_base(base_class, config, pretrained_model_name_or_path, here, {**hub, **for_base})
        if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            name_padding(base.config)
        _grow_vocabulary(base, pretrained_model_name_or_path, here, bool(for_base.get("trust_remote_code")))
        return CLASS_FOR_TASK[cls._task].from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **here
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: list[str] | None) -> Any:
        named = config.task_type is not None
        if (named or not cls._auto_class) and config.task_type != cls._task:
            right = _class_for(config.task_type)
            raise ValueError(
                f"This adapter's task is {config.task_type}, {cls.__name__} loads {cls._task}: use {right}."
            )
        if cls._auto_class:
            return getattr(import_module("transformers"), cls._auto_class)
        mapping = config.auto_mapping
        if mapping is None or "parent_library" not in mapping:
            raise ValueError(
                "The configuration names neither a task nor the base model's class: load the base yourself and "
                "use PeftModel.from_pretrained(base, path)."
            )
        package = mapping["parent_library"].partition(".")[0]
        if package not in (*_TRUSTED, *(allowed or ())):
            raise ValueError(
                f"The adapter wants to import {mapping['parent_library']!r}: if you trust it, pass "
                f"import_allowlist=[{package!r}]."
            )
        found = getattr(_imported(mapping["parent_library"]), mapping.get("base_model_class", ""), None)
        if (
            not isinstance(found, type)
            or not issubclass(found, torch.nn.Module)
            or not hasattr(found, "from_pretrained")
        ):
            raise ValueError(
                f"The adapter's auto_mapping names {shorten(mapping.get('base_model_class'))} of "
                f"{mapping['parent_library']}, which is no model that can be loaded: load the base yourself and use "
                "PeftModel.from_pretrained(base, path)."
            )
        return found


def _imported(library: str) -> Any:
    """A module that an adapter names, of a package that is trusted."""
    try:
        return import_module(library)
    except ImportError as error:
        raise ValueError(f"The adapter's auto_mapping names {library!r}, which can't be imported: {error}.") from error


def _load_base(base_class: Any, config: PeftConfig, kwargs: dict[str, Any]) -> Any:
    name = config.base_model_name_or_path
    assert name is not None
    if config.revision is not None:
        kwargs = {**kwargs, "revision": config.revision}
    return load_model(name, base_class, **kwargs)


def _load_headed_base(
    base_class: Any, config: PeftConfig, source: str | Path, here: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """The base with a head of the adapter's size, whose weights the adapter brings."""
    arguments = {key: value for key, value in here.items() if value is not None}
    if not kwargs.keys() & {"config", "num_labels", "id2label"}:
        tensors = plain_tensors(load_peft_weights(source, **arguments))
        trusted = bool(kwargs.get("trust_remote_code"))
        kwargs = {**_classes(base_class, config, source, arguments, tensors, trusted), **kwargs}
    with without_the_loading_report():
        return _load_base(base_class, config, kwargs)


@contextmanager
def without_the_loading_report() -> Iterator[None]:
    """Drop transformers' report of new and left-out weights: what it may say is checked afterwards."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _classes(
    base_class: Any,
    config: PeftConfig,
    source: str | Path,
    arguments: dict[str, Any],
    tensors: Mapping[str, Any],
    trusted: bool,
) -> dict[str, Any]:
    """What makes the base's head one for the adapter's classes: their names by the task's file, or their number."""
    labels = _labels(fetch(source, "ia3_task.json", optional=True, **arguments))
    if labels:
        sizes: dict[str, Any] = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    else:
        sizes = _sizes(base_class, _base_config(config, trusted), tensors, trusted)
    return {"ignore_mismatched_sizes": True, **sizes} if sizes else {}


def _base_config(config: PeftConfig, trusted: bool) -> Any:
    from transformers import AutoConfig

    name = config.base_model_name_or_path
    assert name is not None
    revision = {} if config.revision is None else {"revision": config.revision}
    if is_gguf(name):
        return from_gguf(AutoConfig, name, **revision)
    return load_pretrained(AutoConfig, resolve_model(name), trust_remote_code=trusted, **revision)


def _sizes(base_class: Any, config: Any, tensors: Mapping[str, Any], trusted: bool) -> dict[str, int]:
    """The sizes in a base's configuration with which it has the adapter's tensors, where it has others.

    The class itself tells which tensors depend on a size, and how: it is made without memory for the size and for
    the next.

    Args:
        base_class: the base's class, or an automatic one.
        config: the base's configuration; left as it is.
        tensors: the adapter's, by plain name.
        trusted: run code that comes with the base.
    """
    found = {}
    for name in ("num_labels", "vocab_size") if _is_for_speech(base_class) else ("num_labels",):
        size = getattr(config, name, None)
        if not isinstance(size, int):
            continue
        shapes, larger = (_shapes(base_class, config, name, number, trusted) for number in (size, size + 1))
        sizes = {
            size + (length - now) // (then - now)
            for key, tensor in tensors.items()
            if key in shapes and len(tensor.shape) == len(shapes[key])
            for length, now, then in zip(tensor.shape, shapes[key], larger[key], strict=True)
            if now != then
        }
        if len(sizes) == 1:
            found[name] = sizes.pop()
    return found


def _is_for_speech(base_class: Any) -> bool:
    """Whether a class writes speech by a head of its own, whose width is a vocabulary's."""
    return str(base_class.__name__).endswith("ForCTC")


def _shapes(base_class: Any, config: Any, name: str, size: int, trusted: bool) -> dict[str, torch.Size]:
    config = deepcopy(config)
    setattr(config, name, size)
    with torch.device("meta"):
        model = make_model(base_class, config, trust_remote_code=trusted)
    return {key: parameter.shape for key, parameter in model.named_parameters()}


def _labels(task: Path | None) -> list[str] | None:
    """What the task's file names, if there is one."""
    if task is None:
        return None
    content = read_json(task)
    if (wrong := wrong_field(content, {"labels": list[str] | None})) is not None:
        raise ValueError(f"{task}: {wrong} Copy it again, or remove it.")
    return content.get("labels")


def name_padding(config: Any) -> None:
    """Without a padding token a causal model's head takes one text at a time: the end token, as is usual."""
    text = config.get_text_config()
    if text.pad_token_id is None and text.eos_token_id is not None:
        text.pad_token_id = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id


def _grow_vocabulary(base: Any, source: str | Path, hub: dict[str, Any], trusted: bool) -> None:
    """Make room for tokens that the tokenizer beside the adapter has and the base hasn't."""
    arguments = {key: value for key, value in hub.items() if value is not None}
    if not hasattr(base, "resize_token_embeddings"):
        return
    if fetch(source, "tokenizer_config.json", optional=True, **arguments) is None:
        return
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, source, trust_remote_code=trusted, **arguments)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


def _class_for(task: str | None) -> str:
    return f"Auto{CLASS_FOR_TASK[task].__name__}"


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For `TaskType.CAUSAL_LM`."""

    _task = TaskType.CAUSAL_LM
    _auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For `TaskType.SEQ_2_SEQ_LM`."""

    _task = TaskType.SEQ_2_SEQ_LM
    _auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For `TaskType.SEQ_CLS`."""

    _task = TaskType.SEQ_CLS
    _auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For `TaskType.TOKEN_CLS`."""

    _task = TaskType.TOKEN_CLS
    _auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For `TaskType.QUESTION_ANS`."""

    _task = TaskType.QUESTION_ANS
    _auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For `TaskType.FEATURE_EXTRACTION`."""

    _task = TaskType.FEATURE_EXTRACTION
    _auto_class = "AutoModel"
