"""ia3: fine-tuning by vectors.

(IA)³ (Liu et al. 2022) multiplies a frozen transformer's keys, values and feed-forward intermediate by
learned vectors. The public names are PEFT's; they load lazily, so that `import ia3` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "config": ["IA3Config", "PeftConfig", "PeftType", "TaskType"],
    "sites": ["Layout", "Site", "find_sites"],
    "model": [
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_peft_model",
        "inject_adapter_in_model",
    ],
    "bridge": ["as_peft_model"],
    "fast.decode": ["compile_generate"],
    "fast.step": ["compile_step"],
    "training.sweep": ["sweep"],
    "training.train": ["resume", "train"],
    "status": ["get_layer_status", "get_model_status"],
    "table": ["AdapterTable"],
    "checkpoint": ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"],
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
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "Site",
    "TaskType",
    "__version__",
    "as_peft_model",
    "compile_generate",
    "compile_step",
    "find_sites",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "resume",
    "set_peft_model_state_dict",
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
    from ia3.checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from ia3.config import IA3Config, PeftConfig, PeftType, TaskType
    from ia3.fast.decode import compile_generate
    from ia3.fast.step import compile_step
    from ia3.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        inject_adapter_in_model,
    )
    from ia3.sites import Layout, Site, find_sites
    from ia3.status import get_layer_status, get_model_status
    from ia3.table import AdapterTable
    from ia3.training.sweep import sweep
    from ia3.training.train import resume, train


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ia3' has no attribute {name!r}; its public names are {__all__}")
    value = getattr(import_module(f"ia3.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
