"""The whole guide on a GPU, PEFT's as it is written and `ia3 train`'s: 3 epochs of 2,037 examples, each evaluated.

    python benchmarks/guide_gpu.py [--tiny]

mt0-large's shape with random weights, texts of PhraseBank's lengths, labels of three tokens, batch 8, shuffled, AdamW
8e-3. PEFT's is fp32, eager, padded to 128, and evaluates by a forward over batches of 8; 40 of its steps and 10 of its
batches are timed and scaled to the whole, since each is alike. ia3's is `fit` in bf16, timed from the adapted model to
the saved adapter: set-up, 765 steps, four evaluations by loss and generated words (one before the first step), the
run's files. Cold begins with an empty cache of kernels, warm is the same in a new process. Loading the model counts for
neither. `one line` is a plain loop over batches alike with `compile_step` in bf16, without evaluations. `import
changed` is the guide's own loop with nothing changed but the import, fp32 and padded to 128, an evaluation by a
forward an epoch; it compiles its kernels, for fp32, on the way. Both are whole, with their set-up. `--tiny` tries the
script on a CPU.

Needs: one GPU, --tiny a CPU; peft; 6 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import ia3
from bench import say_machine
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import Task
from ia3.tasks.template import Template
from ia3.training.learners.words import Words
from ia3.training.loop import Training
from ia3.training.plan import RunPlan
from lengths import shuffled
from train_step import LARGE, TINY, batch_of, build, guide, milliseconds

RESULTS = Path(__file__).parent / "results" / "guide_gpu.json"
EPOCHS, BATCH, TEST = 3, 8, 227
CASES = {
    "ia3, cold": "ia3",
    "ia3, warm": "ia3",
    "one line, warm": "one line",
    "import changed": "import changed",
}
ALONE = tuple(dict.fromkeys(CASES.values()))
LABELS = ("no good", "so so", "all good")
WORDS = ["<pad>", "</s>", "<unk>", "no", "good", "so", "all", *(f"w{number}" for number in range(240))]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and the end token behind."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def examples(lengths: list[int]) -> Examples:
    chance = random.Random(0)
    rows = tuple(
        Example(" ".join(chance.choices(WORDS[7:], k=length - 1)), LABELS[number % 3])
        for number, length in enumerate(lengths)
    )
    return Examples(rows, LABELS, "made up", 0, 0)


def ours(shape: dict, device: str, few: int | None) -> dict[str, Any]:
    lengths = shuffled()[:few]
    test = min(TEST, len(lengths) // 4)
    config = ia3.IA3Config(task_type="SEQ_2_SEQ_LM")
    model = ia3.get_peft_model(build(shape, torch.bfloat16, device), config)
    model.generation_config.eos_token_id = 1
    settings = TrainSettings(
        learning_rate=8e-3, epochs=EPOCHS, batch_size=BATCH, group_by_length=False, answer_by="generation"
    )
    task = Task(template=Template.of_column("text"), labels=LABELS, max_length=128, max_new_tokens=4)
    learner = Words(model, tokenizer(), task, settings)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        training = Training(RunPlan(learner, examples(lengths[test:]), examples(lengths[:test])))
        run = training.run(Path(folder))
        seconds = time.perf_counter() - started
    evaluations = sum(each.seconds for each in run.evaluations)
    steps = run.progress.seconds
    return {
        "s": seconds,
        "steps_s": steps,
        "evaluations_s": evaluations,
        "steps": len(run.losses),
        "path": training.describe_path(),
    }


def batches(few: int | None, padded: int | None) -> tuple[list[list[dict[str, torch.Tensor]]], list[dict]]:
    """Those of three epochs, and of an evaluation."""
    lengths = shuffled()[:few]
    test = min(TEST, len(lengths) // 4)
    chance = torch.Generator().manual_seed(0)

    def batch(some: list[int]) -> dict[str, torch.Tensor]:
        width = padded or max(some)
        mask = (torch.arange(width) < torch.tensor(some)[:, None]).long()
        ids = torch.randint(7, 240, mask.shape, generator=chance) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 7, (len(some), 3))}

    def epoch(own: list[int]) -> list[dict[str, torch.Tensor]]:
        return [batch(own[start : start + BATCH]) for start in range(0, len(own), BATCH)]

    training = lengths[test:]
    return [epoch(random.Random(seed).sample(training, len(training))) for seed in range(EPOCHS)], epoch(lengths[:test])


def own_loop(shape: dict, device: str, few: int | None, *, one_line: bool) -> dict[str, Any]:
    """The guide's loop, by `compile_step` or with the import changed."""
    dtype = torch.bfloat16 if one_line else torch.float32
    model = ia3.get_peft_model(build(shape, dtype, device), ia3.IA3Config(task_type="SEQ_2_SEQ_LM")).train()
    epochs, test = batches(few, None if one_line else 128)
    started = time.perf_counter()
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(vectors, lr=8e-3)
    count = sum(map(len, epochs))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, count)
    step = ia3.compile_step(model, optimizer, schedule) if one_line else None
    evaluations = 0.0
    for epoch in epochs:
        model.train()
        total = torch.zeros((), device=device)
        for batch in epoch:
            if step is not None:
                total += step(batch)
                continue
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            total += loss.detach().float()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        float(total)
        if step is None:
            begun = time.perf_counter()
            model.eval()
            for batch in test:
                with torch.no_grad():
                    output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                float(output.loss.detach())
                output.logits.argmax(-1).cpu()
            evaluations += time.perf_counter() - begun
    seconds = time.perf_counter() - started
    return {"s": seconds, "steps_s": seconds - evaluations, "evaluations_s": evaluations, "steps": count}


def pefts(shape: dict, device: str, steps: int) -> dict[str, Any]:
    import peft

    config = peft.IA3Config(task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(build(shape, torch.float32, device), config).train()
    batch = batch_of(shape, BATCH, 128, device)
    cuda = device == "cuda"
    step = guide(model, batch, cuda)
    for _ in range(3):
        step()
    a_step = milliseconds(step, cuda, 40) / 1e3
    model.eval()

    def evaluate() -> None:
        with torch.no_grad():
            model(**batch).logits.argmax(-1).cpu()

    evaluate()
    a_batch = milliseconds(evaluate, cuda, 10) / 1e3
    batches = -(-TEST // BATCH)
    return {"s": steps * a_step + EPOCHS * batches * a_batch, "step_s": a_step, "evaluation_batch_s": a_batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, shape = ("cuda" if cuda else "cpu"), (LARGE if cuda and not arguments.tiny else TINY)
    few = 64 if arguments.tiny else None
    if arguments.alone == "ia3":
        print(json.dumps(ours(shape, device, few)))
        return
    if arguments.alone:
        print(json.dumps(own_loop(shape, device, few, one_line=arguments.alone == "one line")))
        return
    where = say_machine()
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        for name, alone in CASES.items():
            command = [sys.executable, __file__, "--alone", alone, *(["--tiny"] if arguments.tiny else [])]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, rows[name], flush=True)
    rows["PEFT guide"] = pefts(shape, device, rows["ia3, cold"]["steps"])
    print("PEFT guide", rows["PEFT guide"], flush=True)
    for name in ("ia3, cold", "ia3, warm", "import changed"):
        rows[name]["times_faster"] = rows["PEFT guide"]["s"] / rows[name]["s"]
        print(f"{name}: {rows[name]['times_faster']:.1f} times as fast")
    arguments.output.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
