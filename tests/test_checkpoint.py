"""Saving and loading: round trips to the bit, and a clear refusal of everything that doesn't fit."""

import io
import itertools
import json
import os
import pickle
import re
import socket
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from builders import Failing
from ia3 import (
    IA3Config,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from ia3.config import CONFIG_NAME
from ia3.tensors import PICKLE_NAME, SAFETENSORS_NAME

LAYERS = ["embed", "biased", "plain", "transposed", "conv1", "grouped1", "conv2", "grouped2", "conv3", "grouped3"]
EXPLICIT_T5 = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("neither saving nor loading from a folder needs the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def saved(tiny, randomise, output, tmp_path):
    """A folder with a T5 adapter, and the output of its model."""
    model = randomise(get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM")))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder, output(model)


def _rewrite(folder, change):
    tensors = load_file(folder / SAFETENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / SAFETENSORS_NAME, metadata={"format": "pt"})


def _reconfigure(folder, **fields):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Round trips


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_round_trip_over_layers_and_precisions(zoo, randomise, tmp_path_factory, data, dtype):
    targets = data.draw(st.sets(st.sampled_from(LAYERS), min_size=1))
    inputs = data.draw(st.sets(st.sampled_from(sorted(targets)))) - {"embed"}
    config = IA3Config(target_modules=targets, feedforward_modules=inputs)
    model = randomise(get_peft_model(zoo(dtype), config, autocast_adapter_dtype=False))
    folder = tmp_path_factory.mktemp("zoo")
    model.save_pretrained(folder, safe_serialization=data.draw(st.booleans()))
    again = PeftModel.from_pretrained(zoo(dtype), folder, autocast_adapter_dtype=False)
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    for key, parameter in before.items():
        assert after[key].dtype == parameter.dtype
        assert torch.equal(after[key], parameter)
    saved, resaved = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert all(torch.equal(saved[key], resaved[key]) for key in saved.keys() | resaved.keys())
    assert all(tensor.dtype == dtype for tensor in saved.values())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ["t5", "mt5", "bert", "gpt2", "falcon-grouped", "bloom"])
def test_round_trip_over_families(tiny, randomise, output, tmp_path, name, safe):
    task = "SEQ_CLS" if name == "bert" else None
    model = randomise(get_peft_model(tiny(name), IA3Config(task_type=task)))
    if task:
        model.classifier.modules_to_save["default"].bias.data += 1
    model.save_pretrained(tmp_path, safe_serialization=safe)
    again = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(output(again), output(model))
    again.save_pretrained(tmp_path / "again", safe_serialization=True)
    model.save_pretrained(tmp_path / "first", safe_serialization=True)
    for file in (SAFETENSORS_NAME, CONFIG_NAME):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_the_files(tiny, randomise, tmp_path):
    model = randomise(get_peft_model(tiny("gpt2"), IA3Config(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", CONFIG_NAME, SAFETENSORS_NAME]
    with safe_open(tmp_path / SAFETENSORS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        # A safetensors file can't be iterated.
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  the file is no dict
    prefix = "base_model.model.transformer.h"
    assert shapes == {f"{prefix}.{n}.attn.c_attn.ia3_l": [48, 1] for n in range(2)} | {
        f"{prefix}.{n}.mlp.c_proj.ia3_l": [1, 64] for n in range(2)
    }
    assert (load_file(tmp_path / SAFETENSORS_NAME)[f"{prefix}.0.attn.c_attn.ia3_l"][:16] == 1).all()
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["inference_mode"] is True
    assert config["auto_mapping"] is None
    assert model.peft_config["default"].inference_mode is False


def test_a_model_without_a_task_names_its_class(tiny, tmp_path):
    get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).auto_mapping == {
        "base_model_class": "T5ForConditionalGeneration",
        "parent_library": "transformers.models.t5.modeling_t5",
    }


def test_saving_changes_format_and_removes_the_other(tiny, tmp_path):
    model = get_peft_model(tiny("t5"), IA3Config())
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / SAFETENSORS_NAME).exists()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / PICKLE_NAME).exists()


def test_several_adapters_and_their_folders(tiny, randomise, output, tmp_path):
    model = get_peft_model(tiny("t5"), IA3Config())
    model.add_adapter("b", IA3Config(target_modules=["k"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "b" / SAFETENSORS_NAME).is_file()
    assert not (tmp_path / "default").exists()
    again = PeftModel.from_pretrained(tiny("t5"), tmp_path, adapter_name="first")
    again.load_adapter(tmp_path / "b", "second")
    assert again.active_adapters == ["first"]
    assert torch.equal(output(again), output(model))
    for ours, theirs in (("b", "second"), (["default", "b"], ["first", "second"])):
        model.set_adapter(ours)
        again.set_adapter(theirs)
        assert torch.equal(output(again), output(model))
    by_folder = PeftModel.from_pretrained(tiny("t5"), tmp_path, subfolder="b")
    model.set_adapter("b")
    assert torch.equal(output(by_folder), output(model))


def test_selected_adapters(tiny, tmp_path):
    model = get_peft_model(tiny("t5"), IA3Config())
    model.add_adapter("b", IA3Config())
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["README.md", "b"]
    with pytest.raises(ValueError, match="no adapter 'x'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["b", "x"])
    with pytest.raises(ValueError, match="selected_adapters is empty"):
        model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none").exists()


def test_only_the_main_process_writes(tiny, tmp_path):
    get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_saving_over_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file"):
        get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path / "file")


def test_values_gathered_elsewhere(tiny, randomise, tmp_path):
    model = randomise(get_peft_model(tiny("gpt2"), IA3Config(task_type="CAUSAL_LM")))
    gathered = {key: value.clone() * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    site = model._ia3.adapters["default"].layout.sites[0]
    expected = site.widen(gathered[f"{site.key}.default"])
    assert torch.equal(load_file(tmp_path / SAFETENSORS_NAME)[f"base_model.model.{site.key}"], expected)
    assert torch.equal(get_peft_model_state_dict(model, gathered)[f"base_model.model.{site.key}"], expected)


def test_an_injected_adapter_has_no_prefix_in_memory_and_the_usual_one_on_disk(tiny, randomise, output, tmp_path):
    from ia3.tensors import save_adapter

    model = randomise(inject_adapter_in_model(IA3Config(), tiny("t5")))
    assert not any(key.startswith("base_model") for key in get_peft_model_state_dict(model))
    save_adapter(type(model), model.peft_config["default"], get_peft_model_state_dict(model), tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(tiny("t5"), tmp_path)), output(model))


def test_inside_a_compiled_module(tiny):
    model = get_peft_model(tiny("t5"), IA3Config())
    compiled = torch.compile(model)
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == model.get_adapter_state_dict().keys()


def test_loading_for_inference_and_for_training(tiny, saved):
    folder, _ = saved
    model = PeftModel.from_pretrained(tiny("t5").train(), folder)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.peft_config["default"].inference_mode
    model = PeftModel.from_pretrained(tiny("t5").train(), folder, is_trainable=True)
    assert model.training
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for key, _ in model.named_parameters() if ".ia3_l." in key
    }
    assert not model.peft_config["default"].inference_mode


def test_loading_into_an_adapter_that_exists_takes_the_files_values(tiny, saved, output):
    folder, expected = saved
    model = get_peft_model(tiny("t5"), IA3Config())
    model.load_adapter(folder, "default")
    assert torch.equal(output(model), expected)
    assert list(model.peft_config) == ["default"]


def test_loading_into_a_merged_adapter_is_refused(tiny, saved, trace):
    folder, _ = saved
    model = get_peft_model(tiny("t5"), IA3Config())
    model.merge_adapter()
    before = trace(model)
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter\(\)"):
        model.load_adapter(folder, "default")
    assert before.differences(trace(model)) == []


def test_load_adapter_trainable(tiny, saved):
    folder, _ = saved
    model = get_peft_model(tiny("t5"), IA3Config())
    model.load_adapter(folder, "b", is_trainable=True)
    assert all(p.requires_grad for key, p in model.named_parameters() if key.endswith(".b"))
    model.load_adapter(folder, "c")
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.endswith(".c"))
    assert not model.training


def test_a_given_configuration_is_used_and_kept(tiny, saved, output):
    folder, expected = saved
    (folder / CONFIG_NAME).unlink()
    config = IA3Config(**EXPLICIT_T5)
    model = PeftModel.from_pretrained(tiny("t5"), folder, config=config)
    assert torch.equal(output(model), expected)
    assert config.inference_mode is False


@pytest.mark.parametrize("form", ["prefix", "none", "in-model", "in-model with prefix"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_keys_in_every_form(tiny, randomise, output, name, form):
    task = {"gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}[name]
    model = randomise(get_peft_model(tiny(name), IA3Config(task_type=task)))
    tensors = get_peft_model_state_dict(model)
    if form == "none":
        tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    elif form.startswith("in-model"):
        plain = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        prefix = "base_model.model." if form.endswith("prefix") else ""
        tensors = {
            prefix
            + (f"{key}.default" if key.endswith("ia3_l") else key.replace(".", ".modules_to_save.default.")): value
            for key, value in plain.items()
        }
    other = get_peft_model(tiny(name), IA3Config(task_type=task))
    result = set_peft_model_state_dict(other, tensors)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(output(other), output(model))


def test_two_keys_for_one_tensor_are_refused(tiny, trace):
    model = get_peft_model(tiny("t5"), IA3Config())
    tensors = get_peft_model_state_dict(model)
    key = next(iter(tensors))
    tensors[key.removeprefix("base_model.model.")] = tensors[key] * 2
    before = trace(model)
    with pytest.raises(ValueError, match=r"1 tensors come twice.*\(such as .*ia3_l\)"):
        set_peft_model_state_dict(model, tensors)
    assert before.differences(trace(model)) == []


def test_key_mapping(tiny, saved, output):
    folder, expected = saved

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("EncDecAttention", "CrossAttention").replace("wo.ia3_l", "out.ia3_l")] = tensors.pop(
                key
            )

    _rewrite(folder, rename)
    _reconfigure(folder, **EXPLICIT_T5)
    with pytest.raises(ValueError, match=r"unknown.*missing"):
        PeftModel.from_pretrained(tiny("t5"), folder)
    mapping = {r"CrossAttention\.": "EncDecAttention.", r"\.out\.": ".wo."}
    assert torch.equal(output(PeftModel.from_pretrained(tiny("t5"), folder, key_mapping=mapping)), expected)
    model = tiny("t5")
    model._checkpoint_conversion_mapping = mapping
    assert torch.equal(output(PeftModel.from_pretrained(model, folder)), expected)
    other = get_peft_model(tiny("t5"), IA3Config())
    other.load_adapter(folder, "b", key_mapping=mapping)
    other.set_adapter("b")
    assert torch.equal(output(other), expected)


def test_a_fused_projection_whose_queries_were_scaled_keeps_every_channel(tiny, randomise, output, tmp_path):
    theirs = randomise(peft.get_peft_model(tiny("gpt2"), peft.IA3Config(task_type="CAUSAL_LM")))
    theirs.save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-6, atol=1e-6)
    assert all(site.intervals is None for site in model._ia3.adapters["default"].layout.sites)
    assert all(p.requires_grad for key, p in model.named_parameters() if ".ia3_l." in key)
    model.save_pretrained(tmp_path / "ours")
    ours, before = (load_file(tmp_path / name / SAFETENSORS_NAME) for name in ("ours", "theirs"))
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[key], before[key]) for key in ours)


def test_a_fused_projection_whose_queries_are_one_stays_narrow(tiny, randomise, tmp_path):
    model = randomise(get_peft_model(tiny("gpt2"), IA3Config(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    assert again.transformer.h[0].attn.c_attn.ia3_l.default.shape == (32, 1)


# The vocabulary


def _on_disk(model, path) -> str:
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert", "llama"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_resized_vocabulary_travels_with_the_adapter(tiny, randomise, output, tmp_path, name, when):
    base = _on_disk(tiny(name), tmp_path / "base")
    load = type(tiny(name)).from_pretrained
    model = load(base)
    if when == "before":
        model.resize_token_embeddings(70)
    get_peft_model(model, IA3Config(task_type="SEQ_CLS" if name == "bert" else None))
    if when == "after":
        model.resize_token_embeddings(70)
    randomise(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[64:] = 0.1
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / SAFETENSORS_NAME)
    assert any(tensor.shape[0] == 70 for tensor in tensors.values())
    with pytest.raises(ValueError, match=r"\(70, 16\) in the file and \(64, 16\).*resize_token_embeddings"):
        PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    again = load(base)
    again.resize_token_embeddings(70)
    PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(output(again), output(model))


def test_the_embeddings_are_saved_only_where_asked_or_resized(tiny, tmp_path):
    base = _on_disk(tiny("llama"), tmp_path / "base")
    model = get_peft_model(type(tiny("llama")).from_pretrained(base), IA3Config())
    assert not any("embed" in key for key in get_peft_model_state_dict(model))
    asked = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in asked
    model.resize_token_embeddings(70)
    assert any("embed" in key for key in get_peft_model_state_dict(model))
    assert not any("embed" in key for key in get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.mark.parametrize("name", ["", "nobody/nothing", "not a repository's name!", "a/b/c"])
def test_a_base_that_is_not_here_has_no_known_size(tiny, name):
    model = get_peft_model(tiny("llama"), IA3Config())
    model.name_or_path = name
    assert not any("embed" in key for key in get_peft_model_state_dict(model))


# Refusals: each names the thing and the remedy, and leaves the model as it was


def _swap_side(tensors):
    key = next(key for key in tensors if key.endswith("wo.ia3_l"))
    tensors[key] = torch.ones(16, 1)


def _other_width(tensors):
    key = next(key for key in tensors if key.endswith(".k.ia3_l"))
    tensors[key] = torch.ones(20, 1)


def _other_rank(tensors):
    key = next(key for key in tensors if key.endswith(".k.ia3_l"))
    tensors[key] = torch.ones(16)


def _unknown(tensors):
    tensors["base_model.model.encoder.nothing.ia3_l"] = torch.ones(16, 1)


def _unknown_base_weight(tensors):
    tensors["base_model.model.encoder.final_layer_norm.weight"] = torch.ones(16)


def _missing(tensors):
    del tensors[next(iter(tensors))]


def _not_a_number(tensors):
    next(iter(tensors.values())).view(-1)[-1] = torch.nan


def _infinite(tensors):
    next(iter(tensors.values())).view(-1)[-1] = -torch.inf


def _lora(tensors):
    tensors.clear()
    tensors["base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"] = torch.ones(2, 16)


def _empty(tensors):
    tensors.clear()


BROKEN = [
    (_swap_side, r"wo\.ia3_l has the shape \(16, 1\) in the file and \(1, 24\).*output.*input.*feedforward_modules"),
    (_other_width, r"k\.ia3_l has the shape \(20, 1\) in the file and \(16, 1\) in the model.*another base"),
    (_other_rank, r"k\.ia3_l has the shape \(16,\) in the file and \(16, 1\)"),
    (_unknown, r"17 tensors don't fit .*expects 16: 1 unknown \(such as encoder\.nothing\.ia3_l\).*another base"),
    (_unknown_base_weight, r"1 unknown \(such as encoder\.final_layer_norm\.weight\)"),
    (_missing, r"15 tensors don't fit .*expects 16: 1 missing \(such as .*ia3_l\)"),
    (_not_a_number, r"1 tensors hold NaN or infinity .*\(such as .*ia3_l\).*earlier checkpoint"),
    (_infinite, r"NaN or infinity"),
    (_lora, r"1 unknown .*lora_A.*16 missing"),
    (_empty, r"0 tensors don't fit .*16 missing"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_file_that_does_not_fit_is_refused(tiny, saved, trace, change, message):
    folder, _ = saved
    _rewrite(folder, change)
    model = tiny("t5")
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert before.differences(trace(model)) == []
    get_peft_model(model, IA3Config())
    before = trace(model)
    for name in ("new", "default"):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(folder, name)
        assert before.differences(trace(model)) == []
        assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, load_file(folder / SAFETENSORS_NAME))
    assert before.differences(trace(model)) == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("safe", [True, False])
def test_a_truncated_file_is_refused(tiny, saved, trace, share, safe):
    folder, _ = saved
    if not safe:
        torch.save(load_file(folder / SAFETENSORS_NAME), folder / PICKLE_NAME)
        (folder / SAFETENSORS_NAME).unlink()
    path = folder / (SAFETENSORS_NAME if safe else PICKLE_NAME)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    model = tiny("t5")
    before = trace(model)
    with pytest.raises(ValueError, match=rf"{path.name} is truncated or damaged.*copy or download it again"):
        PeftModel.from_pretrained(model, folder)
    assert before.differences(trace(model)) == []


@given(data=st.data())
def test_damaged_bytes_are_refused_or_read_as_tensors(tmp_path_factory, data):
    """Whatever the bytes, nothing but a ValueError about the file."""
    tensors = {"base_model.model.a.ia3_l": torch.ones(4, 1), "base_model.model.b.ia3_l": torch.ones(1, 4)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    name = data.draw(st.sampled_from([SAFETENSORS_NAME, PICKLE_NAME]))
    content = bytearray(save(tensors) if name == SAFETENSORS_NAME else buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_bytes(bytes(content[: cut if data.draw(st.booleans()) else None]))
    try:
        loaded = load_peft_weights(folder)
    except ValueError as error:
        if str(folder / name) not in str(error):
            raise AssertionError("the message doesn't name the file") from error
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())


class _Sentinel:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(tiny, saved, tmp_path, trace, writer):
    folder, _ = saved
    tensors = load_file(folder / SAFETENSORS_NAME)
    (folder / SAFETENSORS_NAME).unlink()
    sentinel = tmp_path / "sentinel"
    writer({**tensors, "x": _Sentinel(sentinel)}, folder / PICKLE_NAME)
    model = tiny("t5")
    before = trace(model)
    with pytest.raises(ValueError, match=rf"{PICKLE_NAME} is a pickle that .*could run code.*safetensors"):
        PeftModel.from_pretrained(model, folder)
    assert not sentinel.exists()
    assert before.differences(trace(model)) == []


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": 1}, {1: torch.ones(2)}])
def test_a_pickle_of_something_else_is_refused(saved, content):
    folder, _ = saved
    (folder / SAFETENSORS_NAME).unlink()
    torch.save(content, folder / PICKLE_NAME)
    with pytest.raises(ValueError, match=rf"{PICKLE_NAME} holds no dictionary of tensors"):
        load_peft_weights(folder)


def test_safetensors_is_preferred_to_a_pickle(saved, tmp_path):
    folder, _ = saved
    torch.save({"a": _Sentinel(tmp_path / "sentinel")}, folder / PICKLE_NAME)
    assert len(load_peft_weights(folder)) == 16


def test_no_file_at_all(tiny, saved):
    folder, _ = saved
    (folder / SAFETENSORS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=rf"No {SAFETENSORS_NAME} or {PICKLE_NAME} in .*adapter"):
        PeftModel.from_pretrained(tiny("t5"), folder)
    with pytest.raises(FileNotFoundError, match=r"in .*/sub\."):
        load_peft_weights(folder, subfolder="sub")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LORA", "r": 8}, r"describes a 'LORA' adapter"),
        ({"layers_to_transform": [0]}, r"[0-9]+ unknown"),
        ({"target_modules": ["nothing"], "feedforward_modules": []}, r"\{'nothing'\} matches no module"),
        ({"feedforward_modules": []}, r"wo\.ia3_l has the shape \(1, 24\) in the file and \(16, 1\).*feedforward"),
        ({"target_modules": ["k", "v"], "feedforward_modules": []}, r"4 unknown .*wo\.ia3_l"),
        ({"task_type": "STRANGE"}, r"Unknown task_type 'STRANGE'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tiny, saved, trace, fields, message):
    folder, _ = saved
    _reconfigure(folder, **fields)
    model = tiny("t5")
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert before.differences(trace(model)) == []


def test_an_inert_unknown_field_is_ignored(tiny, saved, output):
    folder, expected = saved
    _reconfigure(folder, layers_to_transform=None, something=[])
    assert torch.equal(output(PeftModel.from_pretrained(tiny("t5"), folder)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_ff": 32}, r"wo\.ia3_l has the shape \(1, 24\) in the file and \(1, 32\)"),
        ({"num_layers": 3}, r"\d+ missing"),
        ({"num_layers": 1}, r"\d+ unknown"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tiny, saved, trace, change, message):
    model = tiny("t5", **change)
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, saved[0])
    assert before.differences(trace(model)) == []


def test_another_base_of_the_same_shape_is_said(tiny, saved, caplog):
    folder, _ = saved
    _reconfigure(folder, base_model_name_or_path="org/one")
    model = tiny("t5")
    model.name_or_path = "/somewhere/two"
    PeftModel.from_pretrained(model, folder)
    assert "made for the base model 'org/one'; this one is '/somewhere/two'" in caplog.text
    caplog.clear()
    model = tiny("t5")
    model.name_or_path = "/somewhere/one"
    PeftModel.from_pretrained(model, folder)
    assert caplog.text == ""


def test_mismatched_sizes_are_left_out_where_asked(tiny, saved, caplog):
    folder, _ = saved
    values = load_file(folder / SAFETENSORS_NAME)
    _rewrite(folder, _other_width)
    model = PeftModel.from_pretrained(tiny("t5"), folder, ignore_mismatched_sizes=True)
    assert re.search(r"Left out: .*k\.ia3_l has the shape \(20, 1\)", caplog.text)
    left_out = next(key for key in values if key.endswith(".k.ia3_l"))
    for key, value in model.get_adapter_state_dict().items():
        assert torch.equal(value, torch.ones(16, 1) if key == left_out else values[key])
    caplog.clear()
    other = get_peft_model(tiny("t5"), IA3Config())
    other.load_adapter(folder, "b", ignore_mismatched_sizes=True)
    assert "Left out" in caplog.text


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16])
def test_a_value_that_overflows_the_vectors_precision_is_refused(tiny, saved, trace, base):
    folder, _ = saved
    _rewrite(folder, lambda tensors: next(iter(tensors.values())).fill_(3.4e38))
    model = tiny("t5", dtype=base)
    before = trace(model)
    with pytest.raises(ValueError, match="NaN or infinity"):
        PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    assert before.differences(trace(model)) == []


def test_wrong_arguments_are_refused(tiny, saved):
    folder, _ = saved
    with pytest.raises(TypeError, match=r"takes the base model first, got PosixPath.*AutoPeftModelFor"):
        PeftModel.from_pretrained(folder, tiny("t5"))
    with pytest.raises(TypeError, match=r"Unknown arguments \['device'\]"):
        PeftModel.from_pretrained(tiny("t5"), folder, device="cpu")
    with pytest.raises(ValueError, match="ephemeral_gpu_offload is not supported"):
        PeftModel.from_pretrained(tiny("t5"), folder, ephemeral_gpu_offload=True)
    model = PeftModel.from_pretrained(tiny("t5"), folder, torch_device="cpu", revision=None, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"use model\.load_adapter\(path, name\)"):
        PeftModel.from_pretrained(model, folder)
    with pytest.raises(ValueError, match="ephemeral_gpu_offload"):
        model.load_adapter(folder, "b", ephemeral_gpu_offload=True)


# Atomicity


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_files_whole(tiny, randomise, saved, monkeypatch, step):
    folder, _ = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = randomise(get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM")), seed=9)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert model.peft_config["default"].inference_mode is False


def test_a_trainers_checkpoint_has_the_adapters_alone_beside(tiny, randomise, output, tmp_path):
    model = randomise(get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS")))
    folder = tmp_path / "checkpoint-10"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert all(".ia3_l." in key or ".modules_to_save." in key for key in tensors)
    other = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"))
    result = other.load_state_dict(tensors, strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(output(other), output(model))
    del tensors[next(iter(tensors))]
    assert len(other.load_state_dict(tensors, strict=False).missing_keys) == 1
    assert len(other.load_state_dict({"bert.x": torch.ones(1)}, strict=False).missing_keys) > 1
    model.save_pretrained(tmp_path / "checkpoint-best")
    assert not (tmp_path / "checkpoint-best" / "model.safetensors").exists()


def test_uploading(tiny, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            self.token = token

        def create_repo(self, repo_id, **arguments):
            calls.append(("create", repo_id, arguments))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **arguments):
            files = sorted(path.name for path in Path(arguments.pop("folder_path")).iterdir())
            calls.append(("upload", files, arguments))
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = get_peft_model(tiny("t5"), IA3Config())
    assert model.push_to_hub("x", private=True, commit_message="m") == "done"
    assert calls[0] == ("create", "x", {"private": True, "exist_ok": True})
    assert calls[1][1] == ["README.md", CONFIG_NAME, SAFETENSORS_NAME]
    assert calls[1][2] == {
        "repo_id": "me/x",
        "commit_message": "m",
        "revision": None,
        "create_pr": False,
        "commit_description": None,
    }


def test_loading_from_the_hub_passes_its_arguments_on(tiny, saved, output, monkeypatch):
    folder, expected = saved
    seen = []

    def download(repository, filename, **arguments):
        seen.append((repository, filename, arguments))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = PeftModel.from_pretrained(tiny("t5"), "some/repo", revision="r", token="t", subfolder="s")
    assert torch.equal(output(model), expected)
    arguments = {"revision": "r", "token": "t", "subfolder": "s"}
    assert seen == [("some/repo", file, arguments) for file in (CONFIG_NAME, SAFETENSORS_NAME)]


def test_parameters_keep_their_identity_when_values_are_loaded(tiny, saved):
    """An optimizer made before loading goes on with the same parameters."""
    folder, _ = saved
    model = get_peft_model(tiny("t5"), IA3Config())
    before = [id(parameter) for parameter in model.parameters()]
    model.load_adapter(folder, "default", is_trainable=True)
    assert [id(parameter) for parameter in model.parameters()] == before
    assert isinstance(next(model.parameters()), nn.Parameter)


# A base without memory


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_an_adapter_on_a_base_without_memory_keeps_its_numbers(
    tiny, randomise, output, tmp_path, family, task, low_cpu_mem_usage
):
    model = randomise(get_peft_model(tiny(family), IA3Config(task_type=task))).eval()
    expected = output(model)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = tiny(family)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    own = {
        name: tensor for name, tensor in loaded.named_parameters() if ".ia3_l." in name or ".modules_to_save." in name
    }
    assert not any(tensor.is_meta for tensor in own.values())
    loaded.to_empty(device="cpu")
    whole = tiny(family)
    loaded.load_state_dict(whole.state_dict(), strict=False)
    for name, buffer in whole.named_buffers():
        loaded.get_buffer(name).copy_(buffer)
    assert torch.equal(output(loaded.eval()), expected)


def test_a_new_adapter_on_a_base_without_memory_begins_at_one(tiny, output):
    with torch.device("meta"):
        base = tiny("gpt2")
    model = get_peft_model(base, IA3Config())
    model.to_empty(device="cpu")
    model.load_state_dict(tiny("gpt2").state_dict(), strict=False)
    assert torch.equal(output(model.eval()), output(tiny("gpt2")))


def test_embeddings_in_a_file_need_a_base_with_memory(tiny, tmp_path):
    get_peft_model(tiny("llama"), IA3Config()).save_pretrained(tmp_path, save_embedding_layers=True)
    with torch.device("meta"):
        base = tiny("llama")
    with pytest.raises(ValueError, match="no memory for it: load the base's weights first"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_loading_that_is_stopped_in_the_middle_changes_nothing(tiny, randomise, trace, error):
    config = IA3Config(task_type="SEQ_CLS")
    model = randomise(get_peft_model(tiny("bert"), config))
    other = randomise(get_peft_model(tiny("bert"), config), seed=5)
    tensors, before = get_peft_model_state_dict(other), trace(model)
    for place in itertools.count(1):
        try:
            with Failing(place, error):
                set_peft_model_state_dict(model, tensors)
            break
        except error:
            assert before.differences(trace(model)) == [], place
    assert place > 10
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in get_peft_model_state_dict(model).items())
