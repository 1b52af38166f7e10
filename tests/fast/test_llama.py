"""The hand-written loss of causal models is the model's own, whatever vectors, padding, heads and labels."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders import models_own
from ia3 import IA3Config, compile_step, get_peft_model
from ia3.adapter import site_vectors
from ia3.fast.batch import pack_causal as pack
from ia3.fast.batch import round_up
from ia3.fast.fused import FusedLoss
from ia3.fast.graphed import unsupported_at
from ia3.state import attached

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "llama with wide heads and a tied head": ("llama", {"head_dim": 6, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
}
AT_THE_OTHER_HALF = {"target_modules": ["k_proj", "v_proj", "up_proj"], "feedforward_modules": []}
KEYS_ALONE = {"target_modules": ["k_proj"], "feedforward_modules": []}


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers norms in fp32 even where the model is float64, which would hide all smaller errors."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    for family in ("llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral", "qwen2.modeling_qwen2.Qwen2"):
        monkeypatch.setattr(
            f"transformers.models.{family}RMSNorm.forward", lambda self, x: norm(x, self.weight, self.variance_epsilon)
        )
    monkeypatch.setattr("ia3.fast.ops.norm.rms_norm", norm)
    monkeypatch.setattr("ia3.fast.guard._sources", lambda: ("",))  # wherever a forward is from


def adapted_causal(tiny: Any, randomise: Any, form: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    family, shape = FORMS[form]
    model = tiny(family, dtype=dtype, **shape)
    chance = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=chance, dtype=dtype)
        elif "proj" in name:  # sharp enough for attention to matter
            parameter.data *= 10
    return randomise(get_peft_model(model, IA3Config(task_type="CAUSAL_LM", **config)))


def texts_of(rows: int = 5, length: int = 23, side: str = "right") -> dict[str, Tensor]:
    """A batch with prompts and padding."""
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (rows, length), generator=chance)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        missing = (3 * row) % (length - 4)
        labels[row, : 2 + row % 3] = -100
        if missing and side == "right":
            mask[row, -missing:] = 0
        elif missing:
            mask[row, :missing] = 0
            labels[row, : missing + 2 + row % 3] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and the flat gradient."""
    adapter = attached(model).adapters["default"]
    vectors = [vector for _, vector in site_vectors(model, adapter)]
    flat = adapter.layout.flatten([vector.detach() for vector in vectors]).requires_grad_()
    (loss,) = FusedLoss(model, adapter.layout)(pack(batch), flat[None])
    (gradient,) = torch.autograd.grad(loss, flat)
    return loss.detach(), gradient


def by_the_model(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """From its logits in float64, since its own loss is in fp32."""
    adapter = attached(model).adapters["default"]
    vectors = [vector for _, vector in site_vectors(model, adapter)]
    output = models_own(model, **batch)
    loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    return loss.detach(), adapter.layout.flatten(torch.autograd.grad(loss, vectors))


def reason_of(model: Any) -> str | None:
    return unsupported_at(model, attached(model).adapters["default"].layout)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("config", [{}, AT_THE_OTHER_HALF, KEYS_ALONE], ids=str)
def test_loss_and_gradients_are_the_models(tiny, randomise, form, side, config) -> None:
    model = adapted_causal(tiny, randomise, form, **config)
    batch = texts_of(side=side)
    expected = by_the_model(copy.deepcopy(model), batch)
    assert reason_of(model) is None
    # transformers makes angles in fp32, and counts from the padding on the left: their differences are not exact.
    exactly = {"rtol": 1e-10, "atol": 1e-12} if side == "right" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(by_hand(model, batch), expected, **exactly)
    torch.testing.assert_close(by_the_model(model, batch), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("implementation", "rtol"), [("sdpa", 1e-10), ("eager", 1e-6)])  # eager: softmax in fp32
def test_without_padding(tiny, randomise, implementation, rtol) -> None:
    model = adapted_causal(tiny, randomise, "llama")
    model.set_attn_implementation(implementation)
    batch = texts_of(rows=1, length=9)
    assert pack(batch).uniform
    torch.testing.assert_close(by_hand(model, batch), by_the_model(model, batch), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("form", ["llama", "qwen2"])
def test_groups_have_the_losses_and_gradients_of_each_alone(tiny, randomise, form) -> None:
    model = adapted_causal(tiny, randomise, form)
    layout = attached(model).adapters["default"].layout
    loss_of = FusedLoss(model, layout)
    batch = texts_of(rows=6)
    batch["labels"][2:4] = -100
    table = (1 + torch.randn(3, layout.size, dtype=torch.float64) / 3).requires_grad_()
    losses = loss_of(pack(batch), table)
    (gradient,) = torch.autograd.grad(losses.sum(), table)
    for group in range(3):
        part = {name: tensor[2 * group : 2 * group + 2] for name, tensor in batch.items()}
        alone = loss_of(pack(part), table[group : group + 1])
        torch.testing.assert_close(losses[group], alone[0])
        torch.testing.assert_close(gradient[group], torch.autograd.grad(alone.sum(), table)[0][group])
    assert losses[1] == 0
    with pytest.raises(ValueError, match="6 examples can't be divided into 4 equal groups"):
        loss_of(pack(batch), torch.ones(4, layout.size, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 3])
def test_rounding_up_changes_no_loss_and_no_gradient(tiny, randomise, rows) -> None:
    model = adapted_causal(tiny, randomise, "llama")
    layout = attached(model).adapters["default"].layout
    loss_of = FusedLoss(model, layout)
    texts = pack(texts_of(rows=rows))
    rounded = round_up(texts, examples=5, filler=0)
    assert (rounded.total_tokens, rounded.examples, rounded.max_seqlen, rounded.uniform) == (64, 5, 64, False)
    assert len(rounded["labels"]) == len(rounded["label_at"]) == (32 if rows == 1 else 64)
    table = (1 + torch.randn(1, layout.size, dtype=torch.float64) / 3).requires_grad_()
    found = [(loss, *torch.autograd.grad(loss.sum(), table)) for loss in (loss_of(e, table) for e in (texts, rounded))]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_what_is_full_stays_uniform() -> None:
    texts = pack(texts_of(rows=1, length=64))
    assert round_up(texts, 1, 0).uniform
    assert not round_up(texts, 2, 0).uniform
    labels = round_up(pack({**texts_of(rows=1, length=64), "labels": torch.full((1, 64), -100)}), 1, 0)["labels"]
    assert labels.tolist() == [-100] * 8


def test_the_head_in_pieces(tiny, randomise, monkeypatch) -> None:
    model = adapted_causal(tiny, randomise, "llama")
    batch = texts_of(rows=8, length=60)
    expected = by_hand(model, batch)
    assert len(pack(batch)["labels"]) > 2 * 128
    monkeypatch.setattr("ia3.fast.ops.cross_entropy._LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(by_hand(model, batch), expected, rtol=1e-12, atol=1e-14)


def test_attention_dropout_acts_in_training_alone(tiny, randomise) -> None:
    model = adapted_causal(tiny, randomise, "llama")
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    batch = texts_of()
    still = by_hand(model, batch)[0]
    model.train()
    torch.manual_seed(0)
    losses = torch.stack([by_hand(model, batch)[0] for _ in range(150)])
    assert len(losses.unique()) > 140
    eager = torch.stack([models_own(model, **batch).loss.detach() for _ in range(150)])
    assert abs(losses.mean() - eager.mean()) < 4 * eager.std() / 150**0.5 * 2**0.5
    assert still not in losses


def test_labels_that_padding_would_predict() -> None:
    batch = texts_of(rows=3)
    labels = batch["labels"].clone()
    labels[1, -2] = 5
    with pytest.raises(ValueError, match=r"predict the label at \[1, 21\].* set labels to -100"):
        pack({**batch, "labels": labels})
    left = texts_of(rows=3, side="left")
    left["labels"][2, 6] = 5
    with pytest.raises(ValueError, match=r"predict the label at \[2, 6\]"):
        pack(left)
    with pytest.raises(ValueError, match=r"are \[3, 4\]; a causal model's are as its input_ids \[3, 23\]"):
        pack({**batch, "labels": labels[:, :4]})
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][0, 4] = 0
    with pytest.raises(ValueError, match="example 0 hides tokens between others"):
        pack(holes)


def test_the_label_of_the_first_padding_is_the_last_tokens(tiny, randomise) -> None:
    """Such as an end token that shares the padding's id; the mask hides it as an input alone."""
    model = adapted_causal(tiny, randomise, "llama")
    batch = texts_of(rows=3)
    for row in (1, 2):
        batch["labels"][row, 23 - 3 * row] = 1
    torch.testing.assert_close(by_hand(model, batch), by_the_model(model, batch), rtol=1e-10, atol=1e-12)


def change_hook(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)


def change_forward(model: Any) -> None:
    model.model.norm.forward = model.model.norm.forward


def change_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()


def change_weight(model: Any) -> None:
    class Quantised(nn.Parameter):
        pass

    linear = model.model.layers[0].self_attn.o_proj
    linear.weight = Quantised(linear.weight.data, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_hook, "q_proj carries another's hook"),
        (change_forward, "the forward of model.norm was replaced"),
        (change_checkpointing, "gradients|carries another's hook"),
        (change_weight, "the weight of .*o_proj is a Quantised"),
    ],
)
def test_it_stands_aside(tiny, randomise, change, said) -> None:
    model = adapted_causal(tiny, randomise, "llama")
    assert reason_of(model) is None
    change(model)
    reason = reason_of(model)
    assert reason is not None
    assert re.search(said, reason), reason


@pytest.mark.parametrize(
    ("family", "shape", "targets", "said"),
    [
        ("llama", {}, ["q_proj"], r"the input of .*\.q_proj is adapted"),
        ("llama", {}, ["gate_proj"], r"the input of .*\.gate_proj is adapted"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            None,
            "positions are 'dynamic'",
        ),
        ("bloom", {}, None, "a bloom is not described"),
    ],
)
def test_what_is_left_to_the_model(tiny, family, shape, targets, said) -> None:
    config = {"target_modules": targets, "feedforward_modules": targets}
    model = get_peft_model(
        tiny(family, **shape), IA3Config(task_type="CAUSAL_LM", **(config if targets is not None else {}))
    )
    reason = reason_of(model)
    assert reason is not None
    assert re.search(said, reason), reason


def test_recomputing_changes_nothing(tiny: Any, randomise: Any) -> None:
    model = adapted_causal(tiny, randomise, "llama")
    layout = attached(model).adapters["default"].layout
    texts = pack(texts_of())
    table = (1 + 0.3 * torch.randn(1, layout.size, dtype=torch.float64)).requires_grad_()

    def found(recompute: bool) -> tuple[Tensor, ...]:
        losses = FusedLoss(model, layout, recompute=recompute)(texts, table)
        return losses.detach(), *torch.autograd.grad(losses.sum(), table)

    torch.testing.assert_close(found(True), found(False), rtol=1e-12, atol=1e-14)
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="Attention dropout can't be computed again"):
        FusedLoss(model, layout, recompute=True)


def test_biases_loaded_in_place_are_noticed(tiny: Any, randomise: Any) -> None:
    model = adapted_causal(tiny, randomise, "qwen2", torch.float32)
    step = compile_step(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0))
    batch = texts_of()
    step(batch)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.add_(1)
    with pytest.raises(RuntimeError, match="make the step again"):
        step(batch)
