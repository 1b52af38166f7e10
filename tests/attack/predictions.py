"""Whether a labelled file comes out the same where its process was killed and gone on with: by `kills`, at file events.

python tests/attack/predictions.py              # every event
python tests/attack/predictions.py --few 8      # so many of them, evenly spread
python tests/attack/predictions.py --full-disk  # the disk is full from an event on
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import kills  # noqa: E402 (after what it needs is set)
import torch  # noqa: E402 (after what it needs is set)

import tiny_classifier  # noqa: E402 (after what it needs is set)
from ia3.inference.label_file import label_file  # noqa: E402 (after what it needs is set)

torch.set_num_threads(1)

_OUTPUT = "out.csv"
# Of 32 rows a part, as one text a batch makes them.
_ROWS = 250


def attack(home: Path, *, few: int | None = None, full_disk: bool = False) -> Iterator[tuple[int, str | None]]:
    """Each event's number with what is wrong after its process was struck there and gone on with; None if nothing."""
    adapter, rows = tiny_classifier.save_adapter(home), home / "rows.txt"
    rows.write_text("".join(f"{row.text}\n" for row in tiny_classifier.labelled(_ROWS)), encoding="utf-8")
    folder = home / "folder"

    def label(*, resume: bool = False) -> kills.Work:
        return lambda: label_file(adapter, rows, folder / _OUTPUT, batch_size=1, resume=resume)

    folder.mkdir()
    whole = kills.done(label(), within=folder)
    assert whole.code == 0, whole.output
    expected = (folder / _OUTPUT).read_bytes()
    count = whole.events
    chosen = range(1, count + 1) if few is None else sorted({1 + place * count // few for place in range(few)})
    for number in chosen:
        shutil.rmtree(folder)
        folder.mkdir()
        strike = kills.refused_at if full_disk else kills.killed_at
        ended = strike(label(), number, within=folder)
        if ended.killed or full_disk:
            yield number, _wrong(folder, label(resume=True), expected)
        else:
            yield number, f"it was not killed: {ended.output[-2000:]}"


def _wrong(folder: Path, go_on: kills.Work, expected: bytes) -> str | None:
    again = kills.done(go_on, within=folder)
    if again.code:
        return f"it did not go on: {again.output[-2000:]}"
    left = sorted(path.name for path in folder.iterdir() if path.name != _OUTPUT)
    if left:
        return f"{left} are left"
    return None if (folder / _OUTPUT).read_bytes() == expected else "another output"


def main() -> int:
    """Attack, and print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--few", type=int, help="how many events, evenly spread; all by default")
    parser.add_argument("--full-disk", action="store_true", help="fail as a full disk does, instead of being killed")
    given = parser.parse_args()
    started, wrong, count = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as home:
        for number, found in attack(Path(home), few=given.few, full_disk=given.full_disk):
            count += 1
            if found is not None:
                wrong += 1
                print(f"event {number}: {found}", flush=True)
    print(f"predict: {count - wrong} of {count} events come out the same, {time.perf_counter() - started:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
