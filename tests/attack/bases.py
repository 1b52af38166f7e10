"""Hostile bases: code that comes with them, and damaged configurations, tokenizers and weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import BASE_DOORS, Attack, Ground
from safetensors.torch import load_file, save
from weights import HEADERS, PICKLES, SPECIAL, TENSORS_CHANGED, Change, Write

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_ROADS = ("train_in_python", "targets", "predict_on", "auto_model_on")
"""One door of each road that a base's files take."""

Build = Callable[[Path, Ground], None]


def attacks() -> Iterator[Attack]:
    """All of them."""
    for name, build in CODE.items():
        yield Attack("code of a base", name, build, BASE_DOORS)
    yield Attack("code of a base", "a class of no model", _with_class("transformers", "pipeline"), ("auto_any",))
    yield Attack("code of a base", "a class that isn't there", _with_class("transformers.nowhere", "X"), ("auto_any",))
    for file in _FILES:
        for name, write in SPECIAL.items():
            doors = BASE_DOORS if name in ("empty", "text") else _ROADS
            yield Attack("bases' files", f"{file} is {name}", partial(_with_file, file, write), doors)
    for name, changes in CONFIGS.items():
        yield Attack("bases' configurations", name, partial(_with_json, "config.json", changes), _ROADS)
    for name, (file, changes) in TOKENIZERS.items():
        yield Attack("bases' tokenizers", name, partial(_with_json, file, changes), _ROADS)
    for name, build in WEIGHTS.items():
        yield Attack("bases' weights", name, build, _ROADS)


def _copy(folder: Path, ground: Ground) -> None:
    shutil.copytree(ground.base, folder, dirs_exist_ok=True)


def _change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def _with_file(file: str, write: Write, folder: Path, ground: Ground) -> None:
    _copy(folder, ground)
    (folder / file).unlink(missing_ok=True)
    write(folder / file)


def _with_json(file: str, changes: dict[str, Any], folder: Path, ground: Ground) -> None:
    _copy(folder, ground)
    _change_json(folder / file, changes)


def _with_class(library: str, name: str) -> Build:
    """An adapter that names the class of its base."""

    def build(folder: Path, ground: Ground) -> None:
        shutil.copytree(ground.adapter, folder, dirs_exist_ok=True)
        mapping = {"parent_library": library, "base_model_class": name}
        _change_json(folder / "adapter_config.json", {"task_type": None, "auto_mapping": mapping})

    return build


# Code

_HOSTILE = """
from pathlib import Path

Path({canary!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


class Config(PretrainedConfig):
    model_type = "hostile"


class Model(PreTrainedModel):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass


def generate(model, **inputs):
    return inputs["input_ids"]
"""


def _with_code(
    folder: Path, ground: Ground, *, config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None
) -> None:
    _copy(folder, ground)
    for name in ("code.py", "custom_generate/generate.py", "configuration_hostile.py", "modeling_hostile.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(_HOSTILE.format(canary=str(folder.parent / "canary")))
    _change_json(folder / "config.json", config or {})
    _change_json(folder / "tokenizer_config.json", tokenizer or {})


_CLASSES = {
    **{name: "code.Model" for name in ("AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")},
    **{name: "code.Model" for name in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")},
}
_ALL = {"AutoConfig": "code.Config", **_CLASSES}
CODE: dict[str, Build] = {
    name: partial(_with_code, config=config, tokenizer=tokenizer)
    for name, config, tokenizer in (
        ("a configuration", {"model_type": "hostile", "auto_map": _ALL}, {}),
        ("a configuration of a known type", {"auto_map": _ALL}, {}),
        ("a configuration of no type", {"model_type": None, "auto_map": _ALL}, {}),
        ("a model alone", {"auto_map": _CLASSES}, {}),
        ("a model of another kind", {"model_type": "bert", "auto_map": _CLASSES}, {}),
        ("a generate of its own", {}, {}),
        ("a tokenizer", {}, {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}),
        (
            "a tokenizer of no class",
            {},
            {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}},
        ),
        ("a tokenizer as a list", {}, {"tokenizer_class": "X", "auto_map": ["code.Tokenizer", "code.Tokenizer"]}),
        ("a processor", {}, {"auto_map": {"AutoProcessor": "code.Model"}}),
        (
            "all of it",
            {"model_type": "hostile", "auto_map": _ALL},
            {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}},
        ),
        (
            "trust by its own word",
            {"model_type": "x", "trust_remote_code": True, "auto_map": _ALL},
            {"trust_remote_code": True},
        ),
        ("code above the folder", {"model_type": "x", "auto_map": {"AutoConfig": "../hostile/code.Config"}}, {}),
        ("code of another repository", {"model_type": "x", "auto_map": {"AutoConfig": "someone/x--code.Config"}}, {}),
        ("kernels", {"attn_implementation": "someone/kernels"}, {}),
        ("kernels of the usual place", {"attn_implementation": "kernels-community/flash-attn3"}, {}),
        ("kernels in a folder", {"attn_implementation": "./custom_generate"}, {}),
        ("kernels by an inner name", {"_attn_implementation": "someone/kernels"}, {}),
        ("kernels of experts", {"experts_implementation": "someone/kernels"}, {}),
        ("a map that is a list", {"model_type": "x", "auto_map": ["code.Config"]}, {}),
        ("a map that is a text", {"model_type": "x", "auto_map": "AutoConfig"}, {}),
        ("a map without a class", {"model_type": "x", "auto_map": {"AutoConfig": "code"}}, {}),
        ("a map to a number", {"model_type": "x", "auto_map": {"AutoConfig": 3}}, {}),
    )
}


# Configurations and tokenizers

_WRONG = (None, "", "x", -1, 0, 1.5, [], {}, [1], True, 10**12, "9" * 50)
CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"{field} is {json.dumps(value)[:20]}": {field: value}
        for field in ("d_model", "num_layers", "vocab_size", "model_type", "d_kv")
        for value in _WRONG
    },
    **{
        f"{field} is {json.dumps(value)[:20]}": {field: value}
        for field in ("architectures", "dtype", "is_encoder_decoder", "eos_token_id", "id2label")
        for value in (0, "x", [], [1], {"a": 1}, -1)
    },
    "a million layers": {"num_layers": 1_000_000, "num_decoder_layers": 1_000_000},
    "a wide model": {"d_model": 1 << 20, "d_ff": 1 << 20},
    "a wide feed-forward": {"d_ff": 1 << 30},
    "a large vocabulary": {"vocab_size": 1 << 30},
    "many heads": {"num_heads": 1 << 20},
    "another family": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "deep": {"x": json.loads("[" * 900 + "]" * 900)},
    "quantised by nobody": {"quantization_config": {"quant_method": "nobody"}},
    "quantised by a number": {"quantization_config": 3},
    "quantised without a method": {"quantization_config": {}},
    "quantised by gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "a class that is none": {"architectures": ["pipeline"]},
    "a class of another kind": {"architectures": ["Trainer"]},
    "a name of its own": {"name_or_path": "someone/else", "_name_or_path": 3},
    "a long name": {"x" * 100_000: "y" * 100_000},
    "methods in its fields": {"to_dict": 1, "get_text_config": "x", "__class__": "y", "from_pretrained": None},
}

_TEMPLATE = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
TOKENIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{field} is {json.dumps(value)[:20]}": ("tokenizer_config.json", {field: value})
        for field in ("tokenizer_class", "model_max_length", "eos_token", "added_tokens_decoder", "auto_map")
        for value in (None, 3, -1, "x", [], {"a": 1}, ["x"])
    },
    "a template without an end": ("tokenizer_config.json", {"chat_template": _TEMPLATE}),
    "a template of no language": ("tokenizer_config.json", {"chat_template": "{% for"}),
    **{
        f"tokenizer.json: {field} is {json.dumps(value)[:20]}": ("tokenizer.json", {field: value})
        for field in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "version")
        for value in (3, "x", [1], {"type": "Nothing"})
    },
    "a slow expression": (
        "tokenizer.json",
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(.|.)*!x"}, "behavior": "Isolated", "invert": False}},
    ),
    "a slow replacement": (
        "tokenizer.json",
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a|.)*x!"}, "content": "y"}},
    ),
    "no expression": (
        "tokenizer.json",
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
    ),
    "tokens beyond the model": (
        "tokenizer.json",
        {"model": {"type": "WordLevel", "vocab": {"<unk>": 0, "the": 4_000_000_000}, "unk_token": "<unk>"}},
    ),
}


# Weights


def _index(change: Callable[[dict[str, Any]], Any]) -> Build:
    """A base whose weights an index names."""

    def build(folder: Path, ground: Ground) -> None:
        _copy(folder, ground)
        (folder / "model.safetensors").rename(folder / "part-1.safetensors")
        keys = load_file(folder / "part-1.safetensors")
        changed = change({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, "part-1.safetensors")})
        text = changed if isinstance(changed, str) else json.dumps(changed)
        (folder / "model.safetensors.index.json").write_text(text)

    return build


def _mapped(weight_map: Any) -> Build:
    return _index(lambda index: {**index, "weight_map": weight_map})


def _as_pickle(make: Callable[[Path], bytes]) -> Build:
    def build(folder: Path, ground: Ground) -> None:
        _copy(folder, ground)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(make(folder / "pytorch_model.bin"))

    return build


def _with_tensors(change: Change) -> Build:
    def build(folder: Path, ground: Ground) -> None:
        _copy(folder, ground)
        tensors = load_file(folder / "model.safetensors")
        change(tensors, next(iter(tensors)))
        (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))

    return build


def _whole(tensors: dict[str, torch.Tensor], first: str) -> None:
    tensors[first] = tensors[first].to(torch.int32)


WEIGHTS: dict[str, Build] = {
    "an honest index": _index(lambda index: index),
    "an index of nothing": _index(lambda index: {}),
    "an index that is a list": _index(lambda index: []),
    "an index of no JSON": _index(lambda index: "{"),
    "an index of a missing part": _mapped({"shared.weight": "gone.safetensors"}),
    "an index of a file outside": _mapped({"shared.weight": "../../../../etc/passwd"}),
    "an index of itself": _mapped({"x": "model.safetensors.index.json"}),
    "an index of numbers": _mapped({"shared.weight": 3}),
    "an index of no map": _mapped(None),
    "an index without metadata": _index(lambda index: {"weight_map": index["weight_map"]}),
    **{
        f"pickle: {name}": _as_pickle(PICKLES[name])
        for name in (
            *("code", "code in protocol 2", "code in a torch file", "code in an old torch file", "half of it"),
            *("a call of eval", "an empty archive", "a sparse tensor", "a number", "keys that are numbers", "none"),
            *("an expanded tensor", "bytes of 100 GB", "a module", "one tensor"),
        )
    },
    **{
        f"safetensors: {name}": partial(_with_file, "model.safetensors", HEADERS[name])
        for name in (
            *("truncated", "half of it", "a length of 2**63", "a header alone", "no tensors", "no JSON", "a list"),
            *("deep lists", "all tensors in one place", "200 MB of spaces"),
        )
    },
    **{
        f"tensors: {name}": _with_tensors(TENSORS_CHANGED[name])
        for name in ("a NaN", "no dimension", "five dimensions", "twice as long", "one too few")
    },
    "tensors: whole numbers": _with_tensors(_whole),
}
