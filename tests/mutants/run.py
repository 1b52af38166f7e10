"""Run tests against each mutation of the code; every one must fail a test.

    python tests/mutants/run.py [--only WORD]

A mutation is made in a temporary copy of the package, never in the working tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
# Quick tests first, those most likely to notice: pytest stops at the first failure.
TESTS = [
    "test_config.py",
    "test_files.py",
    "test_sites.py",
    "test_families.py",
    "test_merging.py",
    "test_arithmetic.py",
    "test_checkpoint.py",
    "test_adapter.py",
    "test_parity.py",
    "test_contexts.py",
]
# Mutations in these folders and files are for these tests instead.
TESTS_OF = {
    "training/": [
        "training/test_collate.py",
        "training/test_optimise.py",
        "training/test_losses.py",
        "training/test_instructions.py",
        "training/test_loop.py",
        "training/test_resume.py",
    ],
    "fast/output.py": ["fast/test_output.py"],
    "fast/guard.py": ["fast/test_output.py", "fast/test_guard.py"],
    "fast/products.py": ["fast/test_products.py"],
    "fast/sweep.py": ["fast/test_sweep_step.py"],
    "fast/llama.py": ["fast/test_llama.py"],
    "fast/": ["fast/test_t5.py", "fast/test_step.py", "fast/test_packing.py", "fast/test_decode.py"],
    "table.py": ["test_table.py"],
    "storage.py": ["fast/test_step.py"],
    "rows.py": ["test_mixed.py"],
}
_CHECK = "import ia3, sys; sys.exit(0 if ia3.__file__.startswith(sys.argv[1]) else 3)"


def copy_with(mutant: Mutant | None, folder: Path) -> None:
    """A copy of the package with the mutation.

    Raises:
        SystemExit: its old text does not occur exactly once.
    """
    package = folder / "ia3"
    shutil.copytree(ROOT / "src" / "ia3", package, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is None:
        return
    path = package / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: found {source.count(mutant.old)} times, expected once: {mutant.old!r}")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def tests_for(mutant: Mutant) -> list[str]:
    return next((tests for start, tests in TESTS_OF.items() if mutant.file.startswith(start)), TESTS)


def run(mutant: Mutant | None, tests: list[str]) -> tuple[bool, str]:
    """Whether all tests passed, and the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        copy_with(mutant, Path(folder))
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", _CHECK, folder], env=environment, check=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        command.append("--hypothesis-profile=no-shrinking")
        done = subprocess.run(
            [*command, *(str(ROOT / "tests" / name) for name in tests)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), "")
    return done.returncode == 0, failed.removeprefix("FAILED tests/").split(" - ")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose description has this word")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args().only in mutant.breaks]
    for tests in {tuple(tests_for(mutant)) for mutant in chosen}:
        passed, failed = run(None, list(tests))
        if not passed:
            raise SystemExit(f"The tests fail without a mutation: {failed}")
    survivors = []
    for number, mutant in enumerate(chosen, 1):
        start = time.perf_counter()
        survived, failed = run(mutant, tests_for(mutant))
        survivors += [mutant] * survived
        state = "SURVIVED" if survived else "killed"
        seconds = time.perf_counter() - start
        print(f"{number:2} {state:8} {seconds:4.0f} s  {mutant.file:21} {mutant.breaks}  [{failed}]", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
