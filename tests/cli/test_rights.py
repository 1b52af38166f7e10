"""Who may read what is written: what the umask leaves, so that a colleague can load what one trained."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import succeed

from ia3.inference.loading import load_adapter


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def others(folder: Path, umask: int) -> dict[str, str]:
    """What in a folder, itself included, has other rights than the umask leaves."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        rights = stat.S_IMODE(path.stat().st_mode)
        if rights != (0o777 if path.is_dir() else 0o666) & ~umask:
            found[str(path.relative_to(folder))] = oct(rights)
    return found


def test_a_run_and_what_is_made_of_it(umask: int, base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    home = tmp_path / "work"
    common = ("--data", data, "--epochs", 1, "--test-size", 0.2)
    succeed("train", "--model", base, *common, "--output", home / "run")
    succeed("train", "--model", base, *common, "--seeds", "0,1", "--output", home / "seeds")
    succeed("sweep", base, data, "--output", home / "sweep", "--epochs", 1, "--over", "seed=0,1")
    succeed("merge", adapter, home / "deep" / "merged")
    succeed("combine", adapter, adapter, "--output", home / "combined")
    assert others(home, umask) == {}
    assert len(list(home.rglob("*.safetensors"))) > 5


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter(umask: int, adapter: Path, tmp_path: Path, safe: bool) -> None:
    model, _ = load_adapter(adapter)
    for name in ("adapter", "checkpoint-3"):  # a Trainer's has more files
        model.save_pretrained(tmp_path / "new" / name, safe_serialization=safe)
    assert others(tmp_path / "new", umask) == {}
