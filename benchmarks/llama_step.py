"""One training step on Llama-3.2-3B's shape, and a long one on Llama-3-8B's, PEFT and ia3 side by side on one card.

    python benchmarks/llama_step.py [--tiny]

Random weights in Llama-3.2-3B's shape (28 layers, width 3,072, 24 heads over 8 of keys and values, 128,256 words,
tied head), bfloat16, 4 texts of 512 tokens, of which all but the first 64 are learned. PEFT's IA3 and LoRA (r = 8 on
queries and values) run as they are, and whole in one CUDA graph, the strongest that PEFT can be made without changing
it; it gets no attention mask, which it needs not, and transformers is kept from making one while a graph is recorded,
so that its attention is the fused one. ia3's step is `ia3.compile_step`, also on texts of four lengths, which it
doesn't pad. The long cases are Llama-3-8B's shape (32 layers, width 4,096, untied head), 2 texts of 4,096 tokens,
which ia3's step also takes with `recompute`. Columns are as in `train_step.py`; `loss` is the first step's, alike for
all that start at the base. `--tiny` tries the script on a CPU.

Needs: one GPU, --tiny a CPU; peft; a few minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import ia3
from bench import say_machine
from train_step import captured, guide, known_rows, launches, ours, timed

RESULTS = Path(__file__).parent / "results" / "llama_step.json"
THREE_B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
EIGHT_B = THREE_B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = THREE_B | {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LENGTH, PROMPT = 512, 64
FULL, MIXED, LONG = (LENGTH,) * 4, (LENGTH, 384, 256, 128), (4096,) * 2


def build(shape: dict[str, Any], device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, use_cache=False), dtype=torch.bfloat16)


def without_masks() -> Any:
    """transformers without its looks at masks and positions, which would say that no mask is needed."""
    return mock.patch.multiple(
        "transformers.masking_utils", is_tracing=lambda *_: False, find_packed_sequence_indices=lambda *_: None
    )


def batch_of(words: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = torch.randint(2, words, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def measure(
    model: torch.nn.Module, make: Callable[..., Callable[[], Any]], lengths: tuple[int, ...], device: str, *, own: bool
) -> dict[str, Any]:
    """One case: its first step's loss, set-up, times and memory."""
    cuda = device == "cuda"
    batch = batch_of(model.config.vocab_size, lengths)
    if not own:
        batch = {name: batch[name].to(device) for name in ("input_ids", "labels")}
        with torch.no_grad():
            loss = float(model(**batch).loss)
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step = make(model, batch, cuda)
    first = step()
    if cuda:
        torch.cuda.synchronize()
    setup = time.perf_counter() - started
    row = {"loss": float(first) if own else loss, "setup_s": setup}
    repeats, together = (4, 2) if lengths == LONG else (20, 10)
    row |= timed(step, cuda, repeats if cuda else 2, together)
    row["tokens_per_s"] = 1e3 * sum(lengths) / row["ms"]
    return row | (launches(step) if cuda else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ours", action="store_true", help="ia3's steps alone")
    parser.add_argument("--resume", action="store_true", help="leave out what the output has of a machine like this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import peft

    cuda = torch.cuda.is_available()
    device, tiny = "cuda" if cuda else "cpu", arguments.tiny or not cuda
    where = say_machine()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    cases: list[tuple[str, Any, Any, Any, tuple[int, ...]]] = [
        ("ia3 compile_step", ia3, ia3.IA3Config(task_type="CAUSAL_LM"), ours, FULL),
        ("ia3 compile_step", ia3, ia3.IA3Config(task_type="CAUSAL_LM"), ours, MIXED),
        ("ia3 compile_step, fp8", ia3, ia3.IA3Config(task_type="CAUSAL_LM"), partial(ours, frozen="fp8"), FULL),
        ("PEFT IA3 captured", peft, peft.IA3Config(task_type="CAUSAL_LM"), captured, FULL),
        ("PEFT LoRA captured", peft, lora, captured, FULL),
        ("PEFT IA3", peft, peft.IA3Config(task_type="CAUSAL_LM"), guide, FULL),
        ("PEFT LoRA", peft, lora, guide, FULL),
        ("ia3 compile_step", ia3, ia3.IA3Config(task_type="CAUSAL_LM"), ours, LONG),
        ("PEFT LoRA captured", peft, lora, captured, LONG),
        ("PEFT LoRA", peft, lora, guide, LONG),
        ("ia3 compile_step, recompute", ia3, ia3.IA3Config(task_type="CAUSAL_LM"), partial(ours, recompute=True), LONG),
    ]
    rows: list[dict[str, Any]] = known_rows(arguments.output, where) if arguments.resume else []
    known = {(row["name"], tuple(row["lengths"])) for row in rows}
    for name, library, config, make, lengths in cases:
        if (make is captured and not cuda) or (arguments.ours and library is not ia3) or (name, lengths) in known:
            continue
        row: dict[str, Any] = {"name": name, "lengths": list(lengths)}
        shape = TINY if tiny else EIGHT_B if lengths == LONG else THREE_B
        model = library.get_peft_model(build(shape, device), config).train()
        row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        try:
            with without_masks():
                row |= measure(model, make, lengths, device, own=library is ia3)
        except Exception as error:  # the next cases can still be measured
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        print({key: value for key, value in row.items() if key != "longest"}, flush=True)
        if not tiny or arguments.output != RESULTS:
            arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    for key, count, busy in rows[0].get("longest", []):
        print(f"  {busy:8.3f} ms {count:5} x {key}")


if __name__ == "__main__":
    main()
