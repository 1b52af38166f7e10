"""Folders of adapters that the tests of a file share, and leave as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet import CAUSAL, TASKS, save_fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("fleet"), TASKS)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("chats"), CAUSAL, causal=True)
