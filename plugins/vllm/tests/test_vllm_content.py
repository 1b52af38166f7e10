"""What an adapter's name stands for is what its files held when they were read, whatever happens to them later."""

from __future__ import annotations

import gc
import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ia3_vllm import content
from ia3_vllm.content import Contents, is_ours, number_of


def write(folder, value=1.0, peft_type="IA3"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    save_file({"base_model.model.k.ia3_l": torch.full((4, 1), value)}, folder / "adapter_model.safetensors")
    return folder


def value_in(copy):
    return load_file(copy / "adapter_model.safetensors")["base_model.model.k.ia3_l"][0].item()


def test_a_copy_outlives_what_happens_to_the_files(tmp_path):
    contents = Contents()
    first = contents.keep(write(tmp_path / "a", 1.0))
    second = contents.keep(write(tmp_path / "a", 2.0))
    assert first != second
    assert (value_in(first), value_in(second)) == (1.0, 2.0)
    assert number_of(first) != number_of(second)
    for copy in (first, second):
        assert 1 << 60 <= number_of(copy) < 1 << 63


def test_the_same_content_is_one_copy_wherever_it_lies(tmp_path):
    contents = Contents()
    assert contents.keep(write(tmp_path / "a")) == contents.keep(write(tmp_path / "b"))
    assert len(list(contents.root.iterdir())) == 1


def test_another_configuration_is_another_content(tmp_path):
    contents = Contents()
    first = contents.keep(write(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["k"]}))
    assert contents.keep(tmp_path / "a") != first


def test_copies_go_with_their_owner(tmp_path):
    contents = Contents()
    root = contents.keep(write(tmp_path / "a")).parent
    del contents
    gc.collect()
    assert not root.exists()


def test_files_replaced_while_they_are_read_give_one_or_the_other(tmp_path):
    folder, done = write(tmp_path / "a", 1.0), threading.Event()

    def replace():
        value = 1.0
        while not done.is_set():
            value = 3.0 - value
            write(tmp_path / "new", value)
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (tmp_path / "new" / name).replace(folder / name)
            done.wait(0.02)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        contents, seen, until = Contents(), set(), time.monotonic() + 60
        while seen != {1.0, 2.0} and time.monotonic() < until:
            seen.add(value_in(contents.keep(folder)))
    finally:
        done.set()
        writer.join()
    assert seen == {1.0, 2.0}


def test_files_that_never_rest_are_an_error(tmp_path, monkeypatch):
    folder = write(tmp_path / "a")
    states = iter(range(10**6))
    monkeypatch.setattr(content, "_state", lambda path: (next(states),))
    monkeypatch.setattr(content.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="changed 20 times"):
        Contents().keep(folder)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named_and_a_pickle_is_no_substitute(tmp_path, missing):
    folder = write(tmp_path / "a")
    torch.save({"k": torch.ones(1)}, folder / "adapter_model.bin")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"No {missing}.*pickle"):
        Contents().keep(folder)


@pytest.mark.parametrize(("peft_type", "ours"), [("IA3", True), ("LORA", False), (None, False), ("PREFIX", True)])
def test_lora_is_left_to_the_engine_and_other_methods_are_not(tmp_path, peft_type, ours):
    assert is_ours(write(tmp_path / "a", peft_type=peft_type)) is ours


@pytest.mark.parametrize("text", ["", "[]", "{", '"IA3"'])
def test_what_is_no_configuration_is_left_to_the_engine(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    assert not is_ours(tmp_path)
    assert not is_ours(tmp_path / "nowhere")
