"""What is printed of an adapted model and of a table of adapters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from ia3 import AdapterTable, IA3Config, get_peft_model

CAUSAL = {"task_type": "CAUSAL_LM"}


def line_of(model: nn.Module) -> str:
    (line,) = re.findall(r"adapters: .*", repr(model))
    return line


def count(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for path, parameter in model.named_parameters() if path.endswith(f"ia3_l.{name}"))


@pytest.fixture
def model(tiny: Any) -> Any:
    model = get_peft_model(tiny("llama"), IA3Config(**CAUSAL))
    model.add_adapter("small", IA3Config(target_modules=["k_proj"], feedforward_modules=[], **CAUSAL))
    return model


def test_the_adapters_are_the_first_line_of_the_tree(model: Any, tiny: Any) -> None:
    bare = repr(tiny("llama"))
    assert line_of(model) == (
        f"adapters: default (active, {count(model, 'default')} numbers), "
        f"small (inactive, {count(model, 'small')} numbers)"
    )
    added = re.compile(r"^ *(adapters: .*|\(ia3_l\): .*)\n", re.MULTILINE)
    with_vectors = re.compile(r"^( *\(\w+\): Linear)\(\n +(\(?in_features.*)\n(?: +\(ia3_l\).*\n) *\)$", re.MULTILINE)
    assert added.sub("", with_vectors.sub(r"\1(\2)", repr(model))) == bare
    assert repr(model.unload()) == bare


def test_each_module_shows_its_vectors(model: Any) -> None:
    width = model.model.layers[0].self_attn.k_proj.out_features
    assert repr(model.model.layers[0].self_attn.k_proj.ia3_l) == (
        f"SiteVectors(default: {width} outputs, active, small: {width} outputs)"
    )
    inner = model.model.layers[0].mlp.down_proj.in_features
    assert repr(model.model.layers[0].mlp.down_proj.ia3_l) == f"SiteVectors(default: {inner} inputs, active)"


def test_what_adapters_do_is_told_as_it_is(model: Any) -> None:
    model.set_adapter("small")
    assert line_of(model).startswith("adapters: small (active, ")
    with model.disable_adapter():
        assert "small (disabled, " in line_of(model)
    model.merge_adapter()
    assert "small (merged, " in line_of(model)
    assert "default (inactive, " in line_of(model)
    model.unmerge_adapter()
    for number in range(20):
        model.add_adapter(f"more{number}", IA3Config(**CAUSAL))
    assert line_of(model).startswith("adapters: small (active, ")
    assert line_of(model).endswith(", 14 more")


def test_modules_trained_in_full_count(tiny: Any) -> None:
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert line_of(model) == f"adapters: default (active, {trained:,} numbers)"


def test_printing_changes_nothing(model: Any) -> None:
    """Also where a tool replaced a module, which the next forward settles and printing doesn't."""
    path = "model.layers.0.self_attn.k_proj"
    old = model.get_submodule(path)
    model.set_submodule(path, nn.Linear(old.in_features, old.out_features, bias=False))
    before = [(name, id(value)) for name, value in (*model.named_parameters(), *model.named_modules())]
    assert "default (active, " in line_of(model)
    assert [(name, id(value)) for name, value in (*model.named_parameters(), *model.named_modules())] == before


def test_a_table(tiny: Any, randomise: Any, tmp_path: Any) -> None:
    for name in ("a", "b"):
        randomise(get_peft_model(tiny("llama"), IA3Config(**CAUSAL))).save_pretrained(tmp_path / name)
    model = tiny("llama")
    model.name_or_path = "owner/base"
    table = AdapterTable(model, capacity=4)
    assert (
        repr(table) == "AdapterTable(LlamaForCausalLM 'owner/base', 0 adapters over 0 numbers, float32, up to 4 on cpu)"
    )
    for number in range(9):
        table.register(f"n{number}", tmp_path / "ab"[number % 2])
    shown = ", ".join(f"'n{number}'" for number in range(8))
    expected = (
        f"AdapterTable(LlamaForCausalLM 'owner/base', 9 adapters over {table.layout.size:,} numbers, float32, up to 4 "
        f"on cpu: {shown}, …)"
    )
    assert repr(table) == expected
    assert line_of(model) == f"adapters: none attached; {expected}"
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]), adapter_names=["n3"])
    assert repr(table) == expected
    table.close()
    assert repr(table) == "AdapterTable(closed)"
