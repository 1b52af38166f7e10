"""A generation that is not the model's own is noticed at its first batch, and left to the model."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_compare import PATCHES, other_attention, start
from test_generation import lively, mixed_model, prompts

from ia3.fast import compare_decoding, generate
from ia3.fast.compare_decoding import decoding_difference
from ia3.fast.generate import Decoder
from ia3.fast.guard import own_forward
from ia3.fast.slots import Slots
from ia3.mixing import acting_flat
from ia3.rows import BASE
from replayed import recording

SETTINGS = {"max_new_tokens": 6, "eos_token_id": [1, 5, 9]}
# Not what acts in training alone, nor an attention of another name, for which there is a reason before any number.
IN_USE = {name: patch for name, patch in PATCHES.items() if not name.endswith(("training alone", "one's own"))}


def own(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, **SETTINGS, **more
    )
    return tokens


@pytest.mark.parametrize(("form", "patch"), IN_USE.values(), ids=IN_USE)
@pytest.mark.parametrize("before", [True, False], ids=["before", "later"])
def test_a_patched_model_writes_itself(tiny, randomise, monkeypatch, caplog, form, patch, before) -> None:
    model = lively(start(tiny, randomise, form).eval())
    ids, mask = prompts(model)
    plain = own(model, ids, mask)
    if before:
        patch(monkeypatch, model)
    decoder = Decoder(model, **SETTINGS)
    if not before:
        assert torch.equal(decoder(ids, mask), plain)
        assert (decoder.path, decoder.reason) == ("static", None)
        patch(monkeypatch, model)
    with caplog.at_level(logging.WARNING, "ia3"):
        found = [decoder(ids, mask) for _ in range(2)]
    assert all(torch.equal(each, own(model, ids, mask)) for each in found)
    assert not torch.equal(found[0], plain)
    assert decoder.path == "eager"
    assert "its logits differ from the model's own forward by " in (decoder.reason or "")
    assert caplog.text.count("written by the model's own generate") == 1
    assert not decoder.sessions
    monkeypatch.undo()
    assert torch.equal(decoder(ids, mask), plain)
    assert (decoder.path, decoder.reason) == ("static", None)
    assert decoder.fused


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_a_mixture_is_compared_of_its_own(tiny, monkeypatch, family) -> None:
    """Where each example has the vectors of the other, it shows."""
    model = mixed_model(tiny, family)
    ids, mask = prompts(model, 2)
    decoder = Decoder(model, **SETTINGS)
    decoder(ids, mask)
    for names in (["a", "b"], [BASE, "a"]):
        assert torch.equal(decoder(ids, mask, adapter_names=names), own(model, ids, mask, adapter_names=names))
    assert decoder.reason is None
    layout, flat = decoder._flat(["a", "b"])  # type: ignore[misc]
    (mixture,) = (session for size, session in decoder.fused.items() if size.mixed)
    assert decoding_difference(mixture.fused, ids, mask, layout, flat, 0) is None
    monkeypatch.setattr(compare_decoding, "over", lambda wanted, layout, flat: flat.flip(0))
    assert "logits differ" in (decoding_difference(mixture.fused, ids, mask, layout, flat, 0) or "")


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_each_kind_is_compared_once_as_long_as_the_model_is_the_same(tiny, monkeypatch, family) -> None:
    model = mixed_model(tiny, family)
    ids, mask = prompts(model, 2)
    compared: list[int] = []
    monkeypatch.setattr(
        generate, "decoding_difference", lambda loss, ids, mask, layout, flat, start: compared.append(len(flat))
    )
    with recording():
        decoder = Decoder(model, **SETTINGS)
        for names in (None, ["a", "b"], None, ["b", BASE], ["a"]):
            more = {} if names is None else {"adapter_names": names}
            decoder(ids[: len(names or ids)], mask[: len(names or ids)], **more)
        assert compared == [1, 2]
        model.set_adapter("a")
        decoder(ids, mask)
        assert compared == [1, 2, 1]


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "opt"])
@pytest.mark.parametrize("length", [1, 2, 16])
def test_short_inputs_and_ones_that_take_all_positions(tiny, family, length) -> None:
    sizes = {"gpt2": {"n_positions": 16}, "opt": {"max_position_embeddings": 16}}
    model = lively(tiny(family, **sizes.get(family, {})))
    ids = torch.randint(10, 60, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    decoder = Decoder(model, max_new_tokens=1)
    assert torch.equal(
        decoder(ids, mask), model.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=1)
    )
    assert decoder.fused


def test_inputs_without_a_token_say_nothing(tiny) -> None:
    model = mixed_model(tiny, "t5")
    ids, mask = prompts(model, 2)
    decoder = Decoder(model, **SETTINGS)
    decoder(ids, mask)
    (session,) = decoder.fused.values()
    layout, flat = acting_flat(model)  # type: ignore[misc]
    assert decoding_difference(session.fused, ids, torch.zeros_like(mask), layout, flat, 0) is None


def test_long_inputs_keep_few_logits(tiny, monkeypatch) -> None:
    model, seen = lively(tiny("llama")), []

    def watched(kind: type) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own_forward(kind)(*args, **kwargs)
            seen.append(output.logits.shape[1])
            return output

        return forward

    monkeypatch.setattr(compare_decoding, "own_forward", watched)
    ids = torch.randint(10, 60, (3, 40), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, **SETTINGS)
    decoder(ids, torch.ones_like(ids))
    assert (seen, decoder.reason) == ([2], None)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_patched_model_has_no_slots(tiny, monkeypatch, family) -> None:
    model = lively(tiny(family))
    layout, _ = acting_flat(model)  # type: ignore[misc]
    settings: dict[str, Any] = {"max_source": 2, "max_new_tokens": 4, "forced_eos_token_id": None}
    settings |= {"no_repeat_ngram_size": 0, "min_length": 0}
    Slots(model, 2, layout=layout, **settings)
    other_attention(monkeypatch, model)
    with pytest.raises(ValueError, match="No slots for this model: its logits differ"):
        Slots(model, 2, layout=layout, **settings)
