"""Encoders' fused blocks under a row of vectors a text, against the model's own forward of a batch that mixes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ia3 import AdapterTable
from ia3.fast import encoding
from ia3.fast.encoding import FusedEncoder
from ia3.mixing import gather_flat, gather_rows, make_rows
from ia3.rows import acting
from test_stacked import fleet, load_base

NAMES = ["five", "three", "other", "__base__", "five"]


def batch_of() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (len(NAMES), 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 1, 4, 7, 2)):
        mask[row, length:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def served(tmp_path: Path, family: str) -> Any:
    base, folder = fleet(tmp_path, family)
    model = load_base(base, "SequenceClassification", 9).eval()
    table = AdapterTable(model)
    for name in {*NAMES} - {"__base__"}:
        table.register(name, folder / name)
    return model


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
@torch.inference_mode()
def test_the_blocks_are_the_models_own(tmp_path: Path, family: str) -> None:
    model, batch = served(tmp_path, family), batch_of()
    layout, flat = gather_flat(model, NAMES)
    assert encoding.unsupported_reason(model, layout) is None
    fused = FusedEncoder(model, layout)
    state = torch.get_rng_state()
    with acting(gather_rows(model, NAMES)):
        found = fused(batch, flat, head=True).logits
        hidden = fused(batch, flat, head=False).last_hidden_state
        expected = model(**batch).logits
        own = model.base_model(**batch).last_hidden_state
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden[seen], own[seen], rtol=1e-5, atol=1e-5)
    assert fused.guard.is_valid()


@torch.inference_mode()
def test_another_forward_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = served(tmp_path, "bert"), batch_of()
    layout, flat = gather_flat(model, NAMES)
    fused = FusedEncoder(model, layout)

    def own(batch: Any, flat: torch.Tensor) -> torch.Tensor:
        with acting(make_rows(model, NAMES, layout, flat)):
            states: torch.Tensor = model.base_model(**batch).last_hidden_state
        return states

    def other(batch: Any, flat: torch.Tensor) -> torch.Tensor:
        return own(batch, flat.flip(0))

    assert fused.difference(batch, flat, own) is None
    assert fused.difference(batch, flat, other) is None  # its kind was compared
    even = {"input_ids": batch["input_ids"].clamp(min=2), "attention_mask": torch.ones_like(batch["input_ids"])}
    assert "differs" in str(fused.difference(even, flat, other))
    monkeypatch.setattr(model.bert.encoder.layer[0].output, "forward", lambda states, _: states)
    assert not fused.guard.is_valid()


def test_what_has_no_fused_blocks(tmp_path: Path) -> None:
    model = served(tmp_path, "modernbert")
    reason = encoding.unsupported_reason(model, gather_flat(model, NAMES)[0])
    assert reason == "a ModernBertForSequenceClassification has no described encoder below a head of its own"
