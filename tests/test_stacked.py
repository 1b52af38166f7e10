"""Heads of many adapters in one batch: each example gets what its adapter gives alone, whatever head its family has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_classifier
from ia3 import AdapterTable, IA3Config, PeftModel, get_peft_model
from ia3.mixing import gather_rows
from ia3.rows import acting
from tiny_heads import SHAPES, load_base, save_base

SHAPES["modernbert"] = {**SHAPES["bert"], "global_attn_every_n_layers": 2, "local_attention": 8}
FAMILIES = (
    *("bert", "roberta", "deberta-v2", "albert", "electra", "distilbert", "gpt2", "llama", "bart"),
    "modernbert",
)
# The adapters of a folder and their number of classes.
CLASSES = {"three": 3, "other": 3, "five": 5}
TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


def save(folder: Path, base: str, head: str, classes: int, seed: int, **config: Any) -> None:
    """An adapter whose vectors and head are drawn at random."""
    model = get_peft_model(load_base(base, head, 0, num_labels=classes), IA3Config(task_type=TASKS[head], **config))
    tiny_classifier.randomise(model, seed, 0.5, 1.5)
    model.save_pretrained(folder)


def fleet(folder: Path, family: str, head: str = "SequenceClassification", **config: Any) -> tuple[str, Path]:
    """A base without any head, and a folder of adapters."""
    base = save_base(folder / "base", family, "")
    for seed, (name, classes) in enumerate(CLASSES.items()):
        save(folder / "adapters" / name, base, head, classes, seed, **config)
    return base, folder / "adapters"


def batch_of(count: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (count, 7), generator=torch.Generator().manual_seed(5))
    ids[:, -1] = 1  # the end, which BART's head reads
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def one(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {key: tensor[row : row + 1] for key, tensor in batch.items()}


def expect_as_alone(base: str, folder: Path, head: str, model: Any, names: list[str]) -> None:
    batch = batch_of(len(names))
    mixed = model(**batch, adapter_names=names).logits
    alone = {
        name: PeftModel.from_pretrained(load_base(base, head, 7, num_labels=CLASSES[name]), folder / name)
        for name in {*names}
    }
    for row, name in enumerate(names):
        expected = alone[name](**one(batch, row)).logits[0]
        own = mixed[row, ..., : CLASSES[name]]
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(own.argmax(-1), expected.argmax(-1))
        assert mixed[row, ..., CLASSES[name] :].eq(-torch.inf).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_example_is_as_alone(tmp_path: Path, family: str) -> None:
    base, folder = fleet(tmp_path, family)
    model = load_base(base, "SequenceClassification", 9)
    batch = batch_of(2)
    before, kind = model(**batch).logits, type(model)
    table = AdapterTable(model)
    for name in CLASSES:
        table.register(name, folder / name)
        assert table.classes(name) == CLASSES[name]
    expect_as_alone(base, folder, "SequenceClassification", model, ["five", "three", "other", "five"])
    expect_as_alone(base, folder, "SequenceClassification", model, ["three", "other"])
    mixed = model(**batch, adapter_names=["__base__", "other"]).logits
    torch.testing.assert_close(mixed[0, : before.shape[1]], before[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(model(**batch).logits, before)
    table.close()
    assert type(model) is kind
    assert not any("Saved" in each.__name__ for module in model.modules() for each in type(module).__mro__)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_words_too(tmp_path: Path, family: str) -> None:
    base, folder = fleet(tmp_path, family, "TokenClassification")
    model = load_base(base, "TokenClassification", 9)
    table = AdapterTable(model)
    for name in CLASSES:
        table.register(name, folder / name)
    expect_as_alone(base, folder, "TokenClassification", model, ["five", "three", "other"])


@torch.no_grad()
def test_a_pooler_is_a_part_of_the_head(tmp_path: Path) -> None:
    base, folder = fleet(tmp_path, "bert", modules_to_save=["pooler"])
    model = load_base(base, "SequenceClassification", 9)
    table = AdapterTable(model, capacity=2)  # so that one makes room for the other
    for name in CLASSES:
        table.register(name, folder / name)
    for names in (["five", "other"], ["three", "other"], ["five", "five"]):
        expect_as_alone(base, folder, "SequenceClassification", model, names)
    assert len(table._heads) == 2
    table.drop("five")
    table.register("other", folder / "five")
    assert table.classes("other") == 5
    assert len(table._heads) <= 1
    with pytest.raises(ValueError, match="Unknown adapter_names"):
        table.classes("five")


def test_attached_ones_share_a_batch_and_get_gradients(tmp_path: Path) -> None:
    base, folder = fleet(tmp_path, "bert")
    head = "SequenceClassification"
    alone = PeftModel.from_pretrained(load_base(base, head, 9, num_labels=5), folder / "five", is_trainable=True)
    model = PeftModel.from_pretrained(load_base(base, head, 9, num_labels=5), folder / "five", is_trainable=True)
    table = AdapterTable(model)
    table.register("three", folder / "three")
    batch = batch_of(2)
    for each, names in ((alone, None), (model, ["three", "default"])):
        logits = each(**batch, adapter_names=names).logits if names else each(**batch).logits
        logits[1].sum().backward()
    held = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(held[name].grad, gradient, rtol=1e-4, atol=1e-5)
    names = ["three", "three"]
    begun = gather_rows(model.eval(), names)
    expected = model(**batch, adapter_names=names).logits
    model.delete_adapter("default")
    with acting(begun):  # a batch that began before
        assert torch.equal(model(**batch).logits, expected)
    expect_as_alone(base, folder, head, model, names)


@torch.no_grad()
def test_half_precision(tmp_path: Path) -> None:
    base, folder = fleet(tmp_path, "bert")
    model = load_base(base, "SequenceClassification", 9, dtype=torch.bfloat16)
    table = AdapterTable(model)
    table.register("five", folder / "five")
    alone = PeftModel.from_pretrained(
        load_base(base, "SequenceClassification", 7, num_labels=5, dtype=torch.bfloat16), folder / "five"
    )
    batch = batch_of(3)
    mixed = model(**batch, adapter_names=["five", "__base__", "five"]).logits
    assert mixed.dtype is torch.bfloat16
    torch.testing.assert_close(mixed[[0, 2]], alone(**batch).logits[[0, 2]], rtol=2e-2, atol=2e-2)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def key_of(name: str) -> str:
    return f"base_model.model.classifier.{name}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({key_of("bias"): torch.ones(4)}), "for 3, 4 classes"),
        (lambda t: t.update({key_of("weight"): torch.ones(3, 5)}), r"the shape \(3, 5\) in the file and \(2, 16\)"),
        (lambda t: t.update({key_of("bias"): torch.full((3,), torch.nan)}), "NaN"),
        (lambda t: t.pop(key_of("bias")), "1 missing"),
        (lambda t: t.update({key_of("ia3_l"): torch.ones(3, 1)}), "1 unknown"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    base = save_base(tmp_path / "base", "bert", "")
    save(tmp_path / "three", base, "SequenceClassification", 3, 0)
    table = AdapterTable(load_base(base, "SequenceClassification", 9))
    table.register("good", tmp_path / "three")
    rewrite(tmp_path / "three", change)
    with pytest.raises(ValueError, match=said):
        table.register("bad", tmp_path / "three")
    assert list(table) == ["good"]


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert", "")
    table = AdapterTable(load_base(base, "SequenceClassification", 9))
    for module in ("word_embeddings", "embeddings", "bert.encoder.layer.0.output"):
        save(tmp_path / module, base, "SequenceClassification", 3, 0, modules_to_save=[module])
        with pytest.raises(ValueError, match="holds modules in full"):
            table.register(module, tmp_path / module)
    save(tmp_path / "pooler", base, "SequenceClassification", 3, 0, modules_to_save=["pooler"])
    save(tmp_path / "classes", base, "SequenceClassification", 3, 0)
    file = tmp_path / "classes" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": None}))
    table.register("implied", tmp_path / "classes")  # the task alone implies its head
    assert table.classes("implied") == 3
    within = {"target_modules": ["pooler.dense"], "feedforward_modules": []}
    save(tmp_path / "within", base, "SequenceClassification", 3, 0, **within)
    table.register("pooler", tmp_path / "pooler")
    with pytest.raises(ValueError, match=r"trains bert.pooler.dense in full and another has vectors there"):
        table.register("within", tmp_path / "within")


def test_one_name_a_token_has_no_head(tmp_path: Path) -> None:
    base, folder = fleet(tmp_path, "llama", "TokenClassification")
    model = load_base(base, "TokenClassification", 9)
    AdapterTable(model).register("three", folder / "three")
    with pytest.raises(ValueError, match="pass one name an example"):
        model(**batch_of(1), adapter_names=[["three"] * 7])
