"""A step of a loop of one's own, with nothing changed but the import, beside `ia3.compile_step`.

    python benchmarks/own_loop.py [--tiny] [--rounds 40] [--float32]

mt0-large's shape with random weights (24 + 24 blocks, width 1,024, 250,112 words, head not tied), bf16, dropout on,
batches of 8 of PhraseBank's lengths with labels of three tokens, on the device as a loop has them. A step is
`model(**batch).loss.backward()`, torch's AdamW, a linear schedule and `zero_grad`; `reads its loss` also adds the loss
up on the host each step, as PEFT's guide does. `compile_step` takes the same batches from the CPU. The candidates
take turns, 10 steps each, over the same batches; medians and quartiles of milliseconds a step, and the ratio to
`compile_step`, pair by pair. `host` is the thread's own time of the loop's parts. `--tiny` is 2 + 2 narrow blocks, for
a CPU.

Needs: one GPU, --tiny a CPU; nothing more; a few minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

import ia3
from bench import say_machine, write
from lengths import shuffled
from train_step import LARGE, TINY, build

STEPS = 10


def batches(shape: dict[str, int], count: int, device: str) -> list[dict[str, Tensor]]:
    chance, lengths = torch.Generator().manual_seed(1), shuffled()
    found = []
    for start in range(0, 8 * count, 8):
        rows = torch.tensor(lengths[start : start + 8])
        ids = torch.randint(2, shape["vocab_size"], (8, int(rows.max())), generator=chance)
        labels = torch.randint(2, shape["vocab_size"], (8, 3), generator=chance)
        mask = (torch.arange(ids.shape[1]) < rows[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found.append({name: tensor.to(device) for name, tensor in batch.items()})
    return found


class Loop:
    """PEFT's guide's loop; `host` collects the thread's own seconds of its parts."""

    def __init__(self, model: Any, *, reads: bool) -> None:
        self.model, self.reads = model, reads
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, 100_000)
        self.total = 0.0
        self.host: dict[str, list[float]] = {name: [] for name in ("forward", "backward", "optimizer", "rest")}

    def __call__(self, batch: dict[str, Tensor]) -> None:
        marks = [time.thread_time()]
        loss = self.model(**batch).loss
        marks.append(time.thread_time())
        loss.backward()
        marks.append(time.thread_time())
        self.optimizer.step()
        marks.append(time.thread_time())
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.reads:
            self.total += float(loss.detach())
        marks.append(time.thread_time())
        for seconds, before, after in zip(self.host.values(), marks[:-1], marks[1:], strict=True):
            seconds.append(after - before)


def compiled(model: Any) -> Callable[[dict[str, Tensor]], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
    step = ia3.compile_step(model, optimizer, get_linear_schedule_with_warmup(optimizer, 0, 100_000))
    assert step.reason is None, step.reason
    return step


def milliseconds(run: Callable[[dict[str, Tensor]], object], data: list[dict[str, Tensor]]) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for batch in data:
        run(batch)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3 / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    say_machine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, dtype = (TINY if arguments.tiny else LARGE), (torch.float32 if arguments.float32 else torch.bfloat16)

    def adapted() -> Any:
        return ia3.get_peft_model(build(shape, dtype, device), ia3.IA3Config(task_type="SEQ_2_SEQ_LM")).train()

    here, away = (batches(shape, 3 * STEPS, where) for where in ("cpu", device))
    loops = {"own loop": Loop(adapted(), reads=False), "own loop, reads its loss": Loop(adapted(), reads=True)}
    candidates: dict[str, tuple[Callable[..., object], list[dict[str, Tensor]]]] = {
        "compile_step": (compiled(adapted()), here),
        **{name: (loop, away) for name, loop in loops.items()},
    }
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(3 + arguments.rounds):
        at = STEPS * (turn % 3)
        for name, (run, data) in candidates.items():
            # The first three turns see each shape, and capture it.
            elapsed = milliseconds(run, data[at : at + STEPS])
            if turn >= 3:
                taken[name].append(elapsed)
    rows = {}
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(a / b for a, b in zip(times, taken["compile_step"], strict=True))
        rows[name] = {"ms": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "ratio": round(ratio, 3)}
    for name, loop in loops.items():
        seen = {part: times[3 * STEPS :] for part, times in loop.host.items()}
        rows[name]["host_ms"] = {part: round(1e3 * statistics.median(times), 3) for part, times in seen.items()}
    name = "own_loop" + ("_tiny" if arguments.tiny else "") + ("_float32" if arguments.float32 else "")
    write(name, {"dtype": str(dtype), "rows": rows})


if __name__ == "__main__":
    main()
