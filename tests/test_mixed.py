"""A batch that mixes adapters gives each example what it would get alone under its adapter."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import AdapterTable, IA3Config, get_peft_model, rows
from ia3.training.learners.instructions import separating_mask

TASKS = {
    "t5": "SEQ_2_SEQ_LM",
    "mt5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bloom": "CAUSAL_LM",
    "falcon-multi-query": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "gemma2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
}
NAMES = ["a", "b", "narrow", "__base__"]


def adapted(tiny, randomise, family, dtype=torch.float32):
    """A model with two adapters of the default sites and one of fewer."""
    config = {"task_type": TASKS[family], "modules_to_save": None}
    model = get_peft_model(tiny(family, dtype=dtype), IA3Config(**config), adapter_name="a")
    model.add_adapter("b", IA3Config(**config))
    first = next(iter(model._state.adapters["a"].layout.sites))
    narrow = IA3Config(task_type=TASKS[family], target_modules=first.path.replace(".", r"\."), feedforward_modules=[])
    model.add_adapter("narrow", narrow)
    randomise(model)
    return model.eval()


def batch_of(model, names, length=6):
    chance = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 30, (len(names), length), generator=chance)
    mask = torch.ones_like(ids)
    for row in range(len(names)):
        mask[row, : row % 3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(2, 30, (len(names), 3), generator=chance)
    return batch


def alone(model, name, batch, row):
    """One example under one adapter."""
    one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
    if name == "__base__":
        with model.disable_adapter():
            return model(**one).logits
    model.set_adapter(name)
    return model(**one).logits


@pytest.mark.parametrize("family", TASKS)
def test_each_example_is_as_alone(tiny, randomise, family):
    model = adapted(tiny, randomise, family)
    names = ["b", "a", "__base__", "b", "narrow", "a", "__base__"]
    batch = batch_of(model, names)
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(model, name, batch, row), rtol=1e-4, atol=1e-5)
    apart = [mixed[row] for row in range(3)]
    assert not torch.allclose(apart[0], model(**batch).logits[0])
    model.set_adapter("a")
    torch.testing.assert_close(model(**batch).logits[1:2], alone(model, "a", batch, 1), rtol=1e-4, atol=1e-5)


def test_any_order_of_any_names(tiny, randomise):
    model = adapted(tiny, randomise, "t5")
    batch = batch_of(model, NAMES)
    expected = {name: [alone(model, name, batch, row).detach() for row in range(len(NAMES))] for name in NAMES}

    @settings(deadline=None, max_examples=25)
    @given(names=st.lists(st.sampled_from(NAMES), min_size=len(NAMES), max_size=len(NAMES)))
    def check(names):
        with torch.no_grad():
            mixed = model(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row : row + 1], expected[name][row], rtol=1e-4, atol=1e-5)

    check()


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_gradients_are_those_of_the_examples_alone(tiny, randomise, family):
    model = adapted(tiny, randomise, family, torch.float64)
    model.set_requires_grad(["a", "b", "narrow"], True)
    names = ["b", "a", "b", "__base__", "narrow"]
    batch = batch_of(model, names)
    weights = torch.randn(model(**batch).logits.shape, generator=torch.Generator().manual_seed(0)).double()
    vectors = {name: p for name, p in model.named_parameters() if ".ia3_l." in name}
    assert all(p.requires_grad for p in vectors.values())
    (model(**batch, adapter_names=names).logits * weights).sum().backward()
    mixed = {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in vectors.items()}
    model.zero_grad()
    for row, name in enumerate(names):
        loss = (alone(model, name, batch, row) * weights[row : row + 1]).sum()
        if loss.requires_grad:
            loss.backward()
        model.set_requires_grad(["a", "b", "narrow"], True)
    for name, p in vectors.items():
        torch.testing.assert_close(
            mixed[name], p.grad if p.grad is not None else torch.zeros_like(p), rtol=1e-8, atol=1e-10
        )


HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams back": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["t5", "bart", "llama", "gpt2"])
def test_generated_tokens_are_those_of_the_examples_alone(tiny, randomise, family, how):
    if how == "static cache" and family == "bart":
        pytest.skip("this tiny BART has fewer positions than a static cache wants")
    model = adapted(tiny, randomise, family)
    names = ["b", "__base__", "a", "narrow", "b"]
    batch = batch_of(model, names)
    batch.pop("decoder_input_ids", None)
    more = {"max_new_tokens": 5, "min_new_tokens": 5, **HOW[how]}
    mixed = model.generate(**batch, **more, adapter_names=names)
    count = HOW[how].get("num_return_sequences", 1)
    assert len(mixed) == count * len(names)
    for row, name in enumerate(names):
        one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**one, **more)
        else:
            model.set_adapter(name)
            expected = model.generate(**one, **more)
        assert torch.equal(mixed[count * row : count * (row + 1), : expected.shape[1]], expected), name


def test_heads_are_the_examples_own(tiny, randomise):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    names = ["b", "a", "__base__", "b"]
    batch = batch_of(model, names)
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(model, name, batch, row), rtol=1e-4, atol=1e-5)


def test_convolutions(tiny):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.lin = torch.nn.Linear(4, 5)

        def forward(self, x):
            return self.lin(self.conv(x).mean((2, 3)))

    config = IA3Config(target_modules=["conv", "lin"], feedforward_modules=["lin"])
    model = get_peft_model(Net(), config, adapter_name="a")
    model.add_adapter("b", config)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".ia3_l." in n):
            parameter.uniform_(0.5, 2)
    x, names = torch.randn(3, 3, 6, 6), ["b", "__base__", "a"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[row : row + 1])
        else:
            model.set_adapter(name)
            expected = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "c", "b"], r"Unknown adapter_names \['c'\]: this model has \['a', 'b', 'narrow'\]"),
        (["a", "b"], "for 3 examples: pass a list with one name an example"),
        ("a", "for 3 examples"),
    ],
)
def test_wrong_names(tiny, randomise, names, said):
    model = adapted(tiny, randomise, "t5")
    batch = batch_of(model, ["a"] * 3)
    expected = model(**batch).logits
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=said):
            call(**batch, adapter_names=names)
    assert torch.equal(model(**batch).logits, expected)


def test_what_a_mixed_batch_cannot_be(tiny, randomise):
    model = adapted(tiny, randomise, "t5")
    batch = batch_of(model, ["a"] * 2)
    names = ["a", "b"]
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled or merged"):
        model(**batch, adapter_names=names)
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="disabled or merged"):
        model(**batch, adapter_names=names)
    model.unmerge_adapter()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**batch, adapter_names=names)
    model.gradient_checkpointing_disable()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"without torch\.compile"):
        model(**batch, adapter_names=names)


def test_an_error_inside_leaves_nothing_behind(tiny, randomise):
    model = adapted(tiny, randomise, "t5")
    batch = batch_of(model, ["a"] * 2)
    expected = model(**batch).logits
    with pytest.raises((IndexError, RuntimeError)):
        model(**{**batch, "input_ids": batch["input_ids"] + 10_000}, adapter_names=["a", "b"])
    assert torch.equal(model(**batch).logits, expected)
    assert not rows.act_here()


def test_threads_and_models_see_their_own_rows(tiny, randomise):
    model, other = (adapted(tiny, randomise, "t5") for _ in range(2))
    batch = batch_of(model, NAMES)
    orders = [NAMES, NAMES[::-1], ["a"] * 4, ["__base__"] * 4]
    with torch.no_grad():
        expected = [model(**batch, adapter_names=names).logits for names in orders]
        plain = other(**batch).logits
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(**batch, adapter_names=orders[index]).logits, expected[index]):
                    wrong.append(index)
                if not torch.equal(other(**batch).logits, plain):
                    wrong.append("other")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not rows.act_here()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_interrupted_forward_leaves_nothing_behind(tiny, randomise, mode):
    model = getattr(adapted(tiny, randomise, "t5"), mode)()
    batch = batch_of(model, NAMES)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    plain = model.eval()(**batch).logits

    def interrupt(module, args):
        raise KeyboardInterrupt

    getattr(model, mode)()
    handle = model.decoder.register_forward_pre_hook(interrupt)
    for names in (NAMES, None):
        with pytest.raises(KeyboardInterrupt):
            model(**batch, adapter_names=names)
        assert not rows.act_here()
    handle.remove()
    assert torch.equal(model.eval()(**batch).logits, plain)
    assert model._state.listener is None
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


class _Holding(torch.nn.Module):
    """Lets the first forward that comes here wait until another thread has done its work."""

    def __init__(self, work):
        super().__init__()
        self.work, self.said = work, []

    def forward(self, *inputs):
        work, self.work = self.work, None
        if work is not None:
            thread = threading.Thread(target=lambda: self.said.append(work()))
            thread.start()
            thread.join()
        return inputs[0]


def test_a_mixed_batch_of_another_thread_changes_no_way(tiny, randomise):
    """What one model does in one thread is nothing that another model, or another thread, goes by."""
    model, other = (adapted(tiny, randomise, "t5") for _ in range(2))
    batch = batch_of(model, NAMES)
    labelled = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    for each in (model, other):
        each.set_adapter("a")

    def work():
        plain = model(**batch).logits
        loss = other.train()(**labelled).loss
        return rows.act_here(), plain, type(loss.grad_fn).__name__

    expected = model(**batch).logits
    holding = _Holding(work)
    model.encoder.dropout = holding
    model(**batch, adapter_names=NAMES)
    assert len(holding.said) == 1
    acting, plain, way = holding.said[0]
    assert not acting
    assert torch.equal(plain, expected)
    assert way == "_WithGradientBackward"


# One name a token: rows that pack several examples

# A row is [(name, length), …]; the last example of the second row fills it up.
PACKED = [[("b", 3), ("a", 4), ("__base__", 2)], [("narrow", 5), ("b", 2), ("__base__", 2)]]


def packed_batch(model):
    """Rows of several examples apart by a mask for each pair of tokens, and the name of each token."""
    chance = torch.Generator().manual_seed(3)
    positions = torch.tensor([[place for _, length in row for place in range(length)] for row in PACKED])
    names = [[name for name, length in row for _ in range(length)] for row in PACKED]
    ids = torch.randint(2, 30, positions.shape, generator=chance)
    mask = separating_mask(positions, model.dtype)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}, names


def each_packed(batch):
    """Each example of the packed rows: its name, its row and its places in it, itself alone."""
    for number, row in enumerate(PACKED):
        start = 0
        for name, length in row:
            places = slice(start, start + length)
            yield name, number, places, {"input_ids": batch["input_ids"][number : number + 1, places]}
            start += length


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon-multi-query", "gemma2"])
@torch.no_grad()
def test_packed_examples_are_as_alone(tiny, randomise, family):
    model = adapted(tiny, randomise, family)
    batch, names = packed_batch(model)
    mixed = model(**batch, adapter_names=names).logits
    for name, row, places, example in each_packed(batch):
        torch.testing.assert_close(mixed[row, places], alone(model, name, example, 0)[0], rtol=1e-4, atol=1e-5)
    model.set_adapter("a")
    assert not torch.allclose(mixed, model(**batch).logits, atol=1e-3)


def test_gradients_of_packed_examples_are_those_of_the_examples_alone(tiny, randomise):
    model = adapted(tiny, randomise, "llama", torch.float64)
    model.set_requires_grad(["a", "b", "narrow"], True)
    batch, names = packed_batch(model)
    vectors = [p for n, p in model.named_parameters() if ".ia3_l." in n]
    mixed = torch.autograd.grad(model(**batch, adapter_names=names).logits.square().sum(), vectors)
    total = [torch.zeros_like(p) for p in vectors]
    for name, _, _, example in each_packed(batch):
        if name != "__base__":
            model.set_adapter(name)
            loss = model(**example).logits.square().sum()
            model.set_requires_grad(["a", "b", "narrow"], True)
            for sum_, gradient in zip(total, torch.autograd.grad(loss, vectors, allow_unused=True), strict=True):
                sum_ += 0 if gradient is None else gradient
    for gradient, expected in zip(mixed, total, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@torch.no_grad()
def test_packed_examples_of_registered_adapters(tiny, randomise, tmp_path):
    model = adapted(tiny, randomise, "llama")
    batch, names = packed_batch(model)
    expected = model(**batch, adapter_names=names).logits
    model.save_pretrained(tmp_path)
    for name in ("a", "b"):
        model.delete_adapter(name)
    table = AdapterTable(model)  # "narrow" stays attached
    for name in ("a", "b"):
        table.register(name, tmp_path / name)
    torch.testing.assert_close(model(**batch, adapter_names=names).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([["a"] * 9, ["a"] * 8], r"adapter_names\[1\] is 8 names for 9 tokens"),
        ([["a"] * 9, "a"], r"adapter_names\[1\] is 'a' for 9 tokens"),
        ([["a"] * 9, None], r"adapter_names\[1\] is None for 9 tokens"),
        ([["a"] * 9], "for 2 examples"),
        ([["a"] * 9, ["a"] * 8 + ["c"]], r"Unknown adapter_names \['c'\]"),
    ],
)
def test_wrong_names_a_token(tiny, randomise, names, said):
    model = adapted(tiny, randomise, "llama")
    batch, _ = packed_batch(model)
    layers = []
    model.model.embed_tokens.register_forward_hook(lambda *_: layers.append(1))
    with pytest.raises(ValueError, match=said):
        model(**batch, adapter_names=names)
    assert not layers


def test_where_names_a_token_cannot_work(tiny, randomise):
    model = adapted(tiny, randomise, "t5")
    batch = batch_of(model, ["a"] * 2)
    with pytest.raises(ValueError, match="decoder's tokens are others than its encoder's"):
        model(**batch, adapter_names=[["a"] * 6] * 2)
    model = adapted(tiny, randomise, "llama")
    batch, names = packed_batch(model)
    with pytest.raises(ValueError, match="generate continues one example a row"):
        model.generate(batch["input_ids"], adapter_names=names)
    model.add_adapter("head", IA3Config(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"can't choose between copies of lm_head"):
        model(**batch, adapter_names=names)


def test_names_a_token_reach_no_convolution_and_no_other_shape():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(9, 4)
            self.conv = torch.nn.Conv1d(4, 4, 3, padding=1)
            self.pool = torch.nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.pool(self.conv(self.embed(input_ids).transpose(1, 2)).mean(-1))

    ids = torch.ones(2, 3, dtype=torch.long)
    for targets, said in ((["conv"], "can't reach a convolution"), (["pool"], r"doesn't hold the \(2, 3\) tokens")):
        model = get_peft_model(Net(), IA3Config(target_modules=targets, feedforward_modules=[]), adapter_name="a")
        with pytest.raises(ValueError, match=said):
            model(ids, adapter_names=[["a"] * 3] * 2)
        assert not rows.act_here()


def test_a_module_that_another_adapter_trains_in_full_is_not_split(tiny, randomise):
    model = get_peft_model(tiny("llama"), IA3Config(task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], modules_to_save=["mlp"]))
    randomise(model)
    batch = batch_of(model, ["a"] * 2)
    with pytest.raises(ValueError, match=r"trains model.layers.0.mlp.down_proj in full and another has vectors there"):
        model(**batch, adapter_names=["a", "__base__"])
    model.set_adapter("a")
    torch.testing.assert_close(model(**batch, adapter_names=["a", "a"]).logits, model(**batch).logits)


def test_an_activation_that_is_not_floating_is_refused():
    site = torch.nn.Linear(1, 1)
    mixed = rows.Rows(("a", "b"), {site: {"output": torch.ones(2, 3)}})
    with pytest.raises(TypeError, match=r"floating-point activations; this layer's is torch\.int8"):
        mixed.scale(site, "output", torch.ones(2, 3, dtype=torch.int8), channels_first=False)


# Inputs of other names


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.tensor([[2, 5], [2, 6]])}
    return model, inputs, ["k_proj", "v_proj", "fc2"]


def _wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, vocab_size=12, feat_proj_dropout=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 200)}, ["k_proj", "v_proj"]


def _vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}, "all-linear"


class _Keyword(torch.nn.Module):
    main_input_name = "spectrum"

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, *, spectrum):
        return (self.lin(spectrum),)


class _Unnamed(_Keyword):
    """Says nothing of its main input."""

    main_input_name = None


def _keyword(kind=_Keyword):
    return kind(), {"spectrum": torch.randn(2, 4)}, ["lin"]


@pytest.mark.parametrize("make", [_whisper, _wav2vec2, _vit, _keyword, lambda: _keyword(_Unnamed)])
def test_a_batch_is_counted_by_whatever_input_the_model_has(randomise, make):
    torch.manual_seed(0)
    base, inputs, targets = make()
    feedforward = ["fc2"] if "fc2" in targets else []
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model = get_peft_model(base, config, adapter_name="a").eval()
    model.add_adapter("b", config)
    randomise(model)
    with torch.no_grad():
        alone = []
        for name in ("a", "b"):
            model.set_adapter(name)
            alone.append(model(**inputs)[0])
        mixed = model(**inputs, adapter_names=["a", "b"])[0]
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]))
    with pytest.raises(ValueError, match="for 2 examples"):
        model(**inputs, adapter_names=["a"])


def test_whisper_generates_by_names(randomise):
    torch.manual_seed(0)
    base, inputs, targets = _whisper()
    config = IA3Config(target_modules=targets, feedforward_modules=["fc2"])
    model = randomise(get_peft_model(base, config, adapter_name="a").eval(), spread=2.0)
    features = inputs["input_features"]
    found = model.generate(input_features=features, adapter_names=["a", "__base__"], max_new_tokens=4)
    assert found[0].tolist() == model.generate(input_features=features, max_new_tokens=4)[0].tolist()
    with model.disable_adapter():
        assert found[1].tolist() == model.generate(input_features=features, max_new_tokens=4)[1].tolist()
