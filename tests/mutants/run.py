"""Run tests against each mutation of the code; every one must fail a test.

    python tests/mutants/run.py [--only WORD] [--list]

A mutation is made in a temporary copy of the package, never in the working tree. Printed are each mutation with its
fate and the test that killed it, and how many of each room were killed: a room is a folder of the package or a module
in its top level.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from changes import PACKAGE, Mutant, Mutated, mutate

from mutants import MUTANTS

ROOT = Path(__file__).parents[2]
_CHECK = "import ia3, sys; sys.exit(0 if ia3.__file__.startswith(sys.argv[1]) else 3)"
_SECONDS = 120  # of one test: a mutation may make it wait for ever


def rooms() -> list[str]:
    """The package's folders with code, and the modules in its top level."""
    folders = [path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))]
    return sorted([*folders, *(path.stem for path in PACKAGE.glob("*.py"))])


def run(mutated: Mutated | None, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether all tests passed, and the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ia3"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutated is not None:
            (package / mutated.file).write_text(mutated.source, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        imported = subprocess.run(
            [sys.executable, "-c", _CHECK, folder], env=environment, capture_output=True, text=True
        )
        if imported.returncode:
            return False, f"import ia3: {imported.stderr.strip().splitlines()[-1:]}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        command += ["--hypothesis-profile=no-shrinking", f"--timeout={_SECONDS}"]
        done = subprocess.run(
            [*command, *(str(ROOT / "tests" / name) for name in tests)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1, 2):  # 2: a file of tests could not be imported
        raise SystemExit(f"pytest could not run ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    return done.returncode == 0, failed.partition(" ")[2].removeprefix("tests/").split(" - ")[0]


def report(killed: Counter[str], survived: Counter[str]) -> None:
    """A line a room."""
    print("\nroom          killed  survived")
    for room in sorted(killed | survived):
        print(f"{room:13} {killed[room]:6} {survived[room]:9}")
    print(f"{killed.total()} of {killed.total() + survived.total()} killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose description, function or room has this word")
    parser.add_argument("--list", action="store_true", help="name the mutations and the rooms without any; run nothing")
    arguments = parser.parse_args()
    every = [(mutant, mutate(mutant), tests) for tests, mutants in MUTANTS.items() for mutant in mutants]

    def is_asked_for(mutant: Mutant, mutated: Mutated) -> bool:
        return arguments.only in mutant.breaks or arguments.only in mutant.function or arguments.only == mutated.room

    chosen = [each for each in every if is_asked_for(*each[:2])]
    without = [room for room in rooms() if room not in {mutated.room for _, mutated, _ in every}]
    if arguments.list:
        for mutant, mutated, _ in chosen:
            print(f"{mutated.file:24} {mutant.function:34} {mutant.breaks}")
        print(f"{len(chosen)} mutations; rooms without any: {', '.join(without) or 'none'}")
        return
    for tests in dict.fromkeys(tests for *_, tests in chosen):
        passed, failed = run(None, tests)
        if not passed:
            raise SystemExit(f"The tests fail without a mutation: {failed}")
    killed: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for number, (mutant, mutated, tests) in enumerate(chosen, 1):
        start = time.perf_counter()
        lives, failed = run(mutated, tests)
        (survived if lives else killed)[mutated.room] += 1
        fate, seconds = "SURVIVED" if lives else "killed", time.perf_counter() - start
        print(f"{number:3} {fate:8} {seconds:4.0f} s  {mutant.function:34} {mutant.breaks}  [{failed}]", flush=True)
    report(killed, survived)
    print(f"Rooms without a mutation: {', '.join(without) or 'none'}")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
