"""A million rows are read in seconds, and labelled in bounded memory by a process that is killed twice and goes on.

The model is a BERT 16 wide, so that reading, tokenising and writing are what is measured. Each line of
`results/million_rows.jsonl` is one process, with its peak of resident memory; beside the clock's seconds are the
processor's own, since others may use the machine.

Needs: CPU; ia3[train]; ten minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

READ = """
import sys
from ia3.data.loading import load_examples
from ia3.data.records import read_records
from ia3.tasks.examples import split_examples
examples = load_examples(read_records(sys.argv[1]))
if "split" in sys.argv:
    parts = split_examples(examples)
    print(examples.describe(), [part.digest() for part in parts])
"""
TOKENISE = """
import sys
from ia3.data.loading import load_examples
from ia3.inference.loading import load_adapter
from ia3.inference.predict import tokenise_inputs
examples = load_examples(sys.argv[1])
tokens = tokenise_inputs(load_adapter(sys.argv[2])[1], examples.texts, 32)
"""


def measured(command: list[str], strike: Callable[[float], bool] = lambda seconds: False) -> dict[str, Any]:
    """Run a command to its end, or until it is to be struck down: seconds, peak of memory and exit status."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if strike(time.perf_counter() - started):
                child.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        log.seek(0)
        said = log.read().decode()
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), said
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": used.ru_maxrss // 1024,
        "ended": "killed" if code else "done",
    }


def make_rows(path: Path, count: int) -> None:
    """Rows with a number each, and texts and labels of the tweets that come with the package."""
    import ia3.data

    source = Path(ia3.data.__file__).with_name("tweets") / "train.csv"
    with source.open(newline="", encoding="utf-8") as file:
        tweets = list(islice(csv.reader(file), 1, None))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label"])
        for number in range(count):
            text, label = tweets[number % len(tweets)]
            writer.writerow([number, f"{text} {number}", label])


def make_words(path: Path, count: int) -> None:
    """Rows with a number each, and texts of the tiny model's words."""
    import tiny_classifier

    few = [row.text for row in tiny_classifier.labelled(12)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([number, few[number * 7 % 12]] for number in range(count))


def expect_whole(output: Path, source: Path) -> int:
    """See that each row is there once, in order, and equal texts have equal labels; how many there are."""
    known: dict[str, str] = {}
    count = 0
    with output.open(newline="", encoding="utf-8") as file, source.open(newline="", encoding="utf-8") as asked:
        for found, row in zip(csv.DictReader(file), csv.DictReader(asked), strict=True):
            assert (found["id"], found["text"]) == (row["id"], row["text"]), found
            assert known.setdefault(found["text"], found["prediction"]) == found["prediction"], found
            count += 1
    return count


def label(adapter: Path, source: Path, output: Path, kills: int) -> list[dict[str, Any]]:
    """Label a file by processes of which the first few are killed in the middle of their work."""
    command = [sys.executable, "-m", "ia3", "predict", str(adapter), "--file", str(source), "--output", str(output)]
    parts = output.with_name(f"{output.name}.parts")
    lines: list[dict[str, Any]] = []
    for number in range(kills + 1):
        done = len(list(parts.glob("*.part")))
        wanted = done + 30

        def strike(seconds: float, wanted: int = wanted, last: bool = number == kills) -> bool:
            return not last and len(list(parts.glob("*.part"))) >= wanted

        found = measured([*command, "--batch-size", "128", *(["--resume"] if number else [])], strike)
        lines.append({"what": "label", "parts_found": done, "parts_left": len(list(parts.glob("*.part"))), **found})
    assert not parts.exists()
    return lines


def main() -> None:
    """Measure, print a line a process, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many rows; a million by default")
    parser.add_argument("--kills", type=int, default=2, help="how often the labelling is killed; twice by default")
    given = parser.parse_args()
    import tiny_classifier

    lines: list[dict[str, Any]] = [{"machine": bench.say_machine(), "rows": given.rows}]

    def keep(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        adapter = tiny_classifier.save_adapter(home)
        tweets, words, output = home / "tweets.csv", home / "words.csv", home / "labelled.csv"
        make_rows(tweets, given.rows)
        make_words(words, given.rows)
        python = [sys.executable, "-c"]
        keep({"what": "read", **measured([*python, READ, str(tweets)])})
        keep({"what": "read, split, describe, digest", **measured([*python, READ, str(tweets), "split"])})
        keep({"what": "read and tokenise", **measured([*python, TOKENISE, str(tweets), str(adapter)])})
        for line in label(adapter, words, output, given.kills):
            keep(line)
        keep({"what": "rows in order, once each", "rows": expect_whole(output, words)})
    bench.RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (bench.RESULTS / "million_rows.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
