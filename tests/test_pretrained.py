"""What transformers loads of a base: none of its code unasked, and errors that name the folder."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

import ia3
import tiny_seq2seq
from ia3 import AutoPeftModelForSeq2SeqLM
from ia3.pretrained import load_pretrained

SOURCE = Path(ia3.__file__).parent
# Classes of our own, whose `from_pretrained` ends in `load_pretrained`.
OWN = {"PeftConfig", "PeftModel", "super()", "loader", "CLASS_FOR_TASK[cls._task]"}

CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()
Path({canary!r}).touch()
from transformers import T5Config


class Config(T5Config):
    model_type = "own"
"""


@pytest.fixture
def with_code(tmp_path):
    """A base whose configuration comes with code, which leaves a file where it ran."""
    folder = tiny_seq2seq.save_base(tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(content | own))
    (folder / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    return folder


def test_code_runs_only_where_it_is_trusted(with_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    for auto_class in (AutoConfig, AutoModelForSeq2SeqLM):
        with pytest.raises(ValueError, match=r"base comes with code of its own.*`trust_remote_code=True`"):
            load_pretrained(auto_class, with_code)
    assert not (with_code.parent / "canary").exists()
    assert load_pretrained(AutoConfig, with_code, trust_remote_code=True).model_type == "own"
    assert (with_code.parent / "canary").exists()


def test_an_adapter_does_not_switch_it_on(with_code, tmp_path):
    model = tiny_seq2seq.adapted()
    model.peft_config["default"].base_model_name_or_path = str(with_code)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="comes with code of its own"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_code(tmp_path, name):
    folder = tiny_seq2seq.save_base(tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {name: "someone/kernels"}))
    with pytest.raises(ValueError, match="kernels 'someone/kernels' of the hub"):
        load_pretrained(AutoConfig, folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 10**9}, "as its num_layers"),
        ({"vocab_size": 1 << 40}, "numbers in one matrix"),
        ({"d_model": "x"}, "base"),
        ({"architectures": 3, "num_heads": []}, "base"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, changes, said):
    folder = tiny_seq2seq.save_base(tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=said):
        load_pretrained(AutoModelForSeq2SeqLM, folder)


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = tiny_seq2seq.save_base(tmp_path / "base")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"base model '.*base' cannot be read|base"):
        load_pretrained(AutoTokenizer, folder)


def test_nobody_else_loads():
    """A base that was loaded elsewhere could run its code."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = node.func.attr in ("from_pretrained", "from_config", "_from_config")
                by = ast.unparse(node.func.value)
                assert not called or by in OWN or path.name == "pretrained.py", f"{path}: {ast.unparse(node.func)}"
