"""What the benchmarks share: interleaved timing, and a report that says where it was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ia3

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
    """Where and with what something is measured, in the one shape that every result has; None for what is not there."""
    cuda = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if cuda else None,
        "driver": _driver() if cuda else None,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "transformers", "peft")},
        "ia3": ia3.__version__,
    }


def say_machine() -> dict[str, Any]:
    """Print `machine()` on one line, and give it."""
    found = machine()
    print("#", ", ".join(f"{name} {value}" for name, value in found.items() if value is not None), flush=True)
    return found


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(name: str, report: dict[str, Any]) -> None:
    """Print the report and keep it under `benchmarks/results`."""
    text = json.dumps({"machine": machine(), **report}, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
