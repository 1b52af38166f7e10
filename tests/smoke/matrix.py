"""Seven things on the oldest and newest torch, transformers and Python that `pyproject.toml` promises.

Each case is an environment of its own under `build/matrix`, made once, in which `seven.py` runs. Whole cases fetch
torch, which is gigabytes: with `--torch-here` they differ in transformers alone, on the torch and Python of the one who
runs it. A case whose wheels don't exist (a torch too old for a Python) is said and is no failure.

    python tests/smoke/matrix.py                 # all cases; a Python that isn't on this machine is left out, and said
    python tests/smoke/matrix.py --torch-here    # transformers alone
    python tests/smoke/matrix.py --list          # what would be run
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
BETWEEN = ("5.0.0",)
"""Versions of transformers between the oldest, a 4, and the newest: the first 5."""


@dataclass(frozen=True)
class Case:
    """One environment; None is the newest version."""

    python: str
    torch: str | None
    transformers: str | None

    @property
    def folder(self) -> Path:
        return FOLDER / f"py{self.python}-torch{self.torch or ''}-transformers{self.transformers or ''}"

    def __str__(self) -> str:
        return f"Python {self.python}, torch {self.torch or 'newest'}, transformers {self.transformers or 'newest'}"


def oldest(package: str) -> str:
    """The lowest version of a dependency that is promised."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (requirement,) = [line for line in project["dependencies"] if re.match(rf"{package}\b", line)]
    match = re.search(r">=([\d.]+)", requirement)
    assert match is not None
    return match[1]


def cases(torch_here: bool) -> Iterator[Case]:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if torch_here:
        yield from (Case(here, "here", version) for version in (oldest("transformers"), *BETWEEN, None))
        return
    for python in PYTHONS:
        yield Case(python, None, None)
    yield from (Case(here, None, version) for version in (oldest("transformers"), *BETWEEN))
    yield Case(here, oldest("torch"), oldest("transformers"))
    yield Case(here, oldest("torch"), None)


def interpreter(version: str) -> str | None:
    """A Python of this version on this machine."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    uv = shutil.which("uv")
    if uv is not None:
        found = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else None
    found = (
        subprocess.run([f"python{version}", "-c", ""], capture_output=True)
        if shutil.which(f"python{version}")
        else None
    )
    return f"python{version}" if found is not None and found.returncode == 0 else None


def installed(case: Case, python: str) -> str | None:
    """Make the environment; what stood in the way, or None."""
    done = case.folder / ".installed"
    if done.exists():
        return None
    shutil.rmtree(case.folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", case.folder], check=True)
    pip = [case.folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    wanted = [f"transformers=={case.transformers}" if case.transformers else "transformers"]
    if case.torch == "here":
        see_packages_of(python, case.folder)
    else:
        wanted.append(f"torch=={case.torch}" if case.torch else "torch")
    for command in ([*pip, *wanted, "safetensors", "numpy"], [*pip, "--no-deps", "--editable", str(ROOT)]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            return result.stderr.strip().splitlines()[-1]
    done.touch()
    return None


def see_packages_of(python: str, folder: Path) -> None:
    """Let an environment use what another has, after what is installed in it."""
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = subprocess.run([python, "-c", site], capture_output=True, text=True, check=True).stdout.strip()
    own = subprocess.run([folder / "bin" / "python", "-c", site], capture_output=True, text=True, check=True).stdout
    Path(own.strip(), "of_the_one_who_runs_it.pth").write_text(theirs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-here", action="store_true", help="transformers alone, on this Python's torch")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    arguments = parser.parse_args()
    failed = 0
    for case in cases(arguments.torch_here):
        if arguments.list:
            print(case)
            continue
        python = interpreter(case.python)
        hindrance = "no such Python on this machine" if python is None else installed(case, python)
        if hindrance is not None:
            print(f"left out: {case}: {hindrance}", flush=True)
            continue
        command = [case.folder / "bin" / "python", "-W", "ignore", Path(__file__).with_name("seven.py")]
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        failed += result.returncode != 0
        said = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
        print(said[-1] if said else f"{case}: ended with {result.returncode}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
