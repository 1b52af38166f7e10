"""Decoding one batch of 256 examples with 1 to 256 adapters in it, against PEFT's ways of doing the same.

    python benchmarks/many_adapters.py [--tiny] [--shape mt0-large | llama-3-8b] [--registered N]

Random weights in the shapes of mt0-large and Llama-3-8B, bf16; prompts of 32 random tokens, 32 new ones, no end token.
Tokens a second of whole calls, prompt included, median of 5 after 2 that record. `base` is the bare model on ia3's
captured path, and `ratio` is to it: ia3's cases take turns with it (`base_ms`), PEFT's don't. ia3's adapters are
registered in an `AdapterTable` from files, of which 256 have contents of their own; `registered` says how many names
there are, and `new` that every batch uses others than the last. PEFT's IA3 switches between 64 adapters, 4 examples
each, one group after the other: 3 groups are timed and scaled to 64. PEFT's LoRA of rank 8 takes `adapter_names`; 3 and
7 new tokens are timed, and the difference scaled to 32.
`same_alone` counts rows of the mixed batch whose tokens are those of the row alone under its adapter, filled up with
copies of itself to a batch of the same size, so that the kernels are the same. `--tiny` tries the script on a CPU.

Needs: one GPU, --tiny a CPU; peft; a quarter of an hour.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import train_step
from bench import say_machine
from ia3 import AdapterTable, IA3Config, find_sites
from ia3.fast.generate import Decoder
from register import write_adapters

RESULTS = Path(__file__).parent / "results" / "many_adapters.json"
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY_LLAMA = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPT, NEW = 32, 32
GENERATING = {"num_beams": 1, "do_sample": False}


def build_llama(shape: dict, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its frequencies are computed, not drawn
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02)
    return model


class Shape:
    """One base model, and the cases that are measured on it."""

    def __init__(self, name: str, tiny: bool, registered: int, report: Callable[[dict[str, Any]], None]) -> None:
        self.name, self.registered, self.report = name, registered, report
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        small = tiny or self.device == "cpu"
        if name == "mt0-large":
            shape = train_step.TINY if small else train_step.LARGE
            self.model, self.task = train_step.build(shape, dtype, self.device).eval(), "SEQ_2_SEQ_LM"
        else:
            shape = TINY_LLAMA if small else LLAMA
            self.model, self.task = build_llama(shape, dtype, self.device).eval(), "CAUSAL_LM"
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.batch, self.new, self.most = (16, 4, 8) if tiny else (256, NEW, 256)
        chance = torch.Generator().manual_seed(1)
        self.ids = torch.randint(2, shape["vocab_size"], (self.batch, PROMPT), generator=chance).to(self.device)
        self.mask = torch.ones_like(self.ids)
        self.base: float | None = None

    def case(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Report a case; one that fails leaves the others."""
        try:
            row = {"shape": self.name, "name": name, **measure()}
        except Exception as error:
            traceback.print_exc()
            row = {"shape": self.name, "name": name, "error": f"{type(error).__name__}: {error}"}
        if self.base is not None and "tokens_per_s" in row:
            row.setdefault("ratio", row["tokens_per_s"] / self.base)
        elif name == "base" and "tokens_per_s" in row:
            self.base = row["tokens_per_s"]
        self.report(row)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def speed(self, call: Callable[[int], Any], beside: Callable[[], Any] | None = None) -> dict[str, Any]:
        """Of a whole batch, by the turn's number; and as a part of that of another call that takes turns with it."""
        for turn in range(2):
            call(turn)
            if beside is not None:
                beside()
        taken, others = [], []
        for turn in range(2, 7):
            taken.append(self.seconds(lambda turn=turn: call(turn)))
            others += [] if beside is None else [self.seconds(beside)]
        low, middle, high = statistics.quantiles(taken, n=4)
        row = {"tokens_per_s": self.batch * self.new / middle, "ms": 1e3 * middle}
        row["quartiles_ms"] = [1e3 * low, 1e3 * high]
        if beside is not None:
            row["base_ms"] = 1e3 * statistics.median(others)
            row["ratio"] = statistics.median(other / own for own, other in zip(taken, others, strict=True))
        return row

    # ia3's

    def ours(self) -> None:
        config = IA3Config(task_type=self.task)
        layout = find_sites(self.model, config).layout
        table = AdapterTable(self.model, capacity=self.most)
        decoder = Decoder(self.model, max_new_tokens=self.new)
        self.case("base", lambda: {"path": decoder.path, **self.speed(lambda turn: decoder(self.ids, self.mask))})
        del decoder
        with tempfile.TemporaryDirectory() as folder:
            places = write_adapters(Path(folder), layout, config, self.registered, self.most)
            table.register(places[0].name, places[0])
            decoder = Decoder(self.model, max_new_tokens=self.new)
            self.plain = Decoder(self.model, max_new_tokens=self.new)
            self.mixed(decoder, [places[0].name], 1)
            for place in places[1 : self.most]:
                table.register(place.name, place)
            names = [place.name for place in places]
            for distinct in dict.fromkeys(min(self.most, count) for count in (1, 8, 64, 256)):
                self.mixed(decoder, names[:distinct], self.most)
            self.case("rows alone", lambda: self.alone(decoder, names[: self.most]))
            started = time.perf_counter()
            for place in places[self.most :]:
                table.register(place.name, place)
            spent = time.perf_counter() - started
        self.report({"shape": self.name, "name": "registering", "adapters": len(places) - self.most, "s": spent})
        self.mixed(decoder, names[:1], len(table))
        self.mixed(decoder, names[: self.most], len(table))
        chance = random.Random(3)
        draws = [chance.sample(names, self.most) for _ in range(7)]
        each = self.batch // self.most
        self.case(
            f"ia3, {self.most} adapters, {len(table)} registered, new",
            lambda: self.speed(
                lambda turn: decoder(self.ids, self.mask, adapter_names=draws[turn] * each),
                lambda: self.plain(self.ids, self.mask),
            ),
        )
        del self.plain
        table.close()

    def mixed(self, decoder: Decoder, names: Sequence[str], registered: int) -> None:
        each = list(names) * (self.batch // len(names))
        self.case(
            f"ia3, {len(names)} adapters, {registered} registered",
            lambda: self.speed(
                lambda _: decoder(self.ids, self.mask, adapter_names=each), lambda: self.plain(self.ids, self.mask)
            ),
        )

    def alone(self, decoder: Decoder, names: Sequence[str]) -> dict[str, Any]:
        each = list(names) * (self.batch // len(names))
        mixed: Tensor = decoder(self.ids, self.mask, adapter_names=each)
        rows = sorted({0, 1, self.batch // 3, self.batch // 2, self.batch - 1})
        same = differ = 0
        for row in rows:
            ids, mask = (x[row : row + 1].expand_as(x) for x in (self.ids, self.mask))
            lone = decoder(ids, mask, adapter_names=[each[row]] * self.batch)
            same += int(torch.equal(lone[0], mixed[row]))
            other = decoder(ids, mask, adapter_names=["__base__"] * self.batch)
            differ += int(not torch.equal(other[0], mixed[row]))
        return {"same_alone": f"{same} of {len(rows)}", "other_than_the_base": f"{differ} of {len(rows)}"}

    # PEFT's

    def switching(self) -> dict[str, Any]:
        """Groups of examples one after the other, an adapter switched on for each."""
        import peft

        model = peft.get_peft_model(self.model, peft.IA3Config(task_type=self.task), adapter_name="0")
        try:
            for name in ("1", "2", "3"):
                model.add_adapter(name, peft.IA3Config(task_type=self.task))
            model.eval()
            distinct = min(64, self.batch // 4)
            size = self.batch // distinct
            batch = {"input_ids": self.ids[:size], "attention_mask": self.mask[:size]}

            def group(name: str) -> None:
                model.set_adapter(name)
                model.generate(**batch, max_new_tokens=self.new, **GENERATING)

            with torch.no_grad():
                group("0")
                taken = [self.seconds(lambda name=name: group(name)) for name in ("1", "2", "3")]
        finally:
            model.unload()
        whole = statistics.median(taken) * distinct
        return {"tokens_per_s": self.batch * self.new / whole, "ms": 1e3 * whole, "scaled_from_groups": 3}

    def lora(self, distinct: int) -> dict[str, Any]:
        """PEFT's mixed batches."""
        import peft

        config = peft.LoraConfig(task_type=self.task, r=8, lora_alpha=8)
        names = [f"adapter-{number}" for number in range(distinct)]
        started = time.perf_counter()
        model = peft.get_peft_model(self.model, config, adapter_name=names[0], autocast_adapter_dtype=False)
        try:
            for name in names[1:]:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
            model.eval()
            adding = time.perf_counter() - started
            each = names * (self.batch // distinct)

            @torch.no_grad()
            def generate(new: int) -> None:
                batch = {"input_ids": self.ids, "attention_mask": self.mask}
                model.generate(**batch, max_new_tokens=new, adapter_names=each, **GENERATING)

            generate(2)
            few, more = (self.seconds(lambda new=new: generate(new)) for new in (3, 7))
        finally:
            model.unload()
        whole = few + (more - few) / 4 * (self.new - 3)
        row = {"tokens_per_s": self.batch * self.new / whole, "ms": 1e3 * whole, "adding_s": adding}
        return {**row, "scaled_from_tokens": [3, 7]}

    def theirs(self) -> None:
        self.case("PEFT IA3, 64 adapters by switching", self.switching)
        for distinct in (8, 64):
            count = min(distinct, self.batch)
            self.case(f"PEFT LoRA r8, {count} adapters, adapter_names", lambda count=count: self.lora(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shape", choices=["mt0-large", "llama-3-8b"], help="this shape alone")
    parser.add_argument("--registered", type=int, help="names in the table; 10,000, and 2,000 for Llama")
    parser.add_argument("--ours", action="store_true", help="ia3's cases alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    where = say_machine()
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")

    for name in [arguments.shape] if arguments.shape else ["mt0-large", "llama-3-8b"]:
        usual = 20 if arguments.tiny else 10_000 if name == "mt0-large" else 2_000
        started = time.perf_counter()
        shape = Shape(name, arguments.tiny, arguments.registered or usual, report)
        shape.ours()
        if not arguments.ours:
            shape.theirs()
        print(f"# {name}: {time.perf_counter() - started:.0f} s", flush=True)
        del shape
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
