"""TRL's trainers on an adapted model: one base in memory, its reference, its checkpoints, what goes to vLLM."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from ia3 import IA3Config, PeftModel, as_peft_model, get_peft_model, get_peft_model_state_dict
from tiny_causal import examples, llama, logits, tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture
def adapted(randomise):
    def make(*, trained: bool = False) -> PeftModel:
        model = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM"))
        return randomise(model) if trained else model

    return make


def pairs() -> Dataset:
    rows = [{"prompt": e.text, "chosen": f" {e.label}", "rejected": " be brief"} for e in examples(8)]
    return Dataset.from_list(rows)


def trl_arguments(kind, folder, **given):
    return kind(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=2, learning_rate=0.05, report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, **given,
    )  # fmt: skip


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The base models that are loaded meanwhile."""
    from transformers import PreTrainedModel

    loaded: list[str] = []
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls, name, *a, **k: loaded.append(name)))
    return loaded


def test_sft_trains_the_vectors_alone(adapted, tmp_path):
    model = adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = Dataset.from_dict({"text": [f"{e.text} {e.label}" for e in examples(8)]})
    arguments = trl_arguments(trl.SFTConfig, tmp_path, save_strategy="steps", save_steps=2)
    trainer = trl.SFTTrainer(
        model=as_peft_model(model), args=arguments, train_dataset=data, processing_class=tokenizer()
    )
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert set(saved) == set(get_peft_model_state_dict(model))


def dpo(model, folder, reference=None):
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl_arguments(trl.DPOConfig, folder),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )


def test_the_references_log_probabilities_are_the_bases(adapted, tmp_path):
    trainer = dpo(as_peft_model(adapted()), tmp_path / "one")
    other = dpo(llama(), tmp_path / "other", reference=llama())
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    found = trainer.compute_ref_log_probs(trainer.model.eval(), batch)
    expected = other.compute_ref_log_probs(other.ref_model.eval(), batch)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_dpo_takes_its_reference_from_the_one_base(adapted, tmp_path, loads, trained):
    """Of a new adapter it is the base; of one that was trained before, that adapter, as TRL means it."""
    model = adapted(trained=trained)
    expected = logits(model)
    trainer = dpo(as_peft_model(model), tmp_path)
    assert trainer.ref_model is None
    assert loads == []
    trainer.train()
    assert not torch.equal(logits(model), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    if not trained:
        assert torch.equal(logits(model), logits(llama()))


def test_grpo_keeps_the_reference_beside_the_adapter(adapted, tmp_path, loads):
    model = adapted()
    prompts = Dataset.from_dict({"prompt": [e.text for e in examples(8)]})
    arguments = trl_arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=4, beta=0.1)
    trainer = trl.GRPOTrainer(
        model=as_peft_model(model),
        reward_funcs=lambda completions, **_: [
            float(len(set(text.split()))) + index for index, text in enumerate(completions)
        ],
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer(),
    )
    trainer.train()
    assert loads == []
    trained = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), logits(llama()))
    assert not torch.equal(trained, logits(llama()))


def test_the_weights_that_go_to_vllm_are_the_merged_ones(adapted):
    from trl.generation.vllm_generation import VLLMGeneration

    model = adapted(trained=True)
    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model = as_peft_model(model)
    sync._dist = type("Alone", (), {"gather_params": lambda self, p: torch.no_grad(), "is_fsdp": False})()
    sent = {name: tensor.clone() for name, tensor in sync._iter_named_params()}
    merged = dict(adapted(trained=True).merge_and_unload().named_parameters())
    assert {name: tensor.shape for name, tensor in sent.items()} == {n: p.shape for n, p in merged.items()}
    assert all(torch.equal(sent[name], parameter) for name, parameter in merged.items())
    assert not model.get_model_status().merged_adapters
