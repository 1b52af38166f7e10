"""Which bases are vLLM's. What it does with them is tested where it is installed, in `plugins/vllm/tests`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from fleet import bare

import tiny_seq2seq
from ia3.inference.loading import Base
from ia3.serving import on_vllm
from ia3.serving.starting import plan_of_vllm

INSTALLED = {"vllm", "ia3_vllm"}


@pytest.fixture
def causal(tmp_path: Path) -> Base:
    bare(causal=True).save_pretrained(tmp_path / "causal")
    return Base(str(tmp_path / "causal"))


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)


def test_a_causal_base_is_vllms_where_both_are_installed(causal: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ((), ("vllm",), ("ia3_vllm",)):
        installed(monkeypatch, *names)
        assert not on_vllm.is_wanted(causal)
    installed(monkeypatch, *INSTALLED)
    assert on_vllm.is_wanted(causal)
    monkeypatch.setenv("VLLM_PLUGINS", "other,ia3")
    assert on_vllm.is_wanted(causal)
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    assert not on_vllm.is_wanted(causal)


def test_no_other_base_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, *INSTALLED)
    tiny_seq2seq.base().save_pretrained(tmp_path / "seq2seq")
    assert not on_vllm.is_wanted(Base(str(tmp_path / "seq2seq")))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert not on_vllm.is_wanted(Base(str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_why_a_base_is_served_without_vllm_is_said(
    causal: Base, error: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(base: Base, batch_size: int) -> None:
        raise error("it has no adapters")

    monkeypatch.setattr(on_vllm, "is_wanted", lambda base: True)
    monkeypatch.setattr(on_vllm, "plan", refuse)
    assert plan_of_vllm(causal, 4) is None
    assert "is served without vLLM. it has no adapters" in caplog.text
