"""Layers that answer otherwise than with one tensor of their channels: right, or an error at attach with the path."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.ibert.quant_modules import QuantLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

import builders
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.layers import why_nothing_learns
from ia3.sites import Site, find_sites

DOUBLE = torch.float64


class Around(nn.Module):
    """One layer `k` between what calls it and what takes its answer."""

    def __init__(self, layer: nn.Module, *, named: str = "", place: int | None = None) -> None:
        super().__init__()
        self.k, self.named, self.place = layer, named, place

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        answer = self.k(**{self.named: x}) if self.named else self.k(x, *more)
        return answer if self.place is None else answer[self.place]


def adapted(model: nn.Module, side: str = "output", *more: str) -> Any:
    """The model with random vectors at its layer `k`, of both signs."""
    config = {"target_modules": ["k"], "feedforward_modules": ["k"] if side == "input" else []}
    model = get_peft_model(model.to(DOUBLE).eval(), IA3Config(**config), autocast_adapter_dtype=False)
    for name in more:
        model.add_adapter(name, IA3Config(**config))
    builders.randomise(model, spread=1.0)
    return model


def vector(model: Any, name: str = "default") -> Tensor:
    return model.k.ia3_l[name].detach().flatten()


def quantised(layer: QuantLinear) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


# What a layer answers with


def test_a_tuple_with_one_tensor_is_scaled() -> None:
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    base = quantised(QuantLinear(4, 6)).to(DOUBLE)
    plain, none = base(x)
    assert none is None
    model = adapted(Around(base, place=0))
    torch.testing.assert_close(model(x), plain * vector(model), rtol=0, atol=1e-14)
    got, still = model.k(x)
    assert still is None
    assert type(model.k(x)) is tuple
    torch.testing.assert_close(got, plain * vector(model), rtol=0, atol=1e-14)


def test_a_tuple_with_one_tensor_in_a_mixed_batch_and_merged() -> None:
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    model = adapted(Around(quantised(QuantLinear(4, 6)), place=0), "output", "other")
    rows = torch.stack([vector(model, "other"), vector(model)])[:, None]
    with model.disable_adapter():
        plain = model(x)
    torch.testing.assert_close(model(x, adapter_names=["other", "default"]), plain * rows, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.merge_and_unload()(x), plain * rows[1], rtol=0, atol=1e-14)


def test_ibert_learns_and_merges() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = transformers.IBertForSequenceClassification(transformers.IBertConfig(vocab_size=64, **shape)).eval()
    targets = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    model = builders.adapted(base, **targets, exclude_modules=["attention.output.dense"])
    ids = torch.arange(2, 12).view(2, 5)
    out = model(input_ids=ids, labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert all(gradient.abs().max() > 0 for gradient in builders.vector_gradients(model).values())
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, out.logits, rtol=0, atol=1e-5)


def router(kind: str) -> nn.Module:
    common = {"hidden_size": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "llama4":
        return Llama4Router(transformers.Llama4TextConfig(**common))
    return PhimoeTopKRouter(transformers.PhimoeConfig(**common))


@pytest.mark.parametrize("kind", ["llama4", "phimoe"])
def test_a_router_is_refused_before_anything_runs(kind: str) -> None:
    message = r"k is a \w+Router that answers with [23] tensors .*exclude_modules.*feedforward_modules"
    with pytest.raises(ValueError, match=message):
        get_peft_model(Around(router(kind)), IA3Config(target_modules=["k"]))


@pytest.mark.parametrize("kind", ["llama4", "phimoe"])
def test_all_linear_leaves_a_router_out_and_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"router": router(kind), "fc": nn.Linear(4, 4)})
    with caplog.at_level(logging.WARNING, "ia3"):
        found = find_sites(model, IA3Config(target_modules="all-linear"))
    assert [site.path for site in found.layout.sites] == ["fc"]
    assert "all-linear leaves out router: it is a" in caplog.text


def test_a_routers_input_may_be_scaled() -> None:
    x = torch.randn(5, 4, dtype=DOUBLE)
    base = router("llama4").to(DOUBLE)
    model = adapted(Around(base, place=1), "input")
    torch.testing.assert_close(model(x), x * vector(model) @ base.weight.T, rtol=0, atol=1e-14)


def test_channels_folded_into_groups() -> None:
    """Row g · n + i of the weight makes channel i of group g, which the vector of as many numbers multiplies."""
    x = torch.randn(3, 5, 2, 4, dtype=DOUBLE)
    layer = DeepseekV4GroupedLinear(4, 6, n_groups=2).to(DOUBLE)
    model = adapted(Around(layer), "output", "other")
    by_group = layer.weight.detach().view(2, 3, 4)
    plain = torch.einsum("blgi,goi->blgo", x, by_group)
    torch.testing.assert_close(model(x), plain * vector(model).view(2, 3), rtol=0, atol=1e-14)
    rows = torch.stack([vector(model, name) for name in ("other", "default", "other")]).view(3, 1, 2, 3)
    mixed = model(x, adapter_names=["other", "default", "other"])
    torch.testing.assert_close(mixed, plain * rows, rtol=0, atol=1e-14)
    expected = plain * vector(model).view(2, 3)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-14)


def test_inputs_in_groups_share_a_vector() -> None:
    x = torch.randn(3, 5, 2, 4, dtype=DOUBLE)
    layer = DeepseekV4GroupedLinear(4, 6, n_groups=2).to(DOUBLE)
    model = adapted(Around(layer), "input")
    expected = torch.einsum("blgi,goi->blgo", x * vector(model), layer.weight.detach().view(2, 3, 4))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-14)


class Wider(nn.Linear):
    """A linear layer whose answer has more channels than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2, dim=-1)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round().to(torch.int32)


class OnceRight(nn.Linear):
    """It can't be tried with two tokens, and answers three with a dictionary."""

    def forward(self, x: Tensor) -> Any:
        if x.shape[-2] != 3:
            raise ValueError("three tokens")
        return {"out": super().forward(x)}


def test_another_width_than_the_layers_is_refused_at_attach() -> None:
    with pytest.raises(ValueError, match=r"k is a Wider that answers with the shape .*no 6 channels"):
        get_peft_model(Around(Wider(4, 6)), IA3Config(target_modules=["k"]))


def test_what_shows_in_a_forward_alone_names_its_path() -> None:
    model = nn.Sequential(Around(OnceRight(4, 4)))
    model = get_peft_model(model, IA3Config(target_modules=["k"]))
    with pytest.raises(TypeError, match=r"^0\.k \(OnceRight\) answered with a dict, .*Leave this layer to exclude_mod"):
        model(torch.randn(1, 3, 4))


def test_integers_name_their_path() -> None:
    model = get_peft_model(nn.Sequential(Around(Rounded(4, 4))), IA3Config(target_modules=["k"]))
    with pytest.raises(TypeError, match=r"^0\.k \(Rounded\): ia3 multiplies floating-point activations"):
        model(torch.randn(1, 4))


def test_trying_a_layer_leaves_it_as_it_was() -> None:
    layer = quantised(QuantLinear(4, 6, quant_mode=True)).train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    find_sites(Around(layer), IA3Config(target_modules=["k"]))
    assert layer.training
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_complex_numbers() -> None:
    layer = nn.Linear(4, 6, dtype=torch.complex128)
    x = torch.randn(2, 3, 4, dtype=torch.complex128)
    for side in ("output", "input"):
        model = get_peft_model(
            Around(layer), IA3Config(target_modules=["k"], feedforward_modules=["k"] if side == "input" else [])
        )
        builders.randomise(model)
        scale = vector(model)
        expected = layer.forward(x) * scale if side == "output" else layer.forward(x * scale)
        torch.testing.assert_close(model(x), expected)
        model(x).abs().sum().backward()
        assert model.k.ia3_l["default"].grad.abs().min() > 0
        with pytest.raises(ValueError, match=r"k has no floating-point weight.*complex128"):
            model.merge_adapter()
        model.unload()


# How a layer is called


def test_an_input_passed_by_name() -> None:
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    layer = nn.Linear(4, 6).to(DOUBLE)
    model = adapted(Around(layer, named="input"), "input", "other")
    torch.testing.assert_close(model(x), layer.forward(x * vector(model)), rtol=0, atol=1e-14)
    rows = torch.stack([vector(model, "other"), vector(model)])[:, None]
    mixed = model(x, adapter_names=["other", "default"])
    torch.testing.assert_close(mixed, layer.forward(x * rows), rtol=0, atol=1e-14)
    assert not model.unload().k._forward_pre_hooks_with_kwargs


class Sum(nn.Linear):
    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(left + right)


def test_two_inputs_by_name_are_refused_with_the_path() -> None:
    class Twice(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.k(left=x, right=x)

    model = get_peft_model(Twice(Sum(4, 4)), IA3Config(target_modules=["k"], feedforward_modules=["k"]))
    with pytest.raises(TypeError, match=r"^k \(Sum\) was called with 2 tensors"):
        model(torch.randn(2, 4))


def test_further_arguments_are_passed_on() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return super().forward(x) + shift

    x, shift = torch.randn(2, 4, dtype=DOUBLE), torch.randn(2, 6, dtype=DOUBLE)
    layer = Shifted(4, 6).to(DOUBLE)
    model = adapted(Around(layer), "input")
    torch.testing.assert_close(model(x, shift), layer.forward(x * vector(model), shift), rtol=0, atol=1e-14)


# Layers that no vector fits


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    "layer",
    [nn.LazyLinear(4), nn.LazyConv1d(4, 3), nn.LazyConvTranspose2d(4, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_weights_are_refused(layer: nn.Module, side: str) -> None:
    model = Around(layer)
    with pytest.raises(ValueError, match=r"k is a Lazy\w+ that has no weights yet.*call the model once"):
        get_peft_model(model, IA3Config(target_modules=["k"], feedforward_modules=["k"] if side == "input" else []))
    assert not layer._forward_hooks


def test_a_lazy_layer_that_was_called_is_a_layer() -> None:
    model = Around(nn.LazyLinear(6))
    model(torch.randn(2, 4))
    assert find_sites(model, IA3Config(target_modules=["k"])).layout.sites == (Site("k", "output", (6, 1)),)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 4), nn.GRU(4, 4), nn.Bilinear(4, 4, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.Identity()],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_refused_at_attach(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"k is a {type(layer).__name__}, which can't carry a vector"):
        get_peft_model(Around(layer), IA3Config(target_modules=["k"]))


def test_all_linear_of_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match=r"Around has no linear layer for 'all-linear'.*name its modules"):
        get_peft_model(Around(nn.Conv1d(4, 4, 1)), IA3Config(target_modules="all-linear"))


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_a_computed_weight_is_scaled_and_not_merged(how: str) -> None:
    layer = getattr(nn.utils.parametrizations, how)(nn.Linear(4, 6).to(DOUBLE))
    x = torch.randn(2, 4, dtype=DOUBLE)
    for side in ("output", "input"):
        model = adapted(Around(layer), side)
        scale = vector(model)
        expected = layer.forward(x) * scale if side == "output" else layer.forward(x * scale)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
        with pytest.raises(ValueError, match=r"k has no floating-point weight of its own.*its weight is computed"):
            model.merge_adapter()
        model.unload()


# Places where nothing learns


class Chooser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).argmax(-1)


class BlockIndexer(Chooser):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x).topk(1, dim=-1).indices


class WithChooser(nn.Module):
    def __init__(self, chooser: nn.Module) -> None:
        super().__init__()
        self.indexer, self.v = chooser, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(x) * self.indexer(x)


@pytest.mark.parametrize("chooser", [Chooser, BlockIndexer])
def test_a_layer_without_gradient_is_refused_by_name(chooser: type[nn.Module]) -> None:
    model = WithChooser(chooser())
    with pytest.raises(ValueError, match=r"indexer\.k is inside indexer, a \w+, which .*would never learn") as caught:
        get_peft_model(model, IA3Config(target_modules=["k", "v"]))
    pattern = re.search(r"r'(.*)'", str(caught.value)).group(1)
    found = find_sites(model, IA3Config(target_modules=["v"], exclude_modules=pattern))
    assert [site.path for site in found.layout.sites] == ["v"]


@pytest.mark.parametrize("chooser", [Chooser, BlockIndexer])
def test_all_linear_leaves_out_what_never_learns(chooser: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ia3"):
        model = get_peft_model(WithChooser(chooser()), IA3Config(target_modules="all-linear"))
    assert "all-linear leaves out indexer.k" in caplog.text
    model(torch.randn(2, 3, 4)).sum().backward() if chooser is BlockIndexer else None
    assert [site.path for site in find_sites(model, model.peft_config["default"]).layout.sites] == ["v"]


def test_a_file_with_vectors_in_an_indexer_is_loaded(tmp_path: Path) -> None:
    """PEFT puts them there, and in answering they act."""
    base = WithChooser(BlockIndexer())
    config = peft.IA3Config(target_modules=["k", "v"], feedforward_modules=[])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(WithChooser(BlockIndexer()), tmp_path)
    assert loaded.indexer.k.ia3_l.keys() == ["default"]


def test_the_indexers_of_transformers_are_known() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "q_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "qk_rope_head_dim": 4}
    indexer = DeepseekV32Indexer(transformers.DeepseekV32Config(**shape), 0)
    modules = {"attn.indexer": indexer, "attn.indexer.wk": indexer.wk, "attn": nn.Module()}
    assert "DeepseekV32Indexer, which" in (why_nothing_learns(modules, "attn.indexer.wk") or "")
    assert why_nothing_learns(modules, "attn.k_proj") is None


# One module at several paths


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4).to(DOUBLE)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def test_a_module_at_two_paths_has_one_vector_saved_once(tmp_path: Path) -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    model = get_peft_model(Shared(), IA3Config(target_modules=["a"]), autocast_adapter_dtype=False)
    builders.randomise(model)
    scale, layer = model.a.ia3_l["default"].detach().flatten(), model.a
    expected = layer.forward((layer.forward(x) * scale).tanh()) * scale
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Shared(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-14)
    assert model.get_nb_trainable_parameters()[0] == 4
    rows = torch.stack([scale, torch.ones_like(scale), scale])
    plain = Shared()
    mixed = plain.a((plain.a(x) * rows).tanh()) * rows
    torch.testing.assert_close(model(x, adapter_names=["default", "__base__", "default"]), mixed, rtol=0, atol=1e-14)
    torch.testing.assert_close(loaded.merge_and_unload()(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("targets", [["b"], "b"])
def test_the_second_path_is_told_apart(targets: Any) -> None:
    with pytest.raises(ValueError, match="b is the same module as a: name it 'a'"):
        get_peft_model(Shared(), IA3Config(target_modules=targets))


# A base that carries PEFT's layers


def lora() -> Any:
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(builders.llama(), config)


def test_pefts_wrapper_is_refused() -> None:
    for config in (IA3Config(), IA3Config(target_modules="all-linear")):
        with pytest.raises(ValueError, match=r"is a peft\.PeftModel.*get_base_model\(\).*merge_and_unload\(\)"):
            get_peft_model(lora(), config)


def test_vectors_on_top_of_a_lora(tmp_path: Path) -> None:
    ids = torch.arange(6)[None]
    wrapper = lora().eval()
    plain = wrapper.merge_and_unload()  # the oracle: a base with the LoRA in its weights
    expected = builders.adapted(plain, **builders.CAUSAL)(ids).logits
    wrapper = lora().eval()
    trained = [name for name, parameter in wrapper.named_parameters() if parameter.requires_grad]
    model = builders.adapted(wrapper.get_base_model(), **builders.CAUSAL)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(lora().eval().get_base_model(), tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="k_proj has no floating-point weight of its own to merge into"):
        model.merge_adapter()
    base = model.unload()
    assert base is wrapper.get_base_model()
    assert base.peft_config is wrapper.base_model.peft_config
    assert [name for name, parameter in wrapper.named_parameters() if parameter.requires_grad] == trained


def test_all_linear_takes_a_lora_layer_as_one() -> None:
    own = find_sites(builders.llama(), IA3Config(target_modules="all-linear")).layout.sites
    wrapped = find_sites(lora().get_base_model(), IA3Config(target_modules="all-linear")).layout.sites
    assert own == wrapped


# Transposed convolutions and bags


TRANSPOSED = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "3d": (lambda: nn.ConvTranspose3d(6, 4, 2, groups=2, bias=False), (2, 6, 3, 3, 3)),
}


def transposed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return TRANSPOSED[kind][0]().to(DOUBLE)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_convolutions(kind: str, side: str, tmp_path: Path) -> None:
    x, layer = torch.randn(TRANSPOSED[kind][1], dtype=DOUBLE), transposed(kind)
    model = adapted(Around(transposed(kind)), side, "other")
    rows = torch.stack([vector(model, name) for name in ("default", "other")])
    rows = rows.view(2, -1, *(1,) * (x.dim() - 2))
    first, second = (layer(x) * row if side == "output" else layer(x * row) for row in rows)
    torch.testing.assert_close(model(x), first, rtol=0, atol=1e-13)
    mixed = model(x, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=0, atol=1e-13)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Around(transposed(kind)), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(x), first, rtol=0, atol=1e-13)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(x), first, rtol=0, atol=1e-13)
    loaded.unmerge_adapter()
    assert torch.equal(loaded.k.weight, layer.weight)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode: str) -> None:
    layer = nn.EmbeddingBag(9, 6, mode=mode).to(DOUBLE)
    ids = torch.tensor([[1, 2, 3], [4, 5, 5]])
    model = adapted(Around(layer), "output", "other")
    plain = layer.forward(ids)
    torch.testing.assert_close(model(ids), plain * vector(model), rtol=0, atol=1e-14)
    rows = torch.stack([vector(model, "other"), vector(model)])
    torch.testing.assert_close(model(ids, adapter_names=["other", "default"]), plain * rows, rtol=0, atol=1e-14)
    if mode == "max":
        with pytest.raises(ValueError, match="takes the maximum"):
            model.merge_adapter()
    else:
        expected = plain * vector(model)
        torch.testing.assert_close(model.merge_and_unload()(ids), expected, rtol=0, atol=1e-14)


def test_a_bags_input_is_refused() -> None:
    with pytest.raises(ValueError, match="k is an embedding: its input are token numbers"):
        get_peft_model(Around(nn.EmbeddingBag(9, 6)), IA3Config(target_modules=["k"], feedforward_modules=["k"]))
