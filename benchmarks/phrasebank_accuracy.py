"""Accuracy of the guide on PhraseBank over seeds, by PEFT, ia3 and ia3 in fp8: exact match by `generate`.

    IA3_PHRASEBANK=…/Sentences_AllAgree.txt python benchmarks/phrasebank_accuracy.py [--of ia3 "ia3 fp8" peft]

Model `bundled:flan-t5-small-titler` in fp32, 10 % held out, 3 epochs, AdamW 8e-3, batch 8, padded to the longest of the
batch. Runs of a seed share split and order; ia3 and PEFT draw other dropouts. `ia3` is the guide's loop with the import
changed. `ia3 fp8` is `compile_step(…, frozen="fp8")` with every product of the layers in fp8, also those of few rows,
which it would leave as they are. Runs that were not asked for stay in the results.

Needs: CPU; peft, PhraseBank; an hour.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_linear_schedule_with_warmup,
)

import ia3
from bench import say_machine
from ia3.bundled import resolve_model
from ia3.fast.linear import Fp8Linear

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import guide

NAMES = ("ia3", "ia3 fp8", "peft")
RESULTS = Path(__file__).parent / "results" / "phrasebank_accuracy.json"


def exact_match(model, tokenizer, sentences: list[str], labels: list[str]) -> float:
    model.eval()
    correct = 0
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        inputs = tokenizer(
            [sentences[i] for i in chosen], max_length=128, truncation=True, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=6)
        words = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        correct += sum(word.strip() == labels[i] for word, i in zip(words, chosen, strict=True))
    return correct / len(sentences)


def run(name: str, seed: int, epochs: int, steps: int | None) -> dict:
    library = importlib.import_module(name.split()[0])
    data = os.environ["IA3_PHRASEBANK"]
    arguments = guide.parse(["--data", data, "--padding", "longest", "--seed", str(seed)])
    folder = resolve_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = guide.read_dataset(arguments)
    processed = guide.tokenise(dataset, tokenizer, arguments)
    collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(processed["train"], 8, shuffle=True, collate_fn=collate, generator=order)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model = library.get_peft_model(model, library.IA3Config(task_type="SEQ_2_SEQ_LM"))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=8e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches) * epochs)
    step = ia3.compile_step(model, optimizer, schedule, frozen="fp8") if name == "ia3 fp8" else None
    torch.manual_seed(seed)
    accuracies, losses, seconds = [], [], 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        if step is None:
            losses += guide.train_epoch(model, batches, optimizer, schedule, "cpu", steps)
        else:
            model.train()
            losses += [float(step(batch)) for batch in islice(batches, steps)]
        seconds += time.perf_counter() - start
        sentences, labels = list(dataset["test"]["sentence"]), list(dataset["test"]["text_label"])
        accuracies.append(exact_match(model, tokenizer, sentences, labels))
    return {
        "library": name,
        "seed": seed,
        "accuracies": accuracies,
        "held_out": len(labels),
        "last_losses": losses[-5:],
        "training_seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=NAMES, nargs="+", default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps an epoch, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    report = {"machine": say_machine()}
    runs = json.loads(arguments.output.read_text())["runs"] if arguments.output.exists() else []
    runs = [each for each in runs if each["library"] not in arguments.of]
    report["runs"] = runs
    Fp8Linear.many_rows = 1
    for seed in arguments.seeds:
        for name in arguments.of:
            result = run(name, seed, arguments.epochs, arguments.steps)
            print(json.dumps(result), flush=True)
            runs.append(result)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in NAMES:
        final = [each["accuracies"][-1] for each in runs if each["library"] == name]
        print(f"{name}: mean {sum(final) / max(1, len(final)):.2%} of {final}")


if __name__ == "__main__":
    main()
