"""Causal bases by vLLM: its engine writes, and the adapters' vectors are in its LoRA slots (`plugins/vllm`).

The names of vLLM that a server needs are used here alone; how vectors get into the slots is the plugin's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import wait
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoModelForCausalLM

from ia3.bundled import load_model
from ia3.config import TaskType
from ia3.gguf import is_gguf
from ia3.inference.loading import Base, reading_weights
from ia3.rows import BASE
from ia3.serving.continuous import ContinuousEngine, Tokens
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.serving.requests import Dropped
from ia3.table import read_vectors

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# What a process of vLLM's is told where its environment says nothing: to write its log where ours is, and no more than
# ours; to send nobody figures of its use; and to start its engine anew and not as a copy of a process with threads.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_LOOK_S = 1.0  # how often it is looked whether vLLM still runs, while it is waited for
_HELD = 256  # adapters in the host memory of vLLM's workers; more are read again when they are asked for


def is_wanted(base: Base) -> bool:
    """Whether a base is one for vLLM: a causal model's folder, where vLLM and the plugin are installed.

    `VLLM_PLUGINS`, vLLM's own list of the plugins that it loads, leaves this one out where it doesn't name it.
    """
    if is_gguf(base.name) or base.kind.task_type is not TaskType.CAUSAL_LM:
        return False
    named = os.environ.get("VLLM_PLUGINS")
    wanted = named is None or "ia3" in named.split(",")
    return wanted and all(importlib.util.find_spec(name) is not None for name in ("vllm", "ia3_vllm"))


def plan(base: Base, batch_size: int) -> Any:
    """What vLLM is to run.

    Args:
        base: a causal base.
        batch_size: the most requests at once, each under its own adapter.

    Returns:
        vLLM's configuration.

    Raises:
        ValueError: vLLM doesn't run this model, or not with adapters.
        RuntimeError: another release of vLLM than the plugin was tested with.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models import supports_lora

    import ia3_vllm

    ia3_vllm.register()
    dtype = getattr(base.config, "dtype", None)
    config = AsyncEngineArgs(
        model=base.folder,
        trust_remote_code=base.trusted,
        # Where a file doesn't say, vLLM looks itself.
        dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
        max_model_len=-1,  # as many as memory has room for, where that is less than the model's
        max_num_seqs=batch_size,
        skip_tokenizer_init=True,  # tokens go in and come out
        enable_lora=True,
        max_loras=batch_size,
        max_cpu_loras=max(_HELD, batch_size),
        max_lora_rank=1,  # vLLM has matrices for each slot, which nobody uses here
    ).create_engine_config()
    kind = get_model_cls(config.model_config)
    if not supports_lora(kind):
        raise ValueError(f"vLLM has no adapters for a {kind.__name__}.")
    return config


def start(base: Base, folder: Path, config: Any, *, name: str, limits: Limits) -> ContinuousEngine:
    """Start vLLM and read the adapters.

    Args:
        base: the base model.
        folder: with a folder for each adapter.
        config: what `plan` made.
        name: the base's, for clients.
        limits: how many requests may wait.
    """
    tokenizer = base.tokenizer
    with reading_weights(base.name):
        # Adapters and prompts are checked against the model, for which it needs no memory: vLLM has the weights.
        more = {"trust_remote_code": base.trusted, "dtype": "auto", "device_map": "meta"}
        model = load_model(base.name, AutoModelForCausalLM, **more)
    writer = VLLM(model, config)
    try:
        registry = Registry(model, folder, base=name, table=writer)
        return ContinuousEngine(model, tokenizer, registry, writer, limits)
    except BaseException:  # vLLM's processes would stay behind
        writer.close()
        raise


class VLLM:
    """vLLM's engine on a thread and loop of its own, a `Writer` with a LoRA slot for each content of an adapter.

    Contents are told apart by the sha256 of their files, of which vLLM gets copies: what it read once it may read
    again, whatever happened to the adapter's folder.

    Args:
        model: the base model, which may be without memory; adapters are checked against it.
        config: what `plan` made.
    """

    def __init__(self, model: Any, config: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="ia3-vllm", daemon=True)
        self._thread.start()
        self._model = model
        self._numbers = itertools.count(1)
        # Of each name its request, and of each copy how many names mean it.
        self._adapters: dict[str, Any] = {}
        self._uses: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._llm: Any = None
        try:
            self._llm = self._wait_for(self._start(config))
        except BaseException:  # the loop's thread would stay behind
            self._end_loop()
            raise
        self.longest: int = self._llm.model_config.max_model_len
        self.capacity: int = config.lora_config.max_loras

    @property
    def alive(self) -> bool:
        """Whether vLLM runs."""
        return self._llm is not None and not self._llm.errored

    # What is held

    @property
    def resident(self) -> int:
        """How many contents are in slots: as many as there are, until these are full."""
        return min(len(self._uses), self.capacity)

    def register(self, name: str, path: str | Path) -> str:
        """Read an adapter that fits the base and that vLLM can multiply by, and hold it; its digest.

        Raises:
            FileNotFoundError, ValueError: as `AdapterTable.register`; or vectors where vLLM's layers have no place.
        """
        from vllm.lora.request import LoRARequest

        from ia3_vllm.content import number_of
        from ia3_vllm.engine import names_of

        digest, _ = read_vectors(self._model, path)
        with self._lock:
            copy = names_of(self._llm).contents.keep(path)
            adapter = LoRARequest(copy.name, number_of(copy), str(copy))
            self._adapters[name] = adapter
            self._uses[adapter.lora_path] += 1
        try:
            self._wait_for(self._llm.add_lora(adapter))
        except Exception as error:  # vLLM refuses an adapter by errors of many classes
            self.drop(name)
            raise ValueError(str(error).replace(str(copy), str(path))) from error
        return digest

    def drop(self, name: str) -> None:
        """Hold an adapter no more; its slot is free where no other name means its content. It returns at once."""
        with self._lock:
            adapter = self._adapters.pop(name)
            self._uses[adapter.lora_path] -= 1
            if not self._uses[adapter.lora_path]:
                asyncio.run_coroutine_threadsafe(self._remove(adapter), self.loop)

    async def _remove(self, adapter: Any) -> None:
        try:
            await self._llm.remove_lora(adapter.lora_int_id)
        except Exception:  # vLLM has ended, or will make room itself
            _logger.exception("vLLM did not unload an adapter.")
        with self._lock:
            if not self._uses[adapter.lora_path]:  # nor meanwhile
                del self._uses[adapter.lora_path]
                shutil.rmtree(adapter.lora_path, ignore_errors=True)

    def close(self) -> None:
        """End vLLM. No request may be under way."""
        # Else it would take the end of vLLM's process for a failure.
        self.loop.call_soon_threadsafe(self._llm.output_handler.cancel)
        self._llm.shutdown()
        self._llm = None
        self._end_loop()
        self._adapters.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    # What is written

    async def write(self, prompt: Sequence[int], row: str, ends: Sequence[int], most: int) -> AsyncIterator[Tokens]:
        """See `Writer.write`.

        Raises:
            Dropped: vLLM has ended.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        how = SamplingParams(
            temperature=0.0,
            max_tokens=most,
            stop_token_ids=list(ends),
            ignore_eos=True,  # vLLM's own idea of it: all that end an answer are named
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        adapter = None if row == BASE else self._adapters[row]
        number = str(next(self._numbers))
        try:
            async for more in self._llm.generate({"prompt_token_ids": prompt}, how, number, lora_request=adapter):
                (answer,) = more.outputs
                if answer.finish_reason not in (None, "stop", "length"):  # given up, with what was written so far
                    raise _ended()
                yield Tokens(answer.token_ids, more.metrics.scheduled_ts)
        except EngineDeadError as error:
            raise _ended() from error

    # The loop

    async def _start(self, config: Any) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        # vLLM's processes have it from the thread that starts them. Ctrl-C in a terminal reaches these, too, and would
        # end them under requests that the server still answers; it tells them itself when all is done.
        resource_tracker.ensure_running()  # whose start, with the first process, would undo it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return AsyncLLM.from_vllm_config(config)

    def _wait_for(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """What a coroutine gives; vLLM leaves some of them without an end when it ends.

        Raises:
            Dropped: vLLM has ended.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        while not wait([future], timeout=_LOOK_S).done:
            if self._llm is not None and self._llm.errored:
                future.cancel()
                raise _ended()
        return future.result()

    def _end_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _ended() -> Dropped:
    return Dropped("The server can't answer any more: try another, or later.")
