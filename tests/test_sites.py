"""Matching a configuration against a model, and the layout of what was found."""

import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ia3 import IA3Config, Layout, Site, find_sites, get_peft_model


class Blocks(nn.Module):
    """Names chosen to collide: `o` and `wo`, `fc` at the root and inside, `mlp.c_proj` and `attn.c_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name in ("attn", "mlp"):
            part = nn.Module()
            for layer in ("o", "wo", "c_proj", "fc"):
                part.add_module(layer, nn.Linear(4, 4))
            part.norm = nn.LayerNorm(4)
            self.add_module(name, part)


def _sides(found) -> dict[str, str]:
    return {site.path: site.side for site in found.layout.sites}


def _find(model, **config):
    return _sides(find_sites(model, IA3Config(**config)))


def test_names_match_whole_parts_of_a_path():
    assert _find(Blocks(), target_modules=["o"]) == {"attn.o": "output", "mlp.o": "output"}
    assert _find(Blocks(), target_modules=["attn.o"]) == {"attn.o": "output"}
    assert _find(Blocks(), target_modules=["fc"]).keys() == {"fc", "attn.fc", "mlp.fc"}


def test_feedforward_names_match_whole_parts_too():
    sides = _find(Blocks(), target_modules=["o", "wo"], feedforward_modules=["o"])
    assert sides == {"attn.o": "input", "attn.wo": "output", "mlp.o": "input", "mlp.wo": "output"}


def test_regular_expressions_match_the_whole_path():
    assert _find(Blocks(), target_modules=r"attn\.(o|fc)") == {"attn.o": "output", "attn.fc": "output"}
    assert _find(Blocks(), target_modules="fc", feedforward_modules=[]) == {"fc": "output"}
    assert _find(Blocks(), target_modules=r".*\.wo", feedforward_modules=r"mlp\..*") == {
        "attn.wo": "output",
        "mlp.wo": "input",
    }


def test_sites_are_in_the_order_of_the_models_modules():
    model = Blocks()
    order = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    sites = find_sites(model, IA3Config(target_modules=["wo", "o", "fc", "c_proj"])).layout.sites
    assert [site.path for site in sites] == order


@pytest.mark.parametrize("excluded", [["mlp.o"], r"mlp\..*"])
def test_excluded(excluded):
    assert _find(Blocks(), target_modules=["o"], exclude_modules=excluded) == {"attn.o": "output"}


def test_all_linear_takes_every_linear_layer_and_guesses_the_feedforward():
    found = find_sites(Blocks(), IA3Config(target_modules="all-linear"))
    sides = _sides(found)
    assert len(sides) == 9
    assert {path for path, side in sides.items() if side == "input"} == {"attn.wo", "mlp.wo", "mlp.c_proj"}
    again = find_sites(Blocks(), found.config)
    assert again.layout == found.layout


def test_modules_trained_in_full_carry_no_vectors():
    found = find_sites(Blocks(), IA3Config(target_modules=["o"], modules_to_save=["mlp"]))
    assert _sides(found) == {"attn.o": "output"}
    assert found.saved == ("mlp",)


def test_only_the_outermost_module_is_saved():
    found = find_sites(Blocks(), IA3Config(target_modules=["fc"], modules_to_save=["mlp", "wo", "norm"]))
    assert found.saved == ("attn.wo", "attn.norm", "mlp")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["nothing"]}, r"target_modules: 'nothing' matches no module of Blocks"),
        ({"target_modules": ["o", "nothing"]}, r"target_modules: 'nothing' matches no module"),
        ({"target_modules": "o"}, r"target_modules: 'o' matches no module"),
        ({"target_modules": ["c_prj"]}, r"'c_prj' matches no module.*Did you mean \['c_proj'\]"),
        ({"target_modules": ["o"], "exclude_modules": ["x"]}, r"exclude_modules: 'x' matches no module"),
        ({"target_modules": ["o"], "exclude_modules": "x"}, r"exclude_modules: 'x' matches no module"),
        ({"target_modules": ["o"], "feedforward_modules": "wo"}, r"feedforward_modules: 'wo' matches no module"),
        ({"target_modules": r".*\.o", "feedforward_modules": ["wo"]}, r"feedforward_modules: 'wo' matches no"),
        ({"target_modules": ["o"], "modules_to_save": ["head"]}, r"modules_to_save: 'head' matches no module"),
        ({"target_modules": ["o"], "exclude_modules": r".*o"}, r"target_modules: .*'o'.* matches no module"),
        ({"target_modules": "("}, r"'\(' is not a valid regular expression"),
        ({"target_modules": ["o"], "feedforward_modules": "["}, r"'\[' is not a valid regular expression"),
        ({"target_modules": ["norm"]}, r"attn.norm is a LayerNorm, which can't carry a vector"),
        ({"target_modules": ["attn"]}, r"attn is a Module, which can't carry a vector"),
        ({}, r"finds no layer of 'Blocks' that makes such. Name the layers.*\['c_proj', 'fc', 'o', 'wo'\]"),
    ],
)
def test_what_matches_nothing_is_an_error_that_names_it(config, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        find_sites(Blocks(), IA3Config(**config))


def test_refining_a_default(tiny):
    found = find_sites(tiny("t5"), IA3Config(exclude_modules=r".*decoder.*"))
    assert {site.path.split(".")[0] for site in found.layout.sites} == {"encoder"}
    found = find_sites(tiny("t5"), IA3Config(feedforward_modules=[]))
    assert {site.side for site in found.layout.sites} == {"output"}
    for exclude in (["encoder.layer.1.output.dense"], r".*encoder\.layer\.1\.output\.dense"):
        found = find_sites(tiny("bert"), IA3Config(exclude_modules=exclude))
        dense = [site.path for site in found.layout.sites if site.path.endswith("dense")]
        assert dense == ["bert.encoder.layer.0.output.dense"]
    for name in ("t5", "bert"):
        for exclude in (["nothing"], "nothing"):
            with pytest.raises(ValueError, match="exclude_modules: 'nothing' matches no module"):
                find_sites(tiny(name), IA3Config(exclude_modules=exclude))


@pytest.mark.parametrize("container", [nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleDict({"a": nn.Linear(2, 2)})])
def test_a_container_can_not_be_saved_in_full(container):
    model = nn.ModuleDict({"heads": container, "other": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"heads is a Module.*never called"):
        find_sites(model, IA3Config(target_modules=["other"], modules_to_save=["heads"]))


def test_an_embeddings_input_is_refused(zoo):
    with pytest.raises(ValueError, match=r"embed is an embedding.*Remove it from feedforward_modules"):
        find_sites(zoo(), IA3Config(target_modules=["embed"], feedforward_modules=["embed"]))


def test_loading_tolerates_names_without_a_match():
    config = IA3Config(target_modules=["o", "nothing"], modules_to_save=["score"])
    assert len(find_sites(Blocks(), config, loading=True).layout.sites) == 2
    with pytest.raises(ValueError, match="matches no module"):
        find_sites(Blocks(), IA3Config(target_modules=["nothing"]), loading=True)


def test_shapes_are_pefts(zoo):
    layers = ["embed", "biased", "plain", "transposed", "conv1", "grouped1", "conv2", "grouped2", "conv3", "grouped3"]
    outputs = {s.path: s.shape for s in find_sites(zoo(), IA3Config(target_modules=layers)).layout.sites}
    assert outputs == {
        "embed": (6, 1),
        "biased": (8, 1),
        "plain": (6, 1),
        "transposed": (8, 1),
        "conv1": (1, 4, 1),
        "grouped1": (1, 8, 1),
        "conv2": (1, 6, 1, 1),
        "grouped2": (1, 9, 1, 1),
        "conv3": (1, 4, 1, 1, 1),
        "grouped3": (1, 4, 1, 1, 1),
    }
    config = IA3Config(target_modules=layers[1:], feedforward_modules=layers[1:])
    inputs = {s.path: s.shape for s in find_sites(zoo(), config).layout.sites}
    assert inputs == {
        "biased": (1, 6),
        "plain": (1, 8),
        "transposed": (1, 6),
        "conv1": (1, 8, 1),
        "grouped1": (1, 4, 1),
        "conv2": (1, 8, 1, 1),
        "grouped2": (1, 6, 1, 1),
        "conv3": (1, 9, 1, 1, 1),
        "grouped3": (1, 4, 1, 1, 1),
    }


def test_the_configuration_passed_stays_as_it_is(tiny):
    config = IA3Config()
    before = config.to_dict()
    found = find_sites(tiny("bert"), config)
    assert config.to_dict() == before
    assert found.config.target_modules == {"key", "value", "output.dense"}
    assert found.config is not config


def test_one_configuration_for_two_models(tiny):
    config = IA3Config()
    before = config.to_dict()
    t5, llama = get_peft_model(tiny("t5"), config), get_peft_model(tiny("llama"), config)
    assert config.to_dict() == before
    assert t5.peft_config["default"].target_modules == {"k", "v", "wo"}
    assert llama.peft_config["default"].target_modules == {"k_proj", "v_proj", "down_proj"}


def test_an_adapted_model_has_the_same_sites(tiny):
    model = tiny("bert")
    config = IA3Config(task_type="SEQ_CLS")
    before = find_sites(model, config)
    get_peft_model(model, config)
    assert find_sites(model, config) == before


def test_a_default_that_differs_from_pefts_says_so_once(tiny, caplog):
    with caplog.at_level(logging.WARNING, "ia3"):
        get_peft_model(tiny("opt"), IA3Config())
    assert [r.getMessage() for r in caplog.records] == [
        "ia3's default for opt follows the paper (k, v, feed-forward); PEFT's default scales q_proj in place of v_proj."
    ]
    caplog.clear()
    get_peft_model(tiny("opt"), IA3Config(target_modules=["k_proj"]))
    get_peft_model(tiny("llama"), IA3Config())
    assert caplog.records == []


# Layouts


@st.composite
def sites(draw, path: str = "m") -> Site:
    width = draw(st.integers(1, 12))
    shape = draw(st.sampled_from([(width, 1), (1, width), (1, width, 1), (1, width, 1, 1), (1, width, 1, 1, 1)]))
    side = "output" if shape[0] == width and len(shape) == 2 else draw(st.sampled_from(["input", "output"]))
    if shape != (width, 1) or draw(st.booleans()):
        return Site(path, side, shape)
    cuts = draw(st.lists(st.integers(0, width), min_size=2, max_size=6, unique=True).map(sorted))
    intervals = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    return Site(path, side, shape, intervals)


@st.composite
def layouts(draw) -> Layout:
    count = draw(st.integers(1, 6))
    return Layout(tuple(draw(sites(f"m{index}")) for index in range(count)))


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(layout=layouts(), dtype=dtypes, batch=st.sampled_from([(), (3,), (2, 4)]))
def test_split_inverts_flatten(layout, dtype, batch):
    vectors = [torch.randn(site.trained_shape).to(dtype) for site in layout.sites]
    flat = layout.flatten(vectors)
    assert flat.shape == (layout.size,)
    assert flat.dtype == dtype
    for vector, part in zip(vectors, layout.split(flat), strict=True):
        assert torch.equal(vector.reshape(-1), part)
    table = flat.expand(*batch, -1) * 2
    for vector, part in zip(vectors, layout.split(table), strict=True):
        assert part.shape == (*batch, vector.numel())
        assert torch.equal(part, (vector.reshape(-1) * 2).expand_as(part))


@given(site=sites(), dtype=dtypes)
def test_narrow_inverts_widen(site, dtype):
    vector = torch.randn(site.trained_shape).to(dtype)
    full = site.widen(vector)
    assert full.shape == site.shape
    assert full.dtype == dtype
    assert torch.equal(site.narrow(full), vector)
    assert site.fits(full)
    trained = torch.zeros(site.width, dtype=torch.bool)
    trained[site.channels()] = True
    assert int(trained.sum()) == site.trained_width == vector.numel()
    assert (full.reshape(-1)[~trained] == 1).all()


@given(site=sites().filter(lambda site: site.trained_width < site.width), data=st.data())
def test_a_vector_that_is_not_one_elsewhere_does_not_fit(site, data):
    full = torch.ones(site.shape)
    outside = sorted(set(range(site.width)) - set(site.channels().tolist()))
    full.view(-1)[data.draw(st.sampled_from(outside))] = 1 + 2**-23
    assert not site.fits(full)


@given(layout=layouts())
def test_backward_of_split_reaches_every_number(layout):
    flat = torch.randn(layout.size, requires_grad=True)
    sum((part * (index + 1)).sum() for index, part in enumerate(layout.split(flat))).backward()
    expected = [index + 1 for index, width in enumerate(layout.widths) for _ in range(width)]
    assert flat.grad.tolist() == expected


def test_flatten_and_split_refuse_other_sizes():
    layout = Layout((Site("a", "output", (2, 1)), Site("b", "input", (1, 3))))
    with pytest.raises(ValueError, match="2 sites of 5 numbers; got 1 vectors of 2"):
        layout.flatten([torch.ones(2)])
    with pytest.raises(ValueError, match="2 sites of 5 numbers; got 2 vectors of 5"):
        layout.flatten([torch.ones(3), torch.ones(2)])
    with pytest.raises(ValueError, match=r"last dimension of 5, got \(2, 6\)"):
        layout.split(torch.ones(2, 6))


def test_keys():
    assert Site("a.b", "output", (2, 1)).key == "a.b.ia3_l"
    assert Site("", "output", (2, 1)).key == "ia3_l"
