"""What `ia3 predict` and `ia3 evaluate` share: an adapter with its task, and its answers with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia3.cli.adapters import expect_adapter

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.training.task import Task, Template

_BATCHES_A_STRETCH = 8


@dataclass(frozen=True)
class Answer:
    """A label, and the probability of each label; None where the label was generated."""

    label: str
    probabilities: dict[str, float] | None = None

    @property
    def probability(self) -> float | None:
        """The label's own probability."""
        return None if self.probabilities is None else self.probabilities[self.label]


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """A loaded adapter and how to ask it.

    Args:
        model: the base model with the adapter.
        tokenizer: the base model's tokenizer.
        template: what the model reads.
        labels: what to choose from; empty lets the model write its answer.
        label_column: the column that holds the labels of an evaluation.
        max_length: where longer inputs are cut, in tokens.
        max_new_tokens: the longest written answer, in tokens.
    """

    model: Any
    tokenizer: Any
    template: Template
    labels: tuple[str, ...]
    label_column: str
    max_length: int
    max_new_tokens: int


def load_labeller(
    adapter: str,
    console: Console,
    *,
    text_column: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> Labeller:
    """Load an adapter with its base model and its task; what is given overrides the task.

    Raises:
        FileNotFoundError, ValueError: what `load_adapter` and `load_task` raise.
    """
    expect_adapter(adapter)
    with console.status(f"Loading {adapter}"):
        from transformers.utils.logging import disable_progress_bar

        from ia3.inference.predict import load_adapter
        from ia3.training.task import load_task

        disable_progress_bar()
        # An adapter that PEFT saved has no task: its input is the text alone, and its answers are written.
        task = load_task(adapter)
        template = _template(task, text_column)
        model, tokenizer = load_adapter(adapter)
    return Labeller(
        model=model,
        tokenizer=tokenizer,
        template=template,
        labels=task.labels if task is not None else (),
        label_column=task.label_column if task is not None else "label",
        max_length=max_length or (task.max_length if task is not None else 128),
        max_new_tokens=max_new_tokens or (task.max_new_tokens if task is not None else 16),
    )


def _template(task: Task | None, text_column: str | None) -> Template:
    from ia3.training.task import Template

    template = task.template if task is not None else Template.of_column("text")
    return template if text_column is None else template.with_column(text_column)


def answer(
    labeller: Labeller, texts: Sequence[str], console: Console, *, generate: bool, batch_size: int
) -> list[Answer]:
    """Label texts as the model reads them, with a progress bar.

    Args:
        labeller: the loaded adapter.
        texts: rendered texts.
        console: where the bar goes, and how many texts are cut.
        generate: let the model write its answer, instead of choosing the likeliest label.
        batch_size: texts at once.

    Returns:
        One answer a text, in order.
    """
    from rich.progress import track

    from ia3.training.data import count_truncated

    cut = count_truncated(texts, labeller.tokenizer, labeller.max_length)
    if cut:
        console.print(f"Cut at {labeller.max_length} tokens: {cut:,} of {len(texts):,} texts.", highlight=False)
    # Sorting by length within a stretch saves most of the padding, and the bar moves at each.
    size = batch_size * _BATCHES_A_STRETCH
    answers: list[Answer] = []
    starts = range(0, len(texts), size)
    for start in track(starts, "labelling", console=console, transient=True, disable=len(starts) == 1):
        answers += _answer_stretch(labeller, texts[start : start + size], generate, batch_size)
    return answers


def _answer_stretch(labeller: Labeller, texts: Sequence[str], generate: bool, batch_size: int) -> list[Answer]:
    if generate or not labeller.labels:
        from ia3.inference.predict import predict

        words = predict(
            labeller.model,
            labeller.tokenizer,
            texts,
            max_length=labeller.max_length,
            max_new_tokens=labeller.max_new_tokens,
            batch_size=batch_size,
        )
        return [Answer(word) for word in words]
    from ia3.inference.rank import rank

    rankings = rank(
        labeller.model,
        labeller.tokenizer,
        texts,
        labeller.labels,
        max_length=labeller.max_length,
        batch_size=batch_size,
    )
    return [Answer(ranking.label, ranking.probabilities) for ranking in rankings]
