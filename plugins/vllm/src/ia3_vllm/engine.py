"""The engine's front: requests for (IA)³ adapters go on under the name, number and folder of their content."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from ia3_vllm.content import Contents, is_ours, number_of


class Names:
    """What each adapter's name stands for in one engine.

    That is fixed by a load or, without one, by the first request, and changes with the next load. Requests under way
    keep what they began with.
    """

    def __init__(self) -> None:
        self.contents = Contents()
        self.known: dict[tuple[str, int, str], Any] = {}

    def find(self, request: Any) -> Any | None:
        """The request as the engine is to see it; None where the adapter has to be loaded first."""
        if self._is_copy(request):
            return request
        known = self.known.get(_key(request))
        return None if known is None or (request.load_inplace and self._is_copy(known)) else known

    @contextmanager
    def loading(self, request: Any) -> Iterator[Any]:
        """While the engine loads the request that is given; afterwards the name means what it now contains."""
        if self._is_copy(request):  # whose caller names contents himself
            yield request
            return
        folder = get_adapter_absolute_path(request.lora_path)
        told = request
        if is_ours(folder):
            copy = self.contents.keep(folder)
            name, base = f"{request.lora_name}@{copy.name[:16]}", request.base_model_name
            told = LoRARequest(name, number_of(copy), str(copy), base_model_name=base)
        try:
            yield told
        except Exception:  # a copy that nobody knows would stay, and whatever came goes on
            if self._is_copy(told) and all(known.path != told.path for known in self.known.values()):
                shutil.rmtree(told.path, ignore_errors=True)
            raise
        if told is not request:
            request.load_inplace = False  # servers keep the object, and its requests must not load it each time
        self.known[_key(request)] = told

    def number(self, number: int) -> int:
        """The engine's number of the adapter that the caller gave this one."""
        return next((known.lora_int_id for key, known in self.known.items() if key[1] == number), number)

    def numbers(self, engines: set[int]) -> set[int]:
        """The caller's numbers of the engine's adapters."""
        return {key[1] for key, known in self.known.items() if known.lora_int_id in engines}

    def _is_copy(self, request: Any) -> bool:
        return Path(request.lora_path).parent == self.contents.root


def _key(request: Any) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path


def names_of(engine: Any) -> Names:
    """The engine's names, made when first asked for."""
    names: Names = engine.__dict__.get("_ia3_names") or engine.__dict__.setdefault("_ia3_names", Names())
    return names


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """One of the engines' methods that take or give adapters, in terms of the caller's names and numbers."""
    signature = inspect.signature(original)

    async def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
        async def result(*args: Any, **kwargs: Any) -> Any:
            given = original(*args, **kwargs)
            return await given if inspect.isawaitable(given) else given

        bound = signature.bind(engine, *args, **kwargs)
        if engine.vllm_config.lora_config is None:
            return await result(*bound.args, **bound.kwargs)
        names, request = names_of(engine), bound.arguments.get("lora_request")
        if original.__name__ == "list_loras":
            return names.numbers(await result(engine))
        if original.__name__ == "add_lora":
            with names.loading(request) as told:
                return await result(engine, told)
        if "lora_id" in bound.arguments:
            bound.arguments["lora_id"] = names.number(bound.arguments["lora_id"])
        elif request is not None:
            if names.find(request) is None:
                added = engine.add_lora(request)
                await added if inspect.isawaitable(added) else added
            bound.arguments["lora_request"] = names.find(request) or request
        return await result(*bound.args, **bound.kwargs)

    def call_now(*args: Any, **kwargs: Any) -> Any:
        """The same for an engine whose methods return at once: nothing in `call` waits then."""
        try:
            call(*args, **kwargs).send(None)
        except StopIteration as done:
            return done.value

    method = call if inspect.iscoroutinefunction(original) else call_now
    return functools.wraps(original)(method)


def install() -> None:
    """Wrap both engines' methods, once."""
    for engine in (LLMEngine, AsyncLLM):
        for name in ("add_lora", "add_request", "remove_lora", "pin_lora", "list_loras"):
            original = getattr(engine, name)
            if not getattr(original, "_ia3", False):
                wrapped = _wrapped(original)
                wrapped._ia3 = True  # type: ignore[attr-defined]
                setattr(engine, name, wrapped)
