"""A file's rows labelled into another file: as they come, to be gone on with, by one process or by several."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ia3.cache import digest as digest_of_file
from ia3.config import CONFIG_NAME
from ia3.data.columns import digest_of
from ia3.data.records import Records
from ia3.data.writing import Found, check_output, check_rows, write_rows
from ia3.files import fetch
from ia3.inference.answering import Answer
from ia3.inference.parts import Parts
from ia3.inference.processes import Processes, join
from ia3.inference.work import Telling, Work, answer_stretches, count_filled, labels_in, say_cut, work_of
from ia3.tasks.task import TASK_NAME
from ia3.tensors import PICKLE_NAME, SAFETENSORS_NAME

# Processes wait for the slowest.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Labelled:
    """What was written.

    Args:
        output: the file.
        rows: how many rows it has.
        answered: how many of them have a text, and so an answer.
        cut: how many texts were cut at the longest length allowed; only of those that one adapter answers.
        labels: how often each label or tag was given, the most frequent first; empty where the answers are free text.
        remarks: how the rows are written, a line each.
    """

    output: Path
    rows: int
    answered: int
    cut: int
    labels: dict[str, int]
    remarks: tuple[str, ...] = ()


def label_file(
    adapter: str | Path,
    source: str | Path | Records | Sequence[str],
    output: str | Path,
    *,
    text_column: str | None = None,
    adapter_column: str | None = None,
    answer_by: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    resume: bool = False,
    tell: Telling | None = None,
) -> Labelled:
    """Label the rows of a file, or texts, into a file.

    Answers are kept in `OUTPUT.parts` as they come, 32 batches a file, and joined at the end: whatever ends the work,
    `resume=True` goes on with it, loses nothing and answers nothing twice. Processes that `torchrun` or `accelerate
    launch` started together take turns at the parts, and the first one joins them.

    Args:
        adapter: a folder or a hub repository; with `adapter_column` a folder of many.
        source: a `.csv`, `.tsv`, `.xlsx`, `.jsonl`, `.parquet` or `.txt` (a text a line); rows as
            `read_questions` reads them; or a list of texts.
        output: a `.csv`, `.tsv`, `.xlsx` or `.jsonl`; it gets the rows with predictions and probabilities.
        text_column: the column with the text, instead of that of the training.
        adapter_column: the file's column with each row's adapter.
        answer_by: `rank` or `generation`, instead of the training's.
        max_length: where longer texts are cut, in tokens.
        max_new_tokens: the longest written answer, in tokens.
        batch_size: texts at once.
        trust_remote_code: run code that comes with the base, which the adapter names.
        resume: go on with what ended early; where nothing did, begin.
        tell: who is told how it goes; only in the first of several processes.

    Returns:
        What is written.

    Raises:
        FileNotFoundError, ImportError, ValueError: what can't be read, answered or written, before the first answer;
            parts of another work that ended early, or of one with other rows, adapters or settings.
        LostProcessError: another process is gone.
    """
    output = Path(output)
    rows = Path(source) if isinstance(source, str | Path) else source
    check_output(output, Path(rows.source) if isinstance(rows, Records) else rows if isinstance(rows, Path) else None)
    asked: dict[str, Any] = {
        **{"text_column": text_column, "adapter_column": adapter_column, "answer_by": answer_by},
        **{"max_length": max_length, "max_new_tokens": max_new_tokens, "batch_size": batch_size},
    }
    processes = join(_PATIENCE)
    tell = (tell or Telling()) if processes.is_first else Telling()
    work = work_of(str(adapter), rows, **asked, trust_remote_code=trust_remote_code, tell=tell)
    return _Labelling(work, {**asked, "ia3": version("ia3")}, output, processes, tell).run(resume=resume)


@dataclass
class _Labelling:
    work: Work
    settings: dict[str, Any]
    output: Path
    processes: Processes
    tell: Telling

    def __post_init__(self) -> None:
        self.parts, self.stretches = Parts(self.output), self.work.stretches
        self.records = self.work.questions.records

    def run(self, *, resume: bool) -> Labelled:
        count_filled(self.work, self.tell)
        shares = {f"probability_{label}" for task in self.work.questions.tasks for label in task.labels}
        check_rows(self.output, self.records, {"prediction", "probability", "probabilities", *shares})
        with ExitStack() as stack:

            def begin() -> tuple[list[int], dict[str, Any] | None]:
                stack.enter_context(self.parts.held())
                return self._begin(resume=resume)

            try:
                missing, summary = self.processes.of_first(begin)
                if summary is None:
                    self._answer(missing[self.processes.rank :: self.processes.count])
                    self.processes.wait()
                    summary = self.processes.of_first(self._join)
                if self.processes.is_first:
                    self.parts.close(summary)
            except BaseException:  # what was begun is given up, and whatever came goes on
                self._give_up()
                raise
        say_cut(self.work, summary["cut"], summary["answered"], self.tell)
        return Labelled(self.output, **{**summary, "remarks": tuple(summary["remarks"])})

    def _begin(self, *, resume: bool) -> tuple[list[int], dict[str, Any] | None]:
        """The parts to make; or a summary, where only the folder was left."""
        folders = [folder for group in self.work.groups for folder in group.adapters]
        digests = {"rows": digest_of(self.records.rows), "adapter": _digest_of(*folders)}
        went_on = self.parts.begin({**digests, **self.settings}, len(self.stretches), resume=resume)
        done = self.parts.done()
        if went_on:
            self.tell.say(f"Going on: {len(done):,} of {len(self.stretches):,} parts are there.")
        elif resume:
            self.tell.say(f"There is nothing to go on with beside {self.output}: begun with the first row.")
        return [number for number in range(len(self.stretches)) if number not in done], self.parts.summary()

    def _answer(self, numbers: list[int]) -> None:
        own = [self.stretches[number] for number in numbers]
        self.tell.begin(sum(len(stretch.places) for stretch in own))
        for number, (_, answered) in zip(numbers, answer_stretches(self.work, own, self.tell), strict=True):
            self.parts.write(number, answered)

    def _join(self) -> dict[str, Any]:
        lacking = len(self.stretches) - len(self.parts.done())
        if lacking:
            raise FileNotFoundError(
                f"{self.parts.folder} lacks {lacking:,} of {len(self.stretches):,} parts, which other processes wrote "
                "elsewhere: name an `output` in a folder that all of them share."
            )
        summary = self._summarise()
        found = _Again(lambda: map(found_of, self._in_order()))
        return {**summary, "remarks": write_rows(self.output, self.records, found, through=self.parts.joined)}

    def _summarise(self) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        answered = cut = 0
        for number, stretch in enumerate(self.stretches):
            part = self.parts.read(number)
            cut += part.cut
            for place, answer in zip(stretch.places, part.answers, strict=True):
                if answer is not None:
                    answered += 1
                    counts.update(labels_in(answer, self.work.questions.task_of(place)))
        return {"rows": len(self.records), "answered": answered, "cut": cut, "labels": dict(counts.most_common())}

    def _in_order(self) -> Iterator[Answer | None]:
        """The answers in the order of the rows: each group's are in it, so the next one of the row's group."""
        of_group: list[list[int]] = [[] for _ in self.work.groups]
        for number, stretch in enumerate(self.stretches):
            of_group[stretch.group].append(number)
        streams = [self._of_parts(numbers) for numbers in of_group]
        group_of = array("l", bytes(array("l").itemsize * len(self.records)))
        for number, group in enumerate(self.work.groups):
            for place in group.places:
                group_of[place] = number
        return (next(streams[number]) for number in group_of)

    def _of_parts(self, numbers: list[int]) -> Iterator[Answer | None]:
        for number in numbers:
            yield from self.parts.read(number).answers

    def _give_up(self) -> None:
        """Say what is kept of a work that ends early; nothing is where no part was made."""
        if not self.parts.is_begun_here:
            return
        done = self.parts.done()
        if not done:
            self.parts.clear()
            return
        self.tell.say(
            f"{len(done):,} of {len(self.stretches):,} parts are kept in {self.parts.folder}: the same again with "
            "`resume=True` goes on."
        )


class _Again(Iterable[Found]):
    """What can be looked through several times, made anew each time."""

    def __init__(self, make: Callable[[], Iterator[Found]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Found]:
        return self.make()


def found_of(answer: Answer | None, name: str = "prediction") -> dict[str, Any]:
    """What is put beside a row, or beside a text under another name."""
    found: dict[str, Any] = {name: answer.label if answer else None}
    if answer is not None and answer.probabilities is not None:
        found |= {"probability": answer.probability, "probabilities": answer.probabilities}
    return found


def _digest_of(*adapters: str) -> str:
    """The SHA-256 of what adapters' files hold, in hexadecimal."""
    digest = hashlib.sha256()
    for adapter in adapters:
        for name in (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME, TASK_NAME):
            path = fetch(adapter, name, optional=True)
            if path is not None:
                digest.update(f"{name}\0".encode() + bytes.fromhex(digest_of_file(path)))
    return digest.hexdigest()
