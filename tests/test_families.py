"""The defaults of every family: which channels are scaled, checked where the modelling code uses them."""

import re
from collections import Counter
from functools import partial, partialmethod

import peft
import pytest
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention as DebertaV2Attention
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.phi3 import modeling_phi3

from described import FORMS, described
from ia3 import IA3Config, find_sites, get_peft_model
from ia3.sites import SECOND_MATRICES, matching

# family: {(end of the path, side, width, trained width): how many}
_DECODER = {
    ("k_proj", "output", 8, 8): 2,
    ("v_proj", "output", 8, 8): 2,
    ("down_proj", "input", 24, 24): 2,
}
_T5 = {("k", "output", 16, 16): 6, ("v", "output", 16, 16): 6, ("wo", "input", 24, 24): 4}
_BART = {("k_proj", "output", 16, 16): 6, ("v_proj", "output", 16, 16): 6, ("fc2", "input", 24, 24): 4}
_BERT = {("key", "output", 16, 16): 2, ("value", "output", 16, 16): 2, ("output.dense", "input", 24, 24): 2}
EXPECTED = {
    "t5": _T5,
    "t5-gated": _T5,
    "mt5": {("k", "output", 16, 16): 6, ("v", "output", 16, 16): 6, ("wi_1", "output", 24, 24): 4},
    "umt5": _T5,
    **dict.fromkeys(["bart", "mbart", "plbart", "pegasus", "marian", "blenderbot"], _BART),
    "gpt2": {("c_attn", "output", 48, 32): 2, ("mlp.c_proj", "input", 64, 64): 2},
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], _DECODER),
    **dict.fromkeys(["olmo2", "ministral", "seed_oss"], _DECODER),
    "starcoder2": {("k_proj", "output", 8, 8): 2, ("v_proj", "output", 8, 8): 2, ("mlp.c_proj", "input", 24, 24): 2},
    "phi3": {("qkv_proj", "output", 32, 16): 2, ("down_proj", "input", 24, 24): 2},
    "phi": {("k_proj", "output", 8, 8): 2, ("v_proj", "output", 8, 8): 2, ("fc2", "input", 24, 24): 2},
    "gptj": {("k_proj", "output", 16, 16): 2, ("v_proj", "output", 16, 16): 2, ("fc_out", "input", 24, 24): 2},
    "gpt_neo": {("k_proj", "output", 16, 16): 2, ("v_proj", "output", 16, 16): 2, ("mlp.c_proj", "input", 24, 24): 2},
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert", "electra"], _BERT),
    "distilbert": {("k_lin", "output", 16, 16): 2, ("v_lin", "output", 16, 16): 2, ("ffn.lin2", "input", 24, 24): 2},
    "deberta-v2": {
        ("key_proj", "output", 16, 16): 2,
        ("value_proj", "output", 16, 16): 2,
        ("output.dense", "input", 24, 24): 2,
    },
    "opt": {("k_proj", "output", 16, 16): 2, ("v_proj", "output", 16, 16): 2, ("fc2", "input", 24, 24): 2},
    "gpt_neox": {("query_key_value", "output", 48, 32): 2, ("dense_4h_to_h", "input", 24, 24): 2},
    "bloom": {("query_key_value", "output", 48, 32): 2, ("mlp.dense_4h_to_h", "input", 64, 64): 2},
    "falcon-grouped": {("query_key_value", "output", 32, 16): 2, ("dense_4h_to_h", "input", 64, 64): 2},
    "falcon-multi-query": {("query_key_value", "output", 24, 8): 2, ("dense_4h_to_h", "input", 64, 64): 2},
    "falcon-plain": {("query_key_value", "output", 48, 32): 2, ("dense_4h_to_h", "input", 64, 64): 2},
}
FUSED = ["gpt2", "phi3", "gpt_neox", "bloom", "falcon-grouped", "falcon-multi-query", "falcon-plain"]


DESCRIBED = [
    *("umt5", "mbart", "plbart", "pegasus", "marian", "blenderbot", "olmo2", "ministral", "seed_oss", "starcoder2"),
    *("phi3", "xlm-roberta", "camembert", "electra", "distilbert"),
]


@pytest.fixture(scope="session")
def families(families):
    """The usual ones, and those that are described alone."""
    return {**families, **{name: FORMS[name][:2] for name in DESCRIBED}}


@pytest.fixture(scope="session")
def tiny(tiny):
    """The usual one, which makes those that are described alone too."""

    def make(name, *, dtype=torch.float32, **more):
        if name not in DESCRIBED:
            return tiny(name, dtype=dtype, **more)
        return described(name, dtype, **more).unload().eval()

    return make


def test_every_family_is_tested(families):
    assert EXPECTED.keys() == families.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_default_sites(tiny, name):
    sites = find_sites(tiny(name), IA3Config()).layout.sites
    ends = [end for end, *_ in EXPECTED[name]]
    found = Counter(
        (next(end for end in ends if site.path.endswith(f".{end}")), site.side, site.width, site.trained_width)
        for site in sites
    )
    assert found == EXPECTED[name]
    assert not any("attention.output" in site.path for site in sites)


@pytest.mark.parametrize("name", EXPECTED)
def test_no_block_lacks_a_site(tiny, name):
    """One for the feed-forward, and of each other kind one an attention: two where a decoder attends across."""
    model = tiny(name)
    *others, last = [end for end, *_ in EXPECTED[name]]
    blocks = {}
    for site in find_sites(model, IA3Config()).layout.sites:
        block = re.match(r".*?\.\d+\.", site.path).group()
        blocks.setdefault(block, Counter())[next(end for end in (*others, last) if site.path.endswith(f".{end}"))] += 1
    across = [block for block in blocks if model.config.is_encoder_decoder and "decoder." in block]
    assert len(blocks) == (4 if model.config.is_encoder_decoder else 2)
    assert len(across) == (2 if model.config.is_encoder_decoder else 0)
    assert blocks == {
        block: Counter({last: 1, **dict.fromkeys(others, 2 if block in across else 1)}) for block in blocks
    }


@pytest.fixture
def projections(monkeypatch):
    """`projections(model, batch)`: the (query, key, value) that reach the first attention, `[batch, heads, …]`."""

    def record(model, batch):
        seen = []
        sdpa, eager = functional.scaled_dot_product_attention, modeling_gemma2.eager_attention_forward
        reshape = BloomAttention._reshape
        own = {cls: cls._attn for cls in (GPTJAttention, GPTNeoSelfAttention)}

        def note(function, *args, skip=0, **kwargs):
            seen.append([part.clone() for part in args[skip : skip + 3]])
            return function(*args, **kwargs)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(functional, "scaled_dot_product_attention", partial(note, sdpa))
            patch.setattr(modeling_gemma2, "eager_attention_forward", partial(note, eager, skip=1))
            parts, own_heads = [], DebertaV2Attention.transpose_for_scores

            def heads(self, *args):
                parts.append(own_heads(self, *args))
                seen.extend([parts[:]] if len(parts) == 3 else [])  # positions follow
                return parts[-1]

            patch.setattr(DebertaV2Attention, "transpose_for_scores", heads)
            for cls, attention in own.items():
                patch.setattr(cls, "_attn", partialmethod(partial(note, attention, skip=1)))
            patch.setattr(BloomAttention, "_reshape", lambda self, x: seen.append(reshape(self, x)) or seen[-1])
            model(**batch)
        return seen[0]

    return record


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_and_values_are_scaled_and_queries_are_not(tiny, randomise, feed, projections, name):
    model = tiny(name)
    batch = feed(model)
    query, key, value = projections(model, batch)
    get_peft_model(model, IA3Config())
    randomise(model)
    new_query, new_key, new_value = projections(model, batch)
    assert torch.equal(query, new_query)
    assert (key != new_key).all()
    assert (value != new_value).all()


def _parts_of_fused(name, model, width, projections, feed):
    """The channels of the fused projection that make queries, keys and values, by the modelling code itself."""
    channels = torch.arange(width, dtype=torch.float32).view(1, 1, width)
    if name == "phi3":  # which cuts in the middle of its forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_phi3, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
            cuts = model.model.layers[0].self_attn.qkv_proj
            hook = cuts.register_forward_hook(lambda module, args, output: channels.expand(output.shape))
            found = projections(model, feed(model))
            hook.remove()
        return found
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    if name == "gpt2":
        return channels.split(attention.split_size, dim=2)
    if name == "gpt_neox":
        return channels.view(1, 1, -1, 3 * attention.head_size).chunk(3, dim=-1)
    return attention._reshape(channels) if name == "bloom" else attention._split_heads(channels)


@pytest.mark.parametrize("name", FUSED)
def test_trained_channels_are_those_that_make_keys_and_values(tiny, feed, projections, name):
    model = tiny(name)
    site = next(site for site in find_sites(model, IA3Config()).layout.sites if site.intervals is not None)
    parts = _parts_of_fused(name, model, site.width, projections, feed)
    query, key, value = (set(part.flatten().int().tolist()) for part in parts)
    assert not query & (key | value)
    assert set(site.channels().tolist()) == key | value
    assert len(query) + len(key) + len(value) == site.width


@pytest.mark.parametrize("name", FUSED)
def test_fused_output_against_the_vector_by_hand(tiny, randomise, feed, name):
    model = tiny(name, dtype=torch.float64)
    site = next(site for site in find_sites(model, IA3Config()).layout.sites if site.intervals is not None)
    seen = []
    module = model.get_submodule(site.path)
    get_peft_model(model, IA3Config())
    module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        model(**feed(model))
        randomise(model)
        model(**feed(model))
    before, after = seen
    vector = torch.ones(site.width, dtype=torch.float64)
    vector[site.channels()] = module.ia3_l.default.detach().view(-1)
    torch.testing.assert_close(after, before * vector, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FUSED)
def test_explicit_targets_keep_every_channel(tiny, name):
    default = find_sites(tiny(name), IA3Config())
    explicit = find_sites(tiny(name), IA3Config(target_modules=default.config.target_modules))
    assert all(site.intervals is None for site in explicit.layout.sites)
    assert explicit.layout.size > default.layout.size
    assert [s.path for s in explicit.layout.sites] == [s.path for s in default.layout.sites]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_cross_attention(name):
    """GPT-2's cross-attention makes `[k | v]` under the name that makes `[q | k | v]` in self-attention."""
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True))
        widths = {"attn.c_attn": (48, 32), "crossattention.c_attn": (32, 32), "mlp.c_proj": (64, 64)}
        prefix = "transformer.h.0."
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertLMHeadModel(BertConfig(vocab_size=32, is_decoder=True, add_cross_attention=True, **shape))
        parts = ("attention.self", "crossattention.self")
        widths = {f"{part}.{layer}": (16, 16) for part in parts for layer in ("key", "value")}
        widths["output.dense"] = (24, 24)
        prefix = "bert.encoder.layer.0."
    sites = find_sites(model, IA3Config()).layout.sites
    assert {site.path: (site.width, site.trained_width) for site in sites} == {
        prefix + path: both for path, both in widths.items()
    }


def test_feedforward_names_are_known_outside_the_table():
    assert {"wo", "down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense"} <= SECOND_MATRICES


@pytest.mark.parametrize("name", EXPECTED)
def test_a_name_of_another_familys_feedforward_means_an_attention(tiny, name):
    """For a model outside the table every family's names count, so none may mean another's keys or its output."""
    named = matching(SECOND_MATRICES, dict(tiny(name).named_modules()))
    inside = {path for path in named if re.search(r"(?i)(attn|attention)\.", path)}
    # BERT's is left out by name.
    assert {path for path in inside if not path.endswith("attention.output.dense")} == set()


# Real shapes, without memory


def _mt5(d_model, d_ff, layers, heads, **more):
    shape = {"d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": layers, "num_heads": heads}
    return MT5ForConditionalGeneration(MT5Config(vocab_size=250112, feed_forward_proj="gated-gelu", **shape, **more))


def _t5(d_model, d_ff, layers, heads, activation):
    shape = {"d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": layers, "num_heads": heads}
    return T5ForConditionalGeneration(T5Config(vocab_size=32128, feed_forward_proj=activation, **shape))


def _llama_3b():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize(
    ("make", "trainable"),
    [
        pytest.param(lambda: _mt5(512, 1024, 8, 6), 34_816, id="mt0-small"),
        pytest.param(lambda: _mt5(768, 2048, 12, 12), 104_448, id="mt0-base"),
        pytest.param(lambda: _mt5(1024, 2816, 24, 16), 282_624, id="mt0-large"),
        pytest.param(lambda: _mt5(2048, 5120, 24, 32), 540_672, id="mt0-xl"),
        pytest.param(lambda: _t5(2048, 5120, 24, 32, "gated-gelu"), 540_672, id="T0-3B"),
        pytest.param(lambda: _t5(512, 2048, 6, 8, "relu"), 43_008, id="t5-small"),
        pytest.param(_llama_3b, 286_720, id="Llama-3.2-3B"),
    ],
)
def test_counts_of_real_models(make, trainable):
    with torch.device("meta"):
        model = make()
    get_peft_model(model, IA3Config())
    assert model.get_nb_trainable_parameters()[0] == trainable
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tied", "line"),
    [
        (True, "trainable params: 282,624 || all params: 973,749,248 || trainable%: 0.0290\n"),
        (False, "trainable params: 282,624 || all params: 1,229,863,936 || trainable%: 0.0230\n"),
    ],
)
def test_mt0_large_prints_the_guides_line(capsys, tied, line):
    with torch.device("meta"):
        model = _mt5(1024, 2816, 24, 16, tie_word_embeddings=tied)
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))
    assert len(find_sites(model, IA3Config()).layout.sites) == 192
    model.print_trainable_parameters()
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("name", ["t5", "mt5", "llama", "mistral", "bart", "bert", "qwen2", "phi"])
def test_prints_exactly_what_peft_prints(tiny, families, capsys, name):
    task = families[name][1]
    model = get_peft_model(tiny(name), IA3Config(task_type=task))
    targets = model.peft_config["default"].target_modules
    settings = {"task_type": task, "target_modules": targets}
    settings["feedforward_modules"] = model.peft_config["default"].feedforward_modules
    settings["exclude_modules"] = model.peft_config["default"].exclude_modules
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.get_peft_model(tiny(name), peft.IA3Config(**settings)).print_trainable_parameters()
    assert ours == capsys.readouterr().out
