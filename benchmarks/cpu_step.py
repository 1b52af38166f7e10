"""A training step on the CPU, ia3 and PEFT taking turns on the same batches.

    python benchmarks/cpu_step.py [--rounds 15]

flan-t5-small-titler in fp32, batch 8, 3 label tokens, forward + backward + AdamW: padded to 64 tokens, to the
guide's 128, and (ia3 alone) to the longest of each batch, in the same order as PEFT pads to 128.

Needs: CPU; peft; about 3 minutes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from bench import interleaved, summary, write
from ia3.bundled import resolve_model
from ia3.data.loading import bundled_tweets, load_examples


def stepper(library_name: str, folder: str, batches: list[dict[str, torch.Tensor]]):
    library = importlib.import_module(library_name)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).train()
    model = library.get_peft_model(model, library.IA3Config(task_type="SEQ_2_SEQ_LM")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    turn = itertools.cycle(batches)

    def step() -> float:
        loss = model(**next(turn)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_batches(tokenizer, examples, count: int, pad_to: int | None) -> list[dict[str, torch.Tensor]]:
    batches = []
    for start in range(0, 8 * count, 8):
        rows = examples[start : start + 8]
        padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True, "max_length": 128}
        batch = dict(tokenizer([row.text for row in rows], truncation=True, return_tensors="pt", **padding))
        labels = tokenizer([row.label for row in rows], padding="max_length", max_length=3, return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels["input_ids"] == 0, -100)
        batches.append(batch)
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--data", help="a labelled file instead of the bundled tweets, such as PhraseBank's .txt")
    arguments = parser.parse_args()
    folder = resolve_model("bundled:flan-t5-small-titler")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = list(load_examples(arguments.data)) if arguments.data else list(bundled_tweets()[0])
    torch.manual_seed(0)
    examples = [examples[i] for i in torch.randperm(len(examples)).tolist()]
    count = arguments.rounds + 3
    report: dict = {"data": "PhraseBank" if arguments.data else "bundled:tweets", "batch": 8}
    for length in (64, 128):
        batches = make_batches(tokenizer, examples, count, length)
        candidates = {name: stepper(name, folder, batches) for name in ("peft", "ia3")}
        report[f"padded to {length}"] = summary(interleaved(candidates, arguments.rounds), "peft")
    candidates = {
        "peft, padded to 128": stepper("peft", folder, make_batches(tokenizer, examples, count, 128)),
        "ia3, padded to the longest": stepper("ia3", folder, make_batches(tokenizer, examples, count, None)),
    }
    report["same order of batches"] = summary(interleaved(candidates, arguments.rounds), "peft, padded to 128")
    write("cpu_step", report)


if __name__ == "__main__":
    main()
