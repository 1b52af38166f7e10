"""What the files of a run's folder must hold to be read back; what else they hold is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ia3.documents import parse_json, read_json
from ia3.errors import fit_screen, shorten
from ia3.files import read_file
from ia3.tasks.task import TaskKind

ModelT = TypeVar("ModelT", bound="Written")

# The most bytes of a file, whose content takes some 25 times as much memory.
_LIMIT = 1 << 26
_Count = Annotated[int, Field(ge=0)]


class Written(BaseModel):
    """What a run wrote, each value of its own type and no other that could be turned into it."""

    model_config = ConfigDict(strict=True, frozen=True)


class Figures(Written):
    """An evaluation; further figures by name may stand beside these."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    step: _Count
    loss: FiniteFloat
    accuracy: FiniteFloat | None = None


class Result(Written):
    """`result.json`."""

    accuracy_interval_95: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None
    best: Figures
    evaluations: Annotated[list[Figures], Field(min_length=1)]
    steps: _Count
    stopped_early: bool
    train_seconds: FiniteFloat


class FinishedResult(Result):
    """`result.json` as it is given again where a run need not be done again."""

    labels: list[str]
    predictions: list[Any]
    task: Annotated[TaskKind, Field(strict=False)]
    train_examples: _Count


class MetricsLine(Written):
    """A line of `metrics.jsonl`: a step, or an evaluation after it."""

    step: _Count
    evaluation: Figures | None = None


class DataFacts(Written):
    """Of data in `environment.json`: where from, how many rows, and their digest."""

    rows: _Count
    sha256: str
    source: str


class BothData(Written):
    """The held-out and the training data."""

    test: DataFacts
    train: DataFacts


class Environment(Written):
    """`environment.json`."""

    base_model: dict[str, Any]
    data: BothData
    device: str
    processes: _Count = 1
    recipe: dict[str, Any]
    threads: _Count
    versions: dict[str, str]


class SweepRecipes(Written):
    """`sweep.yaml`: a recipe a run, and what they differ in."""

    differ_in: Annotated[list[str], Field(min_length=1)]
    runs: Annotated[list[dict[str, Any]], Field(min_length=1)]


class PartsPlan(Written):
    """`plan.json` of an output's parts: what decides the answers, how many parts there are, and what was joined."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    parts: _Count
    settings: dict[str, Any]
    summary: dict[str, Any] | None = None


def read_written(path: Path, model: type[ModelT]) -> tuple[ModelT, dict[str, Any]]:
    """A file of a run: what `model` declares, checked, and all that it holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another than a run writes.
    """
    content = read_json(path, _LIMIT, finite=False)
    return checked(content, model, str(path)), content


def read_lines(path: Path, model: type[ModelT]) -> list[ModelT]:
    """The whole lines of a file with an object a line; of a run under way the last may not be whole yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is damaged, or another than a run writes.
    """
    *lines, _ = read_file(path, _LIMIT).split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        found.append(checked(parse_json(line, place, finite=False), model, place))
    return found


def checked(content: dict[str, Any], model: type[ModelT], source: str) -> ModelT:
    """What `model` declares of a file's content; a ValueError that names `source` where it is something else."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = "is not there" if first["type"] == "missing" else f"is {shorten(first['input'])}: {first['msg']}"
        raise ValueError(
            f"{source} is damaged, or of another version of ia3 ({fit_screen(key, 200)} {reason}): copy it again, "
            "train again, or move its run's folder elsewhere."
        ) from error
