"""Where a mutation is made and what it is: a function by its qualified name, wherever in the package it stands, and a
kind of change to one place in it.

A moved line, another layout or another file leaves a mutation where it was. A renamed function, or one whose place is
gone or there twice, is an error that says so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "ia3"
Edit = tuple[ast.AST, str]


def words_of(node: ast.AST) -> set[str]:
    """The names, attributes, arguments and texts in a piece of code."""
    found: set[str] = set()
    for each in ast.walk(node):
        found |= {str(value) for value in vars(each).values() if isinstance(value, str)}
    return found


@dataclass(frozen=True)
class Change:
    """A kind of change; `edits` gives every place of a function that it fits, with the code to put there."""

    def edits(self, function: ast.AST) -> Iterator[Edit]:
        raise NotImplementedError


@dataclass(frozen=True)
class Instead(Change):
    """Another expression in the place of one."""

    old: str
    new: str

    def edits(self, function: ast.AST) -> Iterator[Edit]:
        wanted = ast.dump(ast.parse(self.old, mode="eval").body)
        yield from ((each, f"({self.new})") for each in _expressions(function) if ast.dump(each) == wanted)


@dataclass(frozen=True)
class Flip(Change):
    """The opposite of the comparison that mentions a word."""

    word: str

    def edits(self, function: ast.AST) -> Iterator[Edit]:
        for each in _expressions(function):
            if isinstance(each, ast.Compare) and len(each.ops) == 1 and self.word in words_of(each):
                yield each, f"(not ({ast.unparse(each)}))"


@dataclass(frozen=True)
class Never(Change):
    """The `if` whose condition mentions a word is never taken; `Always`: it always is."""

    word: str
    outcome = "False"

    def edits(self, function: ast.AST) -> Iterator[Edit]:
        for each in ast.walk(function):
            tests = each.ifs if isinstance(each, ast.comprehension) else [getattr(each, "test", None)]
            for test in tests:
                if isinstance(each, ast.If | ast.IfExp | ast.comprehension) and self.word in words_of(test or each):
                    yield test, self.outcome


@dataclass(frozen=True)
class Always(Never):
    """The `if` whose condition mentions a word is always taken."""

    outcome = "True"


@dataclass(frozen=True)
class Skip(Change):
    """A call is left out: of a method its object stays, of a function its first argument, of a statement nothing."""

    name: str

    def edits(self, function: ast.AST) -> Iterator[Edit]:
        statements = {each.value for each in ast.walk(function) if isinstance(each, ast.Expr)}
        for each in ast.walk(function):
            if not isinstance(each, ast.Call) or _callee(each) != self.name:
                continue
            kept = each.func.value if isinstance(each.func, ast.Attribute) else (each.args or [ast.Constant(None)])[0]
            yield each, "None" if each in statements else f"({ast.unparse(kept)})"


@dataclass(frozen=True)
class Drop(Change):
    """The assignment to a name or attribute is left out; its first value stays."""

    target: str

    def edits(self, function: ast.AST) -> Iterator[Edit]:
        for each in ast.walk(function):
            if isinstance(each, ast.Assign | ast.AugAssign):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                if [ast.unparse(target) for target in targets] == [self.target]:
                    yield each, "pass"


def _callee(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _expressions(function: ast.AST) -> Iterator[ast.expr]:
    yield from (each for each in ast.walk(function) if isinstance(each, ast.expr))


@dataclass(frozen=True)
class Mutant:
    """A change to a function, and what breaks by it.

    Args:
        function: its qualified name, as `SiteVectors.scale`.
        change: to one place in it.
        breaks: what a user would see.
    """

    function: str
    change: Change
    breaks: str


@dataclass(frozen=True)
class Mutated:
    """A mutation that was made: the file within the package and its new content."""

    file: str
    source: str

    @property
    def room(self) -> str:
        """The folder of the package, or the module in its top level."""
        first, _, rest = self.file.partition("/")
        return first if rest else Path(first).stem


@cache
def _functions() -> dict[str, list[tuple[str, ast.AST]]]:
    """Every function and method of the package by its qualified name, with its file."""
    found: dict[str, list[tuple[str, ast.AST]]] = {}

    def collect(node: ast.AST, file: str, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = (*names, child.name) if named else names
            if named and not isinstance(child, ast.ClassDef):
                found.setdefault(".".join(inner), []).append((file, child))
            collect(child, file, inner)

    for path in sorted(PACKAGE.rglob("*.py")):
        collect(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix(), ())
    return found


@cache
def mutate(mutant: Mutant) -> Mutated:
    """The file of a mutation with it.

    Raises:
        LookupError: there is no such function, or not one place that fits.
    """
    functions = _functions().get(mutant.function, [])
    if not functions:
        raise LookupError(f"No function of the package is called {mutant.function}: where is it now? ({mutant.breaks})")
    places = [(file, *edit) for file, function in functions for edit in mutant.change.edits(function)]
    if len(places) != 1:
        files = ", ".join(file for file, _ in functions)
        raise LookupError(f"{mutant.function} ({files}) has {len(places)} places for {mutant.change}, expected one.")
    file, node, new = places[0]
    source = (PACKAGE / file).read_text(encoding="utf-8")
    changed = _replaced(source, node, new)
    if ast.unparse(node) == new.removeprefix("(").removesuffix(")"):
        raise LookupError(f"{mutant.function}: {mutant.change} changes nothing.")
    return Mutated(file, changed)


def _replaced(source: str, node: ast.AST, new: str) -> str:
    """A source with other code in the place of one node; columns count bytes."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    begin = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
    content = source.encode()
    return (content[:begin] + new.encode() + content[end:]).decode()
