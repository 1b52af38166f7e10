"""Tiny seeded models of every family, a zoo of layers, and what to compare about them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from hypothesis import Phase, settings
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)
_usual = settings(deadline=None, max_examples=25, derandomize=True, database=None)
settings.register_profile("ia3", _usual)
# Where a failure alone counts, looking for the smallest one is lost time: `--hypothesis-profile=no-shrinking`.
settings.register_profile("no-shrinking", _usual, phases=[Phase.explicit, Phase.generate])
settings.load_profile("ia3")

_VOCABULARY = 64


# In a shell's background SIGINT is ignored, and what a test raises would reach nobody.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def few_steps() -> Iterator[None]:
    """Trainings that name no steps take three passes over their rows here, since tiny models need no more."""
    from ia3.runs import defaults

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "least_steps", lambda kind, labels: 0)
        yield


_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GEMMA = {**_LLAMA, "head_dim": 4}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}

# name: (model type, task, configuration)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("t5", "SEQ_2_SEQ_LM", {**_T5, "feed_forward_proj": "relu"}),
    "t5-gated": ("t5", "SEQ_2_SEQ_LM", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", "SEQ_2_SEQ_LM", _T5),
    "bart": (
        "bart",
        "SEQ_2_SEQ_LM",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
        },
    ),
    "gpt2": ("gpt2", "CAUSAL_LM", {"n_embd": 16, "n_layer": 2, "n_head": 4}),
    "llama": ("llama", "CAUSAL_LM", _LLAMA),
    "mistral": ("mistral", "CAUSAL_LM", _LLAMA),
    "qwen2": ("qwen2", "CAUSAL_LM", _LLAMA),
    "qwen3": ("qwen3", "CAUSAL_LM", _GEMMA),
    "gemma": ("gemma", "CAUSAL_LM", _GEMMA),
    "gemma2": ("gemma2", "CAUSAL_LM", _GEMMA),
    "gemma3_text": ("gemma3_text", "CAUSAL_LM", _GEMMA),
    "phi": ("phi", "CAUSAL_LM", _LLAMA),
    "bert": ("bert", "SEQ_CLS", _BERT),
    "roberta": ("roberta", "SEQ_CLS", _BERT),
    "gptj": ("gptj", "CAUSAL_LM", {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        "CAUSAL_LM",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "deberta-v2": (
        "deberta-v2",
        "FEATURE_EXTRACTION",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
        },
    ),
    "opt": (
        "opt",
        "CAUSAL_LM",
        {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16},
    ),
    "gpt_neox": ("gpt_neox", "CAUSAL_LM", {**_BERT, "max_position_embeddings": 32}),
    "bloom": ("bloom", "CAUSAL_LM", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "falcon-grouped": ("falcon", "CAUSAL_LM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-multi-query": ("falcon", "CAUSAL_LM", {**_FALCON, "multi_query": True}),
    "falcon-plain": ("falcon", "CAUSAL_LM", {**_FALCON, "multi_query": False}),
}

_AUTO_CLASSES = {
    None: "AutoModel",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@pytest.fixture(scope="session")
def families() -> dict[str, tuple[str, str]]:
    """What `tiny` makes: name to (model type, usual task)."""
    return {name: (kind, task) for name, (kind, task, _) in _FAMILIES.items()}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(family, task=…, seed=0, dtype=…, **configuration)`: a random model in evaluation mode."""

    def make(name: str, *, task: str | None = "", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
        kind, usual, shape = _FAMILIES[name]
        special = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        config = AutoConfig.for_model(kind, **{**special, **shape, **overrides})
        torch.manual_seed(seed)
        auto_class = getattr(transformers, _AUTO_CLASSES[usual if task == "" else task])
        return auto_class.from_config(config, dtype=torch.float32).to(dtype).eval()

    return make


class Zoo(nn.Module):
    """One layer of every kind that can carry a vector, with and without bias, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.biased = nn.Linear(6, 8)
        self.plain = nn.Linear(8, 6, bias=False)
        self.transposed = Conv1D(8, 6)
        self.conv1 = nn.Conv1d(8, 4, 3, padding=1)
        self.grouped1 = nn.Conv1d(4, 8, 1, groups=2, bias=False)
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.grouped2 = nn.Conv2d(6, 9, (1, 3), groups=3, padding=(0, 1))
        self.conv3 = nn.Conv3d(9, 4, 1)
        self.grouped3 = nn.Conv3d(4, 4, 1, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[batch, length]` to `[batch, 4, 1, 1, length]`."""
        hidden = torch.tanh(self.plain(torch.tanh(self.biased(self.embed(ids)))))
        hidden = torch.tanh(self.transposed(hidden)).transpose(1, 2)
        hidden = torch.tanh(self.grouped1(torch.tanh(self.conv1(hidden)))).unsqueeze(2)
        hidden = torch.tanh(self.grouped2(torch.tanh(self.conv2(hidden)))).unsqueeze(2)
        return self.grouped3(torch.tanh(self.conv3(hidden)))


@pytest.fixture(scope="session")
def zoo() -> Callable[..., Zoo]:
    """`zoo(dtype=…, seed=0)`: the same layers each time, with biases that are not zero."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> Zoo:
        torch.manual_seed(seed)
        model = Zoo()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
    """`randomise(model, seed=1, spread=0.3)`: draw all of its vectors around 1, PEFT's too; gives the model."""

    def draw(model: nn.Module, seed: int = 1, spread: float = 0.3) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ia3_l." in name:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(1 + spread * noise)
        return model

    return draw


@pytest.fixture(scope="session")
def feed() -> Callable[..., dict[str, torch.Tensor]]:
    """`feed(model, seed=2)`: a small batch for the model."""

    def make(model: nn.Module, seed: int = 2) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        config = getattr(model, "config", None)
        if config is None:
            return {"ids": torch.randint(0, 11, (2, 5), generator=generator)}
        ids = torch.randint(2, _VOCABULARY, (2, 7), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(2, _VOCABULARY, (2, 3), generator=generator)
        return batch

    return make


@pytest.fixture(scope="session")
def output(feed) -> Callable[..., torch.Tensor]:
    """`output(model, seed=2)`: its main output for that batch, without gradients."""

    def run(model: nn.Module, seed: int = 2) -> torch.Tensor:
        with torch.no_grad():
            result = model(**feed(model, seed))
        return result if isinstance(result, torch.Tensor) else result[0]

    return run


@dataclass
class Trace:
    """All that attaching could leave behind on a model: classes, attributes, hooks, tensors and their flags."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def differences(self, other: Trace) -> list[str]:
        keys = self.facts.keys() | other.facts.keys()
        found = [key for key in sorted(keys) if self.facts.get(key) != other.facts.get(key)]
        if list(self.tensors) != list(other.tensors):
            return [*found, f"keys {self.tensors.keys() ^ other.tensors.keys()}"]
        return found + [
            key
            for key, tensor in self.tensors.items()
            if tensor.dtype != other.tensors[key].dtype or not _same_bits(tensor, other.tensors[key])
        ]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    for path, module in model.named_modules():
        yield f"{path}: class", type(module)
        yield f"{path}: attributes", sorted(module.__dict__)
        yield f"{path}: training", module.training
        for kind in kinds:
            yield f"{path}: {kind}", list(getattr(module, kind).values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"{name}: requires_grad", parameter.requires_grad
        yield f"{name}: identity", id(parameter)


@pytest.fixture(scope="session")
def trace() -> Callable[[nn.Module], Trace]:
    """`trace(model).differences(trace(model))` is empty where nothing happened in between."""

    def take(model: nn.Module) -> Trace:
        tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        return Trace(dict(_facts(model)), tensors)

    return take
