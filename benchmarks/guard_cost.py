"""What the host does for a call of an own loop besides computing: guard, packing, and the way there and back.

    python benchmarks/guard_cost.py [--rounds 200]

The modules of mt0-large (24 + 24 blocks, an adapter's 192 vectors) with tiny widths, whose loss is not computed at all,
on one core of a CPU. `guard` is the look at whether the model still is what its loss was fused from; `pack` leaves the
padding of a typical shuffled batch of PhraseBank's sentences out, and `round up` fills it up as for a GPU; `forward` is
`model(**batch).loss` whole and `backward` what hands the gradient on to 192 vectors. Best tenths and medians of the
thread's own time in milliseconds, the parts taking turns, which finds caches as cold as a loop's.

Needs: CPU; nothing more; half a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import MT5Config, MT5ForConditionalGeneration

import ia3
from bench import say_machine, write
from ia3.fast.output import _STATE
from lengths import typical_batch

SHAPE = {"vocab_size": 256, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 24, "num_heads": 2}


def build() -> Any:
    torch.manual_seed(0)
    config = MT5Config(**SHAPE, feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False)
    model = ia3.get_peft_model(MT5ForConditionalGeneration(config), ia3.IA3Config(task_type="SEQ_2_SEQ_LM"))
    return model.train()


def typical(size: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor(typical_batch(size))
    ids = torch.randint(2, 256, (size, int(lengths.max())), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :3].clone()}


def without_computing(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The model's fused loss, whose numbers are there already."""
    model(**batch).loss.backward()
    state = model.__dict__[_STATE]
    found = state.computation.function(True, 64, False, **state.loss.pack(batch).tensors)
    state.computation.function = lambda *_, **__: found
    return state.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say_machine()
    model, batch = build(), typical(8)
    loss = without_computing(model, batch)
    packed = loss.pack(batch)
    parts: dict[str, Callable[[], object]] = {
        "guard": lambda: loss.guard.is_valid() and loss.guard.in_one_mode,
        "pack": lambda: loss.pack(batch),
        "round up": lambda: loss.losses.round_up(packed, 8),
        "forward": lambda: model(**batch).loss,
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*parts, "backward")}
    for turn in range(arguments.rounds + 5):
        for name, part in parts.items():
            started = time.thread_time()
            found = part()
            if turn >= 5:
                seconds[name].append(time.thread_time() - started)
        started = time.thread_time()
        found.backward()
        if turn >= 5:
            seconds["backward"].append(time.thread_time() - started)
        model.zero_grad()
    rows = {
        name: {
            "best_tenth_ms": round(1e3 * statistics.quantiles(taken, n=10)[0], 3),
            "median_ms": round(1e3 * statistics.median(taken), 3),
        }
        for name, taken in seconds.items()
    }
    counts = {"modules": len(list(model.modules())), "tensors": len(loss.guard.tensors)}
    write("guard_cost", {**counts, "parts": rows})


if __name__ == "__main__":
    main()
