"""Whether a folder comes out the same where its process was killed and gone on with: by `kills`, at every file event.

python tests/attack/recovery.py train          # every event; also sweep, --full-disk, and flips of bits
python tests/attack/recovery.py train --few 8  # so many of them, evenly spread
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import kills  # noqa: E402 (after what it needs is set)
import torch  # noqa: E402 (after what it needs is set)

import tiny_seq2seq  # noqa: E402 (after what it needs is set)

torch.set_num_threads(1)

# What tells the time, or is drawn from what does.
_TIMES = {"seconds", "train_seconds"}
_DRAWN = {"report.md", "report.png", "sweep.png"}


@dataclass(frozen=True)
class Case:
    """A command that fills a folder, and what goes on with it there."""

    begin: Callable[[Path], kills.Work]
    go_on: Callable[[Path], kills.Work]


def cases(home: Path) -> dict[str, Case]:
    """The commands that are attacked, over a tiny base and its data in a folder."""
    base, data = tiny_seq2seq.save_base(home / "base"), tiny_seq2seq.write_csv(home / "data.csv", 24)
    common = ("--dropout", "--test-size", 0.25, "--batch-size", 6)
    train = ("train", base, data, "--steps", 8, "--evaluate-every", 2, "--lr", 0.1, *common)
    over = ("--over", "lr=0.1,1e30,1e38", "--over", "steps=4,8")  # some end early, some diverge
    sweep = ("sweep", base, data, "--evaluate-every", 2, "--patience", 1, "--best-by", "loss", *over, *common)
    return {
        "train": Case(lambda to: (*train, "--output", to), lambda to: ("train", "--resume", to)),
        "sweep": Case(lambda to: (*sweep, "--output", to), lambda to: ("sweep", "--resume", to)),
    }


def content(folder: Path) -> dict[str, Any]:
    """What a folder holds: its files by their paths, without times."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.name in _DRAWN:
        return "drawn"
    if path.name == "SHA256SUMS":
        lines = [line.split("  ") for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == own for own, name in lines}
    if path.name == "metrics.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json" and path.parent.name not in ("adapter", "best"):
        return _timeless(json.loads(path.read_bytes()))
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in _TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """In which files two folders differ; None if in none."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return ", ".join(names) or None


def attack(case: Case, home: Path, *, few: int | None, full_disk: bool = False) -> Iterator[tuple[int, str | None]]:
    """Each event's number with what is wrong after its process was struck there and gone on with; None if nothing."""
    folder = home / "folder"
    whole = kills.done(case.begin(folder), within=folder)
    assert whole.code == 0, whole.output
    expected = content(folder)
    chosen = (
        range(1, whole.events + 1) if few is None else sorted({1 + place * whole.events // few for place in range(few)})
    )
    for number in chosen:
        shutil.rmtree(folder, ignore_errors=True)
        strike = kills.refused_at if full_disk else kills.killed_at
        ended = strike(case.begin(folder), number, within=folder)
        yield number, _wrong(case, folder, ended, expected, full_disk=full_disk)


def flips(case: Case, home: Path, *, few: int | None) -> Iterator[tuple[int, str | None]]:
    """Flip a bit of a stopped run's files and go on with it, of a finished one's and use it: it must be noticed.

    Noticed is an error that names the file, or a line that does, and then the same content as of an unharmed run.
    """
    folder, stopped = home / "folder", home / "stopped"
    whole = kills.done(case.begin(folder), within=folder)
    finished, expected = shutil.copytree(folder, home / "finished"), content(folder)
    shutil.rmtree(folder)
    kills.interrupted_at(case.begin(folder), whole.events // 2, within=folder)
    folder.rename(stopped)
    chance = random.Random(0)
    for number in range(1, (30 if few is None else few) + 1):
        origin, commands = chance.choice(
            [
                (stopped, [case.go_on(folder)]),
                (
                    finished,
                    [
                        ("runs", folder),
                        *(("predict", each, "the share rises") for each in (folder / "adapter", folder / "best")),
                    ],
                ),
            ]
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(origin, folder)
        path = chance.choice([each for each in sorted(folder.rglob("*")) if each.is_file() and _is_read(each)])
        damaged = bytearray(path.read_bytes())
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        ended = [kills.done(command, within=folder) for command in commands]
        yield number, _unnoticed(path, folder, ended, expected if origin == stopped else None)


def _is_read(path: Path) -> bool:
    """Whether a command reads the file, which of recipes compares what they mean."""
    return path.name not in (*_DRAWN, "README.md", "recipe.yaml", "runs.png")


def _unnoticed(path: Path, folder: Path, ended: Sequence[kills.Ended], expected: dict[str, Any] | None) -> str | None:
    output = "".join(_in_one_line(each.output) for each in ended)
    name = path.relative_to(folder).as_posix()
    if name.replace(" ", "") not in output.replace(" ", "") or "Traceback" in output:
        return f"{name}: {output[-2000:]}"
    if expected is not None and not ended[0].code:
        return difference(content(folder), expected)
    return None


def _wrong(case: Case, folder: Path, ended: kills.Ended, expected: dict[str, Any], *, full_disk: bool) -> str | None:
    if not ended.killed and not full_disk:
        return f"it was not killed: {ended.output[-2000:]}"
    if full_disk and (ended.code == 0 or "Traceback" in ended.output or str(folder) not in _in_one_line(ended.output)):
        return f"a full disk ended with {ended.code}: {ended.output[-2000:]}"
    again = kills.done(case.go_on(folder), within=folder) if folder.exists() else None
    if again is None or "holds no run" in again.output or "holds no sweep" in again.output:
        again = kills.done(case.begin(folder), within=folder)  # it had not begun
    if again.code and "iscomplete" not in _in_one_line(again.output).replace(" ", ""):
        return f"it did not go on: {again.output[-2000:]}"
    return difference(content(folder), expected)


def _in_one_line(panel: str) -> str:
    return "".join(line.strip("│ ") for line in panel.splitlines())


def main() -> int:
    """Attack, print what went wrong, and end with 1 if something did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", choices=("train", "sweep", "flips"))
    parser.add_argument("--few", type=int, help="how many events, evenly spread; all by default")
    parser.add_argument("--full-disk", action="store_true", help="fail as a full disk does, instead of being killed")
    given = parser.parse_args()
    import ia3.cli.main
    import ia3.training.sweep  # noqa: F401  so that a child need not

    started, wrong, count = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as home:
        every = cases(Path(home))
        if given.case == "flips":
            struck = flips(every["train"], Path(home), few=given.few)
        else:
            struck = attack(every[given.case], Path(home), few=given.few, full_disk=given.full_disk)
        for number, found in struck:
            count += 1
            if found is not None:
                wrong += 1
                print(f"{number}: {found}", flush=True)
    print(f"{given.case}: {count - wrong} of {count} come out right, {time.perf_counter() - started:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
