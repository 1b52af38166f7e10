"""What a change does to the speed of a step: two source trees in turns on one card, as ratios of their GPU's busy time.

    python benchmarks/two_trees.py OLD_SRC NEW_SRC [--rounds 3] [--tiny]

Each round starts a process a tree (`PYTHONPATH` is its source), which takes steps of mt0-large's shape and of a Llama
of 3 B and times them. `busy` is the time that the GPU computes in a step, which a host's noise doesn't touch; `ms` is
of steps that follow one another. Medians over the rounds, and new over old, pair by pair.

Needs: one GPU, --tiny a CPU; two source trees; a minute a round and tree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "two_trees.json"


def measure(tiny: bool) -> None:
    """The cases, one JSON line each; runs in a process of its own."""
    import torch

    import ia3
    import llama_step
    import train_step

    cuda = torch.cuda.is_available()
    device, large = ("cuda", not tiny) if cuda else ("cpu", False)
    cases = [("mt0", torch.bfloat16, 8, None), ("mt0", torch.bfloat16, 64, 128), ("mt0", torch.float32, 8, 128)]
    cases += [("llama", torch.bfloat16, 4, llama_step.LENGTH)]
    for kind, dtype, count, length in cases:
        if kind == "mt0":
            shape = train_step.LARGE if large else train_step.TINY
            model = train_step.build(shape, dtype, device)
            batch, task = train_step.batch_of(shape, count, length, "cpu"), "SEQ_2_SEQ_LM"
        else:
            shape = llama_step.THREE_B if large else llama_step.TINY
            model, task = llama_step.build(shape, device), "CAUSAL_LM"
            batch = llama_step.batch_of(shape["vocab_size"], llama_step.FULL)
        model = ia3.get_peft_model(model, ia3.IA3Config(task_type=task)).train()
        step = train_step.ours(model, batch, cuda)
        row: dict[str, Any] = {"case": f"{kind} {str(dtype).removeprefix('torch.')} {count} x {length}"}
        row |= train_step.timed(step, cuda, 20 if cuda else 2)
        row |= {"busy_ms": train_step.launches(step)["busy_ms"]} if cuda else {}
        print("ROW" + json.dumps(row), flush=True)
        del model, step, batch
        torch.cuda.empty_cache()


def rows_of(source: str, tiny: bool) -> dict[str, dict[str, Any]]:
    here = str(Path(__file__).parent)
    command = [sys.executable, __file__, "--measure", *(["--tiny"] if tiny else []), source, source]
    path = os.pathsep.join([source, here, os.environ.get("PYTHONPATH", "")])
    output = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line[3:]) for line in output.stdout.splitlines() if line.startswith("ROW")]
    return {line["case"]: line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.tiny)
        return
    from bench import say_machine

    machine, rounds = say_machine(), []
    for _ in range(arguments.rounds):
        rounds.append((rows_of(arguments.old, arguments.tiny), rows_of(arguments.new, arguments.tiny)))
    found = []
    for case in rounds[0][1]:
        row: dict[str, Any] = {"case": case}
        for key in ("busy_ms", "ms", "peak_mib", "setup_s"):
            pairs = [(old[case][key], new[case][key]) for old, new in rounds if key in old.get(case, {})]
            if pairs:
                row[key] = [statistics.median(values) for values in zip(*pairs, strict=True)]
                row[f"{key} new/old"] = statistics.median(new / old for old, new in pairs)
        found.append(row)
        print(row, flush=True)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
