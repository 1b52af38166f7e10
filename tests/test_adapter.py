"""Adapters on a model: what attaching adds, which adapters act and train, what removing leaves behind."""

import copy
import logging
import time

import peft
import pytest
import torch
from torch import nn

from ia3 import (
    IA3Config,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

T5 = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
EVERY_LAYER = [
    "embed",
    "biased",
    "plain",
    "transposed",
    "conv1",
    "grouped1",
    "conv2",
    "grouped2",
    "conv3",
    "grouped3",
]


def _flags(model, name):
    ends = (f".ia3_l.{name}", f".modules_to_save.{name}.")
    return [p.requires_grad for key, p in model.named_parameters() if key.endswith(ends[0]) or ends[1] in key]


# Attaching


def test_the_model_stays_itself(tiny, output):
    model = tiny("t5")
    cls, keys, before = type(model), list(model.state_dict()), output(model)
    adapted = get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))
    assert adapted is model
    assert isinstance(model, cls)
    assert isinstance(model, PeftModelForSeq2SeqLM)
    assert type(model).__name__ == cls.__name__
    assert type(model).__module__ == cls.__module__
    assert [key for key in model.state_dict() if ".ia3_l." not in key] == keys
    assert torch.equal(output(model), before)
    assert type(get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"))) is type(model)


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("t5", None, PeftModel),
        ("t5", "SEQ_2_SEQ_LM", PeftModelForSeq2SeqLM),
        ("gpt2", "CAUSAL_LM", PeftModelForCausalLM),
        ("bert", "SEQ_CLS", PeftModelForSequenceClassification),
        ("bert", "TOKEN_CLS", PeftModelForTokenClassification),
        ("bert", "QUESTION_ANS", PeftModelForQuestionAnswering),
        ("bert", "FEATURE_EXTRACTION", PeftModelForFeatureExtraction),
    ],
)
def test_the_class_for_each_task(tiny, name, task, expected):
    model = get_peft_model(tiny(name, task=task or ""), IA3Config(task_type=task))
    assert isinstance(model, expected)
    assert model.peft_type == "IA3"
    assert model.get_base_model() is model
    assert model.active_peft_config is model.peft_config["default"]
    assert model.base_model_torch_dtype == torch.float32
    assert isinstance(PeftModel(tiny(name), IA3Config()), PeftModel)


def test_calling_its_class_makes_a_bare_base(tiny):
    model = tiny("llama")
    cls = type(model)
    get_peft_model(model, IA3Config())
    assert type(type(model)(model.config)) is cls


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_heads_are_trained_in_full(tiny, name):
    model = get_peft_model(tiny(name, task="TOKEN_CLS"), IA3Config(task_type="TOKEN_CLS"))
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert model.modules_to_save == {"classifier"}
    trained = {key for key, p in model.named_parameters() if p.requires_grad and ".ia3_l." not in key}
    assert trained == {f"classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert get_peft_model(tiny("t5"), IA3Config()).modules_to_save is None


def test_the_head_learns_and_the_base_stays(tiny, feed):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(**feed(model), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    vectors = {key for key in before if key.endswith(".ia3_l.default")}
    assert changed == vectors | {f"classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}


@pytest.mark.parametrize(
    "bad",
    [
        {"target_modules": ["o_"]},
        {"target_modules": ["k", "nothing"]},
        {"target_modules": ["shared"], "feedforward_modules": ["shared"]},
        {"target_modules": ["k"], "modules_to_save": ["nothing"]},
        {"target_modules": ["SelfAttention"]},
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(tiny, trace, bad):
    model = tiny("t5")
    before = trace(model)
    with pytest.raises(ValueError, match=r"."):
        get_peft_model(model, IA3Config(**bad))
    assert before.differences(trace(model)) == []
    get_peft_model(model, IA3Config())
    before = trace(model)
    with pytest.raises(ValueError, match=r"."):
        model.add_adapter("other", IA3Config(**bad))
    assert before.differences(trace(model)) == []
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "name", ["", "a.b", "__base__", "forward", "width", "weight.x", "keys", "items", "a/b", "..", 3]
)
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_bad_names_are_refused(tiny, trace, name, task):
    model = tiny("bert")
    before = trace(model)
    with pytest.raises(ValueError, match="can't name an adapter"):
        get_peft_model(model, IA3Config(task_type=task), adapter_name=name)
    assert before.differences(trace(model)) == []


@pytest.mark.parametrize("name", ["ia3_l", "modules_to_save", "weight", "0", "a b", "ü", "default2", "base_model"])
def test_odd_names_work(tiny, randomise, output, tmp_path, name):
    model = randomise(get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"), adapter_name=name))
    expected = output(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path / name, adapter_name=name)
    assert torch.equal(output(again), expected)
    assert len(model.get_layer_status()) == 7


def test_a_taken_name_is_refused(tiny):
    model = get_peft_model(tiny("t5"), IA3Config())
    with pytest.raises(ValueError, match="already carries an adapter 'default'"):
        model.add_adapter("default", IA3Config())
    with pytest.raises(ValueError, match=r"already carries the adapters \['default'\]"):
        get_peft_model(model, IA3Config())


def test_wrong_arguments_are_refused(tiny):
    model = tiny("t5")
    with pytest.raises(TypeError, match=r"Expected an ia3.IA3Config, got peft"):
        get_peft_model(model, peft.IA3Config())
    with pytest.raises(ValueError, match="mixed=True"):
        get_peft_model(model, IA3Config(), mixed=True)
    with pytest.raises(ValueError, match="compiled already: attach the adapter first"):
        get_peft_model(torch.compile(model), IA3Config())
    get_peft_model(model, IA3Config())
    with pytest.raises(TypeError, match=r"add_adapter\(name, config\)"):
        model.add_adapter(IA3Config(), "name")
    for call in (model.set_adapter, model.delete_adapter, model.set_requires_grad):
        with pytest.raises(ValueError, match=r"no adapter 'other' here; this model has \['default'\]"):
            call("other")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.get_adapter_state_dict("other")


def test_a_model_of_another_library_is_refused(tiny):
    model = peft.get_peft_model(tiny("t5"), peft.IA3Config(**T5)).base_model.model
    with pytest.raises(ValueError, match=r"k already has an attribute 'ia3_l' of another library"):
        get_peft_model(model, IA3Config(**T5))


def test_the_base_models_name_is_recorded(tiny, caplog):
    model = tiny("t5")
    model.name_or_path = "org/base"
    get_peft_model(model, IA3Config(), revision="r")
    assert model.peft_config["default"].base_model_name_or_path == "org/base"
    assert model.peft_config["default"].revision == "r"
    with caplog.at_level(logging.WARNING, "ia3"):
        model.add_adapter("b", IA3Config(base_model_name_or_path="org/other"))
    assert "'org/other' becomes 'org/base'" in caplog.text
    assert get_peft_model(tiny("t5"), IA3Config(revision="q")).peft_config["default"].revision == "q"


# Precision


@pytest.mark.parametrize(
    ("base", "autocast", "expected"),
    [
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, False, torch.float16),
        (torch.float64, False, torch.float64),
    ],
)
def test_the_vectors_precision(tiny, randomise, output, base, autocast, expected):
    model = get_peft_model(tiny("llama", dtype=base), IA3Config(), autocast_adapter_dtype=autocast)
    model.add_adapter("b", IA3Config(), autocast_adapter_dtype=autocast)
    randomise(model)
    assert {p.dtype for key, p in model.named_parameters() if ".ia3_l." in key} == {expected}
    assert {p.dtype for key, p in model.named_parameters() if ".ia3_l." not in key} == {base}
    assert output(model).dtype == base


def test_the_vectors_follow_a_move(tiny, randomise, output):
    model = randomise(get_peft_model(tiny("gpt2"), IA3Config()))
    expected = output(model)
    torch.testing.assert_close(output(model.double()), expected.double())
    assert output(model.bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_initial_values(tiny):
    model = get_peft_model(tiny("t5"), IA3Config())
    assert all((p == 1).all() for key, p in model.named_parameters() if ".ia3_l." in key)
    torch.manual_seed(0)
    model = get_peft_model(tiny("t5"), IA3Config(init_ia3_weights=False))
    drawn = torch.cat([p.view(-1) for key, p in model.named_parameters() if ".ia3_l." in key])
    assert abs(float(drawn.mean())) < 0.2
    assert 0.8 < float(drawn.std()) < 1.2


@pytest.mark.parametrize("name", ["t5", "gpt2", "falcon-grouped"])
def test_vectors_without_memory_are_filled_by_loading(tiny, randomise, output, name):
    model = randomise(get_peft_model(tiny(name), IA3Config()))
    expected, tensors = output(model), model.get_adapter_state_dict()
    empty = get_peft_model(tiny(name), IA3Config(), low_cpu_mem_usage=True)
    vectors = [p for key, p in empty.named_parameters() if ".ia3_l." in key]
    assert all(p.is_meta and p.requires_grad for p in vectors)
    set_peft_model_state_dict(empty, tensors)
    assert torch.equal(output(empty), expected)
    assert all(p.requires_grad and not p.is_meta for key, p in empty.named_parameters() if ".ia3_l." in key)


def test_another_adapter_without_memory_leaves_the_first_alone(tiny, randomise, output):
    model = randomise(get_peft_model(tiny("gpt2"), IA3Config()))
    expected = output(model)
    model.add_adapter("empty", IA3Config(), low_cpu_mem_usage=True)
    assert torch.equal(output(model), expected)


# Acting


def _three(tiny, randomise, name="t5", **config):
    """Adapters a, b and c, a active."""
    model = get_peft_model(tiny(name), IA3Config(**config), adapter_name="a")
    model.add_adapter("b", IA3Config(**config))
    model.add_adapter("c", IA3Config(**config))
    return randomise(model)


def _set(model, name, values_of):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f".ia3_l.{name}"):
                parameter.copy_(values_of(key, parameter))


def test_several_active_adapters_multiply(tiny, randomise, output):
    model = _three(tiny, randomise)
    one = output(model)
    model.set_adapter(["a", "b"])
    assert model.active_adapters == model.active_adapter == ["a", "b"]
    both = output(model)
    values = dict(model.named_parameters())
    _set(model, "c", lambda key, _: values[key[:-1] + "a"] * values[key[:-1] + "b"])
    model.set_adapter("c")
    assert model.active_adapter == "c"
    torch.testing.assert_close(output(model), both)
    model.set_adapter("a")
    assert torch.equal(output(model), one)
    assert not torch.allclose(one, both)


def test_only_active_adapters_train(tiny, randomise):
    model = _three(tiny, randomise)
    assert all(_flags(model, "a"))
    assert not any(_flags(model, "b") + _flags(model, "c"))
    model.set_adapter(["b", "c"])
    assert all(_flags(model, "b") + _flags(model, "c"))
    assert not any(_flags(model, "a"))
    model.set_adapter("a", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["a", "b"])
    assert all(_flags(model, "a") + _flags(model, "b"))
    model.set_requires_grad("b", False)
    assert not any(_flags(model, "b"))
    model.set_adapter("c")
    assert not any(_flags(model, "a") + _flags(model, "b"))


def test_inference_mode_attaches_frozen(tiny):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS", inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


def test_an_inactive_adapter_gets_no_gradient(tiny, randomise, feed):
    model = _three(tiny, randomise)
    model(**feed(model)).logits.sum().backward()
    assert all((p.grad is not None) == key.endswith(".a") for key, p in model.named_parameters())


def test_adapters_may_use_different_sides_of_a_module(zoo, randomise, output):
    model = zoo(torch.float64)
    module = model.biased
    get_peft_model(model, IA3Config(target_modules=["biased"], feedforward_modules=["biased"]), adapter_name="in")
    model.add_adapter("out", IA3Config(target_modules=["biased", "plain"], feedforward_modules=[]))
    randomise(model)
    model.set_adapter(["in", "out"])
    x = torch.randn(3, 6, dtype=torch.float64)
    inside, outside = module.ia3_l.get_parameter("in").view(-1), module.ia3_l.out.view(-1)
    expected = ((x * inside) @ module.weight.T + module.bias) * outside
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    model.delete_adapter("in")
    torch.testing.assert_close(module(x), (x @ module.weight.T + module.bias) * outside)
    assert (len(module._forward_pre_hooks), len(module._forward_hooks)) == (0, 1)


def test_adapters_may_hold_different_channels_of_a_fused_module(tiny, randomise, output):
    model = get_peft_model(tiny("gpt2"), IA3Config(), adapter_name="narrow")
    model.add_adapter("whole", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]))
    randomise(model)
    alone = {}
    for name in ("narrow", "whole"):
        model.set_adapter(name)
        alone[name] = output(model)
    model.set_adapter(["narrow", "whole"])
    both = output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("narrow")
    assert torch.equal(output(model), alone["whole"])


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_disabling_gives_the_base(tiny, randomise, output, trace, name):
    model = tiny(name)
    base = output(model)
    randomise(get_peft_model(model, IA3Config(task_type="SEQ_CLS" if name == "bert" else None)))
    if name == "bert":
        model.classifier.modules_to_save["default"].weight.data.normal_()
    adapted, before = output(model), trace(model)
    assert not torch.allclose(adapted, base)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
        with model.disable_adapter():
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)
    assert before.differences(trace(model)) == []
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(output(model), adapted)
    model.disable_adapters()
    assert torch.equal(output(model), base)
    with model.disable_adapter():
        pass
    assert torch.equal(output(model), base)
    model.enable_adapters()
    assert torch.equal(output(model), adapted)


def test_switching_while_disabled_acts_afterwards(tiny, randomise, output):
    model = tiny("t5")
    base = output(model)
    get_peft_model(model, IA3Config(), adapter_name="a")
    model.add_adapter("b", IA3Config())
    randomise(model)
    model.set_adapter("b")
    expected = output(model)
    model.set_adapter("a")
    with model.disable_adapter():
        model.set_adapter("b")
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), expected)


def test_two_that_train_one_module_in_full_cannot_act_together(tiny, trace):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"))
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    before = trace(model)
    with pytest.raises(ValueError, match=r"\['default', 'b'\] each train \['classifier'\] in full"):
        model.set_adapter(["default", "b"])
    assert before.differences(trace(model)) == []


@pytest.mark.parametrize("site", ["classifier.dense", "classifier.out_proj"])
def test_a_vector_inside_a_module_that_another_trains_in_full_cannot_act(tiny, trace, site):
    """The other's copy runs in the place of the module, and has no such vector."""
    model = get_peft_model(tiny("roberta"), IA3Config(target_modules=[site]), adapter_name="a")
    saved = "classifier" if site == "classifier.dense" else "out_proj"
    model.add_adapter("b", IA3Config(target_modules=["key"], modules_to_save=[saved]))
    model.merge_adapter()
    before = trace(model)
    for act in (model.set_adapter, model.merge_adapter):
        with pytest.raises(ValueError, match=rf"one has vectors in \['{site}'\], which another trains in full"):
            act(["a", "b"])
        assert before.differences(trace(model)) == []
    assert model.get_model_status().merged_adapters == ["a"]


def test_resizing_adapted_embeddings_is_refused(tiny, trace):
    """It would put bare modules in their place."""
    for config in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]},
    ):
        model = get_peft_model(tiny("llama"), IA3Config(**config))
        before = trace(model)
        with pytest.raises(ValueError, match=r"replaces (lm_head|model\.embed_tokens), .* resize before you attach"):
            model.resize_token_embeddings(70)
        assert before.differences(trace(model)) == []
    model = get_peft_model(tiny("llama"), IA3Config())
    assert model.resize_token_embeddings(70).weight.shape == (70, 16)


def test_each_adapter_has_its_own_head(tiny, output):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS"))
    model.add_adapter("b", IA3Config(task_type="SEQ_CLS"))
    model.add_adapter("c", IA3Config())
    base = output(model)
    with torch.no_grad():
        model.classifier.modules_to_save["b"].bias += 1
        model.classifier.modules_to_save["default"].bias += 2
    torch.testing.assert_close(output(model), base + 2)
    model.set_adapter("b")
    torch.testing.assert_close(output(model), base + 1)
    model.set_adapter("c")
    assert torch.equal(output(model), base)
    model.set_adapter(["c", "b"])
    torch.testing.assert_close(output(model), base + 1)


def test_a_copy_in_full_is_free_of_other_adapters(tiny, tmp_path):
    """A vector of one adapter inside the module that another trains in full doesn't travel with the copy."""
    model = get_peft_model(tiny("roberta"), IA3Config(target_modules=["classifier.dense"]), adapter_name="a")
    model.add_adapter("b", IA3Config(target_modules=["key"], modules_to_save=["out_proj"]))
    model.add_adapter("c", IA3Config(target_modules=["key"], modules_to_save=["classifier"]))
    copied = model.classifier.modules_to_save["c"]
    assert sorted(copied.state_dict()) == ["dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight"]
    assert {type(module).__name__ for module in copied.modules()} == {"RobertaClassificationHead", "Linear", "Dropout"}
    assert not any(module._forward_hooks for module in copied.modules())
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    again = PeftModel.from_pretrained(tiny("roberta"), tmp_path / "c")
    assert again.modules_to_save == {"classifier"}


def test_integer_activations_are_refused():
    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x).round().to(torch.int32)

    model = get_peft_model(nn.Sequential(Quantised(2, 2)), IA3Config(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"multiplies floating-point activations; this layer's is torch.int32"):
        model(torch.ones(1, 2))


@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["out_proj"]])
def test_layers_whose_call_is_bypassed_are_not_ignored_in_silence(targets):
    """torch's own encoder layer reads its weights directly: the vector must act, or be refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
        try:
            get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=targets))
        except ValueError as error:
            if "out_proj" not in targets:
                raise AssertionError(f"{targets} can act and were refused") from error
            return
        for key, parameter in model.named_parameters():
            if ".ia3_l." in key:
                parameter.fill_(2.0)
        assert not torch.allclose(model(x), before)


# Removing


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2", "falcon-plain"])
@pytest.mark.parametrize("frozen", [False, True])
def test_unloading_leaves_no_trace(tiny, randomise, feed, trace, name, frozen):
    model = tiny(name)
    if frozen:
        next(model.parameters()).requires_grad_(False)
    foreign = model.register_forward_pre_hook(lambda module, args: None)
    before = trace(model)
    config = IA3Config(task_type="SEQ_CLS" if name == "bert" else None)
    get_peft_model(model, config)
    model.add_adapter("b", config)
    model.set_adapter("b")
    randomise(model)
    model(**feed(model))[0].sum().backward()
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        model(**feed(model))
    assert model.unload() is model
    assert before.differences(trace(model)) == []
    foreign.remove()
    get_peft_model(model, config)


def test_unloading_every_kind_of_layer(zoo, trace, randomise, output):
    model = zoo()
    before, base = trace(model), output(model)
    config = IA3Config(target_modules=EVERY_LAYER, feedforward_modules=EVERY_LAYER[2::2])
    randomise(get_peft_model(model, config))
    assert not torch.allclose(output(model), base)
    model.unload()
    assert before.differences(trace(model)) == []
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("asked", [True, False])
def test_unloading_a_checkpointing_model_leaves_no_trace(tiny, trace, asked):
    """Some versions of transformers make the embeddings' output require a gradient by themselves."""
    model = tiny("t5")
    model.gradient_checkpointing_enable()
    if not asked:
        model.disable_input_require_grads()
        del model._require_grads_hooks
    before = trace(model)
    get_peft_model(model, IA3Config())
    assert model._require_grads_hooks
    model.unload()
    assert before.differences(trace(model)) == []


def test_unloading_keeps_the_input_gradients_that_were_asked_for(tiny, trace):
    model = tiny("t5")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    before = trace(model)
    get_peft_model(model, IA3Config()).unload()
    assert before.differences(trace(model)) == []


def test_deleting_an_adapter_leaves_no_trace_of_it(tiny, randomise, output, trace):
    model = randomise(get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS")))
    before, expected = trace(model), output(model)
    model.add_adapter("b", IA3Config(target_modules=["query", "key"], modules_to_save=["pooler"]))
    model.delete_adapter("b")
    assert before.differences(trace(model)) == []
    assert torch.equal(output(model), expected)
    assert list(model.peft_config) == ["default"]


def test_deleting_the_active_adapter_activates_another(tiny, randomise, caplog):
    model = _three(tiny, randomise)
    with caplog.at_level(logging.WARNING, "ia3"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert "'b' is active now" in caplog.text
    assert all(_flags(model, "b"))
    model.set_adapter(["b", "c"])
    model.delete_adapter("b")
    assert model.active_adapters == ["c"]


def test_deleting_the_only_adapter_leaves_the_base_frozen_and_ready(tiny, randomise, output, tmp_path, trace):
    base = tiny("t5")
    before, expected = trace(base), output(base)
    model = randomise(get_peft_model(base, IA3Config(), "a"))
    model.delete_adapter("a")
    assert torch.equal(output(model), expected)
    assert (model.peft_config, model.active_adapters, model.has_active_enabled_adapter) == ({}, [], False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"no adapter to save.*add_adapter"):
        model.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no adapter here: add_adapter"):
        _ = model.active_peft_config
    model.add_adapter("a", IA3Config())
    model.set_adapter("a")
    assert not torch.equal(output(randomise(model)), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".ia3_l." in name
    }
    model.delete_adapter("a")
    assert before.differences(trace(model.unload())) == []


def test_deleting_keeps_an_adapter_in_inference_mode_frozen(tiny):
    model = get_peft_model(tiny("t5"), IA3Config(), adapter_name="a")
    model.add_adapter("b", IA3Config(inference_mode=True))
    model.delete_adapter("a")
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_a_merged_adapter_is_refused(tiny, randomise, trace):
    model = _three(tiny, randomise)
    model.merge_adapter(["b"])
    before = trace(model)
    with pytest.raises(ValueError, match="'b' is merged"):
        model.delete_adapter("b")
    assert before.differences(trace(model)) == []


def test_swapped_again_by_another_library(tiny, randomise, trace, output):
    """Sharding puts a subclass on top; unloading takes ours from under it."""
    model = tiny("bert")
    cls, base = type(model), output(model)
    randomise(get_peft_model(model, IA3Config(task_type="SEQ_CLS")))
    sharded = type("Sharded" + cls.__name__, (type(model),), {"extra": 1})
    model.__class__ = sharded
    clone = copy.deepcopy(model)
    assert type(clone) is sharded
    assert torch.equal(output(clone), output(model))
    model.unload()
    assert type(model).__bases__ == (cls,)
    assert model.extra == 1
    assert not isinstance(model, PeftModel)
    assert torch.equal(output(model), base)


# Injecting


def test_injecting_keeps_the_class(tiny, randomise, output):
    model = tiny("t5")
    cls, config = type(model), IA3Config()
    assert inject_adapter_in_model(config, model) is model
    assert type(model) is cls
    assert model.peft_config["default"].target_modules == {"k", "v", "wo"}
    expected = output(randomise(get_peft_model(tiny("t5"), IA3Config())))
    assert torch.equal(output(randomise(model)), expected)
    inject_adapter_in_model(config, model, "second")  # active then, as in PEFT
    assert torch.equal(output(model), output(tiny("t5")))
    assert all(_flags(model, "second"))
    assert not any(_flags(model, "default"))
    assert config.target_modules is None


def test_injecting_values(tiny, randomise, output):
    source = randomise(get_peft_model(tiny("t5"), IA3Config()))
    tensors = source.get_adapter_state_dict()
    model = inject_adapter_in_model(IA3Config(), tiny("t5"), state_dict=tensors, low_cpu_mem_usage=True)
    assert torch.equal(output(model), output(source))


def test_injecting_wrong_values_leaves_the_model_as_it_was(tiny, trace):
    model = tiny("t5")
    before = trace(model)
    with pytest.raises(ValueError, match="unknown"):
        inject_adapter_in_model(IA3Config(), model, state_dict={"x.ia3_l": torch.ones(2, 1)})
    assert before.differences(trace(model)) == []


def test_a_facade_over_an_injected_adapter(tiny, trace):
    model = tiny("t5")
    before = trace(model)
    inject_adapter_in_model(IA3Config(), model, "a")
    get_peft_model(model, IA3Config(), adapter_name="b")
    assert sorted(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["b"]
    model.unload()
    assert before.differences(trace(model)) == []


def test_without_an_adapter_there_is_a_clear_error(tiny):
    from ia3 import get_peft_model_state_dict

    with pytest.raises(ValueError, match="This T5ForConditionalGeneration carries no adapter: call get_peft_model"):
        get_peft_model_state_dict(tiny("t5"))


# Many adapters


def test_the_thousandth_adapter_is_as_quick_as_the_first(tiny):
    many, few = (get_peft_model(tiny("llama"), IA3Config()) for _ in range(2))
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    for n in range(1000):
        many.add_adapter(f"a{n}", config)

    def time_of(call, name, *more):
        begin = time.thread_time()
        call(name, *more)
        return time.thread_time() - begin

    # In turns, so that what else the machine does hits both.
    for method, more in (("add_adapter", (config,)), ("set_adapter", ())):
        times = [[time_of(getattr(each, method), f"b{n}", *more) for each in (many, few)] for n in range(50)]
        of_many, of_few = map(min, zip(*times, strict=True))
        assert of_many < 3 * of_few, method


def test_an_argument_for_the_base_is_said_to_do_nothing(tiny, tmp_path, caplog):
    get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny("t5"), tmp_path, device_map={"": "cpu"})
    assert "device_map does nothing here" in caplog.text
    for value in (1, None):
        with pytest.raises(TypeError, match=r"Unknown arguments \['nonsense'\]: expected torch_device or"):
            PeftModel.from_pretrained(tiny("t5"), tmp_path, nonsense=value)


def test_a_class_of_a_task_gives_it_to_a_configuration_without_one(tiny, tmp_path):
    model = PeftModelForSequenceClassification(tiny("bert"), IA3Config(target_modules=["key"]))
    assert isinstance(model, PeftModelForSequenceClassification)
    assert all(p.requires_grad for p in model.classifier.modules_to_save["default"].parameters())
    get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path)
    loaded = PeftModelForSeq2SeqLM.from_pretrained(tiny("t5"), tmp_path)
    assert isinstance(loaded, PeftModelForSeq2SeqLM)


def test_arguments_that_scripts_pass_on_saving(tiny, tmp_path):
    model = get_peft_model(tiny("t5"), IA3Config())
    model.save_pretrained(tmp_path, save_function=torch.save, is_main_process=True)
    with pytest.raises(ValueError, match="concerns other methods"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    with pytest.raises(TypeError, match=r"write \['default'\]"):
        model.save_pretrained(tmp_path, selected_adapters="default")
    with pytest.raises(ValueError, match="needs a name"):
        model.set_adapter([])
    with pytest.raises(ValueError, match="names an adapter twice"):
        model.set_adapter(["default", "default"])
    with pytest.raises(TypeError, match="takes a list of names"):
        IA3Config(modules_to_save="classifier")
    with pytest.raises(ValueError, match="one method, IA3"):
        IA3Config(peft_type="LORA")
    with pytest.raises(ValueError, match=r"lacks 16.*such as"):
        model.save_pretrained(tmp_path, state_dict={})


def test_a_failing_copy_leaves_the_model_as_it_was(tiny, trace, monkeypatch):
    model = tiny("bert")
    before = trace(model)
    monkeypatch.setattr("ia3.adapter.deepcopy", _fail_on_modules)
    with pytest.raises(RuntimeError, match="no copy"):
        get_peft_model(model, IA3Config(task_type="SEQ_CLS"))
    assert before.differences(trace(model)) == []


def _fail_on_modules(value):
    if isinstance(value, nn.Module):
        raise RuntimeError("no copy")
    return copy.deepcopy(value)


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no fp8")
def test_an_fp8_weight_gets_an_fp32_vector():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model = get_peft_model(nn.Sequential(linear), IA3Config(target_modules=["0"]), autocast_adapter_dtype=False)
    assert model[0].ia3_l.default.dtype == torch.float32


def test_configurations_follow_the_adapters(tiny, tmp_path):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"))
    config = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k"], feedforward_modules=[], revision="r")
    model.peft_config["default"] = config
    assert model.active_peft_config is model._state.adapters["default"].config is config
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).revision == "r"
    assert type(copy.deepcopy(model.peft_config)) is dict
    with pytest.raises(ValueError, match=r"no adapter 'other' here: add_adapter\('other', config\)"):
        model.peft_config["other"] = config
    for change in (
        lambda held: held.pop("default"),
        lambda held: held.update(default=config),
        lambda held: held.clear(),
        lambda held: held.__delitem__("default"),
    ):
        with pytest.raises(TypeError, match="follows the adapters"):
            change(model.peft_config)
    with pytest.raises(ValueError, match=r"one configuration for each of \['default'\], got \['other'\]"):
        model.peft_config = {"other": config}
    assert list(model.peft_config) == ["default"]


def test_injected_adapters_are_among_those_of_the_model_that_takes_more(tiny):
    base = tiny("t5")
    inject_adapter_in_model(IA3Config(task_type="SEQ_2_SEQ_LM"), base, "first")
    model = get_peft_model(base, IA3Config(task_type="SEQ_2_SEQ_LM"), "second")
    assert list(model.peft_config) == ["first", "second"]
    assert "peft_config" not in vars(model)
    assert not hasattr(model.unload(), "peft_config")
