"""A tiny model of each described family, with weights that are no family's initial ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from builders import randomise
from ia3 import IA3Config, get_peft_model
from ia3.architectures import architecture_of
from ia3.fast.layers import block_paths
from ia3.sites import find_sites

_DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 4}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32},
    "decoder_start_token_id": 1,
}
_OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16}
_SEQ2SEQ, _CAUSAL, _CLASSES = "SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS"
_AUTO = {
    _SEQ2SEQ: "AutoModelForSeq2SeqLM",
    _CAUSAL: "AutoModelForCausalLM",
    _CLASSES: "AutoModelForSequenceClassification",
}

FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("t5", _SEQ2SEQ, {**_T5, "feed_forward_proj": "relu"}),
    "flan-t5": ("t5", _SEQ2SEQ, {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _SEQ2SEQ, _T5),
    "umt5": ("umt5", _SEQ2SEQ, _T5),
    "bart": ("bart", _SEQ2SEQ, _BART),
    "plbart": ("plbart", _SEQ2SEQ, _BART),
    "mbart": ("mbart", _SEQ2SEQ, _BART),
    "blenderbot": ("blenderbot", _SEQ2SEQ, _BART),
    "pegasus": ("pegasus", _SEQ2SEQ, {**_BART, "scale_embedding": True}),
    "marian": ("marian", _SEQ2SEQ, {**_BART, "scale_embedding": True, "decoder_vocab_size": 64}),
    "llama": ("llama", _CAUSAL, _GROUPED),
    "mistral": ("mistral", _CAUSAL, {**_GROUPED, "sliding_window": None}),
    "mistral with a window": ("mistral", _CAUSAL, {**_GROUPED, "sliding_window": 3}),
    "ministral": ("ministral", _CAUSAL, {**_GROUPED, "sliding_window": 3}),
    "seed_oss": ("seed_oss", _CAUSAL, _GROUPED),
    "qwen2": ("qwen2", _CAUSAL, _GROUPED),
    "qwen3": ("qwen3", _CAUSAL, _GROUPED),
    "olmo2": ("olmo2", _CAUSAL, _GROUPED),
    "gemma": ("gemma", _CAUSAL, _GROUPED),
    "gemma2": ("gemma2", _CAUSAL, {**_GROUPED, "sliding_window": 3}),
    "gemma2 with soft caps": (
        "gemma2",
        _CAUSAL,
        {**_GROUPED, "sliding_window": 3, "attn_logit_softcapping": 0.5, "attn_implementation": "eager"},
    ),
    "gemma3": ("gemma3_text", _CAUSAL, {**_GROUPED, "sliding_window": 3, "num_hidden_layers": 7}),
    "phi": ("phi", _CAUSAL, _DECODER),
    "phi3": ("phi3", _CAUSAL, {**_DECODER, "num_key_value_heads": 2}),
    "starcoder2": ("starcoder2", _CAUSAL, {**_DECODER, "num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", _CAUSAL, _DECODER),
    "gpt_neox in sequence": ("gpt_neox", _CAUSAL, {**_DECODER, "use_parallel_residual": False}),
    "gpt2": ("gpt2", _CAUSAL, {"n_embd": 16, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", _CAUSAL, _OPT),
    "opt with norms behind": ("opt", _CAUSAL, {**_OPT, "do_layer_norm_before": False}),
    "bert": ("bert", _CLASSES, _DECODER),
    "roberta": ("roberta", _CLASSES, _DECODER),
    "xlm-roberta": ("xlm-roberta", _CLASSES, _DECODER),
    "camembert": ("camembert", _CLASSES, _DECODER),
    "electra": ("electra", _CLASSES, {**_DECODER, "embedding_size": 8}),
    "distilbert": ("distilbert", _CLASSES, {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}),
}

# Rates under the names that one family or another has.
_RATES = (
    *("dropout_rate", "dropout", "attention_dropout", "activation_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"),
    *("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "residual_dropout", "embedding_dropout"),
    *("seq_classif_dropout", "classifier_dropout"),
)
# What would skip whole layers, or a head's own dropout.
_NEVER = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def described(
    form: str, dtype: torch.dtype = torch.float64, *, rate: float = 0.0, everywhere: bool = False, **more: Any
) -> Any:
    """The model with random vectors at its default sites, in training mode.

    Args:
        form: a name of `FORMS`.
        dtype: its weights'.
        rate: of all dropouts, each a little more than the last.
        everywhere: with a vector at every linear layer of its blocks instead.
        more: of its configuration.
    """
    kind, task, shape = FORMS[form]
    config = AutoConfig.for_model(
        kind, **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **shape, **more}
    )
    for index, name in enumerate(name for name in _RATES if hasattr(config, name)):
        setattr(config, name, rate and rate + 0.01 * index)
    for name in _NEVER:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, _AUTO[task]).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = IA3Config(task_type=task)
    if everywhere:
        closing = [site.path for site in find_sites(model, config).layout.sites if site.side == "input"]
        config = IA3Config(task_type=task, target_modules=_linear_layers(model), feedforward_modules=closing)
    model = get_peft_model(model.to(dtype).train(), config, autocast_adapter_dtype=False)
    randomise(model)
    return model


def _linear_layers(model: Any) -> list[str]:
    """Those of the blocks."""
    architecture = architecture_of(model)
    assert architecture is not None
    inside = tuple(f"{path}." for stack in architecture.stacks for path in block_paths(model, stack))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return [name for name in linear if name.startswith(inside)]


def batch_for(form: str, *, examples: int = 4, seed: int = 1, left: bool = False) -> dict[str, Tensor]:
    """Inputs of different lengths with labels; those of a model with a window are all as long."""
    _, task, shape = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (examples, 7), generator=generator)
    mask = torch.ones_like(ids)
    if "sliding_window" not in shape:  # where nothing is seen, transformers' own forward is no number
        mask[0, 5:] = mask[2, 3:] = 0
    mask = mask.flip(1) if left else mask
    ids[mask == 0] = 0
    if task == _CLASSES:
        labels = torch.arange(examples) % 2
    elif task == _SEQ2SEQ:
        labels = torch.randint(2, 64, (examples, 4), generator=generator)
        labels[1, 2:] = -100
    else:
        labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) < 3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def is_encoder(form: str) -> bool:
    """Whether a classifier, whose inputs are padded on the right alone."""
    return FORMS[form][1] == _CLASSES
