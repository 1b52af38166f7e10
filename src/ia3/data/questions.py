"""Records to be answered: what a model reads of each row, by the task of the adapter that answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ia3.data.columns import Row
from ia3.data.conversations import format_to_answer, read_to_answer
from ia3.data.loading import words_of
from ia3.data.records import Records, is_phrasebank, read_records
from ia3.errors import listed
from ia3.tasks.columns import require_columns
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind, load_task


@dataclass(frozen=True)
class Questions:
    """The rows of a source as questions, each to its own task; one is made when it is asked for.

    Args:
        records: the rows.
        task_of: the task of a row, by its place among them.
    """

    records: Records
    task_of: Callable[[int], Task]
    _readers: dict[Task, Callable[[Row], Example]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> Example:
        """What the model reads of a row; an empty text of a row without any.

        Raises:
            ValueError: a row of another shape, or without a column that is read.
        """
        task = self.task_of(place)
        reader = self._readers.get(task)
        if reader is None:
            reader = self._readers[task] = _reader(self.records, task)
        return reader(self.records.rows[place])

    def as_given(self, place: int) -> str:
        """The text without the template's words, where one column is all that it reads."""
        field, *more = self.task_of(place).template.fields
        cell = self.records.rows[place][1].get(field, [])
        return self[place].text if more or isinstance(cell, list) else str(cell)

    def count_filled(self) -> int:
        """How many rows have a text; reads them all, so that what can't be read is known before any is answered.

        Raises:
            ValueError: what reading a row raises, or none of them has a text.
        """
        count = sum(bool(self[place].text) for place in range(len(self)))
        if not count:
            fields = sorted({field for task in self.tasks for field in task.template.fields})
            raise ValueError(
                f"None of the {len(self):,} rows of {self.records.source} has a text in [{listed(fields)}]."
            )
        return count

    @cached_property
    def tasks(self) -> set[Task]:
        """The different tasks."""
        return {self.task_of(place) for place in range(len(self))}


def read_questions(path: Path, adapter: str, text_column: str | None, adapter_column: str | None) -> Records:
    """The rows of a file that is to be answered; texts without a column's name get that which the adapter reads.

    Args:
        path: a `.csv`, `.tsv`, `.xlsx`, `.jsonl`, `.json`, `.parquet` or `.txt` file; of a `.txt` whose lines all are
            PhraseBank's, `sentence@label`, the label isn't part of the text.
        adapter: whose task tells what is read; with `adapter_column` it doesn't.
        text_column: the column that is asked for instead.
        adapter_column: the column with each row's adapter.

    Raises:
        FileNotFoundError, ImportError, ValueError: what `load_task` and `read_records` raise.
    """
    task = load_task(adapter) if text_column is None and adapter_column is None else None
    reads = task.template.required or task.template.fields if task is not None else (text_column or "text",)
    named = [adapter_column] if adapter_column is not None else []
    named += reads if len(reads) > 1 or text_column is not None else ()
    label = (task.label_column if task is not None else "label") if is_phrasebank(path) else None
    return read_records(path, line_column=reads[0] if len(reads) == 1 else "text", line_label=label, named=named)


def texts_as_records(texts: Iterable[str], task: Task) -> Records:
    """Sentences as rows of the one column that the template reads.

    Raises:
        ValueError: it reads several.
    """
    fields = task.template.fields
    if len(task.template.required) > 1:
        raise ValueError(
            f"The adapter reads the columns [{listed(fields)}], so a sentence is not enough: give a `file` with them."
        )
    rows = tuple((f"number {number}", {fields[0]: text}) for number, text in enumerate(texts, start=1))
    return Records("the sentences", fields, rows)


def _reader(records: Records, task: Task) -> Callable[[Row], Example]:
    """What makes of a row what the model reads of it; of a text whose words get tags the cell may be a list."""
    if task.kind is TaskKind.INSTRUCTIONS:
        how = format_to_answer(records, task.template)
        return lambda row: read_to_answer(row[1], f"{records.source}, {row[0]}", how)
    if task.kind is not TaskKind.TOKEN_CLASSIFICATION:
        return lambda row: Example(task.template.render(row[1], f"{records.source}, {row[0]}"), "")
    (column,) = task.template.fields
    require_columns(records.source, records.columns, column)
    return lambda row: Example(" ".join(words_of(row[1].get(column), f"{records.source}, {row[0]}", column)), "")
