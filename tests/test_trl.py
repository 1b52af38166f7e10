"""TRL's trainers on an adapted model: one base in memory, the right reference, files of the adapter alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import add_fused_lm_head

import tiny_causal
from builders import CAUSAL, randomise
from ia3 import IA3Config, PeftModel, as_peft_model, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WAYS = pytest.mark.parametrize("way", [as_peft_model, lambda model: model], ids=["bridge", "model"])
QUESTIONS = ["say the number after one", "please say the number after two", "say three", "the number after four"]


def base(cls=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_causal.WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        **more,
    )
    return cls(config)


def tiny(trained=False, **config):
    model = get_peft_model(base(), IA3Config(**{**CAUSAL, **config}))
    if trained:
        randomise(model)
    return model


def tokenizer():
    return tiny_causal.tokenizer(template=None)


def vectors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "ia3_l" in name}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights(model):
    """The base's, which no trainer may change."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def arguments(kind, folder, **more):
    usual = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
    }
    return kind(output_dir=str(folder), **{**usual, **more})


def texts():
    return Dataset.from_dict({"text": QUESTIONS * 2})


def preferences():
    prompts = QUESTIONS * 2
    return Dataset.from_dict({"prompt": prompts, "chosen": [" two three"] * 8, "rejected": [" seven then"] * 8})


def sft(model, folder, peft_config=None, **more):
    data = {"train_dataset": texts(), "eval_dataset": texts(), "processing_class": tokenizer()}
    return SFTTrainer(model, args=arguments(SFTConfig, folder, **more), peft_config=peft_config, **data)


def dpo(model, folder, peft_config=None, **more):
    data = {"train_dataset": preferences(), "eval_dataset": preferences(), "processing_class": tokenizer()}
    return DPOTrainer(model, args=arguments(DPOConfig, folder, **more), peft_config=peft_config, **data)


def kto(model, folder, **more):
    rows = {"prompt": QUESTIONS * 2, "completion": [" two three", " seven then"] * 4, "label": [True, False] * 4}
    rows = Dataset.from_dict(rows)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer()}
    return KTOTrainer(model, args=arguments(KTOConfig, folder, **more), **data)


def grpo(model, folder, peft_config=None, **more):
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **rest: [float(len(set(text.split()))) for text in completions],
        args=arguments(GRPOConfig, folder, max_completion_length=8, num_generations=2, beta=0.1, **more),
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


@pytest.fixture
def one_base(monkeypatch):
    """Loading a second model fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a second base was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", refuse)


# SFT


@WAYS
def test_sft_trains_saves_the_adapter_alone_and_resumes(tmp_path, one_base, way):
    whole = tiny()
    frozen = weights(whole)
    sft(way(whole), tmp_path).train()
    assert all(torch.equal(whole.get_parameter(name), value) for name, value in frozen.items())
    assert not same(vectors(whole), vectors(tiny()))
    files = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert all(size < 5_000 for name, size in files.items() if name.endswith(".safetensors"))
    resumed = tiny(trained=True)
    sft(way(resumed), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(vectors(resumed), vectors(whole))


def test_sft_is_the_same_either_way(tmp_path):
    first, second = tiny(), tiny()
    sft(first, tmp_path / "model").train()
    sft(as_peft_model(second), tmp_path / "bridge").train()
    assert same(vectors(first), vectors(second))


@WAYS
def test_sft_loads_the_best(tmp_path, way):
    model = tiny()
    more = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = sft(way(model), tmp_path, greater_is_better=True, metric_for_best_model="loss", **more)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(vectors(model), vectors(PeftModel.from_pretrained(base(), trainer.state.best_model_checkpoint)))


@WAYS
def test_sft_trains_a_head_in_full(tmp_path, way):
    model = tiny(modules_to_save=["lm_head"])
    own = model.lm_head.weight.detach().clone()
    sft(way(model), tmp_path).train()
    assert torch.equal(model.lm_head.weight, own)
    assert not torch.equal(model.lm_head.modules_to_save["default"].weight, own)


@pytest.mark.parametrize("trainer", [sft, dpo, grpo])
def test_a_vector_at_the_head_is_refused_before_training(tmp_path, trainer):
    model = tiny(task_type=None, target_modules=["k_proj", "lm_head"])
    with pytest.raises(ValueError, match="has a vector at the output head lm_head"):
        trainer(as_peft_model(model), tmp_path)


@pytest.mark.parametrize("trainer", [sft, dpo, grpo])
def test_a_configuration_of_ours_is_refused(tmp_path, trainer):
    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig` instance.*got IA3Config"):
        trainer(base(), tmp_path, peft_config=IA3Config(**CAUSAL))


# References


def check_reference(model, came):
    """The adapter "ref" is the model as it came, and the trained one moved."""
    assert model.active_adapters == ["default"]
    for name, value in came.items():
        assert torch.equal(model.get_parameter(name.removesuffix("default") + "ref"), value)
        assert not torch.equal(model.get_parameter(name), value)


def check_one_base(trainer, came):
    assert trainer.ref_model is None
    own = sum(p.numel() for p in base().parameters())
    assert sum(p.numel() for p in trainer.model.parameters()) == own + 2 * sum(v.numel() for v in came.values())


TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])


@TRAINED
@pytest.mark.parametrize("build", [dpo, kto])
def test_the_reference_is_the_model_as_it_came(tmp_path, one_base, build, trained):
    model = tiny(trained=trained)
    came = vectors(model)
    trainer = build(as_peft_model(model), tmp_path, max_steps=3)
    check_one_base(trainer, came)
    trainer.train()
    check_reference(model, came)
    trainer.model.eval()
    batch = next(iter(trainer.get_eval_dataloader()))
    found = trainer.compute_ref_log_probs(trainer.model, batch)
    plain = (tiny(trained=True) if trained else base()).eval()  # a fresh adapter's is the base itself
    add_fused_lm_head(plain, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer.model, trainer.ref_model = plain, plain
    expected = trainer.compute_ref_log_probs(plain, batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_preference_training_resumes(tmp_path):
    whole = tiny(trained=True)
    dpo(as_peft_model(whole), tmp_path).train()
    assert (tmp_path / "checkpoint-2" / "ref" / "adapter_model.safetensors").is_file()
    resumed = tiny(trained=True)
    dpo(as_peft_model(resumed), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(vectors(resumed), vectors(whole))


@TRAINED
def test_grpo_trains_on_one_base(tmp_path, one_base, trained):
    model = tiny(trained=trained)
    came, frozen = vectors(model), weights(model)
    trainer = grpo(as_peft_model(model), tmp_path)
    check_one_base(trainer, came)
    trainer.train()
    check_reference(model, came)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


# Weights for vLLM


class Server:
    """What takes weights by name, as vLLM does; a name that it doesn't know is an error."""

    def __init__(self, **config):
        self.model = base(**config)

    def load_weights(self, named):
        with torch.no_grad():
            for name, value in named:
                self.model.get_parameter(name).copy_(value)


def sync(model, server):
    generation = object.__new__(VLLMGeneration)
    generation.model = model
    generation.accelerator = Accelerator(cpu=True)
    generation._dist = DistributedBackend(generation.accelerator)
    generation.mode, generation.enable_sleep_mode = "colocate", False
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=server))
    engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    generation.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
    generation.sync_weights()


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"]}], ids=["vectors", "head"])
def test_vllm_gets_the_merged_weights(config):
    model = tiny(trained=True, **config)
    if config:
        with torch.no_grad():
            model.lm_head.modules_to_save["default"].weight.mul_(2)
    else:
        as_peft_model(model).add_adapter("ref", model.peft_config["default"])
    model.eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    server = Server()
    sync(as_peft_model(model), server)
    assert same({n: p for n, p in model.named_parameters()}, before)
    ids = torch.randint(2, len(tiny_causal.WORDS), (2, 6))
    with torch.no_grad():
        expected, bare = model(input_ids=ids).logits, base().eval()(input_ids=ids).logits
        torch.testing.assert_close(server.model.eval()(input_ids=ids).logits, expected)
        assert (bare - expected).abs().max() > 0.01


def test_vllm_refuses_what_a_model_without_the_bridge_sends():
    with pytest.raises(AttributeError, match="ia3_l"):
        sync(tiny(trained=True), Server())


# Rewards


@WAYS
def test_a_reward_model(tmp_path, way):
    model = get_peft_model(base(LlamaForSequenceClassification, num_labels=1), IA3Config(task_type="SEQ_CLS"))
    data = Dataset.from_dict({"chosen": [f"{q} two" for q in QUESTIONS], "rejected": [f"{q} one" for q in QUESTIONS]})
    trainer = RewardTrainer(
        way(model), args=arguments(RewardConfig, tmp_path), train_dataset=data, processing_class=tokenizer()
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.modules_to_save.default.weight" in moved
    loaded = PeftModel.from_pretrained(base(LlamaForSequenceClassification, num_labels=1), tmp_path / "checkpoint-4")
    ids = torch.randint(2, len(tiny_causal.WORDS), (2, 6))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
