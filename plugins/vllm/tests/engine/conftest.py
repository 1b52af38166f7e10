"""An engine at a time, in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., Any]]:
    """`engine(base, **options)`: an engine in this process; each replaces the one before."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    running: list[Any] = []

    def stop() -> None:
        if running:
            running.pop().llm_engine.engine_core.shutdown()
            gc.collect()
            cleanup_dist_env_and_memory()

    def start(base: Path, **options: Any) -> Any:
        stop()
        usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
        adapters = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 4}
        running.append(LLM(str(base), **{**usual, **adapters, **options}))
        return running[-1]

    yield start
    stop()
