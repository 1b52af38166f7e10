"""A training step of an encoder classifier and of GPT-2 by the block, beside PEFT captured whole and PEFT compiled.

    python benchmarks/block_step.py [--tiny] [--rounds 6]

BERT-base's shape with a classification head that is trained in full (12 blocks, width 768), batches of 32 of 64 tokens
(every second example 48 tokens), and GPT-2's (12 blocks, width 768, 50,257 words), batches of 8 of 64 tokens; random
weights, bf16, dropout on, AdamW. `PEFT captured` is PEFT's whole step in one CUDA graph, `PEFT compiled` its model
under torch.compile with a fused optimizer. The candidates take turns; medians of milliseconds a step, 10 at a time, and
the ratio of ia3's to each, pair by pair.

Needs: one GPU, --tiny a CPU; peft; three minutes, most of them torch.compile's.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import ia3
from bench import say_machine
from train_step import captured, launches, milliseconds

RESULTS = Path(__file__).parent / "results" / "block_step.json"
SITES: dict[str, dict[str, Any]] = {
    "BERT": {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": []},
    "GPT-2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
}


def build(kind: str, tiny: bool, device: str) -> Any:
    torch.manual_seed(0)
    if kind == "BERT":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        return BertForSequenceClassification(BertConfig(num_labels=3, **(shape if tiny else {}))).to(device)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4} if tiny else {}
    return GPT2LMHeadModel(GPT2Config(**shape)).to(device)


def batch_of(kind: str, device: str) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(1)
    rows = 32 if kind == "BERT" else 8
    ids = torch.randint(2, 30000, (rows, 64), generator=chance)
    mask = torch.ones_like(ids)
    labels = torch.randint(0, 3, (rows,), generator=chance) if kind == "BERT" else ids.clone()
    if kind == "BERT":
        mask[::2, 48:] = 0
    return {name: each.to(device) for name, each in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def adapted(library: Any, kind: str, arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> Any:
    config: dict[str, Any] = {"task_type": "SEQ_CLS"} if kind == "BERT" else {"task_type": "CAUSAL_LM"}
    if library is not ia3:
        config |= SITES[kind]
    return library.get_peft_model(build(kind, arguments.tiny, device).to(dtype), library.IA3Config(**config)).train()


def ours(model: Any, batch: dict[str, Tensor], cuda: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    step = ia3.compile_step(model, optimizer)
    assert step.path == ("captured" if cuda else "fused"), step.reason
    packed = {name: tensor.cpu() for name, tensor in batch.items()}
    step(packed)
    assert step.reason is None, step.reason
    return lambda: step(packed)


def compiled(model: Any, batch: dict[str, Tensor], cuda: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=cuda)
    forward = torch.compile(model)

    def step() -> None:
        forward(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    import peft

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    machine = say_machine()
    rows: list[dict[str, Any]] = []
    for kind in ("BERT", "GPT-2"):
        batch = batch_of(kind, device)
        steps: dict[str, Callable[[], object]] = {
            "ia3": ours(adapted(ia3, kind, arguments, device, dtype), batch, cuda)
        }
        for name, make in (("PEFT captured", captured), ("PEFT compiled", compiled)):
            if cuda or (make is compiled and not arguments.tiny):
                try:
                    # A mask would be looked at on the host, which a recording can't: it has all tokens.
                    own = batch if make is compiled else {n: t for n, t in batch.items() if n != "attention_mask"}
                    steps[name] = make(adapted(peft, kind, arguments, device, dtype), own, cuda)
                except RuntimeError as error:
                    print(f"{kind}, {name}: {error}", flush=True)
        found: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            for _ in range(3):
                milliseconds(step, cuda, 3)
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                found[name].append(milliseconds(step, cuda, 10))
        for name, taken in found.items():
            row = {"model": kind, "name": name, "ms": statistics.median(taken)}
            row["ia3_ratio"] = statistics.median(a / b for a, b in zip(found["ia3"], taken, strict=True))
            row |= {"busy_ms": launches(steps[name])["busy_ms"]} if cuda else {}
            rows.append(row)
            print(row, flush=True)
        RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        del steps
        gc.collect()


if __name__ == "__main__":
    main()
