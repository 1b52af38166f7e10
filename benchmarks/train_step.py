"""One training step on mt0-large's shape, PEFT and ia3 side by side on one card.

    python benchmarks/train_step.py [--tiny]

Random weights in mt0-large's shape (24 + 24 blocks, width 1,024, 250,112 words, head not tied), dropout on, labels of
three tokens. `guide` is PEFT's guide: fp32 and eager, padded to 128; `import changed` is the same loop with ia3, its
batches on the GPU as the guide has them. `captured` is PEFT's bf16 step whole in one CUDA graph, `compiled` has each
of its blocks under `torch.compile`: the one or the other is the strongest that PEFT can be made without changing it.
ia3's is `ia3.compile_step`, at equal shapes, and at the lengths (`length` null) of a typical shuffled batch of
PhraseBank's sentences, which is padded to about 64 with 8 of them; `fp8` multiplies the layers' frozen weights in
eight bits, and `all-linear` has a vector at every linear layer. `frozen base` is the memory's measure: no adapter but
one vector at the embedding, captured alike. Medians of 20 steps after 3: `ms` of steps that follow one another, 10 at a
time, as training does, and `waited_ms` of steps each waited for. `peak_mib` is the allocator's peak after the model is
built, a graph's included; `reserved_mib` what it had taken from the card. Set-up is the first step's: kernels are
compiled, or found in Triton's cache, and the graph recorded. `--tiny` tries the script on a CPU.

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
from typing import Any

import torch
from torch import Tensor
from transformers import MT5Config, MT5ForConditionalGeneration

import ia3
from bench import say_machine
from lengths import typical_batch

RESULTS = Path(__file__).parent / "results" / "train_step.json"
LARGE = {"vocab_size": 250112, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
TINY = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def build(shape: dict, dtype: torch.dtype, device: str) -> MT5ForConditionalGeneration:
    torch.manual_seed(0)
    config = MT5Config(**shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As T5 begins: its scores are not divided by the root of the heads' width, so queries are small.
            spread = 1.0 if "shared" in name else 0.004 if name.endswith(".q.weight") else 0.03
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, spread)
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.03)
    return model


def batch_of(shape: dict, rows: int, length: int | None, device: str) -> dict[str, Tensor]:
    """Rows of equal length, or of PhraseBank's lengths, padded to the longest."""
    lengths = torch.tensor([length] * rows if length else typical_batch(rows))
    longest = int(lengths.max())
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(2, shape["vocab_size"], (rows, longest), generator=chance)
    labels = torch.randint(2, shape["vocab_size"], (rows, 3), generator=chance)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def timed(step: Callable[[], object], cuda: bool, repeats: int, together: int = 10) -> dict:
    """Milliseconds a step, and the memory; so many steps `together` follow one another."""
    for _ in range(3):
        step()
    alone, followed = [], []
    for _ in range(repeats):
        alone.append(milliseconds(step, cuda, 1))
    for _ in range(max(3, repeats // 4)):
        followed.append(milliseconds(step, cuda, together if cuda else 1))
    quarters = statistics.quantiles(followed, n=4)
    row = {"ms": statistics.median(followed), "quartiles": [quarters[0], quarters[2]]}
    row["waited_ms"] = statistics.median(alone)
    if cuda:
        row |= {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}
        row |= {"reserved_mib": torch.cuda.memory_reserved() / 2**20}
    return row


def milliseconds(step: Callable[[], object], cuda: bool, count: int) -> float:
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3 / count


def launches(step: Callable[[], object]) -> dict:
    """Kernels of one step, and how long the GPU is busy with them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.key_averages()
    ranked = sorted(events, key=lambda event: -event.self_device_time_total)
    return {
        "busy_ms": sum(event.self_device_time_total for event in events) / 1e3,
        "kernels": sum(event.count for event in events),
        "longest": [[event.key[:90], event.count, event.self_device_time_total / 1e3] for event in ranked[:22]],
    }


def guide(model: torch.nn.Module, batch: dict[str, Tensor], cuda: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def captured(model: torch.nn.Module, batch: dict[str, Tensor], cuda: bool) -> Callable[[], object]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=torch.tensor(8e-3, device="cuda"), fused=True, capturable=True)
    return recorded(model, batch, optimizer)


def compiled(model: torch.nn.Module, batch: dict[str, Tensor], cuda: bool) -> Callable[[], object]:
    """The guide's step in the model's dtype, each block compiled; the blocks share what is compiled."""
    torch._dynamo.config.recompile_limit = 128
    base = model.get_base_model()
    for block in (*base.encoder.block, *base.decoder.block):
        block.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=8e-3, fused=cuda)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def recorded(
    model: torch.nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], object]:
    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def frozen_base(model: torch.nn.Module, batch: dict[str, Tensor], cuda: bool) -> Callable[[], object]:
    """What a gradient that passes through the frozen base costs, captured: one vector behind the embedding."""
    model.unload()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    vector = torch.nn.Parameter(torch.ones(model.config.d_model, device=model.device))
    model.encoder.embed_tokens.register_forward_hook(lambda module, args, output: output * vector.to(output.dtype))
    optimizer = torch.optim.AdamW([vector], lr=torch.tensor(8e-3, device="cuda"), fused=True, capturable=True)
    return recorded(model, batch, optimizer)


def ours(model: torch.nn.Module, batch: dict[str, Tensor], cuda: bool, **how: Any) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3, weight_decay=0.0)
    step = ia3.compile_step(model, optimizer, **how)
    assert step.path == ("captured" if cuda else "fused"), step.reason
    return lambda: step(batch)


def known_rows(output: Path, where: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call on a machine like this one."""
    found = json.loads(output.read_text()) if output.exists() else {}
    return found["rows"] if found.get("machine") == where else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ours", action="store_true", help="ia3's steps alone")
    parser.add_argument("--resume", action="store_true", help="leave out what the output has of a machine like this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import peft

    cuda = torch.cuda.is_available()
    device, shape = ("cuda", LARGE) if cuda and not arguments.tiny else ("cuda" if cuda else "cpu", TINY)
    where = say_machine()
    half = torch.bfloat16
    cases = [
        ("ia3 compile_step", ia3, ours, half, 8, None),
        ("ia3 compile_step", ia3, ours, half, 8, 64),
        ("ia3 compile_step", ia3, ours, half, 8, 128),
        ("ia3 compile_step", ia3, ours, half, 64, None),
        ("ia3 compile_step", ia3, ours, half, 64, 128),
        ("ia3 compile_step, recompute", ia3, partial(ours, recompute=True), half, 64, 128),
        ("ia3 compile_step, fp8", ia3, partial(ours, frozen="fp8"), half, 64, 128),
        ("ia3 compile_step, all-linear", ia3, ours, half, 8, 128),
        ("ia3 compile_step, all-linear", ia3, ours, half, 64, 128),
        ("ia3 compile_step", ia3, ours, torch.float32, 8, 128),
        ("PEFT captured", peft, captured, half, 8, 128),
        ("PEFT captured", peft, captured, half, 64, 128),
        ("PEFT compiled", peft, compiled, half, 64, 128),
        ("frozen base", ia3, frozen_base, half, 64, 128),
        ("PEFT guide", peft, guide, torch.float32, 8, 128),
        ("PEFT guide, import changed", ia3, guide, torch.float32, 8, None),
        ("PEFT guide, import changed", ia3, guide, torch.float32, 8, 128),
        ("PEFT guide, import changed", ia3, guide, half, 8, None),
    ]
    if arguments.ours:
        cases = [case for case in cases if case[1] is ia3 and case[2] is not frozen_base]
    rows = known_rows(arguments.output, where) if arguments.resume else []
    known = {(row["name"], row["dtype"], row["batch"], row["length"]) for row in rows}
    for name, library, make, dtype, count, length in cases:
        if make in (captured, frozen_base) and not cuda:
            continue
        if (name, str(dtype).removeprefix("torch."), count, length) in known:
            continue
        targets = "all-linear" if name.endswith("all-linear") else None
        config = library.IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=targets)
        model = library.get_peft_model(build(shape, dtype, device), config).train()
        batch = batch_of(shape, count, length, "cpu" if name.startswith("ia3") else device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            step = make(model, batch, cuda)
            step()
            if cuda:
                torch.cuda.synchronize()
        except RuntimeError as error:  # the next cases can still be measured
            print(f"{name} {dtype} {count} x {length}: {error}", flush=True)
            continue
        setup = time.perf_counter() - started
        row = {"name": name, "dtype": str(dtype).removeprefix("torch."), "batch": count, "length": length}
        row |= {"setup_s": setup, **timed(step, cuda, 20 if cuda else 3)}
        row |= launches(step) if cuda else {}
        rows.append(row)
        print({key: value for key, value in row.items() if key != "longest"}, flush=True)
        arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
        del model, step, batch
        gc.collect()
        torch.cuda.empty_cache()
    for each in rows[:2]:
        for key, count, busy in each.get("longest", []):
            print(f"  {each['length'] or 0:>4} {busy:8.3f} ms {count:5} x {key}")


if __name__ == "__main__":
    main()
