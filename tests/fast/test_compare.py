"""A fused loss that is not the model's own forward is noticed at its first batch, named, and not used."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_llama import adapted_causal, texts_of
from test_step import batches, causal_batches, optimiser_of, train_as_usual
from test_sweep_step import DECAYS, NORMS, RATES, flat, losses_by, token_losses
from test_sweep_step import batch_of as groups_of
from test_t5 import adapted, batch_of
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

import ia3
from builders import models_own
from described import described
from ia3.fast import compare
from ia3.fast.compare import beginnings, in_less_memory, surprising, telling_examples
from ia3.fast.graphed import GraphedLoss
from ia3.fast.scores import ChoiceScores
from ia3.fast.sweep import FusedLosses, MixedLosses, SweepStep
from ia3.mixing import acting_flat
from ia3.state import get_adapter


def start(tiny: Any, randomise: Any, form: str) -> Any:
    if form == "llama":
        return adapted_causal(tiny, randomise, form, torch.float32).train()
    model = adapted(tiny, randomise, form, torch.float32).train()
    return without_dropout(model)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    model.config.dropout_rate = 0.0
    return model


def batch_for(form: str) -> dict[str, Tensor]:
    return texts_of() if form == "llama" else batch_of()


def data_for(form: str) -> list[dict[str, Tensor]]:
    return causal_batches() if form == "llama" else batches()


def is_fused(output: Any) -> bool:
    return type(output.loss.grad_fn).__name__ == "_WithGradientBackward"


def other_attention(patch: Any, model: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def halved(*args: Any, **kwargs: Any) -> Any:
        output, weights = before(*args, **kwargs)
        return output / 2, weights

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", halved)


def attention_of_ones_own(patch: Any, model: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", lambda *a, **k: before(*a, **{**k, "scaling": 2.0}))
    patch.setattr(model.config, "_attn_implementation_internal", "mine")


def other_rotation(patch: Any, model: Any) -> None:
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))


def other_kernel(patch: Any, model: Any) -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(
        "transformers.integrations.sdpa_attention.torch.nn.functional.scaled_dot_product_attention",
        lambda *args, **kwargs: before(*args, **{**kwargs, "scale": 0.1}),
    )


def other_masks(patch: Any, model: Any) -> None:
    patch.setattr(modeling_t5, "create_bidirectional_mask", lambda *_, **__: None)


def other_groups(patch: Any, model: Any) -> None:
    """In the attention that is written beside the model."""
    model.set_attn_implementation("eager")
    patch.setattr(modeling_llama, "repeat_kv", lambda x, count: x.repeat(1, count, 1, 1))


def in_training_alone(patch: Any, model: Any) -> None:
    """By a forward that stands in transformers' own file, for all that can be seen of it."""
    code = "def forward(self, x):\n    return before(self, x) * (1.2 if self.training else 1.0)\n"
    names: dict[str, Any] = {"before": modeling_t5.T5LayerFF.forward}
    exec(compile(code, modeling_t5.__file__, "exec"), names)
    patch.setattr(modeling_t5.T5LayerFF, "forward", names["forward"])


PATCHES: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "an attention registered under the name of another": ("llama", other_attention),
    "an attention of one's own": ("llama", attention_of_ones_own),
    "T5's attention": ("t5 gated", other_attention),
    "rotary positions": ("llama", other_rotation),
    "masks": ("t5 gated", other_masks),
    "heads that share keys": ("llama", other_groups),
    "a forward in training alone": ("t5 gated", in_training_alone),
}
BOTH = pytest.mark.parametrize(("form", "patch"), PATCHES.values(), ids=PATCHES)


@BOTH
@pytest.mark.parametrize("before", [True, False], ids=["before", "later"])
def test_an_own_loop_goes_on_with_the_models_own_numbers(
    tiny, randomise, monkeypatch, caplog, form, patch, before
) -> None:
    model, batch = start(tiny, randomise, form), batch_for(form)
    if not before:
        assert is_fused(model(**batch))
    patch(monkeypatch, model)
    with caplog.at_level(logging.WARNING, "ia3"):
        outputs = [model(**batch) for _ in range(2)]
    own = models_own(model, **batch).loss
    assert not any(map(is_fused, outputs))
    assert all(torch.equal(output.loss, own) for output in outputs)
    said = [record.getMessage() for record in caplog.records if "own forward" in record.getMessage()]
    assert len(said) == 1
    assert "its loss differs from the model's own forward by " in said[0]
    monkeypatch.undo()
    assert is_fused(model(**batch))


@BOTH
def test_a_step_becomes_the_ordinary_one(tiny, randomise, monkeypatch, form, patch) -> None:
    usual, data = start(tiny, randomise, form), data_for(form)
    compiled = copy.deepcopy(usual)
    patch(monkeypatch, usual)
    expected = train_as_usual(usual, data)
    monkeypatch.undo()
    patch(monkeypatch, compiled)
    step = ia3.compile_step(compiled, *optimiser_of(compiled))
    assert step.reason is None
    losses = [float(step(batch)) for batch in data]
    assert step.path == "eager"
    assert "differs from the model's own forward" in (step.reason or "")
    assert losses == pytest.approx(expected, rel=1e-6)


@BOTH
def test_a_step_that_is_fused_already_is_an_error(tiny, randomise, monkeypatch, form, patch) -> None:
    model = start(tiny, randomise, form)
    step = ia3.compile_step(model, optimiser_of(model)[0])
    step(batch_for(form))
    patch(monkeypatch, model)
    with pytest.raises(RuntimeError, match="make the step again"):
        step(batch_for(form))


def test_what_torch_computes_with_is_watched(tiny, randomise, monkeypatch) -> None:
    """Both ways call it, so that no comparison shows a difference: the fused loss is made anew all the same."""
    model = start(tiny, randomise, "llama")
    assert is_fused(model(**texts_of()))
    other_kernel(monkeypatch, model)
    torch.testing.assert_close(model(**texts_of()).loss, models_own(model, **texts_of()).loss)


def test_a_sweep_goes_on_with_the_models_own_numbers(tiny, randomise, monkeypatch) -> None:
    model = adapted(tiny, randomise, "t5 gated")
    other_attention(monkeypatch, model)
    table = flat(model).expand(3, -1)
    steps = [
        SweepStep(model, losses, table, max_gradient_norms=NORMS, weight_decays=DECAYS)
        for losses in (losses_by("hand", model), losses_by("mixed", model))
    ]
    for number in range(3):
        batch = groups_of(model, [2, 0, 2], number)
        found, expected = (step(batch, RATES) for step in steps)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert "differs from the model's own forward" in (steps[0].reason or "")
    assert isinstance(steps[0].losses, MixedLosses)
    torch.testing.assert_close(steps[0].table, steps[1].table, rtol=1e-12, atol=0)
    monkeypatch.undo()
    step = SweepStep(model, losses_by("hand", model), table, max_gradient_norms=NORMS, weight_decays=DECAYS)
    step(groups_of(model, [0, 2, 2], 0), RATES)
    assert isinstance(step.losses, FusedLosses)
    assert step.compared
    other_attention(monkeypatch, model)
    with pytest.raises(RuntimeError, match="in the middle of a sweep"):
        step(groups_of(model, [2, 2, 2], 0), RATES)


def test_scores_of_choices_are_compared(tiny, randomise, monkeypatch) -> None:
    model, choices = adapted(tiny, randomise, "t5 gated"), torch.tensor([[5, 1, -100], [7, 9, 1]])
    batch = {name: batch_of()[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        layout, flat = acting_flat(model)  # type: ignore[misc]
        for vectors, readers in ((flat, None), (flat.expand(5, -1), None), (flat.expand(8, -1), [1, 2, 1, 3, 1])):
            with monkeypatch.context() as patch:
                scores = ChoiceScores(model, choices, layout)
                assert scores.difference(**batch, flat=vectors, readers=readers) is None
                other_attention(patch, model)
                scores = ChoiceScores(model, choices, layout)
                assert "differs" in (scores.difference(**batch, flat=vectors, readers=readers) or "")


def test_an_attention_that_is_not_causal_any_more(tiny, randomise) -> None:
    """Which a batch without padding alone is asked for."""
    model = start(tiny, randomise, "llama")
    batch = {name: tensor for name, tensor in texts_of().items() if name != "attention_mask"}
    batch["labels"] = batch["input_ids"]
    assert is_fused(model(**batch))
    model.model.layers[0].self_attn.is_causal = False
    output = model(**batch)
    assert torch.equal(output.loss, models_own(model, **batch).loss)
    assert not is_fused(output)


def test_positions_that_the_fused_loss_asks_the_model_for(tiny, randomise, monkeypatch) -> None:
    model = start(tiny, randomise, "t5 gated")
    before = modeling_t5.T5Attention.compute_bias
    found = [model(**batch_of())]
    monkeypatch.setattr(modeling_t5.T5Attention, "compute_bias", lambda *a, **k: 3 * before(*a, **k))
    found.append(model(**batch_of()))
    assert all(map(is_fused, found))
    torch.testing.assert_close(found[1].loss, models_own(model, **batch_of()).loss)
    assert not torch.allclose(*(output.loss for output in found))


# What a comparison leaves


def test_a_seeded_run_has_the_same_numbers_with_and_without_it(tiny, randomise, monkeypatch) -> None:
    first = adapted(tiny, randomise, "t5 gated", torch.float32).train()
    results = []
    for compares in (True, False):
        if not compares:
            monkeypatch.setattr(GraphedLoss, "difference", lambda *_: None)
        model = copy.deepcopy(first)
        torch.manual_seed(0)
        losses = [float(model(**batch).loss) for batch in batches()[:4]]
        step = ia3.compile_step(model, *optimiser_of(model))
        losses += [float(step(batch)) for batch in batches()[:4]]
        results.append((losses, torch.get_rng_state().tolist()))
    assert results[0] == results[1]


def test_nothing_of_the_model_changes(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32).train()
    vectors = [each for each in model.parameters() if each.requires_grad]
    seen: list[Tensor] = []
    for vector in vectors:
        vector.register_hook(seen.append)
    with torch.no_grad():
        before = models_own(model.eval(), **batch_of()).loss
    model.train()

    def state() -> list[Any]:
        modules = [(module.training, vars(module).get("p"), vars(module).get("dropout")) for module in model.modules()]
        return [modules, [vector._version for vector in vectors], [vector.grad for vector in vectors]]

    GraphedLoss(model)  # which lays weights out anew
    was = state()
    loss = GraphedLoss(model)
    assert loss.difference(batch_of(), loss.pack(batch_of())) is None
    assert loss.compared
    assert state() == was
    assert not seen
    with torch.no_grad():
        assert torch.equal(models_own(model.eval(), **batch_of()).loss, before)


def test_each_kind_of_batch_is_compared_once(tiny, randomise, monkeypatch) -> None:
    model = start(tiny, randomise, "t5 gated")
    loss, compared = GraphedLoss(model), []
    monkeypatch.setattr(loss, "_difference_of", lambda batch, examples: compared.append(list(examples)))
    even = {**batch_of(), "attention_mask": torch.ones(5, 19, dtype=torch.long)}
    without = {**batch_of(), "labels": torch.full((5, 3), -100)}
    for batch in (without, batch_of(), batch_of(rows=3), even, even):
        loss.difference(batch, loss.pack(batch))
    assert len(compared) == 2
    model.eval()
    loss.difference(even, loss.pack(even))
    assert len(compared) == 3


def test_the_longest_and_the_shortest_are_among_the_examples() -> None:
    lengths = torch.tensor([5, 6, 7, 8, 2, 9, 1])
    assert telling_examples(lengths, torch.tensor([False, True, True, True, True, True, False])) == [1, 2, 4, 5]
    assert telling_examples(lengths, torch.zeros(6, dtype=torch.bool)) == []


def test_of_long_texts_their_beginnings_are_compared(monkeypatch) -> None:
    monkeypatch.setattr(compare, "_TOKENS", 8)
    monkeypatch.setattr(compare, "_LEAST", 3)
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "many": torch.tensor(2)}
    assert torch.equal(beginnings(batch)["input_ids"], ids[:, :4])
    assert beginnings(batch)["attention_mask"].shape == beginnings(batch)["labels"].shape == (2, 4)
    answers = {**batch, "labels": ids[:, :3]}  # an encoder-decoder's
    assert beginnings(answers)["input_ids"].shape == (2, 4)
    assert beginnings(answers)["labels"] is answers["labels"]
    monkeypatch.setattr(compare, "_TOKENS", 2)
    assert beginnings(batch)["input_ids"].shape == (2, 3)
    late = ids.masked_fill(torch.arange(6) < torch.tensor([[0], [4]]), -100)
    assert torch.equal(beginnings({**batch, "labels": late})["labels"], late)
    first = ids.masked_fill(torch.arange(6) > 0, -100)  # which no token comes before
    assert torch.equal(beginnings({**batch, "labels": first})["labels"], first)
    classes = torch.rand(2, 6)  # of a head with as many classes as there are tokens
    assert beginnings({**batch, "labels": classes})["labels"] is classes
    assert beginnings(batch, tokens=10)["input_ids"].shape == (2, 5)
    assert beginnings(batch, window=2)["input_ids"].shape == (2, 5)
    assert beginnings(batch, window=6)["input_ids"].shape == (2, 3)  # which no text is longer than
    padded = (torch.arange(6) < torch.tensor([[6], [4]])).long()  # where cut there would be none
    assert torch.equal(beginnings({**batch, "attention_mask": padded})["attention_mask"], padded)


def test_an_adapter_that_is_sure_of_its_labels_is_no_difference(monkeypatch) -> None:
    """In bfloat16 loss and gradient of its own labels are mostly rounding."""
    model = described("flan-t5", torch.bfloat16).eval()
    with torch.no_grad():
        model.decoder.final_layer_norm.weight *= 5
    ids = torch.randint(2, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    written = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    batch["labels"] = written[:, 1:]
    loss = GraphedLoss(model.train())
    assert loss.difference(batch, loss.pack(batch)) is None
    monkeypatch.setattr("ia3.fast.graphed.surprising", lambda labels, classes: labels)
    loss.compared.clear()
    assert "differs from the model's own forward" in (loss.difference(batch, loss.pack(batch)) or "")


def test_other_labels_are_labels() -> None:
    labels = torch.tensor([[3, -100], [0, 4]])
    assert surprising(labels, 5).tolist() == [[4, -100], [1, 0]]
    scores = torch.rand(2, 3)  # what a regression's labels are
    assert surprising(scores, 3) is scores


@pytest.mark.parametrize(("window", "left"), [(10, 12), (24, 4)])
def test_what_is_left_of_a_long_text_is_longer_than_a_window_in_it(monkeypatch, window, left) -> None:
    monkeypatch.setattr(compare, "_TOKENS", 8)
    monkeypatch.setattr(compare, "_LEAST", 2)
    ids = torch.randint(2, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = described("mistral with a window", sliding_window=window)
    loss, seen = GraphedLoss(model), []
    pack = loss.losses.pack
    monkeypatch.setattr(loss.losses, "pack", lambda given: seen.append(given["input_ids"].shape) or pack(given))
    assert loss.difference(batch, pack(batch)) is None
    assert seen == [(2, left)]


def test_fewer_examples_where_memory_does_not_suffice(caplog) -> None:
    tried = []

    def compare_some(most: int) -> Callable[[Any], str | None]:
        def run(examples: Any) -> str | None:
            tried.append(list(examples))
            if len(examples) > most:
                raise torch.OutOfMemoryError("no memory")
            return "another"

        return run

    assert in_less_memory(compare_some(1), [0, 2, 5, 7]) == "another"
    assert tried == [[0, 2, 5, 7], [5, 7], [7]]
    with caplog.at_level(logging.WARNING, "ia3"):
        assert in_less_memory(compare_some(0), [0, 2]) is None
    assert "was not compared" in caplog.text


def test_a_forward_that_fails_is_the_models_own_to_fail(tiny, randomise, monkeypatch) -> None:
    model = start(tiny, randomise, "llama")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("no such attention")

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", broken)
    with pytest.raises(KeyError, match="no such attention"):
        model(**texts_of())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["t5 gated", "llama", "qwen2"])
def test_rounding_is_no_difference(tiny, randomise, form, dtype, monkeypatch) -> None:
    """With room to spare: a tenth of what is allowed in whole precision, a half in half precision."""
    if form == "t5 gated" and dtype is torch.float16:
        pytest.skip("T5 in float16 has no fused loss")
    part = 0.1 if dtype in (torch.float64, torch.float32) else 0.5
    limits = {kind: (part * loss, part * gradient) for kind, (loss, gradient) in compare._TOLERANCES.items()}
    monkeypatch.setattr(compare, "_TOLERANCES", limits)
    if form == "t5 gated":
        model = without_dropout(adapted(tiny, randomise, form, dtype)).train()
    else:
        model = adapted_causal(tiny, randomise, form, dtype).train()
    batch = batch_for("llama" if form != "t5 gated" else form)
    loss = GraphedLoss(model)
    assert loss.difference(batch, loss.pack(batch)) is None


def test_where_rounding_decides_it_may(tiny, randomise, monkeypatch) -> None:
    """Vectors that are moved by one rounding show how far a model's own numbers go by rounding."""
    model = start(tiny, randomise, "llama")
    own = torch.tensor(1.0), torch.tensor([1.0, 0.0])
    near = torch.tensor(1.0), torch.tensor([1.0, 0.05])

    def says(moved: tuple[Tensor, Tensor]) -> str | None:
        return compare.difference(model, lambda: near, lambda by: moved if by else own, dtype=torch.float32)

    assert says(near) is None
    assert "gradient 5.0e-02" in (says(own) or "")
    far = torch.tensor(1.0), torch.tensor([-9.0, 0.0])
    near = torch.tensor(1.0), torch.tensor([1.0, 0.8])
    assert says(far) is not None  # whatever rounding does


def test_the_sweeps_losses_need_no_adapter_of_their_own(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated")
    adapter = get_adapter(model, "default")
    mixed = MixedLosses(model, adapter.layout, token_losses(model))
    losses = FusedLosses(model, adapter, mixed)
    assert losses.difference(batch_of(), flat(model)[None]) is None
