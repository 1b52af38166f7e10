"""Random checkpoints of models with and without heads, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

BLOCKS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 60, "pad_token_id": 0}
BERT = {**BLOCKS, **WORDS}
PAIRS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "d_model": 16,
    **WORDS,
}
SOUND = {
    **BLOCKS,
    "vocab_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "tdnn_dim": (8, 8),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
PIXELS = {**BLOCKS, "image_size": 8, "patch_size": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT,
    "deberta-v2": BERT,
    "albert": {**BERT, "embedding_size": 8},
    "electra": {**BERT, "embedding_size": 16},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, **WORDS},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 60},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, **WORDS},
    "llama": {**BERT, "num_key_value_heads": 1},
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 60,
        "decoder_start_token_id": 0,
    },
    "bart": {**PAIRS, "max_position_embeddings": 32, "eos_token_id": 1},
    "whisper": {
        **PAIRS,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "use_weighted_layer_sum": True,
    },
    "wav2vec2": SOUND,
    "hubert": SOUND,
    "vit": PIXELS,
    "beit": {**PIXELS, "vocab_size": 20},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 8, "patch_size": 2, "window_size": 2},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "yolos": {**PIXELS, "image_size": (8, 8), "num_detection_tokens": 3},
}


def auto_class(head: str) -> Any:
    return getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")


def save_base(folder: Path, family: str, head: str, **shape: Any) -> str:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPES[family], **shape})
    auto_class(head).from_config(config).save_pretrained(folder)
    return str(folder)


def load_base(path: str, head: str, seed: int, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return auto_class(head).from_pretrained(path, **arguments)
