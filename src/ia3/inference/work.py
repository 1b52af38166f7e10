"""Rows to answer in stretches: who answers which, and their answers as they come.

A stretch is so many rows that those of like length fill its batches, and so few that little is lost where the work ends
early. What answers is loaded when its first stretch comes, and is gone when another's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ia3.config import PeftConfig
from ia3.data.questions import Questions, read_questions, texts_as_records
from ia3.data.records import Records
from ia3.errors import naming, shorten
from ia3.inference.answering import Answer, Answerer, cut_line
from ia3.inference.labelling import Labeller, Overrides, load_labeller, task_without_file
from ia3.inference.many import Company, companies_of, find_adapters
from ia3.inference.predict import Beat
from ia3.tasks.columns import as_text, require_columns
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind, load_task

# Batches of a stretch, within which rows are sorted by length.
_BATCHES = 32


@dataclass(frozen=True)
class Telling:
    """Who is told how the work goes.

    Args:
        begin: called with the number of rows that are going to be answered here.
        beat: called after each batch with its number of rows; what it raises ends the work.
        loading: entered while an adapter of this name is loaded.
        say: called with lines on how rows are answered.
    """

    begin: Beat = lambda count: None
    beat: Beat = lambda count: None
    loading: Callable[[str], AbstractContextManager[object]] = nullcontext
    say: Callable[[str], None] = lambda line: None


class Answering(Protocol):
    """What answers the rows of a group, by their places among all rows."""

    def __call__(self, places: Sequence[int], examples: Sequence[Example], beat: Beat) -> list[Answer]: ...
    def count_cut(self, examples: Sequence[Example]) -> int: ...
    def describe_path(self) -> str | None: ...


@dataclass(frozen=True)
class Group:
    """Rows that one loaded model answers.

    Args:
        adapters: the folders, or the repository, of those that answer.
        places: the rows' places, in order.
        load: loads what answers them.
    """

    adapters: Sequence[str]
    places: Sequence[int]
    load: Callable[[], Answering]


@dataclass(frozen=True)
class Work:
    """Rows to answer.

    Args:
        questions: the rows, each to its task.
        groups: who answers which.
        batch_size: texts at once.
        adapters: the name of each row's adapter, where rows have one of their own.
    """

    questions: Questions
    groups: Sequence[Group]
    batch_size: int
    adapters: Sequence[str] | None = None

    @property
    def stretches(self) -> list[Stretch]:
        """All rows, group by group."""
        size = _BATCHES * self.batch_size
        return [
            Stretch(number, group.places[start : start + size])
            for number, group in enumerate(self.groups)
            for start in range(0, len(group.places), size)
        ]


@dataclass(frozen=True)
class Stretch:
    """Some rows of a group, by its number and their places."""

    group: int
    places: Sequence[int]


@dataclass(frozen=True)
class Answered:
    """The answers to a stretch's rows, None of one without a text, and how many texts were cut."""

    answers: list[Answer | None]
    cut: int = 0


def answer_stretches(work: Work, stretches: Iterable[Stretch], tell: Telling) -> Iterator[tuple[Stretch, Answered]]:
    """Answer rows, stretch by stretch.

    Raises:
        FileNotFoundError, ValueError, ImportError: what loading an adapter and `Answerer` raise.
    """
    group, answering = None, None
    for stretch in stretches:
        if answering is None or group != stretch.group:
            answering = None  # the former model goes before the next comes
            group = stretch.group
            with tell.loading(work.groups[group].adapters[0]):
                answering = work.groups[group].load()
            if (path := answering.describe_path()) is not None:
                tell.say(path)
        examples = [work.questions[place] for place in stretch.places]
        filled = [index for index, example in enumerate(examples) if example.text]
        asked = [examples[index] for index in filled]
        found = answering([stretch.places[index] for index in filled], asked, tell.beat) if asked else []
        by_index = dict(zip(filled, found, strict=True))
        yield stretch, Answered([by_index.get(index) for index in range(len(examples))], answering.count_cut(asked))


def answer_in_order(work: Work, tell: Telling) -> Iterator[tuple[Sequence[int], list[Answer | None]]]:
    """Answer all rows, in their order: those of one model as they come, those of several once all are there.

    Yields:
        Places of rows, and an answer each; None of a row without a text.
    """
    found: dict[int, Answer | None] = {}
    cut = count = 0
    for stretch, answered in answer_stretches(work, work.stretches, tell):
        cut += answered.cut
        count += sum(answer is not None for answer in answered.answers)
        if len(work.groups) == 1:
            yield stretch.places, answered.answers
        else:
            found |= zip(stretch.places, answered.answers, strict=True)
    if found:
        yield range(len(found)), [found[place] for place in range(len(found))]
    say_cut(work, cut, count, tell)


def say_cut(work: Work, cut: int, count: int, tell: Telling) -> None:
    """Say how many texts were cut, if any, where one adapter answers all."""
    if cut:
        (task,) = work.questions.tasks
        tell.say(cut_line(task.max_length, cut, count))


def count_filled(work: Work, tell: Telling) -> int:
    """How many rows have a text; the others get no answer, which is said.

    Raises:
        ValueError: none has one, or a row can't be read.
    """
    filled = work.questions.count_filled()
    if missing := len(work.questions) - filled:
        tell.say(f"Without text, and so without prediction: {missing:,} of {len(work.questions):,} rows.")
    return filled


def work_of(
    adapter: str,
    source: Path | Records | Sequence[str],
    *,
    text_column: str | None = None,
    adapter_column: str | None = None,
    answer_by: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    tell: Telling | None = None,
) -> Work:
    """The rows of a file, rows that were read, or texts; the other arguments are those of `label_file`.

    Raises:
        FileNotFoundError, ImportError, ValueError: what reading the file or the adapters' files raises.
    """
    tell = tell or Telling()
    overrides = Overrides(text_column=text_column, max_length=max_length, max_new_tokens=max_new_tokens, way=answer_by)
    if isinstance(source, Path):
        source = read_questions(source, adapter, text_column, adapter_column)
        for remark in source.remarks:
            tell.say(remark)
    if adapter_column is None:
        return _work_of_one(adapter, source, overrides, batch_size, tell, trust_remote_code)
    if not isinstance(source, Records):
        raise ValueError("`adapter_column` names a column of a file, and these are texts alone: give a file.")
    with tell.loading(adapter):
        return _work_of_many(Path(adapter), adapter_column, source, overrides, batch_size, trust_remote_code)


def _work_of_one(
    adapter: str, read: Records | Sequence[str], overrides: Overrides, batch_size: int, tell: Telling, trusted: bool
) -> Work:
    """Rows, or texts, that are all answered by one adapter; it is loaded here only if nothing else tells its task."""
    saved, labeller = load_task(adapter), None
    if saved is not None:
        task = overrides.over(saved)
    else:
        with tell.loading(adapter):
            labeller = load_labeller(adapter, overrides, trust_remote_code=trusted)
        task = labeller.task
    with naming(adapter):
        records = read if isinstance(read, Records) else texts_as_records(read, task)

    def load() -> Answering:
        return _Alone(labeller or load_labeller(adapter, overrides, trust_remote_code=trusted), batch_size)

    return Work(Questions(records, lambda place: task), [Group([adapter], range(len(records)), load)], batch_size)


def _work_of_many(
    folder: Path, column: str, records: Records, overrides: Overrides, batch_size: int, trusted: bool
) -> Work:
    """Rows that each name their adapter in a column, out of a folder of adapters."""
    require_columns(records.source, records.columns, column, setting="adapter_column")
    places = [place for place, _ in records]
    cells = zip(places, records.column(column), strict=True)
    names = [as_text(cell, f"{records.source}, {place}: {shorten(column)}") for place, cell in cells]
    if "" in names:
        raise ValueError(
            f"{records.source}, {places[names.index('')]} names no adapter in {shorten(column)}, as "
            f"{names.count(''):,} of {len(names):,} rows: name one in each row, or take these rows out."
        )
    folders = find_adapters(folder, names, lambda number: f"{records.source}, {places[number]}")
    tasks = {name: overrides.over(_saved_task(path)) for name, path in folders.items()}
    companies = companies_of(folders, tasks, names, trust_remote_code=trusted)
    of_name = {name: number for number, company in enumerate(companies) for name in company.tasks}
    own: list[list[int]] = [[] for _ in companies]
    for place, name in enumerate(names):
        own[of_name[name]].append(place)

    def loader(company: Company) -> Callable[[], Answering]:
        return lambda: _InCompany(company, names, batch_size)

    groups = [
        Group([str(folder) for folder in company.folders.values()], places, loader(company))
        for company, places in zip(companies, own, strict=True)
    ]
    return Work(Questions(records, lambda place: tasks[names[place]]), groups, batch_size, names)


@dataclass
class _Alone:
    """One adapter's answers."""

    labeller: Labeller
    batch_size: int
    answerer: Answerer = field(init=False)

    def __post_init__(self) -> None:
        how = self.labeller
        self.answerer = Answerer(how.model, how.tokenizer, how.task, batch_size=self.batch_size)

    def __call__(self, places: Sequence[int], examples: Sequence[Example], beat: Beat) -> list[Answer]:
        return self.answerer(examples, beat)

    def count_cut(self, examples: Sequence[Example]) -> int:
        return self.answerer.count_cut(examples)

    def describe_path(self) -> str | None:
        return self.answerer.describe_path()


class _InCompany:
    """Each row's answer by the adapter of its name."""

    def __init__(self, company: Company, names: Sequence[str], batch_size: int) -> None:
        self.names, self.together = names, company.open(batch_size)

    def __call__(self, places: Sequence[int], examples: Sequence[Example], beat: Beat) -> list[Answer]:
        return self.together(examples, [self.names[place] for place in places], beat)

    def count_cut(self, examples: Sequence[Example]) -> int:
        return 0

    def describe_path(self) -> str | None:
        return None


def _saved_task(folder: Path) -> Task:
    def no_labels() -> tuple[str, ...]:
        raise ValueError(f"{folder} has no ia3_task.json, so its head's labels aren't known: ask it alone.")

    return load_task(folder) or task_without_file(str(PeftConfig.from_pretrained(folder).task_type), no_labels)


def labels_in(answer: Answer, task: Task) -> list[str]:
    """The labels or tags of an answer; none of free text."""
    if not task.kind.has_labels:
        return []
    return answer.label.split() if task.kind is TaskKind.TOKEN_CLASSIFICATION else [answer.label]
