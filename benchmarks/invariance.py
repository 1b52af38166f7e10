"""Whether an answer depends on who is answered with it, with and without fixed shapes, and what they cost.

    python benchmarks/invariance.py [--tiny]

Random weights in mt0-large's shape, bf16; 64 adapters of random vectors in an `AdapterTable`; 256 requests of 4 to 200
random tokens, an adapter each, 32 new tokens, no end token. Each is answered alone, and three times in company: in an
order, and in numbers at a time, of a seed. `equal` counts the requests whose tokens are the same in all four.
`batches` is `compile_generate` on whole batches of 1 to 32; `slots` are those of `ia3 serve`, which requests join at
any step; `slots, invariant` are the same with `--batch-invariant`. `labels` are four, ranked as the server does:
`equal` where all probabilities are the same to the last bit. `tokens_per_s` counts new tokens in company,
`texts_per_s` texts; what is recorded or compiled was so before. `--tiny` tries the script on a CPU, in bf16 too.

Needs: one GPU, --tiny a CPU; nothing more; some minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import train_step
from bench import say_machine
from ia3 import AdapterTable, IA3Config, find_sites
from ia3.fast.generate import Decoder
from ia3.fast.slots import Slots
from ia3.mixing import gather_flat
from ia3.serving.batches import Batches
from ia3.serving.reading import Prompt
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from register import write_adapters

RESULTS = Path(__file__).parent / "results" / "invariance.json"
LABELS = ("negative", "neutral", "positive", "mixed")
AT_ONCE, SEEDS = 32, (1, 2, 3)

# What answers all requests, in the company of a seed.
Run = Callable[[int | None], list[Any]]


def words() -> PreTrainedTokenizerFast:
    """The labels' words, each a token."""
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(("<pad>", "</s>", *LABELS))}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


class Requests:
    """What is asked, of one model with adapters.

    Args:
        folder: for the adapters' files.
        tiny: a small model, and few requests.
    """

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = train_step.TINY if tiny else train_step.LARGE
        self.model = train_step.build(shape, torch.bfloat16, device).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.new, count, adapters = (6, 24, 4) if tiny else (32, 256, 64)
        config = IA3Config(task_type="SEQ_2_SEQ_LM")
        places = write_adapters(folder, find_sites(self.model, config).layout, config, adapters, adapters)
        self.table = AdapterTable(self.model)
        for place in places:
            self.table.register(place.name, place)
        draw = random.Random(0)
        self.rows = [
            [draw.randrange(2, shape["vocab_size"]) for _ in range(draw.randint(4, 40 if tiny else 200))]
            for _ in range(count)
        ]
        self.names = [draw.choice(places).name for _ in range(count)]
        self.longest = max(map(len, self.rows))

    def in_company(self, seed: int | None) -> Iterable[list[int]]:
        """The requests' numbers, some at a time; each alone without a seed."""
        draw, order = random.Random(seed), list(range(len(self.rows)))
        if seed is not None:
            draw.shuffle(order)
        while order:
            count = 1 if seed is None else draw.randint(1, AT_ONCE)
            yield order[:count]
            order = order[count:]

    # The ways

    def batches(self) -> Run:
        """Whole batches."""
        decoder = Decoder(self.model, max_new_tokens=self.new, num_beams=1, do_sample=False)

        def answer(some: Sequence[int]) -> list[Any]:
            length = max(len(self.rows[index]) for index in some)
            ids = torch.zeros(len(some), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, index in enumerate(some):
                ids[place, : len(self.rows[index])] = torch.tensor(self.rows[index])
                mask[place, : len(self.rows[index])] = 1
            found: list[Any] = decoder(ids, mask, adapter_names=[self.names[index] for index in some])[:, 1:].tolist()
            return found

        return partial(one_after_the_other, self, answer)

    def slots(self, *, invariant: bool) -> Run:
        """Slots as `ia3 serve` has them."""
        how: dict[str, Any] = {"num_beams": 1, "do_sample": False, "invariant": invariant}
        return partial(through, self, Slots(self.model, AT_ONCE, 256, self.new, self.table.layout, **how))

    def labels(self, *, invariant: bool) -> Run:
        """The probabilities of labels."""
        batches = Batches(self.model, words(), AT_ONCE, invariant=invariant)
        task = Task(
            kind=TaskKind.LABEL_WORDS, template=Template.of_column("text"), labels=LABELS, max_length=self.longest
        )
        prompts = [Prompt(row, task, 0, task.max_length) for row in self.rows]

        def answer(some: Sequence[int]) -> list[Any]:
            found = batches([prompts[index] for index in some], [self.names[index] for index in some])
            return [each.probabilities for each in found]

        return partial(one_after_the_other, self, answer)


def through(requests: Requests, slots: Slots, seed: int | None) -> list[Any]:
    """All requests' tokens through slots: some come at a time, and between them some steps are made."""
    draw, found, inside = random.Random(seed), {}, dict[int, int]()

    def step() -> None:
        for slot in slots.step():
            found[inside.pop(slot)] = slots.tokens(slot)

    for some in requests.in_company(seed):
        while len(slots.free) < len(some) or (seed is None and inside):
            step()
        free = slots.free[:1] if seed is None else draw.sample(slots.free, len(some))
        vectors = gather_flat(requests.model, [requests.names[index] for index in some])
        slots.admit(free, [requests.rows[index] for index in some], *vectors)
        inside |= zip(free, some, strict=True)
        for _ in range(draw.randint(0, 4)):
            step()
    while inside:
        step()
    return [found[index] for index in range(len(found))]


def one_after_the_other(
    requests: Requests, answer: Callable[[Sequence[int]], list[Any]], seed: int | None
) -> list[Any]:
    """All requests' answers, some at a time."""
    found: dict[int, Any] = {}
    for some in requests.in_company(seed):
        found |= zip(some, answer(some), strict=True)
    return [found[index] for index in range(len(found))]


def measured(run: Run, each: int) -> dict[str, Any]:
    """How many are answered as alone, and how fast; `each` counts for so many."""
    alone = run(None)
    run(SEEDS[0])  # what this shape of company needs is recorded
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    others = [run(seed) for seed in SEEDS]
    seconds = time.perf_counter() - started
    equal = sum(all(other[index] == alone[index] for other in others) for index in range(len(alone)))
    return {"equal": equal, "of": len(alone), "a_second": each * len(SEEDS) * len(alone) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    where, found = say_machine(), []
    with tempfile.TemporaryDirectory() as folder:
        requests = Requests(Path(folder), tiny=arguments.tiny)
        ways: dict[str, Callable[[], Run]] = {"batches": requests.batches}
        for invariant in (False, True):
            name = ", invariant" if invariant else ""
            ways[f"slots{name}"] = partial(requests.slots, invariant=invariant)
            ways[f"labels{name}"] = partial(requests.labels, invariant=invariant)
        for name, make in ways.items():
            writes = not name.startswith("labels")
            row = {"name": name, **measured(make(), requests.new if writes else 1)}
            row["tokens_per_s" if writes else "texts_per_s"] = row.pop("a_second")
            found.append(row)
            print(row, flush=True)
            arguments.output.write_text(json.dumps({"machine": where, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
