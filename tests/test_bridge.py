"""`as_peft_model`: PEFT's class around an adapted model, against what transformers, accelerate and PEFT call on it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate.utils import is_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import unwrap_peft_model

import ia3
from builders import CAUSAL, SEQ2SEQ, adapted, gpt2, llama, randomise, seq2seq_batch, t5
from ia3 import IA3Config, PeftModel, as_peft_model, get_peft_model
from ia3.bridge import _Bridge

# Only methods that add tokens have these, and `prepare_model_for_gradient_checkpointing`, which works on any model.
LEFT_TO_PEFT = {"get_prompt", "get_prompt_embedding_to_save", "prepare_model_for_gradient_checkpointing"}


@pytest.fixture
def model():
    return adapted(llama(), **CAUSAL)


def vectors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "ia3_l" in name}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What it is


@pytest.mark.parametrize(
    ("build", "config", "cls"),
    [
        (llama, CAUSAL, peft.PeftModelForCausalLM),
        (gpt2, CAUSAL, peft.PeftModelForCausalLM),
        (t5, SEQ2SEQ, peft.PeftModelForSeq2SeqLM),
        (llama, {"target_modules": ["k_proj"]}, peft.PeftModel),
    ],
)
def test_peft_and_those_who_ask_for_it_take_it_for_their_own(build, config, cls):
    model = adapted(build(), **config)
    bridge = as_peft_model(model)
    assert isinstance(bridge, cls)
    assert type(bridge).__name__ == cls.__name__
    assert is_peft_model(bridge)
    assert unwrap_peft_model(bridge) is bridge.base_model.model is bridge.get_base_model() is model
    assert as_peft_model(bridge) is bridge
    assert not is_peft_model(model)  # whose base_model is transformers', so that it must not be one


def test_no_member_of_pefts_classes_runs_peft_code():
    for name in (n for n in dir(peft) if n.startswith("PeftModel") and isinstance(getattr(peft, n), type)):
        members = {m for c in getattr(peft, name).__mro__ if c.__module__.startswith("peft.") for m in vars(c)}
        public = {m for m in members if not m.startswith("_")}
        assert public - set(vars(_Bridge)) <= LEFT_TO_PEFT, name


def test_parameters_have_pefts_names(model):
    names = [name for name, _ in as_peft_model(model).named_parameters()]
    assert names == [f"base_model.model.{name}" for name, _ in model.named_parameters()]
    theirs = peft.get_peft_model(llama(), peft.IA3Config(**CAUSAL, target_modules=["k_proj"], feedforward_modules=[]))
    assert {n for n, _ in theirs.named_parameters() if "ia3_l" in n} <= set(names)
    assert as_peft_model(model).prefix == theirs.prefix


@pytest.mark.parametrize("build", [llama, t5])
def test_forward_and_generate_are_the_models(build):
    model = adapted(build(), **(CAUSAL if build is llama else SEQ2SEQ))
    bridge = as_peft_model(model)
    batch = seq2seq_batch()
    if build is llama:
        batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    with torch.no_grad():
        assert torch.equal(bridge(**batch).logits, model(**batch).logits)
    ids = batch["input_ids"]
    assert torch.equal(bridge.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


def test_what_is_done_to_one_is_done_to_both(model):
    bridge = as_peft_model(model)
    bridge.add_adapter("other", IA3Config(**CAUSAL))
    bridge.set_adapter("other")
    assert model.active_adapters == bridge.active_adapters == ["other"]
    assert bridge.peft_config == model.peft_config
    assert bridge.active_peft_config is model.peft_config["other"]
    with bridge.disable_adapter():
        assert not model._state.enabled
        assert not bridge.has_active_enabled_adapter
    assert bridge.has_active_enabled_adapter
    bridge.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    bridge.eval()
    assert not model.training
    assert bridge.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    other = IA3Config(**CAUSAL)
    bridge.peft_config = {"default": other}
    assert bridge.peft_config["default"] is model.peft_config["default"] is other
    with pytest.raises(AttributeError):
        bridge.active_adapter = "other"  # which changes nothing, so it is not taken
    base = bridge.merge_and_unload()
    assert base is model
    assert type(base) is type(llama())


def test_copies_and_pickles_have_a_model_of_their_own(model):
    bridge = as_peft_model(model)
    for twin in (copy.deepcopy(bridge), pickle.loads(pickle.dumps(bridge))):
        assert isinstance(twin, peft.PeftModelForCausalLM)
        assert twin.get_base_model() is not model
        assert same(vectors(twin), vectors(bridge))


# What it refuses


def test_a_model_without_adapter():
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM: call ia3\.get_peft_model"):
        as_peft_model(llama())


def test_pefts_own_model():
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="a model with an adapter, got PeftModel"):
        as_peft_model(theirs)


def test_peft_that_is_not_installed():
    code = (
        "import sys; sys.modules['peft'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from builders import adapted, t5; from ia3 import as_peft_model; as_peft_model(adapted(t5()))"
    )
    done = subprocess.run([sys.executable, "-c", code, Path(__file__).parent], capture_output=True, text=True)
    assert "ImportError: as_peft_model makes an instance of PEFT's class" in done.stderr
    assert "pip install peft" in done.stderr


@pytest.mark.parametrize("around", [True, False])
def test_one_more_model_around_or_inside_an_adapted_one(model, around):
    before = vectors(model)
    refused = r"peft\.PeftModel, a wrapper" if around else r"k_proj carries \['default'\] already"
    with pytest.raises(ValueError, match=refused):
        get_peft_model(as_peft_model(model) if around else model.model, IA3Config(target_modules=["k_proj"]))
    assert same(vectors(model), before)


@pytest.mark.parametrize("wrap", [as_peft_model, lambda model: model])
def test_pefts_own_state_dict_would_be_empty(model, wrap):
    with pytest.raises(TypeError, match=r"such as ia3\.get_peft_model_state_dict"):
        peft.get_peft_model_state_dict(wrap(model))


def test_a_vector_at_a_head_whose_weight_is_read():
    bridge = as_peft_model(adapted(llama(), target_modules=["k_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"'default' has a vector at the output head lm_head"):
        bridge.get_output_embeddings()
    model = adapted(llama(), **CAUSAL)
    assert as_peft_model(model).get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("wrap", [as_peft_model, lambda model: model])
def test_a_head_trained_in_full_is_the_acting_copy(wrap):
    model = get_peft_model(llama(), IA3Config(**CAUSAL, modules_to_save=["lm_head"]))
    bridge = wrap(model)
    copy = model.lm_head.modules_to_save["default"]
    assert bridge.get_output_embeddings() is copy
    with model.disable_adapter():
        assert bridge.get_output_embeddings() is model.lm_head
    model.add_adapter("all", IA3Config(target_modules="all-linear", feedforward_modules=[]))
    assert not any("lm_head" in site.path for site in model._state.adapters["all"].layout.sites)
    tensors = ia3.get_peft_model_state_dict(model, save_embedding_layers=True)
    assert torch.equal(tensors["base_model.model.lm_head.weight"], copy.weight)
    assert not any("modules_to_save" in key for key in tensors)


# Files


def test_files_go_both_ways(model, tmp_path):
    bridge = as_peft_model(model)
    bridge.save_pretrained(tmp_path, state_dict=bridge.state_dict())
    assert same(vectors(PeftModel.from_pretrained(llama(), tmp_path)), vectors(model))
    loaded = type(bridge).from_pretrained(llama(), tmp_path)
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert same(vectors(loaded), vectors(bridge))


@pytest.mark.parametrize(("name", "own", "is_copy"), [("ref", True, True), ("ref", False, False), ("b", True, False)])
def test_a_reference_that_does_not_begin_as_what_is_trained(model, name, own, is_copy):
    """TRL's way of asking for one: "ref", under the very configuration of "default"."""
    config = model.peft_config["default"]
    as_peft_model(model).add_adapter(name, config if own else copy.deepcopy(config))
    held = vectors(model)
    trained = {key: value for key, value in held.items() if key.endswith("default")}
    added = {key.removesuffix("default"): held[key.removesuffix("default") + name] for key in trained}
    assert added
    expected = {
        key.removesuffix("default"): value if is_copy else torch.ones_like(value) for key, value in trained.items()
    }
    assert same(added, expected)


def test_a_state_dict_with_and_without_the_prefix(model):
    bridge = as_peft_model(model)
    expected = vectors(model)
    for saved in (copy.deepcopy(bridge.state_dict()), copy.deepcopy(model.state_dict())):
        randomise(model, seed=5)
        assert not same(vectors(model), expected)
        bridge.load_state_dict(saved)
        assert same(vectors(model), expected)
    alone = {name: tensor for name, tensor in model.state_dict().items() if "ia3_l" in name}
    randomise(model, seed=5)
    result = bridge.load_state_dict(copy.deepcopy(alone) | expected, strict=False)
    assert not result.missing_keys
    assert same(vectors(model), expected)


# transformers' Trainer


def train(model, folder, resume=None, **more):
    batch = seq2seq_batch(8)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model._shift_right(batch["labels"])  # with smoothing, the model gets no labels
    else:
        batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"optim": "adafactor"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("build", "config"), [(t5, SEQ2SEQ), (llama, CAUSAL)])
def test_trainer_trains_it_as_it_trains_the_model(tmp_path, build, config, more):
    plain, bridged, untrained = (adapted(build(), **config) for _ in range(3))
    train(plain, tmp_path / "plain", **more)
    train(as_peft_model(bridged), tmp_path / "bridged", **more)
    assert same(vectors(plain), vectors(bridged))
    assert not same(vectors(plain), vectors(untrained))


def active(model, name):
    model.set_adapter(name)
    return model


@pytest.mark.parametrize("name", ["default", "other"])
def test_trainer_resumes(tmp_path, name):
    whole = active(adapted(t5(), "other"), name)
    train(as_peft_model(whole), tmp_path)
    resumed = active(adapted(t5(), "other", seed=7), name)
    train(as_peft_model(resumed), tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert same(vectors(resumed), vectors(whole))
    assert resumed.active_adapters == [name]


@pytest.mark.parametrize("name", ["default", "other"])
def test_trainer_loads_the_best(tmp_path, name):
    model = active(adapted(t5(), "other"), name)
    trainer = train(
        as_peft_model(model),
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,  # the highest loss, so that the best isn't the last
        metric_for_best_model="loss",
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    saved = PeftModel.from_pretrained(t5(), best if name == "default" else best / name, adapter_name=name)
    assert same({key: vectors(model)[key] for key in vectors(saved)}, vectors(saved))
    last = ia3.load_peft_weights(tmp_path / "checkpoint-4" / ("" if name == "default" else name))
    assert not torch.equal(
        next(iter(last.values())), next(iter(ia3.get_peft_model_state_dict(saved, adapter_name=name).values()))
    )


def test_accelerates_state_comes_back(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = adapted(t5())
    bridge, _ = accelerator.prepare(as_peft_model(model), torch.optim.SGD(model.parameters(), lr=0.1))
    expected = vectors(model)
    accelerator.save_state(str(tmp_path))
    randomise(model, seed=5)
    accelerator.load_state(str(tmp_path))
    assert same(vectors(model), expected)
    assert accelerator.unwrap_model(bridge).get_base_model() is model


# transformers' own adapter methods


def test_each_adapter_method_of_transformers_is_ours_or_says_what_is(model):
    from transformers.integrations import PeftAdapterMixin

    public = {name for name, member in vars(PeftAdapterMixin).items() if name[0] != "_" and callable(member)}
    ours = {name for cls in PeftModel.__mro__ if cls.__module__.startswith("ia3.") for name in vars(cls)}
    assert public - ours == {"enable_peft_hotswap"}
    with pytest.raises(NotImplementedError, match=r"enable_peft_hotswap works on PEFT's layers.*call load_adapter"):
        model.enable_peft_hotswap()


def test_a_configuration_of_ours_given_to_transformers_add_adapter(model):
    base = llama()
    with pytest.raises(TypeError, match="should be an instance of PeftConfig"):
        base.add_adapter(IA3Config(**CAUSAL))
    again = get_peft_model(base, IA3Config(**CAUSAL))  # it left nothing in the way
    assert again.active_adapters == ["default"]
