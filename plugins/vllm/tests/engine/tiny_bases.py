"""Tiny bases and adapters on disk, and what ia3 itself answers with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ia3 import IA3Config, PeftModel, get_peft_model

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FUSED = {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
WIDE = {"hidden_size": 128, "head_dim": None}  # vLLM's attention on a CPU has no heads of 16
OPT = {**WIDE, "ffn_dim": 128, "word_embed_proj_dim": 128, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Kind:
    """A family: its configuration, and what its adapters name beyond ia3's default."""

    model_type: str
    shape: dict[str, Any]
    adapter: dict[str, Any]
    engine: dict[str, Any]


KINDS = {
    "llama": Kind("llama", {}, {}, {}),
    "qwen2": Kind("qwen2", WIDE, {}, {}),
    "mistral": Kind("mistral", {"sliding_window": None}, {}, {}),
    "gemma2": Kind("gemma2", {"query_pre_attn_scalar": 32}, {}, {}),
    "opt": Kind("opt", OPT, {}, {}),
    "phi3": Kind("phi3", WIDE, FUSED, {}),
    "gated": Kind("llama", {}, {"target_modules": ["q_proj", "up_proj", "o_proj"], "feedforward_modules": []}, {}),
    "transformers": Kind("llama", {}, {}, {"model_impl": "transformers"}),
}


def make_base(folder: Path, kind: Kind, seed: int = 0) -> nn.Module:
    """A base with weights large enough that vectors change its answers."""
    torch.manual_seed(seed)
    shape = {key: value for key, value in {**SHAPE, **kind.shape}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.model_type, **shape), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            elif kind.model_type in ("qwen2", "opt"):
                parameter.add_(0.2 * torch.randn_like(parameter))  # biases and norms that matter
    model.save_pretrained(folder)
    return model


def write_adapter(base: nn.Module, folder: Path, seed: int, spread: float = 0.5, **config: Any) -> Path:
    """An adapter with random vectors; the base is as it was afterwards."""
    model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM", **config))
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.copy_(1 + spread * torch.randn(parameter.shape, generator=chance))
    model.save_pretrained(folder)
    model.unload()
    return folder


def write_lora(base: nn.Module, folder: Path, seed: int, rank: int = 8) -> Path:
    """A LoRA adapter of q_proj and down_proj as PEFT writes it."""
    chance, tensors = torch.Generator().manual_seed(seed), {}
    for path, module in base.named_modules():
        if path.endswith(("q_proj", "down_proj")):
            wide, narrow = module.weight.shape
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.3 * torch.randn(rank, narrow, generator=chance)
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.3 * torch.randn(wide, rank, generator=chance)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def greedy(model: nn.Module, ids: list[int], new: int) -> tuple[list[int], list[float]]:
    """The tokens of highest probability and their log-probabilities, by the model's own forward."""
    out, logprobs = list(ids), []
    with torch.no_grad():
        for _ in range(new):
            row = model(torch.tensor([out])).logits[0, -1].log_softmax(-1)
            out.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return out[len(ids) :], logprobs


def under(base: nn.Module, folder: Path, ids: list[int], new: int = 8) -> tuple[list[int], list[float]]:
    """`greedy` of ia3 with an adapter loaded."""
    model = PeftModel.from_pretrained(base, folder)
    answer = greedy(model, ids, new)
    model.unload()
    return answer


def under_lora(base: nn.Module, folder: Path, ids: list[int], new: int = 8) -> tuple[list[int], list[float]]:
    """`greedy` with the matrices' products added to the weights."""
    from safetensors.torch import load_file

    tensors, former = load_file(folder / "adapter_model.safetensors"), {}
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = base.get_submodule(path).weight
            former[path] = weight.detach().clone()
            weight += tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        answer = greedy(base, ids, new)
        for path, weight in former.items():
            base.get_submodule(path).weight.copy_(weight)
    return answer


def ask(llm: Any, requests: list[tuple[list[int], Any]], new: int = 8) -> list[tuple[list[int], list[float]]]:
    """The engine's greedy tokens and their log-probabilities, all requests at once."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
    answers = []
    for output in llm.generate(prompts, params, lora_request=[adapter for _, adapter in requests], use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        places = zip(output.outputs[0].logprobs, tokens, strict=True)
        answers.append((tokens, [place[token].logprob for place, token in places]))
    return answers


def assert_same(answer: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Equal tokens, and log-probabilities within a tolerance."""
    assert answer[0] == expected[0]
    assert max(abs(one - other) for one, other in zip(answer[1], expected[1], strict=True)) <= tolerance
