"""The terminal, to which nothing that is read gives orders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from ia3.errors import printable


class Screen(Console):
    """rich's console that takes texts as they are: brackets are no markup, and control characters, as in labels,
    columns and file names, are shown escaped."""

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, **how)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

    def status(self, status: Any, **how: Any) -> Status:
        return super().status(Text(status) if isinstance(status, str) else status, **how)
