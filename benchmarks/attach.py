"""What attaching and importing cost, ia3 and PEFT side by side on the CPU.

    python benchmarks/attach.py

mt0-large's real shape with random weights (192 sites): attaching to a fresh model, the n-th adapter, switching;
importing in fresh processes.

Needs: CPU; peft, 10 GB of memory; about 3 minutes.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import MT5Config, MT5ForConditionalGeneration

from bench import write

IMPORTS = {
    "torch": "import torch",
    "ia3": "import ia3",
    "ia3.get_peft_model": "from ia3 import get_peft_model",
    "peft.get_peft_model": "from peft import get_peft_model",
}


def mt0_large() -> torch.nn.Module:
    config = MT5Config(
        vocab_size=250112, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(config)
    return model.to_empty(device="cpu")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def attaching(library_name: str, adapters: int) -> dict[str, float]:
    library = importlib.import_module(library_name)
    config = {"task_type": "SEQ_2_SEQ_LM"}
    first = [
        seconds(lambda model=model: library.get_peft_model(model, library.IA3Config(**config)))
        for model in [mt0_large() for _ in range(5)]
    ]
    model = library.get_peft_model(mt0_large(), library.IA3Config(**config))
    more = [seconds(lambda i=i: model.add_adapter(f"a{i}", library.IA3Config(**config))) for i in range(adapters)]
    switch = [seconds(lambda i=i: model.set_adapter(f"a{i}")) for i in range(min(20, adapters))]
    return {
        "first, median of 5, ms": round(1000 * statistics.median(first), 1),
        "2nd to 11th, median, ms": round(1000 * statistics.median(more[:10]), 1),
        f"last 10 of {adapters}, median, ms": round(1000 * statistics.median(more[-10:]), 1),
        "set_adapter, median of 20, ms": round(1000 * statistics.median(switch), 1),
    }


def importing(statement: str) -> float:
    taken = [seconds(lambda: subprocess.run([sys.executable, "-c", statement], check=True)) for _ in range(5)]
    bare = [seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)) for _ in range(5)]
    return round(statistics.median(taken) - statistics.median(bare), 3)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    report = {
        "attaching to mt0-large": {"ia3": attaching("ia3", 1000), "peft": attaching("peft", 31)},
        "importing, s (median of 5, less a bare interpreter)": {n: importing(s) for n, s in IMPORTS.items()},
    }
    write("attach", report)


if __name__ == "__main__":
    main()
