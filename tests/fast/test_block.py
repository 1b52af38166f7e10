"""The block computes what a family's own forward does: loss, gradient, dropout's places, groups, positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders import randomise
from described import FORMS, batch_for, described, is_encoder
from ia3 import IA3Config
from ia3.adapter import vectors
from ia3.fast.fused import FusedLoss, unsupported_reason
from ia3.fast.guard import own_forward
from ia3.fast.own import Gather
from ia3.state import get_adapter


def fused(model: Any, **how: Any) -> tuple[FusedLoss, Tensor]:
    """The fused loss and the vectors as a table of one row."""
    adapter = get_adapter(model, "default")
    assert unsupported_reason(model, adapter.layout.sites) is None
    flat = adapter.layout.flatten([vector.detach() for vector in vectors(model, adapter)])
    return FusedLoss(model, adapter.layout, **how), flat[None].requires_grad_()


def by_block(model: Any, batch: dict[str, Tensor], *, rounded: bool = False, **how: Any) -> tuple[Tensor, Tensor]:
    loss, table = fused(model, **how)
    packed = loss.pack(batch)
    found = loss(loss.round_up(packed, len(batch["labels"])) if rounded else packed, table)
    (gradient,) = torch.autograd.grad(found.sum(), table)
    return found[0].detach(), gradient[0]


def by_own_forward(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    adapter = get_adapter(model, "default")
    own = vectors(model, adapter)
    output = own_forward(type(model))(model, **batch)
    loss = output.loss
    if batch["labels"].shape == batch["input_ids"].shape and not model.config.is_encoder_decoder:
        # transformers takes it in fp32.
        loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    gradients = torch.autograd.grad(loss, own)
    return loss.detach(), adapter.layout.flatten(list(gradients))


def norm_exactly(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers norms in fp32 even where the model is float64, which would hide all smaller errors."""

    def norm(self: Any, x: Tensor) -> Tensor:
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        weight = self.weight + ("Gemma" in type(self).__name__)
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    for kind in {type(module) for module in model.modules()}:
        if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")):
            monkeypatch.setattr(kind, "forward", norm)
    monkeypatch.setattr(
        "ia3.fast.ops.norm.rms_norm",
        lambda x, weight, eps: weight.to(x.dtype) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)),
    )


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-9) -> None:
    assert abs(found[0] - expected[0]) <= tolerance
    assert (found[1] - expected[1]).abs().max() <= tolerance * expected[1].abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", ["right", "left", "rounded"])
def test_loss_and_gradient_are_those_of_its_own_forward(
    form: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_encoder(form) and padding == "left":
        pytest.skip("a head looks at the first place, so that such a batch is for the model's own forward")
    model = described(form)
    norm_exactly(model, monkeypatch)
    batch = batch_for(form, left=padding == "left")
    # Angles of other positions, and the softmax of its eager attention, are in fp32 there.
    tolerance = 1e-5 if padding == "left" or form.startswith("gemma2") else 1e-9
    close(by_block(model, batch, rounded=padding == "rounded"), by_own_forward(model, batch), tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_vectors_at_every_linear_layer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = described(form, everywhere=True)
    norm_exactly(model, monkeypatch)
    batch = batch_for(form)
    found, expected = by_block(model, batch), by_own_forward(model, batch)
    close(found, expected, 1e-5 if form.startswith("gemma2") else 1e-9)
    parts = get_adapter(model, "default").layout.split(expected[1][None])
    assert all(part.abs().max() > 0 for part in parts)
    assert all(site.intervals is None for site in get_adapter(model, "default").layout.sites)
    close(by_block(model, batch, recompute=True), found)


@pytest.mark.parametrize("form", [form for form in FORMS if not is_encoder(form)])
def test_groups_of_vectors_at_every_linear_layer(form: str) -> None:
    model, batch = described(form, everywhere=True), batch_for(form)
    loss, table = fused(model)
    two = torch.cat([table.detach(), 2 - table.detach()]).requires_grad_()
    (gradients,) = torch.autograd.grad(loss(loss.pack(batch), two).sum(), two)
    for group, half in enumerate((slice(0, 2), slice(2, 4))):
        row = two[group : group + 1].detach().requires_grad_()
        alone = loss(loss.pack({name: tensor[half] for name, tensor in batch.items()}), row)
        assert (torch.autograd.grad(alone.sum(), row)[0] - gradients[group]).abs().max() < 1e-9


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "o_proj", "down_proj"]])
def test_a_gate_in_one_layer_has_one_vector(targets: list[str]) -> None:
    model, batch = described("phi3"), batch_for("phi3")
    model.add_adapter("other", IA3Config(target_modules=targets, feedforward_modules=[]), autocast_adapter_dtype=False)
    model.set_adapter("other")
    model.delete_adapter("default")
    randomise(model)
    adapter = get_adapter(model, "other")
    loss, own = FusedLoss(model, adapter.layout), vectors(model, adapter)
    table = adapter.layout.flatten([vector.detach() for vector in own])[None].requires_grad_()
    (found,) = torch.autograd.grad(loss(loss.pack(batch), table).sum(), table)
    expected = torch.autograd.grad(own_forward(type(model))(model, **batch).loss, own)
    assert (found[0] - adapter.layout.flatten(list(expected))).abs().max() < 1e-6


def test_a_part_of_the_keys_has_no_vector() -> None:
    sites = get_adapter(described("phi3"), "default").layout.sites
    others = [replace(site, intervals=((0, 4),)) if site.intervals else site for site in sites]
    reason = unsupported_reason(described("phi3"), others) or ""
    assert "qkv_proj is adapted, where the block has no vector" in reason


@pytest.mark.parametrize("form", FORMS)
def test_each_dropout_stands_where_its_own_forward_has_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dropout that multiplies by a number of its rate's, two computations without a draw are equal."""
    model = described(form, rate=0.2, attn_implementation="eager")
    norm_exactly(model, monkeypatch)
    batch = batch_for(form)
    without = by_block(model.eval(), batch)
    model.train()
    monkeypatch.setattr(
        functional, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 + p) if training else x
    )
    monkeypatch.setattr(functional, "scaled_dot_product_attention", _attention)
    found, expected = by_block(model, batch), by_own_forward(model, batch)
    close(found, expected, 1e-5)  # the eager attention's softmax is in fp32
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        assert not torch.allclose(found[1], without[1])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **grouping: Any,
) -> Tensor:  # fmt: skip
    """PyTorch's, with the dropout that multiplies."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min) if mask.dtype is torch.bool else scores + mask
    return functional.dropout(scores.softmax(-1), dropout_p) @ v


@pytest.mark.parametrize("form", [form for form in FORMS if not is_encoder(form)])
def test_each_group_has_the_loss_and_the_gradient_that_it_has_alone(form: str) -> None:
    model, batch = described(form), batch_for(form)
    loss, table = fused(model)
    two = torch.cat([table.detach(), 2 - table.detach()]).requires_grad_()
    together = loss(loss.pack(batch), two)
    (gradients,) = torch.autograd.grad(together.sum(), two)
    for group, half in enumerate((slice(0, 2), slice(2, 4))):
        row = two[group : group + 1].detach().requires_grad_()
        alone = loss(loss.pack({name: tensor[half] for name, tensor in batch.items()}), row)
        (gradient,) = torch.autograd.grad(alone.sum(), row)
        close((together[group], gradients[group]), (alone[0], gradient[0]))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_near(form: str) -> None:
    """Whatever the precision of angles and of norms' weights is then."""
    batch = batch_for(form)
    loss, gradient = by_own_forward(described(form, torch.bfloat16).double(), batch)
    found, own = by_block(described(form, torch.bfloat16), batch)
    assert abs(found - loss) < 0.05 * loss
    assert (own - gradient).norm() < 0.1 * gradient.norm()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_computed_again_is_the_same(form: str) -> None:
    model, batch = described(form), batch_for(form)
    close(by_block(model, batch, recompute=True), by_block(model, batch))


@pytest.mark.parametrize("form", ["bert", "distilbert", "electra"])
def test_an_encoders_head_gets_its_gradient_too(form: str) -> None:
    model, batch = described(form), batch_for(form)
    head = [parameter for name, parameter in model.named_parameters() if ".modules_to_save.default." in name]
    assert head
    expected = torch.autograd.grad(own_forward(type(model))(model, **batch).loss, head)
    loss, table = fused(model)
    found = torch.autograd.grad(loss(loss.pack(batch), table).sum(), head)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9)


def test_an_encoders_batch_with_padding_on_the_left_is_for_its_own_forward() -> None:
    loss, _ = fused(described("bert"))
    with pytest.raises(ValueError, match="more than padding behind its tokens"):
        loss.pack(batch_for("bert", left=True))


def test_every_projection_that_is_fused_gives_keys_and_values_their_own_part() -> None:
    """Of a vector over both, a change of the keys' part moves nothing that the values' part does."""
    for form in ("gpt2", "gpt_neox", "phi3"):
        model = described(form)
        loss, _ = fused(model)
        layer = loss.weights.stacks[0].layers[0]
        attention = getattr(layer, "attention", layer)
        width = loss.layout.widths[attention.k.place]
        whole = torch.arange(width, dtype=torch.float64)[None, None]
        keys, values = attention.k.part(whole), attention.v.part(whole)
        assert sorted([*keys.flatten().tolist(), *values.flatten().tolist()]) == list(range(width))


@pytest.mark.parametrize(
    ("form", "more", "reason"),
    [
        ("opt", {"word_embed_proj_dim": 8}, "its embeddings are projected"),
        ("phi", {"qk_layernorm": True}, "normed by head"),
        ("gpt2", {"add_cross_attention": True}, "it attends across"),
        ("bert", {"is_decoder": True}, "it is a decoder"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}},
            "depend on the batch",
        ),
    ],
)
def test_what_is_not_described_is_a_reason(form: str, more: dict[str, Any], reason: str) -> None:
    model = described(form, **more)
    assert reason in str(unsupported_reason(model, get_adapter(model, "default").layout.sites))


@pytest.mark.parametrize(("form", "name"), [("opt", "layerdrop"), ("bart", "encoder_layerdrop")])
def test_a_model_that_drops_whole_layers_is_a_reason(form: str, name: str) -> None:
    model = described(form)
    setattr(model.config, name, 0.1)
    assert "drops whole layers" in str(unsupported_reason(model, get_adapter(model, "default").layout.sites))


def test_a_gradient_that_padding_gets_between_padded_places_and_tokens() -> None:
    """Two examples of 3 and 1 tokens, padded to 3, and one token of filler behind them."""
    token_at, slot_of = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 1, 2, 3, 0, 0])
    padded, tokens = (torch.randn(count, 2, dtype=torch.float64, requires_grad=True) for count in (6, 5))
    for x, at, back, real in ((padded, token_at, slot_of, 4), (tokens, slot_of, token_at, 4)):
        grad = torch.randn(len(at), 2, dtype=torch.float64)
        found = Gather.apply(x, at, back)
        assert torch.equal(found, x[at])
        wanted = torch.zeros_like(x)
        wanted[:real] = grad[:real]
        (gradient,) = torch.autograd.grad(found, x, grad)
        assert torch.equal(gradient, wanted)


def test_a_site_that_the_block_does_not_have_is_a_reason() -> None:
    model = described("llama")
    model.add_adapter("other", IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=["k_proj"]))
    reason = unsupported_reason(model, get_adapter(model, "other").layout.sites)
    assert "the input of model.layers.0.self_attn.k_proj is adapted, where the block has no vector" in str(reason)


def test_a_rate_that_the_configuration_does_not_say_is_a_reason() -> None:
    model = described("bert", rate=0.1)
    model.bert.encoder.layer[1].output.dropout.p = 0.5
    assert "dropout of bert.encoder.layer.1.output.dropout is 0.5" in str(
        unsupported_reason(model, get_adapter(model, "default").layout.sites)
    )


def test_a_model_built_otherwise_is_a_reason_and_no_error() -> None:
    model = described("llama")
    del model.model.layers[1].post_attention_layernorm
    assert "it has no model.layers.1.post_attention_layernorm" in str(
        unsupported_reason(model, get_adapter(model, "default").layout.sites)
    )


def test_layers_with_a_bias_and_without_are_one_product() -> None:
    model = described("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = nn.Parameter(torch.randn(8, dtype=torch.float64), requires_grad=False)
    batch = batch_for("llama")
    close(by_block(model, batch), by_own_forward(model, batch), tolerance=1e-5)
