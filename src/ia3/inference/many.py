"""Texts each answered by an adapter of its own, out of a folder of them: those of vectors alone share batches."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ia3.config import CONFIG_NAME, PeftConfig
from ia3.errors import shorten
from ia3.inference.answering import Answer, Answerers
from ia3.inference.loading import DTYPES, load_adapter
from ia3.inference.predict import Beat
from ia3.runs.sums import expect_adapter_unchanged
from ia3.table import AdapterTable
from ia3.tasks.examples import Example
from ia3.tasks.labels import quote_labels
from ia3.tasks.task import Task
from ia3.tasks.template import Template
from ia3.tensors import SAFETENSORS_NAME, load_peft_weights

# The folder of a run in which its adapter is, which then goes by the run's name, too.
_IN_A_RUN = "adapter"
# Rows of vectors on the device, unless batches are larger.
_CAPACITY = 256


def adapters_below(folder: Path) -> dict[str, Path]:
    """All adapters below a folder by their names; a run's goes by the run's name, too.

    A link counts that leads to an adapter or a run; what else links lead to is not gone through, since it may be all.

    Raises:
        ValueError: the folder is itself an adapter.
    """
    if (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is itself an adapter: give the folder above it, which holds one for each name.")
    known: dict[str, Path] = {}
    for path in sorted(_with_configuration(folder)):
        place = path.relative_to(folder)
        known[place.as_posix()] = path
        if place.name == _IN_A_RUN and len(place.parts) > 1:
            known.setdefault(place.parent.as_posix(), path)
    return known


def _with_configuration(folder: Path) -> Iterator[Path]:
    for inside, folders, files in os.walk(folder):
        if CONFIG_NAME in files:
            yield Path(inside)
        for link in (Path(inside, name) for name in folders if Path(inside, name).is_symlink()):
            yield from (path for path in (link, link / _IN_A_RUN) if (path / CONFIG_NAME).is_file())


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
    known = adapters_below(folder)
    if not known:
        raise ValueError(f"{folder} holds no adapters: expected folders in it, each with an {CONFIG_NAME}.")
    unknown = list(dict.fromkeys(name for name in names if name not in known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" It has {quote_labels([*known])}."
        if near:
            hint = f" Did you mean {shorten(near[0])} for {shorten(unknown[0])}?"
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
    trust_remote_code: bool = False,
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
        trust_remote_code: run code that comes with the bases.

    Returns:
        One answer an example, in order.

    Raises:
        FileNotFoundError, ValueError: what `load_adapter`, `AdapterTable.register` and `Answerer` raise.
    """
    answers: dict[int, Answer] = {}
    for company in companies_of(folders, tasks, names, trust_remote_code=trust_remote_code):
        places = [place for place, name in enumerate(names) if name in company.tasks]
        answer = company.open(batch_size)
        found = answer([examples[place] for place in places], [names[place] for place in places], beat)
        answers |= zip(places, found, strict=True)
    return [answers[place] for place in range(len(examples))]


@dataclass(frozen=True)
class Company:
    """Adapters that are answered with one base model in memory, and what they answer.

    Args:
        folders: where each adapter is.
        tasks: what each answers, and how; without what only says how texts are read, in which adapters that share a
            batch may differ.
        trust_remote_code: run code that comes with the base.
    """

    folders: Mapping[str, Path]
    tasks: Mapping[str, Task]
    trust_remote_code: bool = False

    def open(self, batch_size: int) -> Together:
        """Load the base with these adapters."""
        return Together(self, batch_size)


class Together:
    """The adapters of a company, loaded.

    Raises:
        FileNotFoundError, ValueError: what `load_adapter` and `AdapterTable.register` raise.
    """

    def __init__(self, company: Company, batch_size: int) -> None:
        self.company = company
        first, *others = company.folders
        precision, quantize = company.tasks[first].precision, company.tasks[first].quantize
        dtype = None if precision is None else DTYPES[precision]
        how: Any = {"dtype": dtype, "quantize": quantize, "trust_remote_code": company.trust_remote_code}
        self.model, self.tokenizer = load_adapter(company.folders[first], **how)
        self.shares = bool(others)
        if self.shares:
            table = AdapterTable(self.model, capacity=max(_CAPACITY, batch_size))
            for folder in company.folders.values():
                table.register(str(folder), folder)
        self._answerers = Answerers(self.model, self.tokenizer, batch_size=batch_size)

    def __call__(self, examples: Sequence[Example], names: Sequence[str], beat: Beat | None = None) -> list[Answer]:
        """One answer an example, each by the adapter of its name; those whose tasks are the same share batches."""
        by_task: dict[Task, list[int]] = defaultdict(list)
        for place, name in enumerate(names):
            by_task[self.company.tasks[name]].append(place)
        answers: dict[int, Answer] = {}
        for task, places in by_task.items():
            own = [str(self.company.folders[names[place]]) for place in places] if self.shares else None
            found = self._answerers.for_task(task)([examples[place] for place in places], beat, own)
            answers |= zip(places, found, strict=True)
        return [answers[place] for place in range(len(examples))]


def companies_of(
    folders: Mapping[str, Path], tasks: Mapping[str, Task], names: Iterable[str], *, trust_remote_code: bool = False
) -> list[Company]:
    """Who is answered together, in the order of `names`: adapters of one base and precision that hold vectors alone."""
    by_base: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        by_base[_base_of(name, folders[name], tasks[name])].append(name)
    return [
        Company(
            {name: folders[name] for name in own},
            {name: _without_reading(tasks[name]) for name in own},
            trust_remote_code,
        )
        for own in by_base.values()
    ]


def _base_of(name: str, folder: Path, task: Task) -> tuple[Any, ...]:
    """What adapters must share for one batch: the base as it is loaded; nobody shares one with whole modules."""
    expect_adapter_unchanged(folder)
    config = PeftConfig.from_pretrained(folder)
    base = (config.base_model_name_or_path, config.revision, config.task_type, task.precision, task.quantize)
    is_vectors = task.kind.writes and all(".ia3_l" in key for key in _keys_of(folder))
    return base if is_vectors else (*base, name)


def _keys_of(folder: Path) -> Iterable[str]:
    """The names of an adapter's tensors, which a file has in front."""
    try:
        with safe_open(folder / SAFETENSORS_NAME, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):  # a pickle, or damaged, which is said by who reads it
        return load_peft_weights(folder)


def _without_reading(task: Task) -> Task:
    """The task without what only says how texts are read, in which adapters that share a batch may differ."""
    longest = None if task.ranks else task.max_new_tokens
    return replace(
        task, template=Template.of_column("text"), label_column="label", base_model=None, max_new_tokens=longest
    )
