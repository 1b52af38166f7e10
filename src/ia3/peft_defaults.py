"""PEFT's defaults, by model type: what its scripts may read, and what this library's defaults are told apart from."""

from __future__ import annotations

from collections.abc import Collection, Iterable

_FUSED = ("query_key_value", "dense_4h_to_h")
_DECODER = ("q_proj", "v_proj", "down_proj")
_ENCODER = ("key", "value", "output.dense")

TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING: dict[str, list[str]] = {
    kind: list(names)
    for kind, names in {
        "t5": ("k", "v", "wo"),
        "mt5": ("k", "v", "wi_1"),
        "gpt2": ("c_attn", "mlp.c_proj"),
        "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
        "opt": ("q_proj", "k_proj", "fc2"),
        "gptj": ("q_proj", "v_proj", "fc_out"),
        "gpt_neo": ("q_proj", "v_proj", "c_proj"),
        "bart": ("q_proj", "v_proj", "fc2"),
        "gpt_bigcode": ("c_attn", "mlp.c_proj"),
        **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
        "mixtral": ("k_proj", "v_proj", "w2"),
        "phi": ("q_proj", "v_proj", "fc2"),
        **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _DECODER),
        **dict.fromkeys(("bert", "roberta"), _ENCODER),
        "deberta-v2": ("key_proj", "value_proj", "output.dense"),
        "deberta": ("in_proj", "output.dense"),
        **dict.fromkeys(("gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"), _FUSED),
    }.items()
}
"""PEFT's names of default targets. `IA3Config()` doesn't read them: its default is found in the model, by the paper."""
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING: dict[str, list[str]] = {
    kind: [] if kind == "mt5" else names[-1:]
    for kind, names in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items()
}
"""Those of PEFT's default targets whose input is multiplied."""


def gate_side(model_type: str, path: str) -> str:
    """Where PEFT has the vector of a second matrix at the output of the gate's linear half, that layer's path.

    That is mT5. The gate's product commutes with the vector, so both places mean the same, and its files fit.
    """
    return path.replace(".wo", ".wi_1") if model_type == "mt5" else ""


def difference(model_type: str, adapted: Iterable[str], narrowed: Collection[str], paths: Collection[str]) -> str:
    """How PEFT's default for a model type differs, in one sentence; empty where it doesn't or PEFT has none.

    Args:
        model_type: the model's.
        adapted: paths of the modules that carry a vector.
        narrowed: those of them of which the channels of keys and values alone are trained.
        paths: of all modules.
    """
    names = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model_type)
    if names is None:
        return ""
    theirs = {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}
    ours = set(adapted)
    more, less = _ends(theirs - ours), _ends(ours - theirs)
    said = []
    if more and less:
        said.append(f"scales {more} in place of {less}")
    elif more:
        said.append(f"also scales {more}")
    elif less:
        said.append(f"leaves out {less}")
    if narrowed and set(narrowed) & theirs:
        said.append(f"scales the queries of {_ends(set(narrowed))} too")
    return f"PEFT's default {' and '.join(said)}" if said else ""


def _ends(paths: Iterable[str]) -> str:
    """What paths end with, such as `k_proj` or `attention.output.dense`, without the numbers of layers."""
    tails = {_tail(path) for path in paths}
    ends = {tail.rpartition(".")[2] for tail in tails}
    return " and ".join(sorted(tails if ends == {"dense"} else ends))


def _tail(path: str) -> str:
    """The parts of a path behind the last number."""
    parts = path.split(".")
    start = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[start + 1 :])
