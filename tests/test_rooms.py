"""The rooms of the package: who may import whom. Arrows point down, and in no circle, types and functions included."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import ia3

PACKAGE = Path(ia3.__file__).parent

# From the top; a module may import from its own floor and from those below. A name stands for all modules in it.
FLOORS = (
    {"ia3.__main__", "ia3.utils"},
    {"ia3"},
    {"ia3.cli"},
    {"ia3.on_ray"},
    {"ia3.serving"},
    {"ia3.training"},
    {"ia3.inference", "ia3.runs"},
    {"ia3.data"},
    {"ia3.tasks"},
    {"ia3.auto", "ia3.bridge", "ia3.bundled", "ia3.convert", "ia3.dora", "ia3.gguf", "ia3.registered", "ia3.table"},
    {"ia3.twin"},
    {"ia3.dataflow", "ia3.twin_batch"},
    {"ia3.recording"},
    {"ia3.peft_model"},
    {"ia3.factory"},
    {"ia3.fast"},
    {"ia3.saving", "ia3.loading", "ia3.hotswap", "ia3.heads", "ia3.card", "ia3.publishing", "ia3.status"},
    {"ia3.mixing", "ia3.merging", "ia3.checkpoint", "ia3.arithmetic"},
    {"ia3.adapter"},
    {"ia3.listening"},
    {"ia3.state"},
    {"ia3.placement"},
    {"ia3.hooks", "ia3.swap", "ia3.routed"},
    {"ia3.rows", "ia3.tensors", "ia3.weights"},
    {"ia3.stacked"},
    {"ia3.sites"},
    {"ia3.architectures", "ia3.peft_defaults"},
    {"ia3.structure"},
    {"ia3.experts", "ia3.towers"},
    {"ia3.config"},
    {
        "ia3.cache",
        "ia3.documents",
        "ia3.files",
        "ia3.patterns",
        "ia3.pretrained",
        "ia3.errors",
        "ia3.elsewhere",
        "ia3.interrupts",
        "ia3.launched",
        "ia3.layers",
        "ia3.precision",
        "ia3.quantised",
        "ia3.storage",
    },
)

# Arrows that stand although they point up or close a circle, each with its reason.
EXCEPTIONS = {}


def _name_of(path: Path) -> str:
    parts = ("ia3", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, modules: Mapping[str, object]) -> Iterator[str]:
    """The package's modules that a module imports anywhere: at the top, for types alone, inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules or node.module in modules:
                    yield whole if whole in modules else str(node.module)


def _graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    return {name: set(_imported(ast.parse(text), sources)) for name, text in sources.items()}


def _floor(name: str) -> int:
    """The floor of a module: that of the longest name around it."""
    found = [
        (len(room), number)
        for number, floor in enumerate(FLOORS)
        for room in floor
        if name == room or (room != "ia3" and name.startswith(f"{room}."))
    ]
    assert found, f"{name} stands on no floor: give it a place in FLOORS"
    return max(found)[1]


def _up(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    return {(name, other) for name, others in graph.items() for other in others if _floor(other) < _floor(name)}


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {_name_of(path): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def _without_exceptions(sources: Mapping[str, str]) -> dict[str, set[str]]:
    return {
        name: {other for other in others if (name, other) not in EXCEPTIONS} for name, others in _graph(sources).items()
    }


def test_arrows_point_down(sources: dict[str, str]) -> None:
    assert _up(_without_exceptions(sources)) == set()


def test_imports_make_no_circle(sources: dict[str, str]) -> None:
    assert _circle(_without_exceptions(sources)) == []


def test_what_is_excepted_is_there(sources: dict[str, str]) -> None:
    """An exception goes with its arrow."""
    graph = _graph(sources)
    assert all(other in graph.get(name, ()) for name, other in EXCEPTIONS)


def test_every_room_is_there(sources: dict[str, str]) -> None:
    assert {room for floor in FLOORS for room in floor} <= set(sources)


@pytest.mark.parametrize("form", ["import ia3.auto", "from ia3.auto import AutoPeftModel", "from ia3 import auto"])
@pytest.mark.parametrize("place", ["{}", "if TYPE_CHECKING:\n    {}", "def late():\n    {}"])
def test_an_arrow_up_is_seen_wherever_it_stands(sources: dict[str, str], form: str, place: str) -> None:
    changed = {**sources, "ia3.state": place.format(form)}
    assert ("ia3.state", "ia3.auto") in _up(_graph(changed))
    assert _circle(_graph(changed))


def test_state_is_fetched_in_one_place(sources: dict[str, str]) -> None:
    """Whoever asks what a model carries asks `state`."""
    for name, text in sources.items():
        keys = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        held = [node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        assert ("_ia3" in keys or "_ia3" in held) == (name == "ia3.state"), name


def test_no_file_is_long(sources: dict[str, str]) -> None:
    longest = {name: text.count("\n") for name, text in sources.items() if text.count("\n") > 600}
    assert not longest, longest


def test_files_of_tests_have_names_of_their_own() -> None:
    """Pytest imports them by these, and stops where it finds a second one; run in parts they would pass."""
    here = Path(__file__).parent
    names = Counter(path.name for root in (here, here.parent / "plugins") for path in root.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
