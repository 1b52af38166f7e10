from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import TASKS, TEXTS, bare, task_of, tokenizer_of

from ia3.serving import reading
from ia3.serving.reading import Reader
from ia3.serving.registry import Version
from ia3.serving.requests import NotServed, Request
from ia3.serving.starting import capacity_for


@pytest.mark.parametrize(("in_memory", "held"), [(1.0, 600), (0.5, 300), (0.01, 256)])
def test_a_gpu_holds_all_adapters_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: float, held: int
) -> None:
    """The bound is a sixteenth of its memory; a run's adapter counts once, whatever names it has."""
    for number in range(600):
        folder = tmp_path / f"run-{number}" / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(bytes(100))
    memory = int(16 * 600 * 100 * in_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    assert capacity_for(torch.device("cuda"), tmp_path) == held
    assert capacity_for(torch.device("cpu"), tmp_path) == 256


def test_one_text_is_tokenised_once_for_all_who_read_it_alike(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, tokenise = 0, reading.tokenise_inputs

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return tokenise(*arguments)

    monkeypatch.setattr(reading, "tokenise_inputs", counted)
    read, text = Reader(bare(), tokenizer_of()), " ".join(TEXTS[:3])
    versions = {name: Version(name, "digest", task_of(**fields), "text") for name, fields in TASKS.items()}
    found = {name: read(version, Request(text, name)).tokens for name, version in versions.items()}
    # One has words around the text, one cuts it, and one is of another kind.
    assert count == 4 < len(versions)
    assert found["news"] == found["writes"] == tokenizer_of()(text)["input_ids"]
    assert len({*map(tuple, found.values())}) == 3
    for _ in range(2):
        with pytest.raises(NotServed, match="half a character"):
            read(versions["news"], Request("\ud800", "news"))
