"""Each kernel beside its floor: what the card's own copy and matrix product would take for its bytes and operations.

    python benchmarks/kernels.py [--tiny]

The shapes are mt0-large's (width 1,024, 16 heads of 64, 2,816 channels) and, where it says so, Llama-3.2-3B's and
Llama-3-8B's; bf16, dropout on, one vector for all examples in training and one an example in decoding. The card's copy
rate (reading and writing counted) and its matrix product are measured first, in the same call. `floor` is the larger of
a kernel's bytes, each read or written once, over the copy rate, and of its products' operations over the rate of the
product; `of it` is the floor over what was measured. A case is repeated in one CUDA graph over several sets of inputs,
more than the cache holds where they are large; medians of ten replays. A backward is the graph of both ways less that
of the forward. `--tiny` tries the script on a CPU, in plain PyTorch.

Needs: one GPU, --tiny a CPU; nothing more; two minutes, most of them compiling.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import say_machine, write
from ia3.fast.ops.attention import cross_attention, self_attention
from ia3.fast.ops.decode import Scores, Source, attend_across, attend_to_cache
from ia3.fast.ops.gate import gated
from ia3.fast.ops.greedy import Answers, take_likeliest
from ia3.fast.ops.norm import Norm, add_norm
from ia3.fast.ops.quantise import quantise_rows
from ia3.fast.ops.rotary import rotary_heads
from ia3.fast.ragged import Ragged
from lengths import typical_batch

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda:0", torch.bfloat16) if CUDA else ("cpu", torch.float32)
BACKEND: Any = "triton" if CUDA else "torch"
P = 0.1
PARTIALS = 16 if CUDA else 1
# So many bytes of inputs are more than the cache holds.
MANY_BYTES = 150e6 if CUDA else 1


@dataclass(frozen=True)
class Case:
    """One kernel, or several that one call launches.

    Args:
        name: with its shape.
        make: a set of inputs, and the call that is timed.
        size: the bytes of a set.
        moved: the bytes that must be read or written.
        operations: of the matrix products.
        less: the name of a case whose time is not this one's, a backward's forward.
    """

    name: str
    make: Callable[[], Callable[[], object]]
    size: float
    moved: float
    operations: float = 0.0
    less: str | None = None


def draw(*shape: int, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * spread).to(DTYPE)


def vector(groups: int, width: int, partials: int = PARTIALS) -> Tensor:
    return (1 + torch.randn(1, groups, width, device=DEVICE) * 0.1).expand(partials, -1, -1)


def seed() -> Tensor:
    return torch.randint(0, 2**62, (), device=DEVICE)


def ragged_of(lengths: Sequence[int]) -> Ragged:
    edges = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return Ragged(edges, max(lengths), sum(lengths), uniform=len(set(lengths)) == 1)


def both(name: str, function: Callable[..., Tensor], inputs: Callable[[], list[Tensor]], size: float,
         forward: tuple[float, float], backward: tuple[float, float]) -> list[Case]:  # fmt: skip
    """A forward's case, and its backward's."""

    def make(with_gradient: bool) -> Callable[[], object]:
        given = [each.requires_grad_() for each in inputs()]
        grad = torch.randn_like(function(*given))

        def run() -> object:
            with torch.set_grad_enabled(with_gradient):
                found = function(*given)
                return torch.autograd.grad(found, given, grad) if with_gradient else found

        return run

    return [
        Case(f"{name}, forward", lambda: make(False), size, *forward),
        Case(f"{name}, backward", lambda: make(True), size, *backward, less=f"{name}, forward"),
    ]


def attention(name: str, lengths: Sequence[int], heads: int, dim: int) -> list[Case]:
    ragged, width, item = ragged_of(lengths), heads * dim, DTYPE.itemsize
    bias = draw(1, heads, ragged.max_seqlen, ragged.max_seqlen)
    pairs, rows = sum(length**2 for length in lengths) * heads, ragged.total_tokens * width * item
    own_seed = seed() if CUDA else None

    def attend(qkv: Tensor, l_k: Tensor, l_v: Tensor) -> Tensor:
        return self_attention(
            qkv, bias, ragged, l_k, l_v, heads, scale=1.0, causal=False, p=P, seed=own_seed, backend=BACKEND
        )

    def inputs() -> list[Tensor]:
        return [draw(ragged.total_tokens, 3 * width, spread=0.3), *(vector(1, width).clone() for _ in "kv")]

    product = 2 * pairs * dim
    return both(f"attention {name}", attend, inputs, 4 * rows, (4 * rows, 2 * product), (7 * rows, 5 * product))


def across(name: str, lengths: Sequence[int], queries: int, heads: int, dim: int) -> list[Case]:
    source, width, item = ragged_of(lengths), heads * dim, DTYPE.itemsize
    target = Ragged.even(len(lengths), queries, 1, torch.device(DEVICE))
    keys, rows = source.total_tokens * width * item, target.total_tokens * width * item
    own_seed = seed() if CUDA else None

    def attend(q: Tensor, kv: Tensor, l_k: Tensor, l_v: Tensor) -> Tensor:
        return cross_attention(
            q, target, kv, source, 0, {}, l_k, l_v, heads, scale=1.0, p=P, seed=own_seed, backend=BACKEND
        )

    def inputs() -> list[Tensor]:
        own = [draw(target.total_tokens, width, spread=0.3), draw(source.total_tokens, 2 * width)]
        return [*own, *(vector(1, width).clone() for _ in "kv")]

    product = 2 * sum(lengths) * queries * width
    return both(
        f"attention across {name}", attend, inputs, 2 * keys, (2 * keys + 2 * rows, 2 * product),
        (4 * keys + 3 * rows, 5 * product),
    )  # fmt: skip


def gate(name: str, tokens: int, channels: int, activation: str) -> list[Case]:
    ragged, size = ragged_of([tokens]), tokens * channels * DTYPE.itemsize
    own_seed = seed() if CUDA else None
    function = {"gelu_new": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]

    def run(h: Tensor, l_ff: Tensor) -> Tensor:
        return gated(h, l_ff, ragged, activation, function, True, P, own_seed, BACKEND)

    def inputs() -> list[Tensor]:
        return [draw(tokens, 2 * channels), vector(1, channels).clone()]

    return both(f"gate {name}", run, inputs, 2 * size, (3 * size, 0.0), (5 * size, 0.0))


def norm(name: str, tokens: int, width: int) -> list[Case]:
    size, own = tokens * width * DTYPE.itemsize, Norm(draw(width), None, 1e-6, centred=False)
    own_seed = seed() if CUDA else None

    def run(x: Tensor, h: Tensor) -> Tensor:
        total, normed = add_norm(x, h, own, P, own_seed, BACKEND)
        return torch.stack([total, normed]) if not CUDA else total + normed

    def inputs() -> list[Tensor]:
        return [draw(tokens, width), draw(tokens, width)]

    # Both of what it returns are added here, which reads and writes as much again as half of it.
    return both(f"norm and sum {name}", run, inputs, 2 * size, (7 * size, 0.0), (5 * size, 0.0))


def rotation(name: str, lengths: Sequence[int], heads: int, kv_heads: int, dim: int) -> list[Case]:
    ragged, width = ragged_of(lengths), (heads + 2 * kv_heads) * dim
    size = ragged.total_tokens * width * DTYPE.itemsize
    angles = torch.rand(2, ragged.max_seqlen, dim // 2, device=DEVICE)
    cos, sin = angles[0].cos().to(DTYPE), angles[1].sin().to(DTYPE)

    def run(qkv: Tensor, l_k: Tensor, l_v: Tensor) -> Tensor:
        q, k, v = rotary_heads(qkv, cos, sin, ragged, l_k, l_v, heads, kv_heads, backend=BACKEND)
        return torch.cat([each.transpose(1, 2).flatten(2) for each in (q, k, v)], -1)

    def inputs() -> list[Tensor]:
        return [draw(ragged.total_tokens, width), *(vector(1, kv_heads * dim).clone() for _ in "kv")]

    # The three are put beside each other here, which moves as much again.
    return both(f"rotation {name}", run, inputs, size, (4 * size, 0.0), (4 * size, 0.0))


def decoding(name: str, examples: int, before: int, heads: int, kv_heads: int, dim: int, *, biased: bool) -> Case:
    """One new token each, to whose caches `before` tokens were written."""
    positions, item = 2 * before, DTYPE.itemsize
    one = Ragged.even(examples, 1, examples, torch.device(DEVICE))
    _ = one.group_of_token
    place = torch.full((examples,), before, device=DEVICE)
    bias = draw(heads, positions) if biased else None
    angles = torch.rand(2, positions, dim // 2, device=DEVICE)
    turned = None if biased else (angles[0].cos().to(DTYPE), angles[1].sin().to(DTYPE))
    width = kv_heads * dim

    def make() -> Callable[[], object]:
        qkv, cache = draw(examples, heads * dim + 2 * width), draw(2, examples, kv_heads, positions, dim)
        l_k, l_v = (vector(examples, width, 1) for _ in "kv")
        return lambda: attend_to_cache(
            qkv, cache, place, l_k, l_v, one, heads, Scores(dim**-0.5, bias=bias), turned, BACKEND
        )

    kept = 2 * examples * before * width * item
    moved = kept + examples * (2 * heads * dim + 4 * width) * item + 2 * examples * width * 4
    return Case(f"decoding, {name}", make, 2 * kept, moved)


def decoding_across(name: str, examples: int, length: int, heads: int, dim: int) -> Case:
    width, item, edges = heads * dim, DTYPE.itemsize, ragged_of([length] * examples).cu_seqlens
    source = Source(edges[:-1], edges[1:], length)

    def make() -> Callable[[], object]:
        q, kv = draw(examples, width), draw(examples * length, 2 * width)
        return lambda: attend_across(q, kv[:, :width], kv[:, width:], source, heads, 1.0, BACKEND)

    kept = 2 * examples * length * width * item
    return Case(f"decoding across, {name}", make, kept, kept + 2 * examples * width * item)


def likeliest(examples: int, words: int) -> Case:
    def make() -> Callable[[], object]:
        logits, answers = draw(examples, words), Answers.none(examples, 4096, [1], 0, None, torch.device(DEVICE))
        return lambda: take_likeliest(logits, answers, has_least=False, backend=BACKEND)

    size = examples * words * DTYPE.itemsize
    return Case(f"likeliest token of {examples} x {words:,}", make, size, size)


def rounding(tokens: int, width: int) -> Case:
    def make() -> Callable[[], object]:
        x = draw(tokens, width)
        return lambda: quantise_rows(x)

    size = tokens * width * DTYPE.itemsize
    return Case(f"rounding to fp8 {tokens} x {width}", make, size, 1.5 * size)


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [
            *attention("4 x 8", [8] * 4, 2, 8), *across("4 x 2 / 8", [8] * 4, 2, 2, 8),
            *gate("32 x 16", 32, 16, "silu"), *norm("32 x 16", 32, 16), *rotation("2 x 8", [8] * 2, 4, 2, 8),
            decoding("tiny", 4, 4, 4, 4, 8, biased=True), decoding_across("tiny", 4, 8, 2, 8), likeliest(4, 32),
            rounding(8, 32),
        ]  # fmt: skip
    few, many = typical_batch(8), typical_batch(64)
    return [
        *attention("64 x 128", [128] * 64, 16, 64), *attention("8 x 128", [128] * 8, 16, 64),
        *attention("64 x PhraseBank", many, 16, 64), *attention("8 x PhraseBank", few, 16, 64),
        *attention("16 x 256", [256] * 16, 16, 64), *attention("8 x 512", [512] * 8, 16, 64),
        *across("64 x 4 / 128", [128] * 64, 4, 16, 64), *across("8 x 4 / PhraseBank", few, 4, 16, 64),
        *gate("8,192 x 2,816", 8192, 2816, "gelu_new"), *gate("320 x 2,816", 320, 2816, "gelu_new"),
        *gate("24 x 2,816", 24, 2816, "gelu_new"), *gate("2,048 x 8,192 (3B)", 2048, 8192, "silu"),
        *norm("8,192 x 1,024", 8192, 1024), *norm("24 x 1,024", 24, 1024), *norm("2,048 x 3,072 (3B)", 2048, 3072),
        *rotation("4 x 512 (3B)", [512] * 4, 24, 8, 128),
        decoding("256, 16 before", 256, 16, 16, 16, 64, biased=True),
        decoding("256, 48 before (8B)", 256, 48, 32, 8, 128, biased=False),
        decoding_across("256 x 32", 256, 32, 16, 64), likeliest(256, 250112), likeliest(256, 128256),
        rounding(8192, 1024), rounding(8192, 5632),
    ]  # fmt: skip


def seconds_of(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, the calls taking turns."""
    turns = max(20, len(calls))
    if not CUDA:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            calls[turn % len(calls)]()
    taken = []
    for _ in range(11):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / turns / 1e3)
    return statistics.median(taken[1:])


def card() -> tuple[float, float]:
    """Bytes a second that the faster of two copies reads and writes, and operations a second of a product.

    The one is the driver's own copy, the other a kernel's, which a recorded graph runs at another rate.
    """
    size = 2**31 if CUDA else 2**20
    source, target = draw(size // 2), draw(size // 2)
    copies = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    copied = 2 * size / min(seconds_of([copy]) for copy in copies)
    sides = (8192, 1024, 5632) if CUDA else (64, 64, 64)
    pairs = [(draw(sides[0], sides[1]), draw(sides[2], sides[1])) for _ in range(4)]
    product = seconds_of([lambda a=a, b=b: a @ b.t() for a, b in pairs])
    return copied, 2 * math.prod(sides) / product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny or not CUDA
    say_machine()
    bytes_a_second, operations_a_second = card()
    print(f"copy {bytes_a_second / 1e12:.2f} TB/s, product {operations_a_second / 1e12:.0f} TFLOP/s", flush=True)
    found: dict[str, dict[str, float]] = {}
    whole: dict[str, float] = {}
    for case in cases(tiny):
        sets = min(16, max(2, math.ceil(MANY_BYTES / case.size)))
        whole[case.name] = seconds_of([case.make() for _ in range(sets)])
        taken = whole[case.name] - (0.0 if case.less is None else whole[case.less])
        floor = max(case.moved / bytes_a_second, case.operations / operations_a_second)
        found[case.name] = {"us": round(1e6 * taken, 2), "floor_us": round(1e6 * floor, 2)}
        print(f"{case.name:45} {1e6 * taken:8.1f} us, floor {1e6 * floor:7.1f}, {floor / taken:5.0%} of it", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    card_found = {"copy_bytes_per_s": bytes_a_second, "product_flop_per_s": operations_a_second}
    if not tiny:
        write("kernels", {"of_the_card": card_found, "kernels": found})


if __name__ == "__main__":
    main()
