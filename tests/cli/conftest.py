"""One tiny base, its data and an adapter trained on them, shared by the commands' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import succeed

import tiny_seq2seq


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.save_base(tmp_path_factory.mktemp("models") / "tiny-base")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.write_csv(tmp_path_factory.mktemp("data") / "sentences.csv")


@pytest.fixture(scope="session")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    succeed("train", "--model", base, "--data", data, "--output", folder, "--epochs", 1, "--test-size", 0.2)
    return folder


@pytest.fixture(scope="session")
def adapter(trained: Path) -> Path:
    return trained / "adapter"
