"""The model card that stands beside a saved adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ia3.config import IA3Config
from ia3.errors import fit_screen
from ia3.files import BUNDLED, read_file, write_atomically

# The most bytes of a card.
_LIMIT = 1 << 22

_LOADER = {
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    None: "AutoPeftModel",
}

_TEXT = """
# (IA)³ adapter for {base}

Vectors learned with (IA)³ (Liu et al. 2022, arXiv:2205.05638) for the frozen base model {base}.

| what was trained | |
|---|---|
{trained}
{section}"""
_SECTION = """
## Loading

```python
{code}
```

{peft}
"""
_WITH_BASE = """\
from ia3 import {loader}

adapter = "."  # this repository's name on the hub, or the folder that holds this file
model = {loader}.from_pretrained(adapter)"""
_ONTO_BASE = """\
from ia3 import PeftModel

adapter = "."  # this repository's name on the hub, or the folder that holds this file
model = PeftModel.from_pretrained(base_model, adapter)  # the base model, loaded by you"""
_RESULTS = "## Training and results"
_IN_PEFT = "The files are PEFT's: `from peft import {name}` loads them too."
_ONLY_HERE = (
    "The base model comes with `ia3`, and only `ia3` knows it by this name; PEFT can't load it, and "
    "`transformers.pipeline` takes the loaded model instead of the folder."
)


def read_card(path: Path) -> Any:
    """The card in a file, a `huggingface_hub.ModelCard`.

    Raises:
        ValueError: the file is no card, or much too long for one.
    """
    from huggingface_hub import ModelCard

    content = read_file(path, _LIMIT)
    try:
        return ModelCard(content.decode("utf-8"), ignore_metadata_errors=True)
    except Exception as error:  # the metadata's parser raises almost anything
        raise ValueError(
            f"{path} is no model card ({fit_screen(str(error), 300)}): correct it, or remove it."
        ) from error


def write_card(directory: Path, config: IA3Config) -> None:
    """Write `README.md`, or bring the metadata of the one that is there up to date and keep its text."""
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / "README.md"
    new = f"---\n{ModelCardData().to_yaml()}\n---\n{_text(config)}"
    card = read_card(path) if path.is_file() else ModelCard(new)
    _update_metadata(card.data, config, {"ia3"})
    write_atomically(path, str(card).encode())


def update_card(directory: Path, config: IA3Config, tags: Iterable[str]) -> None:
    """Bring the `README.md` that a Trainer wrote up to date: its metadata, and how to load the adapter behind its text.

    Args:
        directory: where the card stands, or is to stand.
        config: the adapter's.
        tags: the model's own, beside those that the card has.
    """

    path = directory / "README.md"
    if not path.is_file():
        write_card(directory, config)
    card = read_card(path)
    _update_metadata(card.data, config, {"ia3", *tags})
    if "from ia3 import" not in card.text:
        card.text = f"{card.text.rstrip()}\n{_section(config)}"
    write_atomically(path, str(card).encode())


def _update_metadata(data: Any, config: IA3Config, tags: set[str]) -> None:
    data.library_name = "peft"
    present = [data.tags] if isinstance(data.tags, str) else data.tags or ()
    data.tags = sorted({*(tag for tag in present if isinstance(tag, str)), *tags})
    base = config.base_model_name_or_path
    if base and is_on_hub(base):
        data.base_model = base
    elif base and data.get("base_model") == base:  # a Trainer names any; the hub refuses the card
        data.base_model = None


def add_tags(directory: Path, tags: Iterable[str]) -> None:
    """Put more tags into the card that `write_card` wrote."""

    path = directory / "README.md"
    card = read_card(path)
    metadata: Any = card.data
    metadata.tags = sorted({*(metadata.tags or ()), *tags})
    write_atomically(path, str(card).encode())


def add_results(
    directory: Path, facts: Mapping[str, str], *, accuracy: float | None, task: str, data: str, named: bool = True
) -> None:
    """Put a training and what it reached into the card that `write_card` wrote, in place of an earlier one.

    Args:
        directory: the adapter's.
        facts: the section's table.
        accuracy: what the hub shows beside the model's name; None where there is none.
        task: the hub's name of the task, such as `text-classification`.
        data: the data's name; of a path its last part, since the rest is nobody else's business.
        named: whether the name can be a hub data set's.
    """
    from huggingface_hub import EvalResult

    path = directory / "README.md"
    card = read_card(path)
    metadata: Any = card.data
    on_hub = named and is_on_hub(data)
    name = data if on_hub else Path(data).name
    metadata.datasets = [data] if on_hub else None
    metadata.model_name = f"(IA)³ on {name}"
    of_data: dict[str, Any] = {"task_type": task, "dataset_type": name, "dataset_name": name}
    metadata.eval_results = None
    if accuracy is not None:
        metadata.eval_results = [EvalResult(**of_data, metric_type="accuracy", metric_value=round(accuracy, 4))]
    rows = "\n".join(f"| {what} | {value} |" for what, value in {"data": name, **facts}.items())
    section = f"{_RESULTS}\n\n| | |\n|---|---|\n{rows}\n"
    text = re.split(rf"^{_RESULTS}$", card.text, maxsplit=1, flags=re.MULTILINE)
    following = re.search(r"^## .*", text[1], re.MULTILINE | re.DOTALL) if len(text) > 1 else None
    card.text = f"{text[0].rstrip()}\n\n{section}" + (f"\n{following[0]}" if following else "")
    write_atomically(path, str(card).encode())


def is_on_hub(name: str) -> bool:
    """Whether this can be a hub repository's name; the hub refuses a card that says so of anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _text(config: IA3Config) -> str:
    base = config.base_model_name_or_path or ""
    if not base.startswith(BUNDLED) and not is_on_hub(base):
        base = Path(base).name  # a path on the author's machine is nobody else's business
    return _TEXT.format(
        base=base or "a model of your own",
        trained="\n".join(f"| {what} | {names} |" for what, names in _trained(config).items()),
        section=_section(config),
    )


def _section(config: IA3Config) -> str:
    """How to load the adapter."""
    base = config.base_model_name_or_path or ""
    loader = _LOADER[config.task_type] if base else "PeftModel"
    return _SECTION.format(
        code=(_WITH_BASE if base else _ONTO_BASE).format(loader=loader),
        peft=_ONLY_HERE if base.startswith(BUNDLED) else _IN_PEFT.format(name=loader),
    )


def _trained(config: IA3Config) -> dict[str, str]:
    """What the configuration trains, as it names it."""
    targets, inputs = config.target_modules, config.feedforward_modules
    rows = {"task": config.task_type or "none", "vectors at": _names(targets), "of these, at the input": _names(inputs)}
    if config.exclude_modules:
        rows["left out"] = _names(config.exclude_modules)
    if config.modules_to_save:
        rows["trained in full"] = _names(config.modules_to_save)
    return rows


def _names(names: set[str] | list[str] | str | None) -> str:
    """Module names, a pattern, or of many paths the names that they end with."""
    if isinstance(names, str):
        return f"`{names}`".replace("|", r"\|")
    if names is not None and len(names) > 8:
        names = {name.rsplit(".", 1)[-1] for name in names}
    return ", ".join(f"`{name}`" for name in sorted(names or ())) or "none"
