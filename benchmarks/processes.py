"""A step on several GPUs of one host against one GPU's: each takes its part of the batch, and the base may be divided.

    python benchmarks/processes.py [--processes 1,2,4,8] [--tiny]

`whole base` is mt0-large's shape in bfloat16 with 64 texts of 128 tokens a GPU: `ia3.compile_step`, captured, whose
gradients are added up between two graphs, 1.1 MB a step. `two graphs` is the same on one GPU, where nothing is added.
`divided base` is Llama-3-8B's shape with 2 texts of 4,096 tokens a GPU over FSDP2, as `ia3 train` divides it;
`undivided base` is the same on one GPU. Random weights. One line of JSON a case and number of processes: `ms` is the
median of 5 times 4 steps after 4, `efficiency` the examples a second against as many times those of one GPU,
`reduce_ms` the sum of the gradients alone. `--tiny` tries it on a CPU.

Needs: one GPU and several of one host, --tiny a CPU; no packages; some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import ia3
import llama_step
import train_step
from bench import say_machine
from ia3.inference.processes import Processes, join
from ia3.training.sharding import shard

EIGHT_B = llama_step.THREE_B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
CASES = ("whole base", "two graphs", "divided base", "undivided base")
# What one GPU alone is measured with.
ALONE = ("two graphs", "undivided base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default=None, help="how many at once, with commas; by default 1 and all GPUs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # in a process that the launcher started
    arguments = parser.parse_args()
    if arguments.case is not None:
        work(arguments.case, arguments.tiny)
        return
    say_machine()
    most = 2 if arguments.tiny else torch.cuda.device_count()
    counts = [int(each) for each in (arguments.processes or f"1,{most}").split(",")]
    for case in CASES:
        alone: float | None = None
        for count in counts if case not in ALONE else [1]:
            row = launch(case, count, tiny=arguments.tiny)
            alone = row["examples_per_s"] if count == 1 else alone
            efficiency = row["examples_per_s"] / (count * alone) if alone else None
            print(json.dumps({**row, "efficiency": efficiency}), flush=True)


def launch(case: str, count: int, *, tiny: bool) -> dict[str, Any]:
    """What the first of so many processes measures."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, __file__, "--case", case, *(["--tiny"] if tiny else [])]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    row: dict[str, Any] = json.loads(said.splitlines()[-1])
    return row


def work(case: str, tiny: bool) -> None:
    """Measure one case as one of the processes."""
    processes = join()
    device = processes.device
    torch.manual_seed(0)
    if case in ("whole base", "two graphs"):
        rows, length, kind = (4, 16, "SEQ_2_SEQ_LM") if tiny else (64, 128, "SEQ_2_SEQ_LM")
        shape = train_step.TINY if tiny else train_step.LARGE
        base: Any = train_step.build(shape, torch.bfloat16, str(device))
        batch = train_step.batch_of(shape, rows, length, "cpu")
    else:
        rows, length, kind = (2, 128, "CAUSAL_LM") if tiny else (2, 4096, "CAUSAL_LM")
        shape = llama_step.TINY if tiny else EIGHT_B
        base = llama_step.build(shape, str(device))
        batch = llama_step.batch_of(shape["vocab_size"], (length,) * rows)
    model: Any = ia3.get_peft_model(base, ia3.IA3Config(task_type=kind)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    if case == "divided base":
        shard(model, trained, device)
    step = ia3.compile_step(
        model, optimizer, reduce=None if processes.alone and case != "two graphs" else processes.sum
    )
    weight = 1 / processes.count
    found = milliseconds(lambda: step(batch, weight), processes, tiny)
    flat = torch.zeros(sum(parameter.numel() for parameter in trained), device=device)
    if processes.is_first:
        row = {"case": case, "path": step.path, "processes": processes.count, "rows": rows, "length": length}
        row |= {"ms": found, "examples_per_s": processes.count * rows / found * 1e3, "megabytes": 4e-6 * len(flat)}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    reduced = milliseconds(lambda: processes.sum(flat), processes, tiny)
    if processes.is_first:
        print(json.dumps(row | {"reduce_ms": reduced}), flush=True)


def milliseconds(call: Callable[[], object], processes: Processes, tiny: bool) -> float:
    """The median of calls that follow one another, four at a time."""
    taken = []
    for turn in range(2 if tiny else 6):
        processes.wait()
        started = time.perf_counter()
        for _ in range(4):
            call()
        if processes.device.type == "cuda":
            torch.cuda.synchronize()
        if turn:  # the first records, or compiles
            taken.append((time.perf_counter() - started) * 1e3 / 4)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
