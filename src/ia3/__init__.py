"""ia3: fine-tuning by vectors.

(IA)³ (Liu et al. 2022) multiplies a frozen transformer's keys, values and feed-forward intermediate by
learned vectors. The public names are PEFT's; they load lazily, so that `import ia3` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "config": ["PEFT_TYPE_TO_CONFIG_MAPPING", "IA3Config", "PeftConfig", "PeftType", "TaskType", "get_peft_config"],
    "errors": ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"],
    "peft_defaults": [
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
        "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    ],
    "hotswap": ["hotswap_adapter"],
    "precision": [
        "cast_mixed_precision_params",
        "infer_device",
        "prepare_model_for_gradient_checkpointing",
        "prepare_model_for_kbit_training",
        "shift_tokens_right",
    ],
    "sites": ["Layout", "Site", "find_sites"],
    "peft_model": [
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_peft_model",
    ],
    "factory": ["inject_adapter_in_model"],
    "tensors": ["load_peft_weights"],
    "bridge": ["as_peft_model"],
    "fast.generate": ["compile_generate"],
    "fast.step": ["compile_step"],
    "inference.label_file": ["label_file"],
    "training.sweep": ["sweep"],
    "training.resuming": ["resume"],
    "training.train": ["train"],
    "status": ["get_layer_status", "get_model_status"],
    "table": ["AdapterTable"],
    "checkpoint": [
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ],
    "auto": [
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "AdapterTable",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "IA3Config",
    "Layout",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "Site",
    "TaskType",
    "__version__",
    "as_peft_model",
    "cast_mixed_precision_params",
    "compile_generate",
    "compile_step",
    "find_sites",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "infer_device",
    "inject_adapter_in_model",
    "label_file",
    "load_peft_weights",
    "prepare_model_for_gradient_checkpointing",
    "prepare_model_for_kbit_training",
    "resume",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "sweep",
    "train",
]

if TYPE_CHECKING:
    from ia3.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from ia3.bridge import as_peft_model
    from ia3.checkpoint import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from ia3.config import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        IA3Config,
        PeftConfig,
        PeftType,
        TaskType,
        get_peft_config,
    )
    from ia3.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
    from ia3.factory import inject_adapter_in_model
    from ia3.fast.generate import compile_generate
    from ia3.fast.step import compile_step
    from ia3.hotswap import hotswap_adapter
    from ia3.inference.label_file import label_file
    from ia3.peft_defaults import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    )
    from ia3.peft_model import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from ia3.precision import (
        cast_mixed_precision_params,
        infer_device,
        prepare_model_for_gradient_checkpointing,
        prepare_model_for_kbit_training,
        shift_tokens_right,
    )
    from ia3.sites import Layout, Site, find_sites
    from ia3.status import get_layer_status, get_model_status
    from ia3.table import AdapterTable
    from ia3.tensors import load_peft_weights
    from ia3.training.resuming import resume
    from ia3.training.sweep import sweep
    from ia3.training.train import train


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from ia3.elsewhere import why_not_here

        raise why_not_here(name, "ia3", __all__)
    value = getattr(import_module(f"ia3.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
