"""PEFT's public names: which are here besides those of `ia3`, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable

IN_UTILS = (
    *("NoMatchingPeftModuleError", "PeftError", "PeftType", "PeftWarning", "TaskType", "cast_mixed_precision_params"),
    *("get_base_model_state_dict", "get_peft_model_state_dict", "infer_device", "load_peft_weights"),
    *("prepare_model_for_kbit_training", "set_base_model_state_dict", "set_peft_model_state_dict"),
    *("shift_tokens_right", "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"),
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
)
"""What `peft.utils` exports and `ia3` has."""

# Methods with a configuration and a model each: `LoraConfig` and `LoraModel`.
_METHODS = """
    AdaLora Adamss AdaptionPrompt BOFT Beft C3A Deft Delora FourierFT Frod Glora Gralora HRA Hira LNTuning Lily
    LoHa LoKr Lora Miss OFT OSF Peanut Poly Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora
    TrainableTokens UniLora VBLoRA Vera WaveFT XLora
"""
_OF_OTHER_METHODS = frozenset(
    [
        "ArrowConfig",
        "BdLoraConfig",
        "CPTConfig",
        "CPTEmbedding",
        "CartridgeConfig",
        "CartridgeEncoder",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraGAConfig",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "MultitaskPromptTuningConfig",
        "MultitaskPromptTuningInit",
        "PrefixEncoder",
        "PrefixTuningConfig",
        "PromptEmbedding",
        "PromptEncoder",
        "PromptEncoderConfig",
        "PromptEncoderReparameterizationType",
        "PromptLearningConfig",
        "PromptTuningConfig",
        "PromptTuningInit",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "VeloraConfig",
        "bloom_model_postprocess_past_key_value",
        "compose_cartridge_adapters",
        "convert_to_lora",
        "create_arrow_model",
        "find_kappa_target_modules",
        "get_eva_state_dict",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "initialize_lora_eva_weights",
        "preprocess_loraga",
        "prompt_embeddings_from_past_key_values",
        "replace_lora_weights_loftq",
        "save_as_lora",
    ]
) | {f"{method}{kind}" for method in _METHODS.split() for kind in ("Config", "Model")}
# Parts of the wrapper that PEFT puts around a model, or of its mixing of methods.
_OF_THE_WRAPPER = frozenset(
    [
        "IA3Model",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "PeftMixedModel",
        "AuxiliaryTrainingWrapper",
        "ModulesToSaveWrapper",
        "TrainableTokensWrapper",
        "tuners",
    ]
)


def why_not_here(name: str, module: str, public: Iterable[str]) -> Exception:
    """What to raise for a name that a module hasn't.

    An `ImportError` for a name that PEFT has: `from … import …` would hide an `AttributeError`'s words.
    """
    if name in _OF_OTHER_METHODS:
        return ImportError(
            f"{name} belongs to another method than (IA)³, which is all that ia3 has: from peft import {name}"
        )
    if name in _OF_THE_WRAPPER:
        return ImportError(
            f"{name} belongs to the wrapper that PEFT puts around a model; here the model stays the base's own object. "
            "get_layer_status(model) says what its layers carry."
        )
    return AttributeError(f"module {module!r} has no attribute {name!r}; its public names are {list(public)}")
