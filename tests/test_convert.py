from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5ForConditionalGeneration

import builders
from ia3 import PeftModel, get_peft_model, set_peft_model_state_dict
from ia3.convert import convert_adapterhub, convert_tfew, load_adapterhub, load_tfew

DOUBLE = torch.float64


def gated() -> T5ForConditionalGeneration:
    return builders.t5(dtype=DOUBLE)


def without_gates() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = deepcopy(gated().config)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "relu", False, "relu"
    return T5ForConditionalGeneration(config).to(DOUBLE).eval()


MODELS = {"gated": (gated, ("k", "v", "wi_1")), "without gates": (without_gates, ("k", "v", "wi"))}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor]]:
    make, leaves = MODELS[request.param]
    model = make()
    return model, checkpoint(model, leaves)


def checkpoint(model: nn.Module, leaves: tuple[str, ...] = ("k", "v", "wi_1")) -> dict[str, Tensor]:
    """What T-Few saves: a vector `(out, 1)` for each key, value and feed-forward layer, some negative."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"{path}.multi_lora_b": 1 + torch.randn(module.out_features, 1, generator=generator, dtype=DOUBLE)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] in leaves
    }


class ScaledLinear(nn.Module):
    """The equation of T-Few's layer: the linear output times the vector."""

    def __init__(self, linear: nn.Linear, vector: Tensor) -> None:
        super().__init__()
        self.weight, self.vector = linear.weight, vector

    def forward(self, activation: Tensor) -> Tensor:
        return activation @ self.weight.T * self.vector.flatten()


def by_hand(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    model = deepcopy(model)
    for name, vector in tensors.items():
        path = name.removesuffix(".multi_lora_b")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ScaledLinear(model.get_submodule(path), vector))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**builders.seq2seq_batch()).logits


def written(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, tmp_path / "finish.pt")
    return tmp_path / "finish.pt"


def test_logits_are_those_by_hand(case: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path) -> None:
    base, tensors = case
    expected, plain = logits(by_hand(base, tensors)), logits(base)
    loaded = load_tfew(base, written(tmp_path, tensors))
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-12)


def test_every_vector_arrives(case: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path) -> None:
    base, tensors = case
    loaded = load_tfew(base, written(tmp_path, tensors), adapter_name="t0")
    assert len(tensors) == 2 * 3 + 2 * 5
    for name, vector in tensors.items():
        assert torch.equal(loaded.get_parameter(f"{name.removesuffix('.multi_lora_b')}.ia3_l.t0"), vector)


@pytest.mark.parametrize("prefix", ["", "model.", "transformer.", "module.model."])
def test_prefixes(prefix: str) -> None:
    tensors = checkpoint(gated())
    config, converted = convert_tfew({prefix + name: vector for name, vector in tensors.items()})
    assert set(converted) == {f"base_model.model.{name.removesuffix('multi_lora_b')}ia3_l" for name in tensors}
    assert config.target_modules == {"k", "v", "wi_1"}
    assert config.feedforward_modules == set()
    assert config.task_type == "SEQ_2_SEQ_LM"


def test_the_converted_adapter_loads_in_peft(tmp_path: Path) -> None:
    base = gated()
    tensors = checkpoint(base)
    expected = logits(by_hand(base, tensors))
    load_tfew(base, written(tmp_path, tensors)).save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(gated(), tmp_path / "adapter", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-12)


def test_beside_another_adapter() -> None:
    model = builders.adapted(gated())
    before = logits(model)
    tensors = checkpoint(gated())
    config, converted = convert_tfew(tensors)
    model.add_adapter("t0", config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, converted, "t0")
    torch.testing.assert_close(logits(model), before)
    model.set_adapter("t0")
    torch.testing.assert_close(logits(model), logits(by_hand(gated(), tensors)), rtol=0, atol=1e-12)


def test_frozen_unless_it_is_to_be_trained(tmp_path: Path) -> None:
    path = written(tmp_path, checkpoint(gated()))
    frozen = load_tfew(gated().train(), path)
    assert not frozen.training
    assert frozen.get_nb_trainable_parameters()[0] == 0
    trained = load_tfew(gated().train(), path, is_trainable=True)
    assert trained.training
    assert trained.get_nb_trainable_parameters()[0] == sum(vector.numel() for vector in checkpoint(gated()).values())


def test_safetensors(tmp_path: Path) -> None:
    base = gated()
    tensors = checkpoint(base)
    save_file(tensors, tmp_path / "tfew.safetensors")
    expected = logits(by_hand(base, tensors))
    torch.testing.assert_close(logits(load_tfew(base, tmp_path / "tfew.safetensors")), expected, rtol=0, atol=1e-12)


def test_input_scales_of_one_are_left_out() -> None:
    tensors = checkpoint(gated())
    with_ones = tensors | {name[:-1] + "a": torch.ones(1, 16) for name in tensors}
    assert convert_tfew(with_ones)[1].keys() == convert_tfew(tensors)[1].keys()


def test_other_input_scales_are_refused() -> None:
    name = "encoder.block.0.layer.0.SelfAttention.k.multi_lora_a"
    scales = torch.ones(1, 16)
    scales[0, 3] = 1.001
    with pytest.raises(ValueError, match=f"{name} is not one throughout"):
        convert_tfew(checkpoint(gated()) | {name: scales})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.block.0.layer.0.SelfAttention.k.lora_b": torch.ones(16, 4)}, "is no .IA.³ vector of T-Few"),
        ({"shared.weight": torch.ones(64, 16)}, "shared.weight is no .IA.³ vector"),
        ({"encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(16, 3)}, "lora_scaling_rank"),
        ({"encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(16)}, r"expected \(out, 1\)"),
        ({"model.encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(16, 1)}, "comes twice"),
    ],
)
def test_what_is_no_ia3_is_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_tfew(checkpoint(gated()) | change)


def test_a_checkpoint_without_vectors_is_refused() -> None:
    for tensors in ({}, {"encoder.block.0.layer.0.SelfAttention.k.multi_lora_a": torch.ones(1, 16)}):
        with pytest.raises(ValueError, match="There is no multi_lora_b here"):
            convert_tfew(tensors)


def _without_one(tensors: dict[str, Tensor]) -> None:
    del tensors["decoder.block.1.layer.1.EncDecAttention.v.multi_lora_b"]


def _deeper(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.2.layer.0.SelfAttention.k.multi_lora_b"] = torch.ones(16, 1)


def _wider(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.0.layer.0.SelfAttention.k.multi_lora_b"] = torch.ones(32, 1)


def _broken(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.0.layer.0.SelfAttention.k.multi_lora_b"][3] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_without_one, "1 missing"), (_deeper, "1 unknown"), (_wider, r"\(32, 1\) in the file"), (_broken, "NaN")],
)
def test_a_checkpoint_of_another_model_leaves_the_base_as_it_was(damage: Any, message: str, tmp_path: Path) -> None:
    base = gated()
    tensors, plain = checkpoint(base), logits(base)
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        load_tfew(base, written(tmp_path, tensors))
    assert not isinstance(base, PeftModel)
    assert type(base) is T5ForConditionalGeneration
    assert torch.equal(logits(base), plain)
    get_peft_model(base, convert_tfew(checkpoint(gated()))[0])


def test_gated_vectors_do_not_fit_a_model_without_gates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'wi_1' matches no module"):
        load_tfew(without_gates(), written(tmp_path, checkpoint(gated())))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint of T-Few, such as finish\.pt"):
        load_tfew(gated(), tmp_path / "finish.pt")


# AdapterHub

HUB = {
    "bert": ("key", "value", "intermediate.dense"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc"),
}


def hub_base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForSequenceClassification(BertConfig(vocab_size=64, **shape)).to(DOUBLE).eval()
    return getattr(builders, kind)().to(DOUBLE)


def hub_content(**settings: Any) -> dict[str, Any]:
    """What `adapters` 1.3 writes into adapter_config.json."""
    config = {"architecture": "lora", "composition_mode": "scale", "r": 1, "alpha": 1, "attn_matrices": ["k", "v"]}
    config |= {"use_gating": False, "selfattn_lora": True, "intermediate_lora": True, "output_lora": False}
    return {"config": config | settings, "model_type": "bert", "name": "sst-2", "version": "adapters.1.3.0"}


def hub_checkpoint(model: nn.Module, kind: str, *, name: str = "sst-2", fused_parts: int = 2) -> dict[str, Tensor]:
    """A vector `(out, 1)` for each module, of a fused projection the keys' and values' alone."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for path, module in model.named_modules():
        if path.endswith(tuple(f".{leaf}" for leaf in HUB[kind])):
            width = getattr(module, "nf", None) or module.out_features
            width = width // 3 * fused_parts if path.endswith("c_attn") else width
            vector = 1 + torch.randn(width, 1, generator=generator, dtype=DOUBLE)
            tensors[f"{path}.loras.{name}.lora_B"] = vector
    return tensors


def by_hub_formula(
    model: nn.Module, tensors: dict[str, Tensor], alpha: float = 1.0, parts: tuple[bool, ...] = (False, True, True)
) -> nn.Module:
    """The equation of that library's layer: the output times the vector times alpha, one where it has no number."""
    model = deepcopy(model)
    for name, tensor in tensors.items():
        module = model.get_submodule(name.partition(".loras.")[0])
        width = getattr(module, "nf", None) or module.out_features
        whole = torch.ones(width, dtype=DOUBLE)
        chosen = torch.ones(width, dtype=torch.bool)
        if tensor.numel() < width:
            chosen = torch.tensor(parts).repeat_interleave(width // 3)
        whole[chosen] = tensor.flatten()
        module.register_forward_hook(lambda module, args, output, whole=whole: output * whole * alpha)
    return model


def hub_folder(folder: Path, content: dict[str, Any], tensors: dict[str, Tensor], file: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    return folder


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).view(2, 6)).logits


@pytest.mark.parametrize("file", ["pytorch_adapter.bin", "adapter.safetensors"])
@pytest.mark.parametrize("kind", HUB)
def test_adapterhub_folders_answer_as_by_hand(kind: str, file: str, tmp_path: Path) -> None:
    base = hub_base(kind)
    tensors = hub_checkpoint(base, kind)
    expected = answers(by_hub_formula(base, tensors, alpha=2.0))
    folder = hub_folder(tmp_path / "hub", hub_content(alpha=2), tensors, file)
    loaded = load_adapterhub(hub_base(kind), folder)
    torch.testing.assert_close(answers(loaded), expected, rtol=0, atol=1e-12)
    loaded.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(hub_base(kind), tmp_path / "ours", autocast_adapter_dtype=False)
    torch.testing.assert_close(answers(theirs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(answers(loaded.merge_and_unload()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("matrices", "parts"),
    [(["v"], (False, False, True)), (["v", "q"], (True, False, True)), (["q", "k", "v"], (True, True, True))],
)
def test_the_parts_of_a_fused_projection(matrices: list[str], parts: tuple[bool, ...], tmp_path: Path) -> None:
    base = hub_base("gpt2")
    tensors = hub_checkpoint(base, "gpt2", fused_parts=len(matrices))
    folder = hub_folder(tmp_path / "hub", hub_content(attn_matrices=matrices), tensors, "pytorch_adapter.bin")
    expected = answers(by_hub_formula(base, tensors, parts=parts))
    torch.testing.assert_close(answers(load_adapterhub(base, folder)), expected, rtol=0, atol=1e-12)


def test_a_head_model_and_a_bare_one(tmp_path: Path) -> None:
    """The file's prefix is dropped, and the model's put in front."""
    whole = hub_base("bert")
    tensors = hub_checkpoint(whole, "bert")
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    config, of_whole = convert_adapterhub(whole, hub_content(), bare)
    assert of_whole.keys() == convert_adapterhub(whole, hub_content(), tensors)[1].keys()
    of_bare = convert_adapterhub(whole.bert, hub_content(), tensors)[1]
    assert {name.replace("base_model.model.", "base_model.model.bert.") for name in of_bare} == set(of_whole)
    other = {name.replace("bert.", "electra."): tensor for name, tensor in tensors.items()}
    assert convert_adapterhub(whole, hub_content(), other)[1].keys() == of_whole.keys()
    get_peft_model(whole, config)


def test_layers_that_the_adapter_leaves_out(tmp_path: Path) -> None:
    base = hub_base("llama")
    tensors = {name: tensor for name, tensor in hub_checkpoint(base, "llama").items() if ".0." not in name}
    folder = hub_folder(tmp_path / "hub", hub_content(leave_out=[0]), tensors, "pytorch_adapter.bin")
    expected = answers(by_hub_formula(base, tensors))
    torch.testing.assert_close(answers(load_adapterhub(base, folder)), expected, rtol=0, atol=1e-12)


def test_a_prediction_head_is_said_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = hub_base("bert")
    folder = hub_folder(tmp_path / "hub", hub_content(), hub_checkpoint(base, "bert"), "pytorch_adapter.bin")
    (folder / "pytorch_model_head.bin").write_bytes(b"")
    load_adapterhub(base, folder)
    assert "pytorch_model_head.bin holds a prediction head, which is left out" in caplog.text


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"composition_mode": "add"}, {}, "describes no .IA.³ adapter of AdapterHub"),
        ({"use_gating": True}, {}, "has gates"),
        ({"r": 2}, {}, "a rank above 1"),
        ({}, {"bert.encoder.layer.0.attention.self.key.loras.sst-2.lora_A": torch.ones(1, 16)}, "lora_A is no .IA.³"),
        ({}, {"bert.encoder.layer.0.attention.self.key.loras.other.lora_B": torch.ones(16, 1)}, "vectors of one adapt"),
        ({}, {"bert.encoder.layer.7.attention.self.key.loras.sst-2.lora_B": torch.ones(16, 1)}, "no module .*layer.7"),
        (
            {},
            {"bert.encoder.layer.0.attention.self.key.loras.sst-2.lora_B": torch.ones(9, 1)},
            "16 outputs and .* 9 num",
        ),
    ],
)
def test_what_is_no_ia3_of_adapterhub_is_refused(
    settings: dict[str, Any], change: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    base = hub_base("bert")
    tensors = hub_checkpoint(base, "bert") | change
    folder = hub_folder(tmp_path / "hub", hub_content(**settings), tensors, "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=message):
        load_adapterhub(base, folder)
    assert type(base) is BertForSequenceClassification


def test_a_folder_of_adapterhub_is_known_where_pefts_is_expected(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", hub_content(), {}, "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"is AdapterHub's: read the folder by ia3\.convert\.load_adapterhub"):
        PeftModel.from_pretrained(hub_base("bert"), folder)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json with one of"):
        load_adapterhub(hub_base("bert"), tmp_path)
