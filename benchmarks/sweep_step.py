"""A step of 8 or 64 runs in one batch, a step of each in sequence, and as many of PEFT's guide, on mt0-large's shape.

    python benchmarks/sweep_step.py [--tiny]

Random weights, bf16, dropout on, batches of 8 a run, shuffled PhraseBank lengths, four batches a run. `together` is
`ia3.sweep`'s step, over a table of a row a run; `in sequence` is `ia3.compile_step` on the runs' batches one after the
other; PEFT's guide is fp32, eager, padded to 128. Milliseconds for all runs, medians of ten rounds over the four
batches. `--tiny` tries the script on a CPU.

Needs: one GPU, --tiny a CPU; peft; a few minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ia3
from bench import say_machine
from ia3.adapter import site_vectors
from ia3.fast.sweep import SweepStep, group_losses
from ia3.state import attached
from ia3.tasks.losses import token_log_probabilities
from lengths import shuffled
from train_step import LARGE, TINY, batch_of, build, guide, milliseconds

RESULTS = Path(__file__).parent / "results" / "sweep_step.json"
RUNS, SIZE, BATCHES = (8, 64), 8, 4


def batches(words: int, runs: int) -> list[list[dict[str, Tensor]]]:
    """Of each round, a batch a run."""
    lengths, chance = shuffled(), torch.Generator().manual_seed(3)
    made = []
    for number in range(BATCHES * runs):
        own = torch.tensor(lengths[number * SIZE : (number + 1) * SIZE])
        longest = int(own.max())
        mask = (torch.arange(longest) < own[:, None]).long()
        ids = torch.randint(2, words, (SIZE, longest), generator=chance) * mask
        labels = torch.randint(2, words, (SIZE, 3), generator=chance)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return [made[start : start + runs] for start in range(0, len(made), runs)]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(part["input_ids"].shape[1] for part in parts)
    together = {
        name: [torch.nn.functional.pad(part[name], (0, longest - part[name].shape[1])) for part in parts]
        for name in ("input_ids", "attention_mask")
    }
    return {name: torch.cat(each) for name, each in together.items()} | {
        "labels": torch.cat([part["labels"] for part in parts])
    }


def adapted(library: object, dtype: torch.dtype, shape: dict, device: str) -> torch.nn.Module:
    config = library.IA3Config(task_type="SEQ_2_SEQ_LM")  # type: ignore[attr-defined]
    return library.get_peft_model(build(shape, dtype, device), config).train()  # type: ignore[attr-defined]


def token_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By the model's own forward, with which the first step compares."""
    logits = model(**batch, use_cache=False).logits
    return -token_log_probabilities(logits, batch["labels"]), batch["labels"] != -100


def together(model: torch.nn.Module, rounds: list[list[dict[str, Tensor]]]) -> Callable[[int], object]:
    adapter = attached(model).adapters["default"]
    vectors, runs = [vector.detach() for _, vector in site_vectors(model, adapter)], len(rounds[0])
    losses, reason = group_losses(model, adapter, partial(token_losses, model))
    assert reason is None, reason
    table = adapter.layout.flatten(vectors).expand(runs, -1)
    step = SweepStep(model, losses, table, max_gradient_norms=[float("inf")] * runs, weight_decays=[0.0] * runs)
    whole = [joined(parts) for parts in rounds]
    rates = [8e-3 / 2 ** (run % 8) for run in range(runs)]
    step(whole[0], rates)
    assert step.reason is None, step.reason
    return lambda number: step(whole[number], rates)


def in_sequence(model: torch.nn.Module, rounds: list[list[dict[str, Tensor]]]) -> Callable[[int], object]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = ia3.compile_step(model, torch.optim.AdamW(trained, lr=8e-3, weight_decay=0.0))
    return lambda number: [step(part) for part in rounds[number]]


def measured(steps: Callable[[int], object], cuda: bool) -> dict:
    started = time.perf_counter()
    for number in range(BATCHES):
        steps(number)
    if cuda:
        torch.cuda.synchronize()
    setup = time.perf_counter() - started
    taken = [milliseconds(lambda: [steps(number) for number in range(BATCHES)], cuda, 1) / BATCHES for _ in range(10)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return {"setup_s": setup, "ms": statistics.median(taken), "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import peft

    cuda = torch.cuda.is_available()
    device, shape = ("cuda" if cuda else "cpu"), (LARGE if cuda and not arguments.tiny else TINY)
    where = say_machine()
    model = adapted(peft, torch.float32, shape, device)
    step = guide(model, batch_of(shape, SIZE, 128, device), cuda)
    alone = statistics.median(milliseconds(step, cuda, 1) for _ in range(13))
    del model, step
    gc.collect()
    rows = []
    for runs in RUNS:
        rounds = batches(shape["vocab_size"], runs)
        own = []
        for name, make in (("together", together), ("in sequence", in_sequence)):
            model = adapted(ia3, torch.bfloat16, shape, device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            own.append({"name": name, "runs": runs, **measured(make(model, rounds), cuda)})
            print(own[-1], flush=True)
            del model
            gc.collect()
        own.append({"name": "PEFT guide, a step each", "runs": runs, "ms": runs * alone})
        for row in own[1:]:
            row["together_takes"] = own[0]["ms"] / row["ms"]
            print(f"{runs} runs, {row['name']}: together takes {row['together_takes']:.3f} of it")
        rows += own
    arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
