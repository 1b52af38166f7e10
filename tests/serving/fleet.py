"""Folders of tiny adapters, and what each answers alone: what the engine's answers are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import tiny_causal
import tiny_seq2seq
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.inference.answering import Answer as Alone
from ia3.inference.answering import Answerer
from ia3.serving.engine import Engine
from ia3.serving.intake import Limits
from ia3.serving.registry import Registry
from ia3.serving.requests import Request
from ia3.serving.writing import Size
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind, load_task, save_task
from ia3.tasks.template import Template

BASE = "tiny"
TEXTS = [row.text for row in tiny_seq2seq.examples(12)]
QUESTIONS = [row.text for row in tiny_causal.examples(12)]

RANKED = {"labels": tiny_seq2seq.LABELS, "max_length": 64, "max_new_tokens": 4}
# What the adapters of a folder of these names answer; several share batches, and some don't.
TASKS: dict[str, dict[str, Any]] = {
    "news": RANKED,
    "sports": RANKED | {"pattern": "the share {text}"},
    "deep/two": RANKED | {"labels": ("positive", "negative"), "max_length": 5},
    "writes": RANKED | {"answer_by": "generation"},
    "free": {"kind": TaskKind.GENERATION, "max_length": 64, "max_new_tokens": 6},
}
CAUSAL: dict[str, dict[str, Any]] = {
    "chat": {"kind": TaskKind.INSTRUCTIONS, "max_length": 64, "max_new_tokens": 5},
    "brief": {"kind": TaskKind.INSTRUCTIONS, "max_length": 14, "max_new_tokens": 5, "system": "be brief"},
    "plain": {"kind": TaskKind.LANGUAGE_MODELLING, "max_length": 64, "max_new_tokens": 5},
}


def task_of(*, pattern: str = "{text}", **fields: Any) -> Task:
    return Task(template=Template(pattern), **fields)


def bare(*, causal: bool = False) -> Any:
    """A base model, the same each time."""
    return (tiny_causal.llama() if causal else tiny_seq2seq.base()).eval()


def tokenizer_of(*, causal: bool = False) -> Any:
    return tiny_causal.tokenizer() if causal else tiny_seq2seq.tokenizer()


def save(folder: Path, seed: int, task: Task | None, *, causal: bool = False, **where: Any) -> Path:
    """An adapter of random vectors with its task."""
    config = IA3Config(task_type="CAUSAL_LM" if causal else "SEQ_2_SEQ_LM", **where)
    model = get_peft_model(bare(causal=causal), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if "ia3_l" in name:
                vector.uniform_(-2, 4)
    model.save_pretrained(folder)
    if task is not None:
        save_task(folder, task)
    return folder


def save_fleet(folder: Path, tasks: dict[str, dict[str, Any]], *, causal: bool = False) -> Path:
    for seed, (name, fields) in enumerate(tasks.items()):
        save(folder / name, seed, task_of(**fields), causal=causal)
    return folder


@contextmanager
def serving(
    folder: Path, *, causal: bool = False, dtype: torch.dtype = torch.float32, **limits: Any
) -> Iterator[Engine]:
    """An engine over the adapters of a folder, whose folder is looked at by `refresh` alone."""
    model = bare(causal=causal).to(dtype)
    registry = Registry(model, folder, base=BASE)
    engine = Engine(model, tokenizer_of(causal=causal), registry, Limits(**limits))
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def never_ending(folder: Path, **limits: Any) -> Iterator[Engine]:
    """An engine whose answers come to no end before they are as long as they may be."""
    with serving(folder, **limits) as engine:
        engine._writing.model.generation_config.eos_token_id = None
        yield engine


def at_step(engine: Engine, number: int, do: Callable[[], Any]) -> list[Any]:
    """Let the engine's thread do something before a step; what it gave."""
    step, count, given = engine._writing.step, 0, list[Any]()

    def counted(size: Size) -> Any:
        nonlocal count
        count += 1
        if count == number:
            given.append(do())
        return step(size)

    engine._writing.step = counted
    return given


def alone(folder: Path, texts: Sequence[str], *, causal: bool = False) -> list[Alone]:
    """What the adapter in a folder answers alone, attached the ordinary way, each text by itself."""
    task = load_task(folder)
    assert task is not None
    model: Any = PeftModel.from_pretrained(bare(causal=causal), folder)
    answer = Answerer(model, tokenizer_of(causal=causal), task, batch_size=1)
    return answer([Example(task.template.render({"text": text}), "") for text in texts])


def ask(engine: Engine, model: str, text: str, **more: Any) -> Any:
    return engine.submit(Request(text, model, **more)).result(60)
