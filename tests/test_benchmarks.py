"""Every benchmark says what it claims and needs, where it ran in one shape, and what its flags are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402 (after what it needs is set)
import catalogue  # noqa: E402 (after what it needs is set)

SCRIPTS = catalogue.scripts()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_that_does_not_say_what_it_needs(script: Path) -> None:
    entry = catalogue.entry(script)
    assert entry.machine.startswith(("CPU", "one GPU")), entry
    assert entry.claim.endswith((".", ":")), entry
    assert "ArgumentParser(" in script.read_text("utf-8"), "--help would run it"


def test_needs_that_are_missing_or_not_last(tmp_path: Path) -> None:
    script = tmp_path / "new.py"
    for docstring in ("A claim.", "A claim.\n\nNeeds: CPU; minutes.", "Needs: CPU; peft; a minute.\n\nMore."):
        script.write_text(f'"""{docstring}"""\n')
        with pytest.raises(ValueError, match=r"new.py doesn't say what it needs"):
            catalogue.entry(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_that_describes_the_machine_its_own_way(script: Path) -> None:
    text = script.read_text("utf-8")
    assert [word for word in ("get_device_name", "__version__", "platform.") if word in text] == []


def test_the_one_shape(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench.say_machine()
    assert [*found] == [
        "card",
        "driver",
        "processor",
        "cores",
        "threads",
        "python",
        "torch",
        "transformers",
        "peft",
        "ia3",
    ]
    assert found["torch"] == bench.torch.__version__
    line = capsys.readouterr().out
    assert line.startswith("# ")
    assert f"threads {bench.torch.get_num_threads()}, " in line
