"""What `ia3 predict` and `ia3 evaluate` share: an adapter with its task, and its answers with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.inference.answering import Answer
    from ia3.tasks.examples import Example
    from ia3.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """A loaded adapter and what it was trained to do.

    Args:
        model: the base model with the adapter.
        tokenizer: the base model's tokenizer.
        task: what the model reads and how it answers.
    """

    model: Any
    tokenizer: Any
    task: Task


def load_labeller(
    adapter: str,
    console: Console,
    *,
    text_column: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    way: str | None = None,
) -> Labeller:
    """Load an adapter with its base model, in the precision of its training, and its task; what is given overrides it.

    Raises:
        FileNotFoundError, ValueError: what `load_adapter` and `load_task` raise.
    """
    with console.status(f"Loading {adapter}"):
        from transformers.utils.logging import disable_progress_bar

        from ia3.inference.loading import DTYPES, load_adapter
        from ia3.tasks.task import load_task

        disable_progress_bar()
        saved = load_task(adapter)
        if saved is not None and text_column is not None:
            saved = replace(saved, template=saved.template.with_column(text_column))
        precision = saved.precision if saved is not None else None
        model, tokenizer = load_adapter(adapter, dtype=DTYPES[precision] if precision is not None else None)
    task = saved if saved is not None else _task_without_file(model, text_column or "text")
    if max_length is not None:
        task = replace(task, max_length=max_length)
    task = answered_by(task, way)
    if max_new_tokens is not None:
        if not task.kind.writes:
            raise ValueError(f"This adapter's task is {task.kind}, which writes nothing: leave --max-new-tokens out.")
        if task.ranks:
            raise ValueError(
                "The labels are ranked here and nothing is written: leave --max-new-tokens out, or add "
                "--answer-by generation."
            )
        task = replace(task, max_new_tokens=max_new_tokens)
    return Labeller(model=model, tokenizer=tokenizer, task=task)


def _task_without_file(model: Any, text_column: str) -> Task:
    """The task of an adapter that PEFT saved: it reads the text alone, and writes its answer or has a head."""
    from ia3.inference.classify import class_labels
    from ia3.tasks.task import Task, TaskKind
    from ia3.tasks.template import Template

    task_type = model.peft_config[model.active_adapter].task_type
    kinds = {kind.task_type: kind for kind in TaskKind}  # the last of a type: free text, for a seq2seq model
    kind = kinds[task_type]
    return Task(
        kind=kind,
        template=Template.of_column(text_column),
        labels=class_labels(model) if kind.has_labels else (),
        max_length=128,
        max_new_tokens=16 if kind.writes else None,
    )


def answered_by(task: Task, way: str | None) -> Task:
    """The task, answered as --answer-by asks for.

    Raises:
        ValueError: a way that there is not, or not for this task.
    """
    try:
        return task if way is None else task.answered_by(way)
    except ValueError as error:
        raise ValueError(f"--answer-by: {error}") from error


def answer(labeller: Labeller, examples: Sequence[Example], console: Console, *, batch_size: int) -> list[Answer]:
    """Answer texts as the model reads them, with a progress bar.

    Args:
        labeller: the loaded adapter.
        examples: rendered texts, with their earlier turns.
        console: where the bar goes, how many texts are cut, and on a GPU which way the answers are found.
        batch_size: texts at once.

    Returns:
        One answer an example, in order.
    """
    from rich.progress import Progress

    from ia3.inference.answering import Answerer
    from ia3.inference.complete import encode, prompt_text
    from ia3.tasks.task import TaskKind
    from ia3.training.collate import count_truncated

    task = labeller.task
    if task.kind is TaskKind.INSTRUCTIONS:
        whole = [prompt_text(labeller.tokenizer, each.text, each.turns, task.system) for each in examples]
        cut = sum(len(prompt) > task.max_length for prompt in encode(labeller.tokenizer, whole))
    else:
        cut = count_truncated([example.text for example in examples], labeller.tokenizer, task.max_length)
    if cut:
        console.print(f"Cut at {task.max_length} tokens: {cut:,} of {len(examples):,} texts.", highlight=False)
    answerer = Answerer(labeller.model, labeller.tokenizer, task, batch_size=batch_size)
    if (path := answerer.describe_path()) is not None:
        console.print(path, markup=False, highlight=False)
    with Progress(console=console, transient=True, disable=len(examples) <= batch_size) as bars:
        bar = bars.add_task("answering", total=len(examples))
        return answerer(examples, lambda count: bars.advance(bar, count))
