"""Adapters registered from disk give each example what it would get alone under the adapter attached."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ia3.registered
import ia3.table
from ia3 import AdapterTable, IA3Config, PeftModel, get_peft_model, rows

TASKS = {"t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
# One has fewer sites than the others, one multiplies the other side of some modules.
CONTENTS = ["a", "b", "narrow", "turned"]


def config_of(model, content, task):
    if content in ("a", "b"):
        return IA3Config(task_type=task)
    found = ia3.find_sites(model, IA3Config(task_type=task))
    first, *_, last = [site.path.rsplit(".", 1)[-1] for site in found.layout.sites]
    if content == "narrow":
        return IA3Config(task_type=task, target_modules=[first], feedforward_modules=[])
    return IA3Config(task_type=task, target_modules=[first, last], feedforward_modules=[first])


@pytest.fixture(scope="module")
def saved(tiny, randomise, tmp_path_factory):
    """`saved(family)`: a folder with an adapter under each content's name."""
    folders: dict[str, Path] = {}

    def save(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            for seed, content in enumerate(CONTENTS):
                model = tiny(family)
                model = get_peft_model(model, config_of(model, content, TASKS[family]))
                randomise(model, seed).save_pretrained(folders[family] / content)
        return folders[family]

    return save


def batch_of(model, count, length=6, seed=3):
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 30, (count, length), generator=chance)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : row % 3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(2, 30, (count, 3), generator=chance)
    return batch


def one(batch, row):
    return {key: tensor[row : row + 1] for key, tensor in batch.items()}


def attached(tiny, family, folder):
    """A model with each adapter attached the ordinary way, and the bare one under "__base__"."""
    loaded = {c: PeftModel.from_pretrained(tiny(family), folder / c) for c in CONTENTS}
    return {**loaded, "__base__": tiny(family)}


def table_of(model, folder, contents=CONTENTS, **options):
    table = AdapterTable(model, **options)
    for content in contents:
        table.register(content, folder / content)
    return table


@pytest.mark.parametrize("family", TASKS)
@torch.no_grad()
def test_each_example_is_as_alone(tiny, saved, family):
    alone = attached(tiny, family, saved(family))
    model = tiny(family)
    names = ["b", "a", "__base__", "narrow", "b", "turned", "a"]
    batch = batch_of(model, len(names))
    bare = model(**batch).logits
    table_of(model, saved(family))
    assert torch.equal(model(**batch).logits, bare)
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone[name](**one(batch, row)).logits, rtol=1e-4, atol=1e-5)
        assert (name == "__base__") == torch.allclose(mixed[row], bare[row], atol=1e-5)
    assert torch.equal(model(**batch).logits, bare)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generated_tokens_are_those_of_the_examples_alone(tiny, saved, family, how):
    alone = attached(tiny, family, saved(family))
    model = tiny(family)
    names = ["narrow", "b", "__base__", "a", "turned"]
    batch = batch_of(model, len(names))
    batch.pop("decoder_input_ids", None)
    more = {"max_new_tokens": 5, "min_new_tokens": 5, **how}
    table_of(model, saved(family))
    mixed = model.generate(**batch, **more, adapter_names=names)
    count = how.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        expected = alone[name].generate(**one(batch, row), **more)
        assert torch.equal(mixed[count * row : count * (row + 1), : expected.shape[1]], expected), name


@torch.no_grad()
def test_any_history_of_orders_evictions_and_replacements(tiny, saved):
    folder, names = saved("t5"), ["x", "y", "z"]
    alone = attached(tiny, "t5", folder)
    batch = batch_of(alone["a"], 3)
    expected = {content: model(**batch).logits for content, model in alone.items()}
    registering = st.tuples(st.sampled_from(names), st.sampled_from([*CONTENTS, None]))
    asking = st.lists(st.sampled_from([*names, "__base__"]), min_size=3, max_size=3)

    @settings(deadline=None, max_examples=25)
    @given(history=st.lists(registering | asking, max_size=12))
    def check(history):
        model = tiny("t5")
        table = AdapterTable(model, capacity=2)
        held = {"__base__": "__base__"}
        for event in history:
            if isinstance(event, list):
                known = [name if name in held else "__base__" for name in event]
                if len(set(known) - {"__base__"}) > 2:
                    with pytest.raises(ValueError, match="uses 3 adapters of the table, whose capacity is 2"):
                        model(**batch, adapter_names=known)
                    continue
                mixed = model(**batch, adapter_names=known).logits
                for row, name in enumerate(known):
                    torch.testing.assert_close(mixed[row], expected[held[name]][row], rtol=1e-4, atol=1e-5)
            elif event[1] is not None:
                table.register(event[0], folder / event[1])
                held[event[0]] = event[1]
            elif event[0] in held:
                table.drop(event[0])
                del held[event[0]]
        assert set(table) == set(held) - {"__base__"}

    check()


@torch.no_grad()
def test_the_one_used_longest_ago_makes_room(tiny, saved):
    model = tiny("t5")
    table = table_of(model, saved("t5"), ["a", "b", "narrow"], capacity=2)
    filled = []
    fill, table._fill_slot = table._fill_slot, lambda rows, adapter: (filled.append(adapter), fill(rows, adapter))
    by_name = {id(adapter): name for name, adapter in table._registered.items()}
    for names in (["a", "b"], ["a", "a"], ["narrow", "a"], ["a", "narrow"], ["b", "narrow"]):
        model(**batch_of(model, 2), adapter_names=names)
    assert [by_name[id(adapter)] for adapter in filled] == ["a", "b", "narrow", "b"]
    assert {by_name[id(adapter)] for adapter in table._slots} == {"narrow", "b"}
    table.register("narrow", saved("t5") / "a")  # what is replaced or dropped leaves the device at once
    assert {by_name[id(adapter)] for adapter in table._slots} == {"b"}
    table.drop("b")
    assert not table._slots
    assert len(table._free) == 2


@torch.no_grad()
def test_attached_and_registered_ones_share_a_batch(tiny, randomise, saved):
    alone = attached(tiny, "t5", saved("t5"))
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"), adapter_name="own")
    randomise(model, 9).eval()
    names = ["b", "own", "turned", "__base__", "own", "narrow"]
    batch = batch_of(model, len(names))
    own = model(**batch).logits
    table = table_of(model, saved("t5"), ["b", "turned", "narrow"])
    assert torch.equal(model(**batch).logits, own)
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = own[row : row + 1] if name == "own" else alone[name](**one(batch, row)).logits
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    table.close()
    assert torch.equal(model(**batch).logits, own)
    with pytest.raises(ValueError, match="Unknown adapter_names"):
        model(**batch, adapter_names=names)


def test_gradients_of_attached_ones_beside_registered_ones(tiny, randomise, saved):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"), adapter_name="own")
    randomise(model, 9)
    table_of(model, saved("t5"), ["b"])
    batch = batch_of(model, 2)
    vectors = [p for p in model.parameters() if p.requires_grad]
    mixed = torch.autograd.grad(model(**batch, adapter_names=["b", "own"]).logits[1].square().sum(), vectors)
    plain = torch.autograd.grad(model(**one(batch, 1)).logits.square().sum(), vectors)
    for vector, expected in zip(mixed, plain, strict=True):
        torch.testing.assert_close(vector, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_thousand(tiny, saved, tmp_path):
    model = tiny("t5")
    source = load_file(saved("t5") / "a" / "adapter_model.safetensors")
    config = (saved("t5") / "a" / "adapter_config.json").read_text()
    table = AdapterTable(model, capacity=8)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ia3.registered, "find_sites", lambda *a, **k: calls.append(a) or ia3.find_sites(*a, **k))
        for number in range(1000):
            folder = tmp_path / "same"
            folder.mkdir(exist_ok=True)
            scaled = {key: tensor * (1 + number / 1000) for key, tensor in source.items()}
            save_file(scaled, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / "adapter_config.json").write_text(config)
            table.register(f"customer-{number:03d}", folder)
    assert len(table) == 1000
    assert len(calls) == 1  # the header and the configuration are the same each time
    held = sum(adapter.numbers.untyped_storage().nbytes() for adapter in table._registered.values())
    assert held == 1000 * sum(tensor.nbytes for tensor in source.values())
    batch = batch_of(model, 3)
    names = [f"customer-{number:03d}" for number in (7, 500, 999)]
    mixed = model(**batch, adapter_names=names).logits
    other = PeftModel.from_pretrained(tiny("t5"), tmp_path / "same")  # the last one's
    torch.testing.assert_close(mixed[2:], other(**one(batch, 2)).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], other(**one(batch, 1)).logits[0], atol=1e-3)
    said = r"Unknown adapter_names \['customer-99'\]: this model has 1000 adapters, the nearest \['customer-99\d', "
    with pytest.raises(ValueError, match=said) as raised:
        model(**batch, adapter_names=["customer-99", *names[1:]])
    assert len(str(raised.value)) < 300


@torch.no_grad()
def test_sites_may_come_later(tiny, saved):
    alone = attached(tiny, "llama", saved("llama"))
    model = tiny("llama")
    table = AdapterTable(model)
    batch = batch_of(model, 3)
    for known in (["narrow"], ["narrow", "turned"], ["narrow", "turned", "a"]):
        table.register(known[-1], saved("llama") / known[-1])
        names = (known * 3)[:3]
        mixed = model(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(
                mixed[row : row + 1], alone[name](**one(batch, row)).logits, rtol=1e-4, atol=1e-5
            )


def test_the_same_content_changes_nothing(tiny, saved):
    model = tiny("t5")
    table = AdapterTable(model)
    first = table.register("x", saved("t5") / "a")
    held = table._registered["x"]
    assert table.register("x", saved("t5") / "a") == first
    assert table._registered["x"] is held
    assert table.register("y", saved("t5") / "a") == first
    assert table.register("x", saved("t5") / "b") != first
    assert table._registered["x"] is not held


# Files


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


def half(tensors, keys):
    tensors.update({key: tensor.half() for key, tensor in tensors.items()})


def without_prefix(tensors, keys):
    for key in keys:
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def as_pickle(folder):
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


@pytest.mark.parametrize(
    "change", [as_pickle, lambda folder: rewrite(folder, half), lambda folder: rewrite(folder, without_prefix)]
)
@torch.no_grad()
def test_files_of_other_kinds(tiny, saved, tmp_path, change):
    folder = copied(saved("t5") / "a", tmp_path)
    change(folder)
    expected = PeftModel.from_pretrained(tiny("t5"), folder)
    model = tiny("t5")
    table = AdapterTable(model)
    table.register("b", saved("t5") / "b")
    table.register("x", folder)
    batch = batch_of(model, 2)
    mixed = model(**batch, adapter_names=["x", "x"]).logits
    torch.testing.assert_close(mixed, expected(**batch).logits, rtol=1e-4, atol=1e-5)


def copied(source, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def drop_key(tensors, keys):
    del tensors[keys[3]]


def unknown_key(tensors, keys):
    tensors["base_model.model.encoder.block.7.layer.0.SelfAttention.k.ia3_l"] = tensors[keys[0]].clone()


def twice(tensors, keys):
    tensors[keys[0].removeprefix("base_model.model.")] = tensors[keys[0]].clone()


def other_side(tensors, keys):
    tensors[keys[0]] = tensors[keys[0]].T.contiguous()


def other_width(tensors, keys):
    tensors[keys[0]] = torch.ones(5, 1)


def nan(tensors, keys):
    tensors[keys[2]][1] = float("nan")


def infinite(tensors, keys):
    tensors[keys[2]][1] = float("-inf")


def change_config(**fields):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def cut(name, at):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:at])


def no(name):
    return lambda folder: (folder / name).unlink()


BROKEN = {
    **{f.__name__: f for f in (drop_key, unknown_key, twice, other_side, other_width, nan, infinite)},
    "unknown field": change_config(alpha=3),
    "another method": change_config(peft_type="LORA"),
    "no such module": change_config(target_modules=["q_proj"], feedforward_modules=[]),
    "the other side": change_config(feedforward_modules=["k"]),
    "a bad task": change_config(task_type="POETRY"),
    "cut JSON": cut("adapter_config.json", 40),
    "no configuration": no("adapter_config.json"),
    "no tensors": no("adapter_model.safetensors"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_loading_refuses_is_refused_with_the_same_words(tiny, saved, tmp_path, what):
    folder = copied(saved("t5") / "a", tmp_path)
    broken = BROKEN[what]
    rewrite(folder, broken) if what == broken.__name__ else broken(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as expected:
        PeftModel.from_pretrained(tiny("t5"), folder)
    model = tiny("t5")
    table = AdapterTable(model)
    table.register("x", saved("t5") / "a")  # so that the file's header may be a known one
    before, layout = dict(table._registered), table.layout
    for name in ("x", "new"):
        with pytest.raises(type(expected.value)) as raised:
            table.register(name, folder)
        assert str(raised.value) == str(expected.value)
    assert table._registered == before
    assert table.layout == layout


@pytest.mark.parametrize("at", [0, 5, 100, -1, -4])
def test_truncated_files(tiny, saved, tmp_path, at):
    folder = copied(saved("t5") / "a", tmp_path)
    cut("adapter_model.safetensors", at)(folder)
    table = AdapterTable(tiny("t5"))
    table.register("x", saved("t5") / "a")
    with pytest.raises(ValueError, match="is truncated or damaged"):
        table.register("y", folder)
    assert "y" not in table


def test_a_folder_that_is_not_there(tiny, tmp_path):
    table = AdapterTable(tiny("t5"))
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: expected an adapter saved"):
        table.register("x", tmp_path / "nowhere")


def test_modules_in_full_are_refused(tiny, saved, tmp_path):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "head")
    embedded = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"))
    embedded.save_pretrained(tmp_path / "embeddings", save_embedding_layers=True)
    table = AdapterTable(tiny("t5"))
    for name, held in (("head", r"lm_head"), ("embeddings", r"shared\.weight")):
        with pytest.raises(ValueError, match=rf"in full \(.*{held}.*\), .* attach it as an ordinary adapter"):
            table.register(name, tmp_path / name)


# Names


def test_names(tiny, saved, randomise):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"), adapter_name="own")
    table = AdapterTable(model)
    table.register("team/x.1", saved("t5") / "a")
    assert "team/x.1" in table
    assert list(table) == ["team/x.1"]
    table.register("x", saved("t5") / "a")
    with pytest.raises(ValueError, match="carries an attached adapter 'own': register under another name"):
        table.register("own", saved("t5") / "a")
    with pytest.raises(ValueError, match="The model's AdapterTable has an adapter 'x'"):
        model.add_adapter("x", IA3Config(task_type="SEQ_2_SEQ_LM"))
    for name in ("", "__base__", None, 3):
        with pytest.raises(ValueError, match="can't name an adapter"):
            table.register(name, saved("t5") / "a")
    with pytest.raises(ValueError, match=r"Unknown adapter_names \['z'\]"):
        table.drop("z")
    batch = batch_of(model, 2)
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=r"Unknown adapter_names \['z'\]: this model has \['own', 'team/x.1', 'x'\]"
        ):
            call(**batch, adapter_names=["z", "x"])
        with pytest.raises(ValueError, match="for 2 examples: pass a list with one name an example"):
            call(**batch, adapter_names=["x"])
    assert not rows.act_here()


def test_a_model_with_a_table_alone_has_no_active_adapter(tiny):
    model = tiny("t5")
    AdapterTable(model)
    assert model.active_adapters == []
    for call in (model.get_adapter_state_dict, lambda: model.active_peft_config):
        with pytest.raises(ValueError, match="No adapter is active"):
            call()
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"carries a table: use add_adapter"):
        get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))


def test_a_table_is_one_of_its_kind(tiny, saved):
    model = tiny("t5")
    table = AdapterTable(model)
    with pytest.raises(ValueError, match="has an AdapterTable already"):
        AdapterTable(model)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"close\(\) the table"):
            copying(model)
    table.close()
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.register("x", saved("t5") / "a")
    with pytest.raises(ValueError, match="capacity is 0"):
        AdapterTable(model, capacity=0)
    AdapterTable(model).register("x", saved("t5") / "a")
    injected = tiny("t5")
    ia3.inject_adapter_in_model(IA3Config(task_type="SEQ_2_SEQ_LM"), injected)
    with pytest.raises(ValueError, match="inject_adapter_in_model"):
        AdapterTable(injected)


# Coming and going


@pytest.mark.parametrize("end", ["close", "unload"])
@torch.no_grad()
def test_no_trace_is_left(tiny, saved, trace, end):
    model = tiny("llama")
    before = trace(model)
    table = table_of(model, saved("llama"))
    model(**batch_of(model, 2), adapter_names=["a", "turned"])
    assert trace(model).differences(before)
    table.close() if end == "close" else model.unload()
    assert not trace(model).differences(before)
    assert not hasattr(model, "peft_config")


@torch.no_grad()
def test_closing_leaves_attached_adapters_as_they_were(tiny, saved, trace, randomise):
    model = get_peft_model(tiny("llama"), IA3Config(task_type="CAUSAL_LM"), adapter_name="own")
    randomise(model)
    before = trace(model)
    table = table_of(model, saved("llama"))
    model(**batch_of(model, 2), adapter_names=["a", "own"])
    table.close()
    assert not trace(model).differences(before)


@torch.no_grad()
def test_attaching_and_detaching_beside_a_table(tiny, saved, randomise):
    alone = attached(tiny, "t5", saved("t5"))
    model = tiny("t5")
    table = table_of(model, saved("t5"), ["a"])
    batch = batch_of(model, 2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.add_adapter("own", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("own")
    randomise(model)
    assert not torch.allclose(model(**batch).logits, alone["__base__"](**batch).logits, atol=1e-3)
    model.delete_adapter("own")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, alone["__base__"](**batch).logits)
    mixed = model(**batch, adapter_names=["a", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], alone["a"](**one(batch, 0)).logits, rtol=1e-4, atol=1e-5)
    table.close()
    assert not isinstance(model, PeftModel)


def test_a_table_made_in_inference_mode_serves_training_mode(tiny, saved):
    model = tiny("t5")
    batch = batch_of(model, 2)
    with torch.inference_mode():
        table = table_of(model, saved("t5"), capacity=1)
        first = model(**batch, adapter_names=["a", "__base__"]).logits.clone()
    model(**batch, adapter_names=["b", "b"]).logits.sum().backward()  # the base's own parameters, as without a table
    assert table.capacity == 1
    with torch.inference_mode():
        again = model(**batch, adapter_names=["a", "__base__"]).logits
        torch.testing.assert_close(again, first)


@torch.no_grad()
def test_a_half_precision_model(tiny, saved):
    alone = PeftModel.from_pretrained(tiny("t5", dtype=torch.bfloat16), saved("t5") / "a")
    model = tiny("t5", dtype=torch.bfloat16)
    table_of(model, saved("t5"), ["a"])
    batch = batch_of(model, 2)
    assert torch.equal(model(**batch, adapter_names=["a", "a"]).logits, alone(**batch).logits)


# Threads


@torch.no_grad()
def test_threads_register_drop_and_run_at_once(tiny, saved):
    """A batch sees one content a name, whole, whatever the others do meanwhile."""
    folder = saved("t5")
    alone = attached(tiny, "t5", folder)
    batch = {key: tensor[:1].repeat(4, 1) for key, tensor in batch_of(alone["a"], 1).items()}
    expected = {content: model(**one(batch, 0)).logits[0] for content, model in alone.items()}
    model = tiny("t5")
    table = AdapterTable(model, capacity=2)
    table.register("steady", folder / "a")
    table.register("changing", folder / "a")
    stop, wrong, seen = threading.Event(), [], set()

    def content_of(logits):
        fits = [c for c, e in expected.items() if torch.allclose(logits, e, rtol=1e-4, atol=1e-5)]
        return fits[0] if fits else None

    @torch.no_grad()
    def run():
        for _ in range(40):
            mixed = model(**batch, adapter_names=["changing", "steady", "__base__", "changing"]).logits
            found = [content_of(row) for row in mixed]
            seen.add(found[0])
            if found[0] not in ("a", "b", "narrow") or found[0] != found[3] or found[1:3] != ["a", "__base__"]:
                wrong.append(found)

    def change(name):
        while not stop.is_set():
            for content in ("b", "narrow", "a"):
                table.register(name, folder / content)
            if name != "changing":
                table.drop(name)

    def work(call, *args):
        try:
            call(*args)
        except BaseException as error:  # the thread's error is told in the test's
            wrong.append(error)

    runners = [threading.Thread(target=work, args=(run,)) for _ in range(2)]
    changers = [threading.Thread(target=work, args=(change, name)) for name in ("changing", "p", "q")]
    for thread in (*runners, *changers):
        thread.start()
    for thread in runners:
        thread.join()
    stop.set()
    for thread in changers:
        thread.join()
    assert not wrong, wrong[:3]
    assert len(seen) > 1
    assert not rows.act_here()
    assert set(table) == {"steady", "changing"}


@pytest.mark.parametrize("family", TASKS)
def test_vectors_read_against_a_base_without_memory_are_those_of_the_attached_adapter(family, tiny, saved):
    with torch.device("meta"):
        bare = type(tiny(family))(tiny(family).config)
    for content in CONTENTS:
        digest, vectors = ia3.table.read_vectors(bare, saved(family) / content)
        adapted = PeftModel.from_pretrained(tiny(family), saved(family) / content)
        expected = ia3.get_peft_model_state_dict(adapted)
        assert {f"base_model.model.{site.key}" for site in vectors} == set(expected)
        for site, vector in vectors.items():
            assert torch.equal(vector, expected[f"base_model.model.{site.key}"].reshape(-1))
        assert digest == AdapterTable(tiny(family)).register("x", saved(family) / content)


def test_vectors_of_another_base_are_not_read(tiny, saved):
    with pytest.raises(ValueError, match="doesn't fit"):
        ia3.table.read_vectors(tiny("llama", intermediate_size=40), saved("llama") / "a")
