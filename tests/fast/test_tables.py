"""Tables of positions are kept within a bound, and for as long as a recorded graph reads them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from test_llama import adapted_causal, texts_of
from test_t5 import adapted, batch_of
from torch import Tensor

from ia3.fast import tables
from ia3.fast.capture import GraphedCallable
from ia3.fast.graphed import GraphedLoss
from ia3.fast.tables import Tables
from replayed import recording

CPU = torch.device("cpu")


def test_those_that_were_read_last_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(tables, "_MOST_BYTES", 40)
    found, made = Tables(), []

    def read(length: int) -> Tensor:
        def make() -> Tensor:
            made.append(length)
            return torch.full((length,), float(length))

        return found.get(length, make)

    for length in (4, 5, 4, 1, 4, 5):  # of four bytes each
        assert torch.equal(read(length), torch.full((length,), float(length)))
    assert made == [4, 5, 1]
    read(2)
    assert (list(found.recent), found.size) == ([5, 2], 28)
    read(4)
    assert (made, list(found.recent)) == ([4, 5, 1, 2, 4], [2, 4])
    read(50)  # more than all that may be kept, and the last one
    assert (list(found.recent), found.size) == ([50], 200)


@pytest.mark.parametrize("warms_up", [False, True])
def test_a_graph_keeps_what_it_reads(monkeypatch, warms_up) -> None:
    """A recording that holds no tensors, as a GPU's, and all tables have to go but the last."""
    monkeypatch.setattr(tables, "_MOST_BYTES", 0)
    monkeypatch.setattr(GraphedCallable, "_capture", lambda self, _, inputs: (self.function(**inputs), lambda: None))
    found = Tables()

    def function(x: Tensor) -> Tensor:
        return x + found.get(len(x), lambda: torch.arange(len(x)))

    computation = GraphedCallable(function, CPU, warm_up=function if warms_up else None)
    computation.captures = True
    for _ in range(2):
        computation(x=torch.ones(2))
    held = weakref.ref(found.alive[2])
    found.get(3, lambda: torch.arange(3))
    assert list(found.recent) == [3]
    assert held() is not None
    assert found.get(2, lambda: torch.zeros(2)) is held()  # nothing is made twice
    found.get(3, lambda: torch.arange(3))
    computation.graphs.clear()
    assert held() is None


def test_what_a_failed_recording_made_is_forgotten() -> None:
    """It has no numbers: recording computes nothing."""
    found = Tables()

    def function(x: Tensor, fails: bool = True) -> Tensor:
        table = found.get("bias", lambda: torch.zeros(1) if fails else torch.ones(1))
        if fails:
            raise torch.OutOfMemoryError
        return x + table

    with recording():
        computation = GraphedCallable(function, CPU, warm_up=function)
        with pytest.raises(torch.OutOfMemoryError):
            computation(x=torch.ones(2))
    gc.collect()
    assert function(torch.ones(1), fails=False).tolist() == [2]


@pytest.mark.parametrize("form", ["t5 gated", "llama"])
@pytest.mark.parametrize("recorded", [False, True])
def test_many_lengths(tiny: Any, randomise: Any, monkeypatch, form: str, recorded: bool) -> None:
    is_causal = form == "llama"
    model = (adapted_causal(tiny, randomise, form) if is_causal else adapted(tiny, randomise, form)).eval()
    data = [texts_of(2, length) if is_causal else batch_of(2, length) for length in (70, 19, 130, 19, 70)]

    def losses() -> list[Tensor]:
        with recording() if recorded else torch.enable_grad():
            loss = GraphedLoss(model)
            computation = loss.graphed()
            found = [loss.run(computation, loss.pack(batch))[0] for batch in data]
        kept = loss.losses.positions.tables
        assert kept.size <= tables._MOST_BYTES or len(kept.recent) == 1
        return found

    expected = losses()
    monkeypatch.setattr(tables, "_MOST_BYTES", 1 << 12)
    torch.testing.assert_close(losses(), expected)
