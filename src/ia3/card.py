"""The model card that stands beside a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ia3.config import IA3Config
from ia3.files import write_atomically

_LOADER = {
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    None: "AutoPeftModel",
}

_TEXT = """
# (IA)³ adapter for {base}

Vectors learned with (IA)³ (Liu et al. 2022, arXiv:2205.05638) for the frozen base model {base}.

```python
from ia3 import {loader}  # or: from peft import {loader}

model = {loader}.from_pretrained("{path}")
```
"""


def write_card(directory: Path, config: IA3Config) -> None:
    """Write `README.md`, or bring the metadata of the one that is there up to date."""
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / "README.md"
    base = config.base_model_name_or_path
    if path.is_file():
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    else:
        text = _TEXT.format(base=base or "a model of your own", loader=_LOADER[config.task_type], path=directory.name)
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n{text}")
    data: Any = card.data
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or ()), "ia3"})
    if base and not Path(base).exists():
        data.base_model = base
    write_atomically(path, str(card).encode())
