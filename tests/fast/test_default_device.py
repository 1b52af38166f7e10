"""What is computed under PyTorch's default device set to another than the model's: the same.

That other one is "meta" here, from which no number comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_encoding import NAMES, batch_of, served
from test_generation import lively, mixed_model, prompts
from test_scores import CHOICES, inputs_of, layout_of, vectors_of
from test_slots import let_in, made, mixed, requests
from test_step import batches
from test_sweep_step import RATES, adapted, sweep_step
from test_sweep_step import batch_of as batch_of_groups

from ia3.fast.encoding import FusedEncoder
from ia3.fast.generate import Decoder
from ia3.fast.graphed import GraphedLoss
from ia3.fast.scores import ChoiceScores
from ia3.mixing import gather_flat
from ia3.training.loop import Training
from ia3.training.together import Together
from replayed import recording

Compute = Callable[[], torch.Tensor]


def slots(**_: Any) -> Compute:
    found, coming = made(mixed("t5")), [*requests(3, 0)]
    coming[2].row[:] = coming[0].row  # a text for several

    def compute() -> torch.Tensor:
        let_in(found, found.free[:3], coming)
        while found.lengths:
            found.step()
        return torch.tensor([token for slot in range(3) for token in found.tokens(slot)], device="cpu")

    return compute


def generation(tiny: Any, **_: Any) -> Compute:
    model = mixed_model(tiny, "gpt2")
    decoder, (ids, mask) = Decoder(model, max_new_tokens=3), prompts(model, 2)
    return lambda: decoder(ids, mask, adapter_names=["default", "__base__"])


def own_forward(tiny: Any, **_: Any) -> Compute:
    model = lively(tiny("gpt2"))
    decoder, (ids, mask) = Decoder(model, max_new_tokens=3), prompts(model, 2)
    decoder.has_block = False
    return lambda: decoder(ids, mask)


def loss(tiny: Any, randomise: Any, **_: Any) -> Compute:
    model, data = adapted(tiny, "t5", randomise).eval(), batches()[0]
    found = GraphedLoss(model)
    computation = found.graphed()

    def compute(_: Any = model) -> torch.Tensor:  # which nobody else keeps alive
        packed = found.pack(data)
        assert found.difference(data, packed) is None
        return torch.cat([each.flatten() for each in found.run(computation, packed)])

    return compute


def sweep(tiny: Any, randomise: Any, **_: Any) -> Compute:
    model = adapted(tiny, "t5", randomise).eval()
    found, data = sweep_step(model, "fused"), batch_of_groups(model, [2, 1, 2], 0)
    return lambda: found(data, [0 * rate for rate in RATES])


def encoder(tmp_path: Path, **_: Any) -> Compute:
    model = served(tmp_path, "bert")
    layout, flat = gather_flat(model, NAMES)
    found, data = FusedEncoder(model, layout), batch_of()
    with torch.inference_mode():
        return lambda: found(data, flat, head=True).logits.detach()


def choice_scores(tiny: Any, randomise: Any, **_: Any) -> Compute:
    model = adapted(tiny, "t5", randomise).eval()
    layout = layout_of(model)
    found, inputs, flat = ChoiceScores(model, CHOICES, layout), inputs_of(2, 19), vectors_of(layout, 3)
    flat[1] = flat[0]

    def compute() -> torch.Tensor:
        assert found.difference(**inputs, flat=flat, readers=[2, 1]) is None
        return found(**inputs, flat=flat, readers=[2, 1])

    return compute


@pytest.mark.parametrize("make", [slots, generation, own_forward, loss, sweep, encoder, choice_scores])
@pytest.mark.parametrize("recorded", [False, True])
def test_another_default_device(
    tiny: Any, randomise: Any, tmp_path: Path, make: Callable[..., Compute], recorded: bool
) -> None:
    expected = make(tiny=tiny, randomise=randomise, tmp_path=tmp_path)()
    with recording() if recorded else torch.enable_grad():
        compute = make(tiny=tiny, randomise=randomise, tmp_path=tmp_path / "again")
        with torch.device("meta"):
            found = [compute(), compute()]
    for each in found:
        torch.testing.assert_close(each, expected)


def test_what_processes_weigh() -> None:
    training: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")), processes=SimpleNamespace(sum=lambda flat: flat)
    )
    with torch.device("meta"):
        assert Training._weights(training, [[3], [1]]).tolist() == [[0.75], [0.25]]


def test_what_fills_up_a_sweeps_batch() -> None:
    together: Any = SimpleNamespace(
        step=SimpleNamespace(records=False),
        learner=SimpleNamespace(collate=lambda rows: {"labels": torch.tensor(rows, device="cpu")}),
    )
    with torch.device("meta"):
        assert Together._batch(together, [[1, 2], [3]])["labels"].tolist() == [1, 2, 3, -100]
