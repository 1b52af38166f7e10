"""The models that PEFT's tests fetch from the hub, made small and random in a cache folder of the hub's layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
MORE = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 512},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "rotary_dim": 4, "n_positions": 512},
    "bloom": {"n_layer": 5, "n_head": 4},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2},
    },
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 520},
    "resnet": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
}
TEXT = "OPTForCausalLM"
# Which architecture a repository's name means.
ARCHITECTURES = {
    "peft-internal-testing/opt-125m": TEXT,
    "peft-internal-testing/tiny-random-OPTForCausalLM": TEXT,
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": TEXT,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "hf-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "GPTJForCausalLM",
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": "GPTNeoXForCausalLM",
    "peft-internal-testing/tiny-random-BloomForCausalLM": "BloomForCausalLM",
    "peft-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "MistralForCausalLM",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "Gemma3ForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "Qwen/Qwen2-0.5B": "Qwen2ForCausalLM",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "Qwen3ForCausalLM",
    "google/flan-t5-small": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-t5": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": "BartForConditionalGeneration",
    "hf-internal-testing/tiny-random-BertModel": "BertModel",
    "peft-internal-testing/tiny-random-BertModel": "BertModel",
    "peft-internal-testing/tiny-random-BertForSequenceClassification": "BertForSequenceClassification",
    "peft-internal-testing/tiny-random-RobertaModel": "RobertaModel",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": "RobertaForSequenceClassification",
    "peft-internal-testing/tiny-random-DebertaModel": "DebertaModel",
    "peft-internal-testing/tiny-random-DebertaV2Model": "DebertaV2Model",
    "peft-internal-testing/tiny-random-ResNetForImageClassification": "ResNetForImageClassification",
}
# Adapters of another method on the hub, whose tests say nothing of the method: here they are (IA)³ ones.
ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": ("CAUSAL_LM", "peft-internal-testing/tiny-random-OPTForCausalLM"),
    "peft-internal-testing/gpt2-lora-random": ("CAUSAL_LM", "peft-internal-testing/tiny-random-GPT2LMHeadModel"),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "FEATURE_EXTRACTION",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "QUESTION_ANS",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "SEQ_CLS",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "TOKEN_CLS",
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "SEQ_2_SEQ_LM",
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
    ),
}
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def make_hub(cache: Path) -> None:
    """Fill `cache`, the hub's cache folder, with every model and adapter."""
    for repository, architecture in ARCHITECTURES.items():
        _put(cache, repository, lambda folder, made=architecture: _save_model(made, folder))
    for repository, (task, base) in ADAPTERS.items():
        _put(cache, repository, lambda folder, task=task, base=base: _save_adapter(cache, task, base, folder))


def _put(cache: Path, repository: str, write: Callable[[Path], None]) -> None:
    root = cache / f"models--{repository.replace('/', '--')}"
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    write(folder)


def _snapshot(cache: Path, repository: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)


def _save_model(architecture: str, folder: Path) -> None:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, architecture)
    kind = cls.config_class.model_type
    sizes = ({} if kind == "resnet" else SIZES) | MORE.get(kind, {})
    own_names = cls.config_class.attribute_map  # a size under two names would be set twice
    sizes = {key: value for key, value in sizes.items() if own_names.get(key) not in sizes}
    model = cls(cls.config_class(**sizes))
    with torch.no_grad():  # the usual 0.02 makes every output nearly the same
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    if kind != "resnet":
        _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    words |= {f"w{index}": index for index in range(len(words), 1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _save_adapter(cache: Path, task: str, base: str, folder: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, CLASSES[task]).from_pretrained(_snapshot(cache, base))
    adapted = peft.get_peft_model(model, peft.IA3Config(task_type=task))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
