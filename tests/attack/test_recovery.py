"""A few of the attacks, in processes of their own, since a child of one that ran a backward can run none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "attack",
    [("train", "--few", "3"), ("train", "--few", "2", "--full-disk"), ("sweep", "--few", "2"), ("flips", "--few", "3")],
    ids=lambda attack: " ".join(attack),
)
def test_what_was_struck_down_comes_out_the_same(attack: tuple[str, ...]) -> None:
    script = Path(__file__).with_name("recovery.py")
    ended = subprocess.run([sys.executable, script, *attack], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{attack[2]} of {attack[2]} come out right" in ended.stdout
