"""The answers to a file's rows while they are made: a folder beside the output, with a file a stretch.

A file of it is written whole or not at all, so that whatever ends the work, the files that are there are right. They
are joined when the last one is; the output is there then, before the folder goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ia3.files import read_file, write_atomically
from ia3.inference.answering import Answer
from ia3.inference.work import Answered
from ia3.runs.lock import LOCK_NAME, locked
from ia3.runs.schemas import PartsPlan, read_written

_VERSION = 1
# The most bytes of a part: some hundred to some thousand answers, however long.
_LIMIT = 1 << 30
_PLAN = "plan.json"
_PART = ".part"
_JOINED = "joined"


class Parts:
    """What of an output is there already.

    Args:
        output: the file that is being made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self.is_begun_here = False  # or gone on with, by this process
        self.joined = self.folder / _JOINED  # what is moved to the output

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep others from working in it; it goes again if nothing is left in it.

        Raises:
            BlockingIOError: somebody else works in it.
        """
        self.folder.mkdir(exist_ok=True)
        try:
            with locked(self.folder):
                yield
        finally:
            with suppress(OSError):
                self.folder.rmdir()

    def begin(self, settings: dict[str, Any], count: int, *, resume: bool) -> bool:
        """Begin, or go on with an earlier work; the folder is held.

        Args:
            settings: what decides the answers, by name: texts, numbers or None.
            count: how many parts there are to be.
            resume: whether to go on.

        Returns:
            Whether there was something to go on with.

        Raises:
            ValueError: another work's parts are there, and `resume` isn't asked for; or they were begun otherwise.
        """
        plan = self.plan()
        if plan is not None and not plan.get("summary") and not resume:
            raise ValueError(
                f"{self.folder} holds {len(self.done()):,} of {plan['parts']:,} parts of a work that ended early: "
                "`resume=True` goes on with it; or remove the folder."
            )
        if plan is not None and resume:
            self._expect_same(plan, settings, count)
            self.is_begun_here = True
            for path in self.folder.iterdir():
                if path.name not in (_PLAN, LOCK_NAME) and path.suffix != _PART:  # was being written at the end
                    path.unlink()
            return True
        self.is_begun_here = True
        self.clear()
        self._write_plan({"version": _VERSION, "parts": count, "settings": settings})
        return False

    def plan(self) -> dict[str, Any] | None:
        """What the folder was begun for; None without any.

        Raises:
            ValueError: it is damaged.
        """
        path = self.folder / _PLAN
        if not path.is_file():
            return None
        try:
            _, plan = read_written(path, PartsPlan)
        except ValueError as error:
            raise ValueError(f"{path} can't be read ({error}): remove {self.folder}, and start anew.") from error
        return plan

    def _expect_same(self, plan: dict[str, Any], settings: dict[str, Any], count: int) -> None:
        former = plan["settings"]
        for name in {**former, **settings}:
            if former.get(name) != settings.get(name):
                was, now = (f"{each.get(name)!s:.60}" for each in (former, settings))
                raise ValueError(
                    f"{self.folder} was begun with another {name} ({was}, and now {now}): give the same again, or "
                    "remove the folder to start anew."
                )
        if plan["parts"] != count:
            raise ValueError(
                f"{self.folder} was begun for {plan['parts']:,} parts, and there are {count:,}: remove it."
            )

    def summary(self) -> dict[str, Any] | None:
        """What `close` was told, where the output is there and only the folder wasn't gone."""
        plan = self.plan()
        return None if plan is None else plan.get("summary")

    def done(self) -> set[int]:
        """The numbers of the parts that are there."""
        return {int(path.stem) for path in self.folder.glob(f"*{_PART}") if path.stem.isdecimal()}

    def write(self, number: int, answered: Answered) -> None:
        """Keep the answers to a stretch."""
        answers = [None if each is None else [each.label, each.probabilities] for each in answered.answers]
        content = json.dumps({"cut": answered.cut, "answers": answers}).encode()
        write_atomically(self._path(number), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    def read(self, number: int) -> Answered:
        """The answers that `write` kept, without the words' tags.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(number)
        digest, _, content = read_file(path, _LIMIT).partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError(f"{path} is damaged: remove this file, and go on by `resume=True`.")
        found = json.loads(content)
        return Answered([None if each is None else Answer(*each) for each in found["answers"]], found["cut"])

    def close(self, summary: dict[str, Any]) -> None:
        """Take everything away, now that the output is there."""
        plan = self.plan()
        assert plan is not None
        self._write_plan({**plan, "summary": summary})
        self.clear()

    def clear(self) -> None:
        """Empty the folder; the plan goes last, since it tells what the rest is."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _PLAN):
            if path.name != LOCK_NAME:
                path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}{_PART}"

    def _write_plan(self, plan: dict[str, Any]) -> None:
        write_atomically(self.folder / _PLAN, (json.dumps(plan, indent=2) + "\n").encode())
