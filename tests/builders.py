"""Tiny seeded models for tests that cross processes, where fixtures don't reach."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ia3 import IA3Config, get_peft_model
from ia3.fast.guard import own_forward

SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM"}
CAUSAL = {"task_type": "CAUSAL_LM"}


def t5(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **overrides) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        dropout_rate=dropout,
        **overrides,
    )
    return T5ForConditionalGeneration(config).to(dtype).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def adapted(model: nn.Module, *more: str, seed: int = 1, **config):
    """The model with an adapter "default" and more of them, all with random vectors."""
    model = get_peft_model(model, IA3Config(**(config or SEQ2SEQ)))
    for name in more:
        model.add_adapter(name, IA3Config(**(config or SEQ2SEQ)))
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 1, spread: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.copy_(1 + spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def seq2seq_batch(size: int = 3, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (size, 7), generator=generator)
    labels = torch.randint(2, 64, (size, 3), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def models_own(model: nn.Module, **batch: torch.Tensor):
    """The output of the base model's own forward, which in training an adapted model's stands before."""
    return own_forward(type(model))(model, **batch)


def vector_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if ".ia3_l." in name and parameter.grad is not None
    }
