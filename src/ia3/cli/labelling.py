"""What `ia3 predict` and `ia3 evaluate` share: an adapter with its task, and its answers with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from ia3.inference.answering import Answer
    from ia3.tasks.examples import Example
    from ia3.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What flags ask for instead of what an adapter's task says; None is not asked for."""

    text_column: str | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    way: str | None = None

    def over(self, task: Task) -> Task:
        """The task with what is asked for, which it has to have a use for."""
        if self.text_column is not None:
            task = replace(task, template=task.template.with_column(self.text_column))
        if self.max_length is not None:
            task = replace(task, max_length=self.max_length)
        task = answered_by(task, self.way)
        if self.max_new_tokens is None:
            return task
        if not task.kind.writes:
            raise ValueError(f"This adapter's task is {task.kind}, which writes nothing: leave --max-new-tokens out.")
        if task.ranks:
            raise ValueError(
                "The labels are ranked here and nothing is written: leave --max-new-tokens out, or add "
                "--answer-by generation."
            )
        return replace(task, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """A base model with its adapter, its tokenizer, and the task: what the model reads and how it answers."""

    model: Any
    tokenizer: Any
    task: Task


def load_labeller(adapter: str, console: Console, overrides: Overrides, trust_remote_code: bool = False) -> Labeller:
    """Load an adapter with its base model, in its training's precision, and its task; what is given overrides it."""
    with console.status(f"Loading {adapter}"):
        from transformers.utils.logging import disable_progress_bar

        from ia3.inference.classify import class_labels
        from ia3.inference.loading import DTYPES, load_adapter
        from ia3.tasks.task import load_task

        disable_progress_bar()
        saved = load_task(adapter)
        task = None if saved is None else overrides.over(saved)
        precision, quantize = (None, None) if task is None else (task.precision, task.quantize)
        dtype = None if precision is None else DTYPES[precision]
        trusted = trust_remote_code
        model, tokenizer = load_adapter(adapter, dtype=dtype, quantize=quantize, trust_remote_code=trusted)
        if task is None:
            task_type = model.peft_config[model.active_adapter].task_type
            task = overrides.over(task_without_file(task_type, lambda: class_labels(model)))
    return Labeller(model=model, tokenizer=tokenizer, task=task)


def task_without_file(task_type: str, labels: Callable[[], tuple[str, ...]]) -> Task:
    """The task of an adapter that PEFT saved: it reads the text alone, and writes its answer or has a head."""
    from ia3.tasks.task import Task, TaskKind
    from ia3.tasks.template import Template

    kinds = {kind.task_type.value: kind for kind in TaskKind}  # the last of a type: free text, for a seq2seq model
    kind = kinds[task_type]
    return Task(
        kind=kind,
        template=Template.of_column("text"),
        labels=labels() if kind.has_labels else (),
        max_length=128,
        max_new_tokens=16 if kind.writes else None,
    )


def answered_by(task: Task, way: str | None) -> Task:
    """The task, answered as --answer-by asks for, which has to be a way for it."""
    try:
        return task if way is None else task.answered_by(way)
    except ValueError as error:
        raise ValueError(f"--answer-by: {error}") from error


def answer(labeller: Labeller, examples: Sequence[Example], console: Console, *, batch_size: int) -> list[Answer]:
    """Answer rendered texts, in order, with a progress bar; says how many are cut, and on a GPU the way they go."""
    from ia3.inference.answering import Answerer

    answerer = Answerer(labeller.model, labeller.tokenizer, labeller.task, batch_size=batch_size)
    if cut := answerer.count_cut(examples):
        length = labeller.task.max_length
        console.print(f"Cut at {length} tokens: {cut:,} of {len(examples):,} texts.", highlight=False)
    if (path := answerer.describe_path()) is not None:
        console.print(path, markup=False, highlight=False)
    with answering_bar(console, len(examples), batch_size) as beat:
        return answerer(examples, beat)


@contextmanager
def answering_bar(console: Console, total: int, batch_size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar where there are several batches; it is told of each batch's number of texts."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=total <= batch_size) as bars:
        bar = bars.add_task("answering", total=total)
        yield lambda count: bars.advance(bar, count)
