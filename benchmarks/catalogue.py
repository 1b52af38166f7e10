"""Every benchmark: what it claims or makes, and what it needs. `make benchmarks` prints it.

    python benchmarks/catalogue.py

Read off the scripts' own docstrings: the first sentence is the claim, and the last line says what is needed, in three
parts: the machine, packages and data, the time that a run took.

Needs: CPU; nothing more; seconds.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
_NEEDS = re.compile(r"^Needs: (?P<machine>[^;\n]+); (?P<packages>[^;\n]+); (?P<time>[^;\n]+)\.\Z", re.MULTILINE)


class Entry(NamedTuple):
    """One script, in its own words."""

    name: str
    claim: str
    machine: str
    packages: str
    time: str


def scripts() -> list[Path]:
    """The files that are run; the others hold what these share."""
    return [path for path in sorted(FOLDER.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text("utf-8")]


def entry(path: Path) -> Entry:
    """What a script says of itself.

    Raises:
        ValueError: it doesn't say what it needs.
    """
    told = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    needs = _NEEDS.search(told)
    if needs is None:
        raise ValueError(
            f"{path.name} doesn't say what it needs: end its docstring with a line such as "
            "'Needs: one GPU, --tiny a CPU; peft; 5 minutes.'"
        )
    return Entry(path.stem, " ".join(told.split("\n\n")[0].split()), *needs.groups())


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for each in map(entry, scripts()):
        print(f"{each.name}\n  {each.claim}\n  {each.machine}; {each.packages}; {each.time}\n")


if __name__ == "__main__":
    main()
