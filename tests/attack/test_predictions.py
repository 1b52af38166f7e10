"""A few of the file events at which `predictions` kills, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_killed_prediction_goes_on_to_the_same_bytes() -> None:
    script = Path(__file__).with_name("predictions.py")
    ended = subprocess.run([sys.executable, script, "--few", "6"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "6 of 6 events come out the same" in ended.stdout
