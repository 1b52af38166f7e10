"""Folding vectors into weights: the same function, and out again to the very bit."""

import itertools
import math
import signal
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from builders import Failing
from ia3 import IA3Config, PeftModel, PeftWarning, get_peft_model
from ia3.placement import Placement

LAYERS = ["embed", "biased", "plain", "transposed", "conv1", "grouped1", "conv2", "grouped2", "conv3", "grouped3"]
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


@st.composite
def choices(draw) -> dict:
    targets = draw(st.sets(st.sampled_from(LAYERS), min_size=1))
    inputs = draw(st.sets(st.sampled_from(sorted(targets)))) - {"embed"}
    return {"target_modules": targets, "feedforward_modules": inputs}


def _draw_vectors(model, name, numbers) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f".ia3_l.{name}"):
                values = [numbers() for _ in range(parameter.numel())]
                parameter.copy_(torch.tensor(values, dtype=parameter.dtype).view_as(parameter))


numbers = st.one_of(st.just(0.0), st.floats(-3, 3), st.just(1.0))
seeds = st.integers(0, 2**16)


def _randomly(seed):
    """Zeros, ones and negative numbers among the usual."""
    generator = torch.Generator().manual_seed(seed)
    special = (0.0, 1.0, -1.0)

    def number():
        which = int(torch.randint(0, 6, (), generator=generator))
        return special[which] if which < 3 else float(torch.randn((), generator=generator))

    return number


@given(config=choices(), other=choices(), dtype=st.sampled_from(list(TOLERANCE)), seed=seeds, both=st.booleans())
def test_merged_equals_unmerged_and_unmerging_gives_the_very_bits(zoo, output, trace, config, other, dtype, seed, both):
    model = zoo(dtype, seed=seed % 7)
    base = trace(model)
    get_peft_model(model, IA3Config(**config), adapter_name="a")
    model.add_adapter("b", IA3Config(**other))
    draw = _randomly(seed)
    _draw_vectors(model, "a", draw)
    _draw_vectors(model, "b", draw)
    if both:
        model.set_adapter(["a", "b"])
    expected, before = output(model), trace(model)
    model.merge_adapter()
    assert all(parameter.data_ptr() for parameter in model.parameters())
    torch.testing.assert_close(output(model), expected, **TOLERANCE[dtype])
    model.unmerge_adapter()
    assert before.differences(trace(model)) == []
    assert torch.equal(output(model), expected)
    model.unload()
    assert base.differences(trace(model)) == []


@given(config=choices(), seed=seeds)
def test_merge_and_unload_gives_the_base_class_and_keys(zoo, output, config, seed):
    model = zoo(torch.float64)
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    get_peft_model(model, IA3Config(**config))
    _draw_vectors(model, "default", _randomly(seed))
    expected = output(model)
    assert model.merge_and_unload() is model
    assert type(model).__name__ == "Zoo"
    assert "_ia3" not in model.__dict__
    assert not hasattr(model, "merge_adapter")
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(output(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("layer", LAYERS)
def test_against_the_closed_form(zoo, layer, side):
    if (layer, side) == ("embed", "input"):
        pytest.skip("token numbers have no channels")
    model = zoo(torch.float64)
    module = model.get_submodule(layer)
    weight, bias = module.weight.detach().clone(), getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().clone()
    feedforward = [layer] if side == "input" else []
    get_peft_model(model, IA3Config(target_modules=[layer], feedforward_modules=feedforward))
    _draw_vectors(model, "default", _randomly(3))
    vector = module.ia3_l.default.detach().view(-1)
    model.merge_adapter()
    expected = weight.clone()
    groups = getattr(module, "groups", 1)
    for out in range(module.weight.shape[0]):
        for column in range(module.weight.shape[1]):
            if layer in ("embed", "transposed"):  # [in, out]
                channel = column if side == "output" else out
            elif side == "output":
                channel = out
            else:
                channel = out // (weight.shape[0] // groups) * weight.shape[1] + column
            expected[out, column] *= vector[channel]
    torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-15, atol=0)
    if bias is not None:
        torch.testing.assert_close(module.bias.detach(), bias * (vector if side == "output" else 1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "gpt2", "llama", "bert", "opt", "gpt_neox", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merged_models_equal_unmerged(tiny, randomise, output, name, dtype):
    model = randomise(
        get_peft_model(tiny(name, dtype=dtype), IA3Config(task_type="SEQ_CLS" if name == "bert" else None))
    )
    expected = output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected, **TOLERANCE[dtype])
    model.merge_and_unload()
    torch.testing.assert_close(output(model), expected, **TOLERANCE[dtype])


def test_heads_trained_in_full_take_the_place_of_the_bases(tiny, randomise, output):
    model = tiny("bert")
    keys = list(model.state_dict())
    randomise(get_peft_model(model, IA3Config(task_type="SEQ_CLS")))
    with torch.no_grad():
        model.classifier.modules_to_save["default"].bias += 1
    expected = output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected)
    with model.disable_adapter():
        assert (output(model) - expected).abs().max() > 0.5
    model.merge_and_unload()
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(output(model), expected)


def test_a_head_that_was_frozen_before_is_frozen_after(tiny):
    model = tiny("bert").requires_grad_(False)
    get_peft_model(model, IA3Config(task_type="SEQ_CLS")).merge_and_unload()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_two_heads_for_one_module_are_refused(tiny, randomise, trace):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    randomise(model)
    before = trace(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"\['a', 'b'\] each train \['classifier'\] in full"):
            merge(adapter_names=["a", "b"])
        assert before.differences(trace(model)) == []


def test_a_tied_head_trained_in_full_is_untied_with_a_warning(tiny, output, caplog):
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    get_peft_model(model, IA3Config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected = output(model)
    model.merge_and_unload()
    assert "lm_head was tied" in caplog.text
    assert model.lm_head.weight is not model.transformer.wte.weight
    torch.testing.assert_close(output(model), expected)


TIED = [
    ("llama", ["lm_head"], False),
    ("llama", ["embed_tokens"], False),
    ("llama", ["lm_head", "embed_tokens"], False),
    ("gpt2", ["wte"], False),
    ("opt", ["lm_head", "embed_tokens"], False),
    ("gemma", ["lm_head"], False),
    ("t5", ["lm_head"], True),  # a T5 multiplies its output otherwise without
    ("t5-gated", ["encoder.embed_tokens"], True),
    ("mt5", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], True),
    ("bart", ["decoder.embed_tokens"], True),
    ("bart", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], False),
]


def _draw_copies(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(("family", "saved", "says_tied"), TIED)
def test_tied_embeddings_trained_in_full_and_merged_load_as_they_were(
    tiny, output, randomise, tmp_path, family, saved, says_tied
):
    ties = {"tie_word_embeddings": True} if family == "llama" else {}
    model = tiny(family, **ties)
    randomise(get_peft_model(model, IA3Config(modules_to_save=saved)))
    _draw_copies(model)
    merged = model.merge_and_unload()
    expected = output(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(type(merged).from_pretrained(tmp_path).eval()), expected)
    assert merged.config.tie_word_embeddings is says_tied


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
@pytest.mark.parametrize("saved", [["shared"], ["shared", "lm_head"]])
def test_an_embedding_that_only_lends_its_weight_is_not_merged(tiny, trace, family, saved):
    model = get_peft_model(tiny(family), IA3Config(modules_to_save=saved))
    _draw_copies(model)
    before = trace(model)
    with pytest.raises(ValueError, match=r"shared\.weight was trained in full and is tied to .*modules_to_save=\["):
        model.merge_and_unload()
    assert before.differences(trace(model)) == []


def test_a_tied_copy_that_was_not_trained_stays_tied(tiny, output):
    model = get_peft_model(tiny("t5"), IA3Config(modules_to_save=["shared"]))
    expected = output(model)
    merged = model.merge_and_unload()
    assert merged.shared.weight is merged.encoder.embed_tokens.weight
    assert torch.equal(output(merged), expected)


def test_a_head_untied_by_hand_is_written_as_such(tiny, randomise, output, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    randomise(get_peft_model(model, IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[])))
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(type(merged).from_pretrained(tmp_path).eval()), output(merged))


def test_buffers_of_modules_trained_in_full_are_installed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3)))
    get_peft_model(model, IA3Config(target_modules=["0"], modules_to_save=["1"]))
    model.train()
    model(torch.randn(8, 3) + 5)
    trained = model[1].modules_to_save["default"][0].running_mean.clone()
    assert not torch.equal(trained, model[1][0].running_mean)
    model.merge_and_unload()
    assert torch.equal(model[1][0].running_mean, trained)


# Refusals


def _tied(make):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            make(self)

        def forward(self, x):
            return self.two(self.one(x))

    return Tied()


def _tie_weights(model):
    model.two.weight = model.one.weight


def _tie_biases(model):
    model.two.bias = model.one.bias


def _share_memory(model):
    model.two.weight = nn.Parameter(model.one.weight.data)


@pytest.mark.parametrize(("tie", "what"), [(_tie_weights, "weight"), (_tie_biases, "bias"), (_share_memory, "weight")])
def test_tied_weights_are_refused(trace, tie, what):
    model = get_peft_model(_tied(tie), IA3Config(target_modules=["one"]))
    _draw_vectors(model, "default", _randomly(1))
    before = trace(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"one\.{what} and two\.{what} are one tied {what}: .*Untie it first"):
            merge()
        assert before.differences(trace(model)) == []


def test_a_tied_bias_matters_only_at_outputs(output):
    config = IA3Config(target_modules=["one"], feedforward_modules=["one"])
    model = get_peft_model(_tied(_tie_biases), config)
    _draw_vectors(model, "default", _randomly(1))
    x = torch.randn(2, 3)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_a_tied_head_is_refused_and_untied_as_told(tiny, randomise, output, trace):
    model = randomise(get_peft_model(tiny("gpt2"), IA3Config(target_modules=["lm_head"])))
    before, expected = trace(model), output(model)
    with pytest.raises(ValueError, match=r"wte\.weight and lm_head\.weight are one tied weight.*nn\.Parameter"):
        model.merge_adapter()
    assert before.differences(trace(model)) == []
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, -1])
def test_a_broken_vector_is_refused_before_anything_changes(zoo, randomise, trace, broken, position):
    model = randomise(get_peft_model(zoo(), IA3Config(target_modules=LAYERS, feedforward_modules=LAYERS[2::2])))
    vectors = [p for key, p in model.named_parameters() if ".ia3_l." in key]
    vectors[position].data.view(-1)[-1] = broken
    before = trace(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"would make \w+\.weight non-finite.*nothing was merged"):
            merge()
        assert before.differences(trace(model)) == []
    assert model.get_model_status().merged_adapters == []


def test_a_bias_that_overflows_is_refused(trace):
    model = nn.Sequential(nn.Linear(2, 2)).half()
    model[0].bias.data.fill_(6e4)
    get_peft_model(model, IA3Config(target_modules=["0"]))
    model[0].ia3_l.default.data.fill_(2.0)
    before = trace(model)
    with pytest.raises(ValueError, match=r"would make 0\.bias non-finite .*overflows torch\.float16"):
        model.merge_adapter()
    assert before.differences(trace(model)) == []


def test_weights_that_overflow_half_precision_are_refused(tiny, trace):
    model = get_peft_model(tiny("llama", dtype=torch.float16), IA3Config())
    _draw_vectors(model, "default", lambda: 1e7)
    before = trace(model)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        model.merge_adapter()
    assert before.differences(trace(model)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    get_peft_model(model, IA3Config(target_modules=["0"]))
    _draw_vectors(model, "default", _randomly(5))
    vector = model[0].ia3_l.default.detach().double()
    model.merge_adapter()
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, (weight * vector).float().to(dtype))
    assert torch.equal(model[0].bias, (bias * vector.view(-1)).float().to(dtype))


def test_a_layer_that_renormalises_is_refused():
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), IA3Config(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"0 renormalises its rows \(max_norm\)"):
        model.merge_adapter()


@pytest.mark.parametrize("weight", [torch.ones(3, 3, dtype=torch.int8), None])
def test_a_weight_that_is_not_floating_is_refused(weight):
    class Quantised(nn.Module):
        in_features = out_features = 3

        def __init__(self):
            super().__init__()
            if weight is not None:
                self.register_buffer("weight", weight)

    model = get_peft_model(nn.Sequential(Quantised()), IA3Config(target_modules=["0"]))
    assert model[0].ia3_l.default.dtype == torch.float32
    with pytest.raises(ValueError, match=r"0 has no floating-point weight of its own.*plain copy of the base"):
        model.merge_adapter()


def test_merging_again_changes_nothing(tiny, randomise, output):
    model = randomise(get_peft_model(tiny("t5"), IA3Config()))
    with pytest.warns(PeftWarning, match="nothing is merged"):
        model.unmerge_adapter()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    merged = output(model)
    with pytest.warns(PeftWarning, match=r"\['default'\] are merged already: there is nothing to do"):
        model.merge_adapter()
    assert torch.equal(output(model), merged)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_one_after_the_other_is_merging_both(tiny, randomise, dtype):
    both, one_by_one = (randomise(get_peft_model(tiny("t5", dtype=dtype), IA3Config(), "a")) for _ in range(2))
    for model in (both, one_by_one):
        model.add_adapter("b", IA3Config(target_modules=["v", "wo"], feedforward_modules=["wo"]))
        randomise(model, seed=5)
    before = {name: p.clone() for name, p in both.named_parameters()}
    both.merge_adapter(["a", "b"])
    one_by_one.merge_adapter(["a"])
    with pytest.warns(PeftWarning, match=r"\['a'\] are merged already: merging \['b'\] too"):
        one_by_one.merge_adapter(["b"])
    for (name, one), (_, other) in zip(one_by_one.named_parameters(), both.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    one_by_one.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in one_by_one.named_parameters())


def test_merging_more_that_overflows_keeps_what_was_merged(tiny, randomise, output):
    model = randomise(get_peft_model(tiny("t5"), IA3Config(), "a"))
    model.add_adapter("b", IA3Config())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("ia3_l.b")).fill_(torch.inf)
    model.merge_adapter(["a"])
    merged = output(model)
    with pytest.warns(PeftWarning), pytest.raises(ValueError, match="non-finite"):
        model.merge_adapter(["b"])
    assert torch.equal(output(model), merged)
    assert model.get_model_status().merged_adapters == ["a"]


def test_merging_nothing_is_refused(tiny):
    model = get_peft_model(tiny("t5"), IA3Config())
    with pytest.raises(ValueError, match="nothing to merge"):
        model.merge_adapter([])
    with pytest.raises(ValueError, match="names an adapter twice"):
        model.merge_adapter(["default", "default"])


def test_an_unknown_adapter_is_refused(tiny, trace):
    model = get_peft_model(tiny("t5"), IA3Config())
    before = trace(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no adapter 'other'"):
            merge(adapter_names=["default", "other"])
    with pytest.raises(TypeError, match=r"a list of names, got 'default'"):
        model.merge_adapter("default")
    assert before.differences(trace(model)) == []


# Merged models in use


def _two(tiny, randomise, output, name="llama"):
    """A model with adapters a (active) and b, and the outputs of base, a, b and both."""
    model = tiny(name)
    outputs = {"base": output(model)}
    get_peft_model(model, IA3Config(), adapter_name="a")
    model.add_adapter("b", IA3Config())
    randomise(model)
    for names in ("b", ["a", "b"], "a"):
        model.set_adapter(names)
        outputs["".join(names)] = output(model)
    return model, outputs


def test_disabling_a_merged_model_gives_the_base_and_leaves_it_merged(tiny, randomise, output, trace):
    model, outputs = _two(tiny, randomise, output)
    model.merge_adapter()
    merged, before = output(model), trace(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(output(model), outputs["base"])
            with model.disable_adapter():
                assert torch.equal(output(model), outputs["base"])
            assert torch.equal(output(model), outputs["base"])
        assert before.differences(trace(model)) == []
        assert torch.equal(output(model), merged)
        assert model.get_model_status().merged_adapters == ["a"]
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert before.differences(trace(model)) == []
    model.unmerge_adapter()
    assert torch.equal(output(model), outputs["a"])


def test_merging_and_unloading_while_disabled_are_refused(tiny, randomise, output):
    model, outputs = _two(tiny, randomise, output)
    with model.disable_adapter():
        for refused in (model.merge_adapter, model.merge_and_unload, model.unload):
            with pytest.raises(ValueError, match="are disabled"):
                refused()
        assert torch.equal(output(model), outputs["base"])
    model.merge_adapter()
    merged = output(model)
    with model.disable_adapter():
        for refused in (model.unmerge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="are disabled"):
                refused()
        assert torch.equal(output(model), outputs["base"])
    assert torch.equal(output(model), merged)


def test_a_computed_weight_is_refused():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = get_peft_model(nn.Sequential(linear), IA3Config(target_modules="0"))
    with pytest.raises(ValueError, match="computed"):
        model.merge_adapter()


def test_a_weight_that_is_a_view_of_anothers_is_refused():
    whole = nn.Linear(4, 8, bias=False)
    part = nn.Linear(4, 4, bias=False)
    part.weight = nn.Parameter(whole.weight.detach()[4:])
    model = get_peft_model(nn.Sequential(whole, part), IA3Config(target_modules=["1"]))
    before = whole.weight.detach().clone()
    with pytest.raises(ValueError, match="one tied weight"):
        model.merge_adapter()
    assert torch.equal(whole.weight, before)


def test_switching_while_merged_unmerges(tiny, randomise, output, caplog):
    model, outputs = _two(tiny, randomise, output)
    model.merge_adapter()
    model.set_adapter("a")
    assert model.get_model_status().merged_adapters == ["a"]
    model.set_adapter("b")
    assert "unmerging ['a'] first" in caplog.text
    assert model.get_model_status().merged_adapters == []
    assert torch.equal(output(model), outputs["b"])


@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"], ["b", "a"]])
def test_merging_a_list(tiny, randomise, output, names):
    model, outputs = _two(tiny, randomise, output)
    model.merge_adapter(adapter_names=names)
    torch.testing.assert_close(output(model), outputs["".join(sorted(names))], rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model), outputs["a"])
    model.merge_and_unload(adapter_names=names)
    torch.testing.assert_close(output(model), outputs["".join(sorted(names))], rtol=1e-5, atol=1e-5)


def test_merge_and_unload_of_a_merged_model(tiny, randomise, output):
    model, outputs = _two(tiny, randomise, output)
    model.merge_adapter(["b"])
    both = deepcopy(model)
    model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(output(model), outputs["b"], rtol=1e-5, atol=1e-5)
    with pytest.warns(PeftWarning, match=r"\['b'\] are merged already: merging \['a'\] too"):
        both.merge_and_unload()  # "a" is active
    torch.testing.assert_close(output(both), outputs["ab"], rtol=1e-5, atol=1e-5)


def test_another_adapter_comes_and_goes_while_merged(tiny, randomise, output, trace):
    model, outputs = _two(tiny, randomise, output)
    model.merge_adapter()
    merged = output(model)
    model.add_adapter("c", IA3Config())
    assert torch.equal(output(model), merged)
    model.delete_adapter("c")
    assert torch.equal(output(model), merged)
    model.unmerge_adapter()
    assert torch.equal(output(model), outputs["a"])


def test_originals_stay_in_cpu_memory_only_where_asked(tiny, randomise):
    model = randomise(get_peft_model(tiny("llama"), IA3Config()))
    model.merge_adapter()
    kept = model._ia3.originals
    assert {key.rsplit(".", 1)[0] for key in kept} == {
        site.path for site in model._ia3.adapters["default"].layout.sites
    }
    assert all(tensor.device.type == "cpu" for tensor in kept.values())
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(tensor.data_ptr() for tensor in kept.values())


def test_merging_says_nothing(tiny, randomise):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = randomise(get_peft_model(tiny("llama"), IA3Config()))
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()
        model.merge_and_unload(progressbar=True, safe_merge=True)


# Weights that are not what the layer multiplies by


class Rounded(nn.Linear):
    """Rounds its weight in each forward, column by column, as quantising tools' layers do."""

    def forward(self, inputs):
        scale = self.weight.abs().amax(dim=1, keepdim=True) / 7
        return nn.functional.linear(inputs, torch.round(self.weight / scale) * scale, self.bias)


class Doubled(nn.Linear):
    """A class of its own, and still linear in its weight."""

    def forward(self, inputs):
        return 2 * super().forward(inputs) - (0 if self.bias is None else self.bias)


class Opaque(torch.Tensor):
    """A tensor of another class, as quantised weights are."""


def _opaque(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Opaque))
    return layer


def _float8(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "feedforward", "reason"),
    [
        (lambda: Rounded(4, 4), ["0"], "a Rounded doesn't multiply by its weight as it is"),
        (lambda: _opaque(nn.Linear(4, 4)), [], "quantised or sharded"),
        (lambda: _float8(nn.Linear(4, 4)), [], "float8_e4m3fn is quantised"),
        (lambda: nn.Linear(4, 4, device="meta"), [], "on the meta device"),
    ],
)
def test_a_weight_that_merging_would_not_scale_is_refused(layer, feedforward, reason):
    model = get_peft_model(nn.Sequential(layer()), IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    held = model[0].weight
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=reason):
            merge()
    assert model[0].weight is held
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("feedforward", [[], ["0"]])
def test_a_layer_of_another_class_is_merged_where_that_is_right(randomise, feedforward):
    torch.manual_seed(0)
    model = nn.Sequential(Doubled(4, 4))
    randomise(get_peft_model(model, IA3Config(target_modules=["0"], feedforward_modules=feedforward)))
    inputs = torch.randn(3, 4)
    expected = model(inputs)
    torch.testing.assert_close(model.merge_and_unload()(inputs), expected)


# Stopped in the middle


def _of_two(tiny, randomise, **more):
    model = get_peft_model(tiny("gpt2", dtype=torch.float32), IA3Config(**more), adapter_name="a")
    model.add_adapter("b", IA3Config())
    return randomise(model).eval()


def _merged(tiny, randomise):
    model = _of_two(tiny, randomise)
    model.merge_adapter(["a"])
    return model


def _trained_head(tiny, randomise):
    saved = ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"]
    model = randomise(get_peft_model(tiny("mt5", dtype=torch.bfloat16), IA3Config(modules_to_save=saved)))
    _draw_copies(model)
    return model.eval()


def _foreign(tiny, randomise):
    class Layer(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs)

    model = nn.Sequential(Layer(3, 4), nn.Linear(4, 2))
    return randomise(get_peft_model(model, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])))


def _disable(model):
    with model.disable_adapter():
        pass


def _switch(model):
    model.set_adapter("b")


STOPPED = [
    (_of_two, lambda model: model.merge_adapter()),
    (_of_two, lambda model: model.merge_and_unload()),
    (_merged, lambda model: model.merge_adapter(["b"])),
    (_merged, lambda model: model.merge_and_unload(adapter_names=["b"])),
    (_merged, lambda model: model.unmerge_adapter()),
    (_merged, _disable),
    (_merged, _switch),
    (_trained_head, lambda model: model.merge_and_unload()),
    (_foreign, lambda model: model.merge_adapter()),
]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("make", "change"), STOPPED)
def test_what_is_stopped_in_the_middle_has_changed_nothing(tiny, randomise, trace, make, change, error):
    model = make(tiny, randomise)
    other = deepcopy(model)
    before, merged, active = trace(model), model._state.merged, model.active_adapters
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    originals = {name: weight.clone() for name, weight in (model._state.originals or {}).items()}
    for place in itertools.count(1):
        failing = Failing(place, error)
        try:
            with failing:
                change(model)
            break
        except error:
            pass
        assert before.differences(trace(model)) == [], place
        assert (model._state.merged, model._state.enabled) == (merged, True)
        if change is not _switch:  # which unmerges first, and says so
            assert model.active_adapters == active
        assert (getattr(model, "all_tied_weights_keys", None) or {}) == tied
        assert (model._state.originals is None) == (not merged)
        held = model._state.originals or {}
        assert all(torch.equal(held[name], weight) for name, weight in originals.items())
    assert place > 3  # there were so many operations to stop at
    change(other)
    keys = [key for key in other.state_dict() if "ia3_l" not in key]
    assert all(torch.equal(model.state_dict()[key], other.state_dict()[key]) for key in keys)


def test_an_interrupt_while_unloading_comes_afterwards(tiny, randomise, monkeypatch):
    model = _of_two(tiny, randomise)
    release = Placement.release_site

    def interrupted(self, path):
        signal.raise_signal(signal.SIGINT)
        release(self, path)

    monkeypatch.setattr(Placement, "release_site", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()
    assert not isinstance(model, PeftModel)
    assert not any("ia3_l" in name for name, _ in model.named_modules())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
