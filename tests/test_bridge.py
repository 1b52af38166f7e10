"""The ecosystem's own calls: TRL's trainers and transformers' Trainer on a model that is also a `peft.PeftModel`."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import _is_peft_model

from ia3 import IA3Config, PeftModel, as_peft_model, get_peft_model, get_peft_model_state_dict
from tiny_causal import llama, logits, tokenizer


@pytest.fixture
def adapted(randomise):
    def make(*, trained: bool = False, **config) -> PeftModel:
        model = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM", **config))
        return randomise(model) if trained else model

    return make


def test_it_is_a_peft_model_and_the_very_same_parameters(adapted):
    model = adapted(trained=True)
    wrapper = as_peft_model(model)
    assert isinstance(wrapper, peft.PeftModel)
    assert _is_peft_model(wrapper)
    assert not _is_peft_model(model)
    own = dict(model.named_parameters())
    assert {name.removeprefix("base_model.model."): p for name, p in wrapper.named_parameters()} == own
    assert wrapper.base_model.model is wrapper.get_base_model() is model
    assert torch.equal(logits(wrapper), logits(model))
    assert wrapper.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert wrapper.active_adapters == ["default"]
    assert wrapper.peft_config is model.peft_config
    assert wrapper.training is model.training


def test_names_are_those_that_peft_gives(adapted):
    theirs = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM"))
    ours = as_peft_model(adapted())
    names = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert names == {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}


def test_pefts_own_state_dict_of_it_is_ours(adapted):
    model = adapted(trained=True, modules_to_save=["lm_head"])
    theirs = peft.get_peft_model_state_dict(as_peft_model(model))
    ours = get_peft_model_state_dict(model)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_disabling_merging_and_saving_reach_the_model(adapted, tmp_path):
    model = adapted(trained=True)
    wrapper, expected = as_peft_model(model), logits(model)
    with wrapper.disable_adapter():
        assert torch.equal(logits(wrapper), logits(llama()))
    wrapper.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    wrapper.unmerge_adapter()
    wrapper.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    wrapper.load_adapter(tmp_path, "again")
    wrapper.set_adapter("again")
    assert model.active_adapters == ["again"]
    wrapper.delete_adapter("default")
    torch.testing.assert_close(logits(wrapper.merge_and_unload()), expected)


def test_only_an_adapted_model_is_taken(adapted):
    with pytest.raises(TypeError, match="got LlamaForCausalLM: call get_peft_model first"):
        as_peft_model(llama())


def test_without_peft_the_error_says_so(tmp_path):
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, ia3\n"
        "model = ia3.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), ia3.IA3Config(target_modules=['0'], "
        "feedforward_modules=[]))\n"
        "try:\n    ia3.as_peft_model(model)\nexcept ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install peft" in found.stdout


# transformers' Trainer


def rows(count: int = 8) -> Dataset:
    tokens = tokenizer()(["say the number after one"] * count)["input_ids"]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def train(model, folder, *, resume=None, **given):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=4, learning_rate=0.05, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_steps=1, **{"save_strategy": "no", **given},
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), processing_class=tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("given", [{}, {"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 1.0}])
def test_trainer_trains_it_as_it_trains_the_model(adapted, tmp_path, given):
    one, other = adapted(), adapted()
    train(one, tmp_path / "one", **given)
    train(as_peft_model(other), tmp_path / "other", **given)
    torch.testing.assert_close(logits(one), logits(other))
    assert not torch.equal(logits(one), logits(llama()))


@pytest.mark.parametrize("first", ["wrapped", "bare"])
@pytest.mark.parametrize("second", ["wrapped", "bare"])
def test_checkpoints_hold_the_adapter_and_go_on_with_and_without_the_wrapper(adapted, tmp_path, first, second):
    wraps = {"wrapped": as_peft_model, "bare": lambda model: model}
    whole = adapted()
    train(whole, tmp_path / "whole")
    train(wraps[first](adapted()), tmp_path / "run", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < 20_000
    resumed = adapted()
    train(wraps[second](resumed), tmp_path / "run", resume=str(checkpoint))
    torch.testing.assert_close(logits(resumed), logits(whole))


@pytest.mark.parametrize("wrapped", [True, False])
def test_trainers_card_keeps_its_text_and_says_peft(adapted, tmp_path, wrapped):
    model = adapted()
    trainer = train(as_peft_model(model) if wrapped else model, tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name="numbers")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "- ia3" in card
    assert "Training hyperparameters" in card
