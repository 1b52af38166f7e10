"""What the commands that answer share: loading and answering, with what is said of them meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from ia3.inference import labelling
from ia3.inference.labelling import Labeller, Overrides

if TYPE_CHECKING:
    from rich.progress import Progress

    from ia3.inference.answering import Answer
    from ia3.inference.work import Telling
    from ia3.tasks.examples import Example


def load_labeller(adapter: str, console: Console, overrides: Overrides, *, trusted: bool) -> Labeller:
    """As the library loads it, and says meanwhile that it does."""
    with console.status(f"Loading {adapter}"):
        return labelling.load_labeller(adapter, overrides, trust_remote_code=trusted)


def answer(labeller: Labeller, examples: Sequence[Example], console: Console, *, batch_size: int) -> list[Answer]:
    """Answer rendered texts, in order, with a progress bar; says how many are cut, and on a GPU the way they go."""
    from ia3.inference.answering import Answerer, cut_line

    answerer = Answerer(labeller.model, labeller.tokenizer, labeller.task, batch_size=batch_size)
    if cut := answerer.count_cut(examples):
        console.print(cut_line(labeller.task.max_length, cut, len(examples)), highlight=False)
    if (path := answerer.describe_path()) is not None:
        console.print(path, markup=False, highlight=False)
    with answering_bar(console, batch_size) as bar:
        bar.begin(len(examples))
        return answerer(examples, bar.beat)


class AnsweringBar:
    """A progress bar of rows, with their rate, which appears where there are several batches.

    Args:
        progress: what draws it.
        batch_size: rows of a batch.
    """

    def __init__(self, progress: Progress, batch_size: int) -> None:
        self.progress, self.batch_size = progress, batch_size
        self.bar = progress.add_task("answering", total=None)

    def begin(self, total: int) -> None:
        """Draw it for so many rows."""
        self.progress.update(self.bar, total=total)

    def beat(self, count: int) -> None:
        """So many more rows are answered."""
        total = self.progress.tasks[0].total
        if total is not None and total > self.batch_size:
            self.progress.start()  # again, after what was loaded
        self.progress.advance(self.bar, count)

    @contextmanager
    def loading(self, adapter: str) -> Iterator[None]:
        """Say in its place that an adapter is loaded."""
        self.progress.stop()
        with self.progress.console.status(f"Loading {adapter}"):
            yield

    def telling(self) -> Telling:
        """What tells the bar, and its console's reader, how the work goes."""
        from ia3.inference.work import Telling

        def say(line: str) -> None:
            self.progress.console.print(line, markup=False, highlight=False)

        return Telling(begin=self.begin, beat=self.beat, loading=self.loading, say=say)


@contextmanager
def answering_bar(console: Console, batch_size: int) -> Iterator[AnsweringBar]:
    """A bar that is gone afterwards, however that comes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")

    columns = ("answering", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    try:
        yield AnsweringBar(progress, batch_size)
    finally:
        progress.stop()
