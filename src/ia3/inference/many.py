"""Texts each answered by an adapter of its own, out of a folder of them: those of vectors alone share batches."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ia3.config import CONFIG_NAME, PeftConfig
from ia3.inference.answering import Answer, Answerer
from ia3.inference.loading import DTYPES, load_adapter
from ia3.inference.predict import Beat
from ia3.runs.sums import expect_adapter_unchanged
from ia3.table import AdapterTable
from ia3.tasks.examples import Example
from ia3.tasks.labels import quote_labels
from ia3.tasks.task import Task
from ia3.tasks.template import Template
from ia3.tensors import load_peft_weights

# The folder of a run in which its adapter is, which then goes by the run's name, too.
_IN_A_RUN = "adapter"
# Rows of vectors on the device, unless batches are larger.
_CAPACITY = 256


def find_adapters(folder: Path, names: Sequence[str], place_of: Callable[[int], str]) -> dict[str, Path]:
    """Where the adapters of these names are, below a folder; a run's goes by the run's name.

    A name is only looked up among the folders that hold an adapter, so it can't lead out of the folder.

    Args:
        folder: what holds the folders of adapters.
        names: the adapters', as often as they are asked for.
        place_of: where a name of this index stands, for the error.

    Raises:
        ValueError: an unknown name, or no adapter at all.
    """
    known: dict[str, Path] = {}
    if (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is itself an adapter: give the folder above it, which holds one for each name.")
    for path in sorted(folder.rglob(CONFIG_NAME)):
        place = path.parent.relative_to(folder)
        known[place.as_posix()] = path.parent
        if place.name == _IN_A_RUN and len(place.parts) > 1:
            known.setdefault(place.parent.as_posix(), path.parent)
    if not known:
        raise ValueError(f"{folder} holds no adapters: expected folders in it, each with an {CONFIG_NAME}.")
    unknown = list(dict.fromkeys(name for name in names if name not in known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r} for {unknown[0]!r}?" if near else f" It has {quote_labels([*known])}."
        count, first = sum(name not in known for name in names), place_of(names.index(unknown[0]))
        raise ValueError(
            f"{folder} holds no adapter {quote_labels(unknown)}, named first in {first} and in {count:,} of "
            f"{len(names):,} rows.{hint}"
        )
    return {name: known[name] for name in dict.fromkeys(names)}


def answer_each(
    folders: Mapping[str, Path],
    tasks: Mapping[str, Task],
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    batch_size: int = 32,
    beat: Beat | None = None,
) -> list[Answer]:
    """Answer each example by its own adapter, as that adapter alone would.

    Adapters of one base and precision that hold vectors alone are rows of one table and share batches where their
    tasks are the same; one with modules of its own, such as a head, answers its examples alone.

    Args:
        folders: where each adapter is.
        tasks: what each answers, and how.
        examples: rendered texts and earlier turns.
        names: the adapter of each example.
        batch_size: texts at once.
        beat: called after each batch with its number of examples.

    Returns:
        One answer an example, in order.

    Raises:
        FileNotFoundError, ValueError: what `load_adapter`, `AdapterTable.register` and `Answerer` raise.
    """
    by_base: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        by_base[_base_of(name, folders[name], tasks[name])].append(name)
    answers: dict[int, Answer] = {}
    for together in by_base.values():
        first = together[0]
        precision, quantize = tasks[first].precision, tasks[first].quantize
        dtype = None if precision is None else DTYPES[precision]
        model, tokenizer = load_adapter(folders[first], dtype=dtype, quantize=quantize)
        if len(together) > 1:
            table = AdapterTable(model, capacity=max(_CAPACITY, batch_size))
            for name in together:
                table.register(str(folders[name]), folders[name])
        answered_by = {name: _without_reading(tasks[name]) for name in together}
        by_task: dict[Task, list[int]] = defaultdict(list)
        for place, name in enumerate(names):
            if name in answered_by:
                by_task[answered_by[name]].append(place)
        for task, places in by_task.items():
            answerer = Answerer(model, tokenizer, task, batch_size=batch_size)
            own = [str(folders[names[place]]) for place in places] if len(together) > 1 else None
            found = answerer([examples[place] for place in places], beat, own)
            answers |= zip(places, found, strict=True)
    return [answers[place] for place in range(len(examples))]


def _base_of(name: str, folder: Path, task: Task) -> tuple[Any, ...]:
    """What adapters must share for one batch: the base as it is loaded; nobody shares one with whole modules."""
    expect_adapter_unchanged(folder)
    config = PeftConfig.from_pretrained(folder)
    base = (config.base_model_name_or_path, config.revision, config.task_type, task.precision, task.quantize)
    is_vectors = task.kind.writes and all(".ia3_l" in key for key in load_peft_weights(folder))
    return base if is_vectors else (*base, name)


def _without_reading(task: Task) -> Task:
    """The task without what only says how texts are read, in which adapters that share a batch may differ."""
    longest = None if task.ranks else task.max_new_tokens
    return replace(
        task, template=Template.of_column("text"), label_column="label", base_model=None, max_new_tokens=longest
    )
