"""Two gloo processes: DDP with and without checkpointing, and FSDP2."""

import os

import pytest
import torch
import transformers

from builders import CAUSAL, adapted, gpt2, llama, seq2seq_batch, t5, vector_gradients
from ia3 import IA3Config, PeftModel, get_peft_model
from two_processes import in_two_processes

STEPS = 3


def trained(model, batches):
    """The model after a few steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def whole_batches():
    """Batches without padding, so that the mean over two halves is the mean over the whole."""
    batches = [seq2seq_batch(4, seed) for seed in range(STEPS)]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batches


def half(batch, rank):
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}


def vectors_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".ia3_l." in name}


def alone():
    return vectors_of(trained(adapted(t5()).train(), whole_batches()))


def with_ddp(rank, reentrant):
    model = adapted(t5()).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    trained(wrapped, [half(batch, rank) for batch in whole_batches()])
    return vectors_of(model)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_ddp_trains_as_one_process_does(reentrant):
    got = in_two_processes(with_ddp, reentrant)
    expected = alone()
    assert got.keys() == expected.keys()
    for name, vector in expected.items():
        torch.testing.assert_close(got[name], vector, atol=1e-6, rtol=1e-5)
    start = vectors_of(adapted(t5()))
    assert all(not torch.equal(vector, start[name]) for name, vector in expected.items())


def sharded():
    from torch.distributed.fsdp import fully_shard

    model = adapted(t5()).train()
    for block in (*model.encoder.block, *model.decoder.block):
        fully_shard(block)
    fully_shard(model)
    return model


def with_fsdp(rank, folder):
    model = sharded()
    assert isinstance(model, PeftModel)
    assert type(model).__name__.startswith("FSDP")
    trained(model, [half(batch, rank) for batch in whole_batches()])
    model.save_pretrained(folder, is_main_process=rank == 0)
    full = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters() if ".ia3_l." in name}
    gradients_on_base = [name for name, p in model.named_parameters() if p.grad is not None and ".ia3_l." not in name]
    return full, gradients_on_base


def test_fsdp2_trains_as_one_process_does(tmp_path):
    got, gradients_on_base = in_two_processes(with_fsdp, str(tmp_path))
    expected = alone()
    assert got.keys() == expected.keys()
    assert not gradients_on_base
    for name, vector in expected.items():
        torch.testing.assert_close(got[name], vector, atol=1e-6, rtol=1e-5)
    saved = PeftModel.from_pretrained(t5(), tmp_path)
    for name, vector in vectors_of(saved).items():
        assert torch.equal(vector, got[name])


def save_everything(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = sharded()
    model.save_pretrained(f"{folder}/checkpoint-1", is_main_process=rank == 0)
    state = {name: p.full_tensor() for name, p in model.named_parameters()}
    model.save_pretrained(f"{folder}/given", state_dict=state, is_main_process=rank == 0)
    fused = adapted(gpt2(), **CAUSAL)
    fully_shard(fused)
    fused.save_pretrained(f"{folder}/fused", is_main_process=rank == 0)
    try:
        model.merge_adapter()
    except ValueError as error:
        return str(error)
    return "merged"


def test_fsdp2_saves_checkpoints_given_values_and_fused_projections(tmp_path):
    refused = in_two_processes(save_everything, str(tmp_path))
    assert "sharded" in refused
    expected = vectors_of(adapted(t5()))
    for folder in ("checkpoint-1", "given"):
        for name, vector in vectors_of(PeftModel.from_pretrained(t5(), tmp_path / folder)).items():
            assert torch.equal(vector, expected[name])
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    for name, vector in vectors_of(PeftModel.from_pretrained(gpt2(), tmp_path / "fused")).items():
        assert torch.equal(vector, vectors_of(adapted(gpt2(), **CAUSAL))[name])


def load_into_fsdp(rank, folder):
    model = sharded()
    model.load_adapter(folder, "default", is_trainable=True)
    with torch.no_grad():
        loss = model(**seq2seq_batch()).loss
    base = model.unload()
    return loss, type(base).__name__, isinstance(base, PeftModel), [n for n, _ in base.named_parameters()]


def test_fsdp2_loads_and_unloads(tmp_path):
    source = adapted(t5(), seed=7)
    source.save_pretrained(tmp_path)
    loss, name, is_peft, keys = in_two_processes(load_into_fsdp, str(tmp_path))
    torch.testing.assert_close(loss, source(**seq2seq_batch()).loss.detach())
    assert name == "FSDPT5ForConditionalGeneration"
    assert not is_peft
    assert keys == [n for n, _ in t5().named_parameters()]


def with_trainer(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    trainer = trainer_of(adapted(llama(), **CAUSAL), folder, 2)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    return vectors_of(trainer.accelerator.unwrap_model(trainer.model))


def trainer_of(model, folder, batch_size):
    """transformers' Trainer on twelve texts in their order; a causal model's loss counts the tokens of all."""
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, max_steps=3, learning_rate=0.1, optim="sgd",
        max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    torch.manual_seed(3)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 60, (12, 7))]
    return transformers.Trainer(model, arguments, train_dataset=rows)


def test_trainer_in_two_processes_trains_as_in_one(tmp_path):
    got = in_two_processes(with_trainer, str(tmp_path / "two"))
    model = adapted(llama(), **CAUSAL)
    trainer_of(model, tmp_path / "one", 4).train()
    for name, vector in vectors_of(model).items():
        torch.testing.assert_close(got[name], vector, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(vector, torch.ones_like(vector)) for vector in got.values())
    for name, vector in vectors_of(PeftModel.from_pretrained(llama(), tmp_path / "two" / "saved")).items():
        assert torch.equal(vector, got[name])


def test_gradients_of_the_oracle_are_not_zero():
    model = get_peft_model(t5(), IA3Config(task_type="SEQ_2_SEQ_LM"))
    model(**seq2seq_batch()).loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in vector_gradients(model).values())
