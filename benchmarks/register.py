"""What registering adapters of mt0-large's shape from disk costs, in time and in memory.

    python benchmarks/register.py [--adapters 10000] [--distinct 256]

The base has mt0-large's layout and no weights (meta device): registering looks at its modules alone. The files hold
random vectors. `--distinct` of them are written, the other folders are hard links to these, so that 10,000 folders take
0.3 GB of disk; each is opened, read, hashed and checked for itself, and held in memory for itself. The files were just
written, so the system's cache serves them: a cold disk's own time is not in the figures. Nor is what a virtual machine
takes to back memory that it never used before, which can be more than all the rest: as much memory is touched and given
back before, and that time reported by itself.

Needs: CPU; 12 GB of memory, 0.3 GB of disk; 2 minutes.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MT5Config, MT5ForConditionalGeneration

from bench import write
from ia3 import AdapterTable, IA3Config, Layout, find_sites

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def mt0_large() -> torch.nn.Module:
    config = MT5Config(
        vocab_size=250112, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        return MT5ForConditionalGeneration(config)


def write_adapters(folder: Path, layout: Layout, config: IA3Config, count: int, distinct: int) -> list[Path]:
    """`count` folders with an adapter each, the first `distinct` with contents of their own."""
    chance = torch.Generator().manual_seed(0)
    places = [folder / f"adapter-{number:05d}" for number in range(count)]
    for number, place in enumerate(places):
        place.mkdir()
        if number < distinct:
            parts = layout.split(1 + 0.1 * torch.randn(layout.size, generator=chance))
            tensors = {
                f"base_model.model.{site.key}": part.reshape(site.shape).clone()
                for site, part in zip(layout.sites, parts, strict=True)
            }
            save_file(tensors, place / TENSORS, metadata={"format": "pt"})
            config.save_pretrained(place)
        else:
            for name in (TENSORS, CONFIG):
                os.link(places[number % distinct] / name, place / name)
    return places


def touch(size: int) -> float:
    """Seconds that touching this many bytes of fresh memory takes."""
    page = mmap.PAGESIZE
    start = time.perf_counter()
    with mmap.mmap(-1, size) as memory:
        memory[::page] = b"1" * -(-size // page)
        return time.perf_counter() - start


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def timed_registering(table: AdapterTable, places: list[Path]) -> list[float]:
    """Milliseconds of each registration."""
    taken = []
    for place in places:
        start = time.perf_counter()
        table.register(place.name, place)
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def of(taken: list[float]) -> dict[str, float]:
    """The first call, which finds the sites; the median and the slowest of the others; all together."""
    return {
        "first_ms": round(taken[0], 3),
        "median_ms": round(statistics.median(taken[1:]), 3),
        "slowest_ms": round(max(taken[1:]), 3),
        "total_s": round(sum(taken) / 1000, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = mt0_large()
    found = find_sites(model, IA3Config(task_type="SEQ_2_SEQ_LM"))
    table = AdapterTable(model)
    with tempfile.TemporaryDirectory() as folder:
        distinct = min(arguments.distinct, arguments.adapters)
        places = write_adapters(Path(folder), found.layout, found.config, arguments.adapters, distinct)
        size = (places[0] / TENSORS).stat().st_size
        touched = touch(size * arguments.adapters)
        before = resident()
        new = timed_registering(table, places)
        grown = resident() - before
        again = timed_registering(table, places[:1000])
    report = {
        "adapters": arguments.adapters,
        "distinct_files": distinct,
        "vectors": len(found.layout.sites),
        "numbers": found.layout.size,
        "file_bytes": size,
        "touching_as_much_memory_s": round(touched, 2),
        "registering": of(new),
        "registering the same content again (up to 1000)": of(again),
        "resident_bytes_over_file_bytes": round(grown / (size * arguments.adapters), 3),
    }
    write("register", report)


if __name__ == "__main__":
    main()
