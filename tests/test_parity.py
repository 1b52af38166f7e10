"""PEFT as the oracle, both ways: the same vectors give the same outputs, gradients and files."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from ia3 import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

# PEFT's IA3 knows no Conv1d and no Embedding.
PEFT_LAYERS = ["biased", "plain", "transposed", "conv2", "grouped2", "conv3", "grouped3"]
# PEFT demands feedforward_modules where it knows no default.
NO_INPUTS = {"feedforward_modules": []}

# family: settings under which PEFT is right
SETTINGS = {
    "t5": {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    "t5-gated": {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    "mt5": {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []},
    "bart": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    "llama": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "bert": {
        "target_modules": ["key", "value", "output.dense"],
        "feedforward_modules": ["output.dense"],
        "exclude_modules": ["attention.output.dense"],
        "task_type": "SEQ_CLS",
    },
    "roberta": {"target_modules": ["key", "intermediate.dense"], "feedforward_modules": [], "task_type": "TOKEN_CLS"},
    "gpt_neox": {"target_modules": ["query_key_value", "dense_4h_to_h"], "feedforward_modules": ["dense_4h_to_h"]},
    "bloom": {
        "target_modules": ["query_key_value", "mlp.dense_4h_to_h"],
        "feedforward_modules": ["mlp.dense_4h_to_h"],
    },
    "falcon-plain": {"target_modules": ["query_key_value", "dense_4h_to_h"], "feedforward_modules": ["dense_4h_to_h"]},
}
OTHER_SETTINGS = {
    "regex": ("t5", {"target_modules": r".*decoder.*\.(k|v|wo)", "feedforward_modules": r".*\.wo"}),
    "excluded": ("t5", {"target_modules": ["k", "v"], "exclude_modules": r".*EncDec.*", **NO_INPUTS}),
    "full path": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"], **NO_INPUTS}),
    "every linear layer of t5": ("t5", {"target_modules": "all-linear", "feedforward_modules": ["wo"]}),
    "every linear layer of gpt2": ("gpt2", {"target_modules": "all-linear", "feedforward_modules": ["mlp.c_proj"]}),
    "every linear layer of llama": ("llama", {"target_modules": "all-linear", **NO_INPUTS}),
    "every linear layer of bert": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", **NO_INPUTS}),
    "input side alone": ("llama", {"target_modules": ["up_proj"], "feedforward_modules": ["up_proj"]}),
    "saved in full": (
        "llama",
        {"target_modules": ["k_proj"], "modules_to_save": ["model.norm", "lm_head"], **NO_INPUTS},
    ),
    "question answering": ("bert", {"target_modules": ["key"], "task_type": "QUESTION_ANS", **NO_INPUTS}),
}
ALL = {name: (name, settings) for name, settings in SETTINGS.items()} | OTHER_SETTINGS


def _task(settings):
    return settings.get("task_type", "")


def _theirs(base, settings, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.IA3Config(**settings), **more)


def _ours(base, settings, **more):
    return get_peft_model(base, IA3Config(**settings), **more)


def _same_values(ours, theirs) -> None:
    """Copy PEFT's vectors and modules trained in full into ours; the names must be the same."""
    values = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach()
        for key, parameter in theirs.named_parameters()
    }
    own = {key: p for key, p in ours.named_parameters() if ".ia3_l." in key or ".modules_to_save." in key}
    wanted = {key for key in values if ".ia3_l." in key or ".modules_to_save." in key}
    assert own.keys() == wanted
    with torch.no_grad():
        for key, parameter in own.items():
            assert parameter.shape == values[key].shape
            parameter.copy_(values[key])


def _pair(tiny, randomise, name, settings, dtype=torch.float32):
    ours = _ours(tiny(name, task=_task(settings), dtype=dtype), settings)
    theirs = randomise(_theirs(tiny(name, task=_task(settings), dtype=dtype), settings))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".modules_to_save." in key:
                parameter.add_(0.1)
    _same_values(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("case", ALL)
def test_same_outputs(tiny, randomise, output, case):
    name, settings = ALL[case]
    ours, theirs = _pair(tiny, randomise, name, settings)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output(ours), output(tiny(name, task=_task(settings))), atol=1e-4)


@pytest.mark.parametrize("case", ["t5", "mt5", "gpt2", "bert", "saved in full", "bloom"])
def test_same_gradients(tiny, randomise, feed, case):
    name, settings = ALL[case]
    ours, theirs = _pair(tiny, randomise, name, settings, torch.float64)
    for model in (ours, theirs):
        model(**feed(ours))[0].square().sum().backward()
    gradients = {
        key.removeprefix("base_model.model."): p.grad for key, p in theirs.named_parameters() if p.grad is not None
    }
    own = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for key, gradient in own.items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ALL)
def test_our_file_in_peft(tiny, randomise, output, tmp_path, case):
    name, settings = ALL[case]
    ours, _ = _pair(tiny, randomise, name, settings)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(name, task=_task(settings)), tmp_path)
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("case", ALL)
def test_pefts_file_in_ours(tiny, randomise, output, tmp_path, case, safe):
    name, settings = ALL[case]
    _, theirs = _pair(tiny, randomise, name, settings)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = PeftModel.from_pretrained(tiny(name, task=_task(settings)), tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ALL)
def test_the_same_file(tiny, randomise, tmp_path, case):
    name, settings = ALL[case]
    ours, theirs = _pair(tiny, randomise, name, settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    in_memory = peft.get_peft_model_state_dict(theirs)
    assert get_peft_model_state_dict(ours).keys() == in_memory.keys()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "falcon-grouped", "falcon-multi-query", "falcon-plain"])
def test_our_fused_default_in_peft_and_back(tiny, randomise, output, tmp_path, name):
    ours = randomise(get_peft_model(tiny(name), IA3Config(task_type="CAUSAL_LM")))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-6, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "theirs")
    assert torch.equal(output(again), output(ours))


@pytest.mark.parametrize("inputs", [[], PEFT_LAYERS, PEFT_LAYERS[::2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_both_ways(zoo, randomise, output, tmp_path, inputs, dtype):
    settings = {"target_modules": PEFT_LAYERS, "feedforward_modules": inputs}
    theirs = randomise(_theirs(zoo(dtype), settings))
    ours = _ours(zoo(dtype), settings)
    _same_values(ours, theirs)
    ours = ours.to(dtype)
    theirs = theirs.to(dtype)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(zoo(dtype), tmp_path / "ours")
    here = PeftModel.from_pretrained(zoo(dtype), tmp_path / "theirs")
    torch.testing.assert_close(output(there), output(ours), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output(here), output(theirs), rtol=1e-6, atol=1e-6)
    x = torch.randint(0, 11, (2, 5))
    for model in (ours, theirs):
        model(x).square().sum().backward()
    own = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    for key, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(own[key.removeprefix("base_model.model.")], parameter.grad)


@pytest.mark.parametrize("layer", ["embed", "conv1", "grouped1"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_layers_that_peft_lacks_against_closed_forms(zoo, randomise, layer, side):
    if (layer, side) == ("embed", "input"):
        pytest.skip("token numbers have no channels")
    model, bare = zoo(torch.float64), zoo(torch.float64).get_submodule(layer)
    inputs = [layer] if side == "input" else []
    randomise(get_peft_model(model, IA3Config(target_modules=[layer], feedforward_modules=inputs)))
    module = model.get_submodule(layer)
    vector = module.ia3_l.default.detach()
    if layer == "embed":
        x, shaped = torch.randint(0, 11, (2, 5)), vector.view(-1)
    else:
        x, shaped = torch.randn(2, bare.in_channels, 5, dtype=torch.float64), vector.view(1, -1, 1)
    expected = bare(x * shaped) if side == "input" else bare(x) * shaped
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_several_adapters_both_ways(tiny, randomise, output, tmp_path, name):
    settings = SETTINGS[name]
    ours = _ours(tiny(name), settings)
    theirs = _theirs(tiny(name), settings)
    ours.add_adapter("other", IA3Config(**settings))
    theirs.add_adapter("other", peft.IA3Config(**settings))
    randomise(theirs)
    _same_values(ours, theirs)
    expected = {}
    for adapter in ("default", "other"):
        ours.set_adapter(adapter)
        theirs.set_adapter(adapter)
        expected[adapter] = output(theirs)
        torch.testing.assert_close(output(ours), expected[adapter], rtol=1e-6, atol=1e-6)
    if name != "bert":
        ours.set_adapter(["default", "other"])
        theirs.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for library, source in ((PeftModel, "theirs"), (peft.PeftModel, "ours")):
        model = library.from_pretrained(tiny(name), tmp_path / source)
        model.load_adapter(tmp_path / source / "other", adapter_name="second")
        torch.testing.assert_close(output(model), expected["default"], rtol=1e-6, atol=1e-6)
        model.set_adapter("second")
        torch.testing.assert_close(output(model), expected["other"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["x", "adapter_1", "default2"])
def test_other_names(tiny, randomise, output, tmp_path, name):
    theirs = randomise(_theirs(tiny("t5"), SETTINGS["t5"], adapter_name=name))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tiny("t5"), tmp_path / "theirs" / name, adapter_name=name)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny("t5"), tmp_path / "ours" / name)
    torch.testing.assert_close(output(again), output(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["t5", "bert", "saved in full"])
def test_state_dicts_in_memory(tiny, randomise, output, case):
    name, settings = ALL[case]
    ours, theirs = _pair(tiny, randomise, name, settings)
    expected = output(ours)
    other = _ours(tiny(name), settings)
    set_peft_model_state_dict(other, peft.get_peft_model_state_dict(theirs))
    assert torch.equal(output(other), expected)
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    torch.testing.assert_close(output(theirs), expected, rtol=1e-6, atol=1e-6)


def test_a_head_that_peft_leaves_frozen(output, randomise, tmp_path):
    """DistilBERT has a pre_classifier, which PEFT does not train: its file must load, and ours there."""

    def make():
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
        return DistilBertForSequenceClassification(config).eval()

    settings = {"task_type": "SEQ_CLS", "target_modules": ["k_lin", "lin2"], "feedforward_modules": ["lin2"]}
    theirs = randomise(_theirs(make(), settings))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make(), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    fresh = randomise(get_peft_model(make(), IA3Config(**settings)))
    fresh.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(output(there), output(fresh), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_a_resized_vocabulary_both_ways(tiny, randomise, output, tmp_path, name):
    settings = SETTINGS[name]
    tiny(name).save_pretrained(tmp_path / "base")
    load = type(tiny(name)).from_pretrained

    def resized():
        torch.manual_seed(3)
        base = load(tmp_path / "base")
        base.resize_token_embeddings(70)
        return base

    ours = randomise(_ours(resized(), settings))
    theirs = randomise(_theirs(resized(), settings))
    with torch.no_grad():
        for model in (ours, theirs):
            model.get_input_embeddings().weight[60:] += 0.5
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert one.keys() == other.keys()
    torch.testing.assert_close(output(PeftModel.from_pretrained(resized(), tmp_path / "theirs")), output(theirs))
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(resized(), tmp_path / "ours")), output(ours))


@pytest.mark.parametrize("case", ["t5", "gpt2", "bert"])
def test_merged_models_are_the_same(tiny, randomise, output, case):
    ours, theirs = _pair(tiny, randomise, *ALL[case], torch.float64)
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-10, atol=1e-10)


def test_unloading_a_merged_model_leaves_it_merged_as_in_peft(tiny, randomise, output):
    ours, theirs = _pair(tiny, randomise, *ALL["t5"])
    expected = output(theirs)
    ours.merge_adapter()
    theirs.merge_adapter()
    torch.testing.assert_close(output(theirs.unload()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(ours.unload()), expected, rtol=1e-5, atol=1e-5)


def test_requires_grad_as_in_peft(tiny):
    """After each step the same parameters train."""
    ours, theirs = _ours(tiny("bert"), SETTINGS["bert"]), _theirs(tiny("bert"), SETTINGS["bert"])

    def trained(model):
        keys = [key.removeprefix("base_model.model.") for key, p in model.named_parameters() if p.requires_grad]
        return sorted(key.replace(".base_layer", "") for key in keys)

    steps = [
        lambda model, config: model.add_adapter("b", config),
        lambda model, config: model.set_adapter("b"),
        lambda model, config: model.add_adapter("c", config),
        lambda model, config: model.delete_adapter("b"),
        lambda model, config: model.set_adapter("c"),
        lambda model, config: model.set_adapter("c", inference_mode=True),
        lambda model, config: model.set_adapter("default"),
    ]
    for step in steps:
        step(ours, IA3Config(**SETTINGS["bert"]))
        step(theirs, peft.IA3Config(**SETTINGS["bert"]))
        assert trained(ours) == trained(theirs)
    assert all(isinstance(module, nn.Module) for module in ours.modules())


def test_a_script_runs_with_either(tiny, feed, tmp_path):
    """The guide's calls, one after another, with only the import changed."""
    import ia3

    def script(library):
        torch.manual_seed(0)
        config = library.IA3Config(task_type=library.TaskType.SEQ_2_SEQ_LM, **SETTINGS["t5"])
        model = library.get_peft_model(tiny("t5", dtype=torch.float64), config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
        losses = []
        for seed in range(5):
            batch = feed(model, seed)
            loss = model(input_ids=batch["input_ids"], labels=batch["decoder_input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        folder = tmp_path / library.__name__
        model.save_pretrained(folder)
        again = library.PeftModel.from_pretrained(tiny("t5", dtype=torch.float64), folder)
        tokens = again.generate(input_ids=feed(again)["input_ids"], max_new_tokens=5)
        return losses, tokens.tolist(), library.PeftConfig.from_pretrained(folder).target_modules

    (losses, *rest), (expected, *theirs) = script(ia3), script(peft)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-10, atol=1e-10)
    assert rest == theirs


def test_pefts_file_whose_saved_modules_matched_without_a_dot(tiny, randomise, output, tmp_path):
    settings = {"target_modules": ["k_proj"], "modules_to_save": ["norm"], **NO_INPUTS}
    theirs = randomise(_theirs(tiny("llama"), settings))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".modules_to_save." in key:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path)
    assert any("input_layernorm" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-6, atol=1e-6)
    again = _ours(tiny("llama"), {"target_modules": ["v_proj"], **NO_INPUTS})
    again.load_adapter(tmp_path, "loaded")
    again.set_adapter("loaded")
    torch.testing.assert_close(output(again), output(theirs), rtol=1e-6, atol=1e-6)
    ours.save_pretrained(tmp_path / "again")
    back = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "again")
    torch.testing.assert_close(output(back), output(theirs), rtol=1e-6, atol=1e-6)
