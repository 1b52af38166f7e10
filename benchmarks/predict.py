"""Labels for 2,264 sentences: PEFT's `generate` of 10 tokens, and ia3's two ways, ranked and generated, in graphs.

    python benchmarks/predict.py [--tiny]

Random weights in mt0-large's shape, bf16, batches of 64, one adapter with vectors around one. The sentences are random
tokens whose numbers are drawn like PhraseBank's: about 30 a sentence, 60 for the longest of eight, at most 128. No end
token is known, so that every answer is 10 tokens long. PEFT's batches are timed for some and scaled to all
(`scaled_from` says how many): padded to 128 as in its guide, and padded to the longest of a batch sorted by length.
ia3's runs are whole ones: `first_s` records the graphs, `s` replays them. Three labels of up to three tokens are
ranked. Labels and answers that are equal between the captured and the ordinary way are counted. `--tiny` tries the
script on a CPU, where nothing is captured.

Needs: one GPU, --tiny a CPU; peft; 5 minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

import ia3
from bench import say_machine
from ia3.fast.generate import Decoder
from ia3.inference.predict import sorted_batches
from ia3.inference.rank import LabelScorer
from train_step import LARGE, TINY, build

RESULTS = Path(__file__).parent / "results" / "predict.json"
LABELS = [[7, 21, 1], [33, 1], [45, 9, 1]]
MOST, NEW, PAD = 128, 10, 0


def sentences(count: int, words: int) -> list[list[int]]:
    """Rows of tokens, as many in each as PhraseBank's sentences have."""
    chance = torch.Generator().manual_seed(2)
    lengths = torch.empty(count).log_normal_(3.24, 0.57, generator=chance).round().clamp(5, MOST).long()
    return [torch.randint(2, words, (length,), generator=chance).tolist() for length in lengths.tolist()]


class Tokens:
    """What stands for a tokenizer where the texts are tokens already."""

    pad_token_id = PAD

    def __call__(self, texts: Any = None, *, text_target: Any = None, **how: Any) -> dict[str, Any]:
        return {"input_ids": LABELS if text_target is not None else texts}


def padded(rows: Sequence[Sequence[int]], length: int) -> BatchEncoding:
    ids = [[*row, *[PAD] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def adapted(library: Any, shape: dict, device: str) -> Any:
    """The model with one adapter, the same numbers for every library."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = library.get_peft_model(build(shape, dtype, device), library.IA3Config(task_type="SEQ_2_SEQ_LM")).eval()
    model.generation_config.eos_token_id = None
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.numel()).view(parameter.shape))
    return model


class Run:
    """The sentences, and the report that grows case by case."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import peft

        self.peft, self.output = peft, arguments.output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.shape = TINY if arguments.tiny or self.device == "cpu" else LARGE
        self.size, count = (8, 50) if arguments.tiny else (64, 2264)
        self.rows = sentences(count, self.shape["vocab_size"])
        self.batches = list(sorted_batches([len(row) for row in self.rows], self.size))
        mean = statistics.mean(map(len, self.rows))
        self.report: dict[str, Any] = {"machine": say_machine(), "rows": []}
        self.report |= {"sentences": count, "batch": self.size, "mean_tokens": round(mean, 1)}
        print(f"# {count} sentences of {mean:.1f} tokens", flush=True)

    def case(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a case to the report; one that fails leaves the others."""
        try:
            row = {"name": name, **measure()}
        except Exception as error:
            traceback.print_exc()
            row = {"name": name, "error": f"{type(error).__name__}: {error}"}
        self.report["rows"].append(row)
        print(row, flush=True)
        self.output.write_text(json.dumps(self.report, indent=1) + "\n")

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        started = time.perf_counter()
        found = call()
        self.wait()
        return time.perf_counter() - started, found

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def some(self, count: int) -> list[list[int]]:
        """Batches from the longest to the shortest, evenly spaced."""
        step = max(1, len(self.batches) // count)
        return self.batches[step // 2 :: step][:count]

    def of(self, indices: Sequence[int]) -> list[list[int]]:
        return [self.rows[index] for index in indices]

    def generated(self, model: Any, batches: Sequence[Sequence[int]], length: int | None) -> dict[str, Any]:
        """The model's own `generate` over some batches, scaled to all."""

        @torch.inference_mode()
        def generate(indices: Sequence[int]) -> Tensor:
            rows = self.of(indices)
            batch = padded(rows, length or max(map(len, rows))).to(self.device)
            return model.generate(**batch, max_new_tokens=NEW, num_beams=1, do_sample=False)

        generate(batches[0])
        taken = [self.seconds(lambda indices=indices: generate(indices))[0] for indices in batches]
        whole = statistics.mean(taken) * len(self.batches)
        return {"s": whole, "batch_ms": 1e3 * statistics.median(taken), "scaled_from": len(batches)}


def twice(run: Run, once: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """A whole run that records, and the median of three that replay."""
    first, _ = run.seconds(once)
    taken, found = zip(*(run.seconds(once) for _ in range(3)), strict=True)
    seconds = statistics.median(taken)
    return {"first_s": first, "s": seconds, "batch_ms": 1e3 * seconds / len(run.batches)}, found[-1]


def ranked(run: Run, model: Any) -> None:
    """Labels by their scores, the ordinary way and captured."""
    scores: dict[str, Tensor] = {}

    def measure(way: str) -> dict[str, Any]:
        scorer = LabelScorer(model, Tokens(), [str(label) for label in LABELS], batch_size=run.size)
        if way == "eager":
            scorer.reason = "it is measured"
        row, scores[way] = twice(run, lambda: scorer(run.rows))  # type: ignore[arg-type]
        row["path"] = "eager" if scorer.reason is not None else "captured"
        if way == "captured" and "eager" in scores:
            differ = scores[way].argmax(1) != scores["eager"].argmax(1)
            row["labels_that_differ"] = int(differ.sum())
            row["largest_difference_of_scores"] = float((scores[way] - scores["eager"]).abs().max())
            top = scores["eager"].topk(2).values
            margins = (top[:, 0] - top[:, 1])[differ].tolist()
            row["largest_margin_of_a_label_that_differs"] = max(margins, default=0.0)
        return row

    run.case("ia3 labels ranked, ordinary", lambda: measure("eager"))
    run.case("ia3 labels ranked, captured", lambda: measure("captured"))


def written(run: Run, model: Any) -> None:
    """Ten tokens by captured steps, compared with the model's own `generate` on some batches."""

    def measure() -> dict[str, Any]:
        decoder = Decoder(model, max_new_tokens=NEW)

        def of(indices: Sequence[int]) -> Tensor:
            rows = run.of(indices)
            batch = padded(rows, max(map(len, rows)))
            return decoder(batch["input_ids"], batch["attention_mask"])

        row, _ = twice(run, lambda: [of(indices) for indices in run.batches])
        equal = total = 0
        for indices in run.some(4):
            rows = run.of(indices)
            batch = padded(rows, max(map(len, rows))).to(run.device)
            with torch.inference_mode():
                wanted = model.generate(**batch, max_new_tokens=NEW, num_beams=1, do_sample=False)
            equal, total = equal + int((of(indices) == wanted).all(1).sum()), total + len(rows)
        return {"path": decoder.path, **row, "answers_equal_to_generate": f"{equal} of {total}"}

    run.case("ia3 10 tokens generated, captured", measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ours", action="store_true", help="ia3's cases alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    run = Run(arguments := parser.parse_args())
    if not arguments.ours:
        model = adapted(run.peft, run.shape, run.device)
        run.case("PEFT 10 tokens, padded to 128", lambda: run.generated(model, run.some(5), MOST))
        run.case("PEFT 10 tokens, sorted, padded to the longest", lambda: run.generated(model, run.some(6), None))
        del model
        gc.collect()
    model = adapted(ia3, run.shape, run.device)
    ranked(run, model)
    written(run, model)
    run.case("ia3 10 tokens generated, ordinary", lambda: run.generated(model, run.some(6), None))


if __name__ == "__main__":
    main()
