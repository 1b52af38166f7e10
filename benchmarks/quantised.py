"""Training over quantised bases reaches what training over fp32 does: PhraseBank, seeds, int8 and nf4.

    IA3_PHRASEBANK=…/Sentences_AllAgree.txt python benchmarks/quantised.py [--seeds 0 1 2] [--tiny]

Model `bundled:flan-t5-small-titler`, `ia3.train` with the settings of PEFT's guide (three epochs, AdamW 8e-3, batch 8);
10 % are held out by `split_seed=42`, so that runs are compared on the same sentences, and a seed decides order and
dropout. The base is in fp32, or its linear layers in int8 or nf4 of bitsandbytes. Each adapter is then loaded anew and
merged: how many of the tensors of integers changed, and by how much of them (norm) the logits of eight sentences did.
What was run stays in the results, and is not run again. `--tiny` tries the script: two steps, into no results.

Needs: one GPU, --tiny a CPU; bitsandbytes, PhraseBank; 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import ia3
from bench import RESULTS, say_machine
from ia3.inference.loading import load_adapter
from ia3.quantised import held_by

MODEL = "bundled:flan-t5-small-titler"
KINDS: tuple[Any, ...] = (None, "int8", "nf4")
GUIDE = {"epochs": 3, "learning_rate": 8e-3, "warmup_steps": 0, "dropout": True, "batch_size": 8}
TINY = {"steps": 2, "learning_rate": 8e-3, "limit": 32, "test_limit": 8}


def integers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the tensors of quantised layers that hold no scales."""
    held = {path: held_by(module) for path, module in model.named_modules()}
    parts = {f"{path} {name}": part for path, each in held.items() if each for name, part in each.parts().items()}
    return {name: part.clone() for name, part in parts.items() if not part.is_floating_point()}


@torch.no_grad()
def merged(adapter: Path, quantize: Any, sentences: list[str]) -> dict[str, Any]:
    """What merging changes of a quantised base with its adapter."""
    model, tokenizer = load_adapter(adapter, dtype=torch.float32, quantize=quantize)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt").to(model.device)
    start = torch.zeros(len(sentences), 1, dtype=torch.long, device=model.device)
    before, wanted = integers(model), model(**inputs, decoder_input_ids=start).logits
    model.merge_adapter()
    found, after = model(**inputs, decoder_input_ids=start).logits, integers(model)
    return {
        "integer_tensors": len(before),
        "integer_tensors_changed": sum(not torch.equal(before[name], after[name]) for name in before),
        "logits_differ_by": float((found - wanted).norm() / wanted.norm()),
    }


def run(quantize: Any, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    data = os.environ["IA3_PHRASEBANK"]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        more = {} if quantize is None else {"quantize": quantize}
        found = ia3.train(MODEL, data, console=Console(quiet=True), output=folder, seed=seed, **settings, **more)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        result = {
            "base": quantize or "fp32",
            "seed": seed,
            "accuracy": found.final.accuracy,
            "held_out": found.final.total,
            "held_out_loss": found.final.loss,
            "training_seconds": round(found.summary()["train_seconds"], 1),
            "peak_gpu_bytes": peak,
        }
        if quantize is not None:
            result["merged"] = merged(found.adapter_dir, quantize, found.shown[:8])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantised.json")
    arguments = parser.parse_args()
    report = {"machine": say_machine(), "runs": []}
    if arguments.output.exists() and not arguments.tiny:
        report["runs"] = json.loads(arguments.output.read_text(encoding="utf-8"))["runs"]
    done = {(each["base"], each["seed"]) for each in report["runs"]}
    for seed in arguments.seeds[:1] if arguments.tiny else arguments.seeds:
        for quantize in KINDS:
            if (quantize or "fp32", seed) in done:
                continue
            result = run(quantize, seed, TINY if arguments.tiny else GUIDE)
            print(json.dumps(result), flush=True)
            report["runs"].append(result)
            if not arguments.tiny:
                arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in ("fp32", "int8", "nf4"):
        accuracies = [each["accuracy"] for each in report["runs"] if each["base"] == name]
        print(f"{name}: mean {sum(accuracies) / max(1, len(accuracies)):.2%} of {accuracies}")


if __name__ == "__main__":
    main()
