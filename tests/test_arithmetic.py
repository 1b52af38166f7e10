"""Combining adapters: closed forms in float64, an absent vector as the identity, conflicts refused."""

import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ia3 import IA3Config, PeftModel, Site, get_peft_model
from ia3.arithmetic import combine, cosine, distance

SITES = [Site("a", "output", (3, 1)), Site("b", "input", (1, 2)), Site("c", "output", (1, 2, 1, 1))]
weights_of_three = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


@st.composite
def triples(draw) -> list[dict[Site, torch.Tensor]]:
    adapters = []
    for _ in range(3):
        sites = draw(st.sets(st.sampled_from(SITES), min_size=1))
        values = {
            site: torch.tensor(draw(st.lists(st.floats(-3, 3), min_size=site.width, max_size=site.width)))
            for site in SITES
            if site in sites
        }
        adapters.append({site: value.double().view(site.shape) for site, value in values.items()})
    return adapters


@given(adapters=triples(), weights=weights_of_three)
def test_against_the_closed_forms(adapters, weights):
    present = {site for adapter in adapters for site in adapter}
    whole = [{site: adapter.get(site, torch.ones(site.shape).double()) for site in present} for adapter in adapters]
    total = math.fsum(weights)
    expected = {site: sum(w * a[site] for w, a in zip(weights, whole, strict=True)) for site in present}
    summed = combine(adapters, weights, "sum")
    assert summed.keys() == present
    for site in present:
        torch.testing.assert_close(summed[site], expected[site], rtol=1e-12, atol=1e-12)
    if abs(total) > 0.1:
        mean = combine(adapters, weights)
        for site in present:
            torch.testing.assert_close(mean[site], expected[site] / total, rtol=1e-11, atol=1e-11)


@given(adapters=triples(), weights=st.lists(st.floats(0.1, 2), min_size=3, max_size=3), scale=st.floats(0.1, 10))
def test_a_mean_does_not_depend_on_the_weights_sum(adapters, weights, scale):
    one, other = combine(adapters, weights), combine(adapters, [scale * w for w in weights])
    for site, value in one.items():
        torch.testing.assert_close(value, other[site], rtol=1e-10, atol=1e-10)


@given(adapters=triples())
def test_one_adapter_is_itself(adapters):
    for kind in ("mean", "sum"):
        for site, value in combine(adapters[:1], [1.0], kind).items():
            torch.testing.assert_close(value, adapters[0][site], rtol=1e-15, atol=1e-15)


def test_shapes_and_precision_are_kept():
    adapter = {SITES[0]: torch.full((3, 1), 1 + 2**-20, dtype=torch.float32)}
    assert torch.equal(combine([adapter, adapter], [0.5, 0.5])[SITES[0]], adapter[SITES[0]])


@pytest.mark.parametrize(
    ("adapters", "weights", "kind", "message"),
    [
        ([{}], [1.0, 2.0], "mean", "1 adapters and 2 weights"),
        ([], [], "mean", "0 adapters and 0 weights"),
        ([{}, {}], [1.0, -1.0], "mean", r"\[1\.0, -1\.0\] add up to 0"),
        ([{}], [1.0], "average", "combination_type 'average': expected 'mean', 'product'"),
        ([{}, {}], [1.0, math.nan], "mean", r"weights \[1\.0, nan\] are not all finite"),
        ([{}, {}], [1.0, math.inf], "sum", "are not all finite"),
    ],
)
def test_refusals(adapters, weights, kind, message):
    with pytest.raises(ValueError, match=message):
        combine(adapters, weights, kind)


def test_a_combination_that_overflows_is_refused():
    adapter = {SITES[0]: torch.full((3, 1), 1e38)}
    with pytest.raises(ValueError, match=r"not finite at a: the weights \[1e\+30\] are too big"):
        combine([adapter], [1e30], "sum")


# On a model


def _two(tiny, randomise, name="t5"):
    model = get_peft_model(tiny(name), IA3Config(), adapter_name="a")
    model.add_adapter("b", IA3Config())
    return randomise(model)


def _vectors(model, name):
    return {key[: -len(name)]: p.detach() for key, p in model.named_parameters() if key.endswith(f".ia3_l.{name}")}


def test_mean_and_sum_of_one_and_one(tiny, randomise, caplog):
    model = _two(tiny, randomise)
    model.add_weighted_adapter(["a", "b"], [1, 1], "mean")
    assert "add up to 2 and are divided by that" in caplog.text
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum", combination_type="sum")
    a, b = _vectors(model, "a"), _vectors(model, "b")
    for key, value in _vectors(model, "mean").items():
        torch.testing.assert_close(value, (a[key] + b[key]) / 2)
    for key, value in _vectors(model, "sum").items():
        torch.testing.assert_close(value, a[key] + b[key])
    assert model.active_adapters == ["a"]
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.endswith(("mean", "sum")))


def test_a_sum_is_pefts(tiny, randomise):
    config = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
    theirs = peft.get_peft_model(tiny("t5"), peft.IA3Config(**config), adapter_name="a")
    theirs.add_adapter("b", peft.IA3Config(**config))
    randomise(theirs)
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "c")
    model = _two(tiny, randomise)
    expected = {key.replace("base_model.model.", ""): value for key, value in _vectors(theirs, "c").items()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".ia3_l." in key:
                parameter.copy_(dict(theirs.named_parameters())[f"base_model.model.{key}"])
    model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "c", "sum")
    for key, value in _vectors(model, "c").items():
        torch.testing.assert_close(value, expected[key])


def test_absent_is_the_identity(tiny, randomise):
    model = get_peft_model(tiny("t5"), IA3Config(target_modules=["k"]), adapter_name="k")
    model.add_adapter("v", IA3Config(target_modules=["v"]))
    randomise(model)
    model.add_weighted_adapter(["k", "v"], [0.5, 0.5], "both")
    keys, values, both = _vectors(model, "k"), _vectors(model, "v"), _vectors(model, "both")
    assert both.keys() == keys.keys() | values.keys()
    for key, value in {**keys, **values}.items():
        torch.testing.assert_close(both[key], 0.5 * value + 0.5)


def test_fused_projections_stay_narrow_where_they_are(tiny, randomise):
    model = _two(tiny, randomise, "gpt2")
    model.add_adapter("whole", IA3Config(target_modules=["c_attn", "mlp.c_proj"]))
    randomise(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "narrow")
    model.add_weighted_adapter(["a", "whole"], [0.5, 0.5], "wide")
    module = model.transformer.h[0].attn.c_attn.ia3_l
    assert module.narrow.shape == (32, 1)
    assert module.wide.shape == (48, 1)
    full = torch.ones(48, 1).index_copy(0, module.channels, module.a.detach())
    torch.testing.assert_close(module.wide.detach(), (full + module.whole.detach()) / 2)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_a_combination_is_saved_and_loaded(tiny, randomise, output, tmp_path, name):
    model = _two(tiny, randomise, name)
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "c")
    model.set_adapter("c")
    expected = output(model)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "c")
    assert torch.equal(output(again), expected)
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "c")
    torch.testing.assert_close(output(theirs), expected, rtol=1e-6, atol=1e-6)


class Nested(nn.Module):
    """The path of one module is the end of another's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.mlp = nn.Module()
        self.mlp.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.mlp.fc(self.fc(x))


def test_paths_that_end_alike_are_kept_apart(randomise, tmp_path):
    torch.manual_seed(0)
    base = Nested().eval()
    fresh = Nested()
    fresh.load_state_dict(base.state_dict())
    model = get_peft_model(base, IA3Config(target_modules="fc", feedforward_modules=[]), adapter_name="a")
    model.add_adapter("b", IA3Config(target_modules="fc", feedforward_modules=[]))
    randomise(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert _vectors(model, "c").keys() == {"fc.ia3_l."}
    model.set_adapter("c")
    x = torch.randn(2, 3)
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path / "c")(x), expected)


def test_a_head_travels_with_the_one_adapter_that_has_it(tiny, randomise, output):
    model = get_peft_model(tiny("bert"), IA3Config(), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    randomise(model)
    with torch.no_grad():
        model.classifier.modules_to_save["b"].bias += 1
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert torch.equal(model.classifier.modules_to_save["c"].bias, model.classifier.modules_to_save["b"].bias)
    assert model.peft_config["c"].modules_to_save == ["classifier"]


def test_two_heads_are_refused(tiny, trace):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    before = trace(model)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] all train modules in full"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert before.differences(trace(model)) == []
    assert list(model.peft_config) == ["a", "b"]


def test_a_vector_inside_a_module_that_another_trains_in_full_is_refused(tiny, trace):
    model = get_peft_model(tiny("roberta"), IA3Config(target_modules=["classifier.dense", "key"]), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    before = trace(model)
    with pytest.raises(ValueError, match=r"vectors in \['classifier\.dense'\], which is trained in full by 'b'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert before.differences(trace(model)) == []


def test_both_sides_of_a_module_are_refused(tiny, trace):
    model = get_peft_model(tiny("t5"), IA3Config(target_modules=["wo"], feedforward_modules=[]), adapter_name="a")
    model.add_adapter("b", IA3Config(target_modules=["wo"], feedforward_modules=["wo"]))
    before = trace(model)
    with pytest.raises(ValueError, match=r"both the input and the output of \['decoder.*same feedforward_modules"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert before.differences(trace(model)) == []


def test_unknown_and_taken_names_are_refused(tiny, randomise, trace):
    model = _two(tiny, randomise)
    before = trace(model)
    with pytest.raises(ValueError, match="no adapter 'x'"):
        model.add_weighted_adapter(["a", "x"], [0.5, 0.5], "c")
    with pytest.raises(ValueError, match="already carries an adapter 'b'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "b")
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["a", "b"], [0.5], "c")
    assert before.differences(trace(model)) == []


def flat(adapter: dict[Site, torch.Tensor], sites: list[Site]) -> list[float]:
    """The difference from the base, over these sites, as numbers."""
    return [x - 1 for site in sites for x in adapter.get(site, torch.ones(site.shape)).flatten().tolist()]


def ties_by_loops(rows: list[list[float]], weights: list[float], density: float) -> list[float]:
    """TIES-merging, number by number."""
    size = len(rows[0])
    trimmed = []
    for row, weight in zip(rows, weights, strict=True):
        threshold = sorted(abs(x) for x in row)[max(0, size - int(density * size) - 1)]
        trimmed.append([weight * x if abs(x) >= threshold else 0.0 for x in row])
    columns = list(zip(*trimmed, strict=True))
    elected = [(sum(column) > 0) - (sum(column) < 0) for column in columns]
    majority = (sum(elected) > 0) - (sum(elected) < 0)
    merged = []
    for column, sign in zip(columns, elected, strict=True):
        sign = sign or majority
        agreeing = [x for x in column if x * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


@given(adapters=triples(), weights=weights_of_three, density=st.floats(0.01, 1))
def test_ties_by_loops(adapters, weights, density):
    sites = list({site: None for adapter in adapters for site in adapter})
    expected = ties_by_loops([flat(adapter, sites) for adapter in adapters], weights, density)
    merged = combine(adapters, weights, "ties", density=density)
    torch.testing.assert_close(flat(merged, sites), expected, rtol=1e-9, atol=1e-9)


def test_trimming_keeps_one_more_than_its_share():
    site = Site("a", "output", (10, 1))
    adapter = {site: 1 + torch.arange(1.0, 11).double().view(10, 1)}
    for density, kept in ((0.2, 3), (0.5, 6), (0.05, 1), (1.0, 10)):
        merged = combine([adapter], [1.0], "ties", density=density)[site]
        assert int((merged != 1).sum()) == kept


@given(adapters=triples(), weights=weights_of_three)
def test_task_arithmetic_and_product(adapters, weights):
    sites = list({site: None for adapter in adapters for site in adapter})
    rows = [flat(adapter, sites) for adapter in adapters]
    added = [sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
    found = flat(combine(adapters, weights, "task_arithmetic"), sites)
    torch.testing.assert_close(found, added, rtol=1e-9, atol=1e-9)
    product = [math.prod(1 + x for x in column) - 1 for column in zip(*rows, strict=True)]
    found = flat(combine(adapters, [1.0, 1.0, 1.0], "product"), sites)
    torch.testing.assert_close(found, product, rtol=1e-9, atol=1e-9)
    negated = combine(adapters[:1], [-1.0], "task_arithmetic")
    for site, vector in adapters[0].items():
        torch.testing.assert_close(negated[site], 2 - vector)


@given(adapters=triples())
def test_cosine_and_distance(adapters):
    one, other, _ = adapters
    sites = list({site: None for adapter in (one, other) for site in adapter})
    a, b = flat(one, sites), flat(other, sites)
    assert distance(one, other) == pytest.approx(math.dist(a, b), rel=1e-9, abs=1e-12)
    lengths = math.hypot(*a) * math.hypot(*b)
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    assert cosine(one, other) == pytest.approx(dot / lengths if lengths > 0 else 0, rel=1e-6, abs=1e-9)


def test_a_product_is_what_active_adapters_do_together(tiny, randomise, output):
    model = get_peft_model(tiny("llama"), IA3Config(task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]))
    randomise(model)
    model.set_adapter(["a", "b"])
    expected = output(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="product")
    model.set_adapter("both")
    torch.testing.assert_close(output(model), expected)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "merged", combination_type="ties", density=0.3)
    assert "merged" in model.peft_config


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"combination_type": "ties"}, "'ties' needs a density"),
        ({"combination_type": "ties", "density": 0.0}, "density is 0.0: expected a share"),
        ({"combination_type": "mean", "density": 0.5}, "'mean' has no use for it"),
        ({"combination_type": "product", "weights": [0.5]}, "has no power of a weight that is not whole"),
    ],
)
def test_rules_refuse_what_they_cannot_do(how, said):
    adapter = {SITES[0]: torch.tensor([[-1.0], [0.5], [2.0]])}
    weights = how.pop("weights", [1.0])
    with pytest.raises(ValueError, match=said):
        combine([adapter], weights, **how)
