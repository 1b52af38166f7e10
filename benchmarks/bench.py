"""What the benchmarks share: interleaved timing, and a report that says where it was measured."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns so that a drifting machine favours none."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], against: str) -> dict[str, dict[str, float]]:
    """Median milliseconds and quartiles, and the median ratio to `against`, pair by pair."""
    rows = {}
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(a / b for a, b in zip(taken, seconds[against], strict=True))
        rows[name] = {
            "median_ms": round(1000 * middle, 3),
            "quartiles_ms": [round(1000 * low, 3), round(1000 * high, 3)],
            f"ratio_to_{against}": round(ratio, 4),
        }
    return rows


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"peft": _peft()} if _peft() else {}),
    }


def _peft() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("peft")
    except PackageNotFoundError:
        return ""


def write(name: str, report: dict[str, Any]) -> None:
    """Print the report and keep it under `benchmarks/results`."""
    text = json.dumps({"machine": machine(), **report}, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
