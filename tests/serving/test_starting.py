from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import TASKS, TEXTS, bare, task_of, tokenizer_of

from ia3 import AdapterTable
from ia3.serving import reading
from ia3.serving.reading import Reader
from ia3.serving.registry import Registry, Version
from ia3.serving.requests import NotServed, Request
from ia3.serving.starting import room_for


def test_a_gpu_holds_all_adapters_within_a_bound(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are a sixteenth of its memory and half of what is free; a row has the union of all sites."""
    model, cuda = bare(), torch.device("cuda")
    table = AdapterTable(model, capacity=1)
    registry = Registry(model, fleet, base="tiny", table=table)
    row, count = 4 * table.layout.size, len(TASKS)
    for free, total, held in (
        (1 << 40, 1 << 40, count),
        (1 << 40, 16 * 3 * row, 3),
        (2 * 2 * row, 1 << 40, 2),
        (0, 1 << 40, 0),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, found=(free, total): found)
        assert room_for(table, cuda) == held
    assert room_for(table, torch.device("cpu")) == 0
    registry.close()
    assert room_for(AdapterTable(bare()), cuda) == 0


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
