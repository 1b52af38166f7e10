"""The forward in training: the base model's own numbers, whoever reads what of its output."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_llama import adapted_causal, texts_of
from test_t5 import FORMS, adapted, batch_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, BertLMHeadModel, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from builders import models_own
from ia3 import IA3Config, get_peft_model
from ia3.fast import output as fused_output
from replayed import recording

CAUSAL = ("llama", "mistral", "qwen2")


def start(tiny: Any, randomise: Any, form: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    if form in CAUSAL:
        return adapted_causal(tiny, randomise, form, dtype).train(), texts_of()
    return without_dropout(adapted(tiny, randomise, form, dtype)).train(), batch_of()


def is_fused(output: Any) -> bool:
    nodes = [output.loss.grad_fn]
    for _ in range(3):  # what divides it by a number of items
        nodes += [before for node in nodes if node is not None for before, _ in node.next_functions[:1]]
    return "_WithGradientBackward" in [type(node).__name__ for node in nodes]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: vector.grad for name, vector in model.named_parameters() if vector.grad is not None}
    model.zero_grad()
    return found


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    model.config.dropout_rate = 0.0
    return model


@pytest.mark.parametrize("form", [*FORMS, *CAUSAL])
def test_loss_and_gradients_are_the_models_own(tiny, randomise, form) -> None:
    model, batch = start(tiny, randomise, form)
    own = models_own(model, **batch)
    (4 * own.loss).backward()
    wanted = gradients(model)
    output = model(**batch)
    assert is_fused(output)
    # The own loss of a causal model is in fp32.
    torch.testing.assert_close(output.loss, own.loss, rtol=1e-10 if form in FORMS else 1e-6, atol=0, check_dtype=False)
    (4 * output.loss).backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9 if form in FORMS else 1e-5, atol=1e-8)


def test_gradients_of_several_batches_add_up(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    other = batch_of(rows=3, source=11, target=2)
    for each in (batch, other):
        (models_own(model, **each).loss / 2).backward()
    wanted = gradients(model)
    (model(**batch).loss / 2).backward()
    (model(**other).loss / 2).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name])
    loss = model(**batch).loss + model(**other).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 4 * wanted[name])


def test_the_number_of_items_of_an_encoders_own_head(caplog) -> None:
    """A language head divides by it, so that its loss is not fused; a classifier's doesn't look at it."""
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    ids = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 3]])
    for head, task, labels, divides in (
        (BertLMHeadModel, "CAUSAL_LM", ids, True),
        (BertForSequenceClassification, "SEQ_CLS", torch.tensor([0, 1]), False),
    ):
        model = get_peft_model(head(config), IA3Config(task_type=task)).train()
        for items in (None, torch.tensor(11)):
            batch = {"input_ids": ids, "labels": labels, "num_items_in_batch": items}
            with caplog.at_level("INFO", logger="ia3"):
                output = model(**batch)
            assert is_fused(output) != (divides and items is not None)
            torch.testing.assert_close(output.loss, models_own(model, **batch).loss)
    assert caplog.text.count("divides the loss by num_items_in_batch") == 1


@pytest.mark.parametrize("form", ["t5", "llama"])
def test_the_number_of_items_as_the_models_own(tiny, randomise, form) -> None:
    model, batch = start(tiny, randomise, form, torch.float32)
    for items in (7, torch.tensor(7)):
        output = model(**batch, num_items_in_batch=items)
        assert is_fused(output)
        torch.testing.assert_close(output.loss, models_own(model, **batch, num_items_in_batch=items).loss)


@pytest.mark.parametrize("form", ["t5 gated", "llama"])
def test_what_is_read_is_the_models_own(tiny, randomise, form) -> None:
    model, batch = start(tiny, randomise, form, torch.float32)
    own = models_own(model, **batch)
    readings: list[Callable[[Any], Any]] = [
        lambda output: output.logits,
        lambda output: output["logits"],
        lambda output: output[1],
        lambda output: output.to_tuple()[1],
        lambda output: dict(output)["logits"],
        lambda output: dict(output.items())["logits"],
        lambda output: list(output.values())[1],
        lambda output: output.get("logits"),
        lambda output: output[:2][1],
        lambda output: pickle.loads(pickle.dumps(output.logits.detach())),
    ]
    for read in readings:
        model(**batch)  # after a reading by the model itself
        output = model(**batch)
        assert is_fused(output)
        assert torch.equal(read(output), own.logits)
        assert type(output) is type(own)
        assert list(output.keys()) == list(own.keys())
        assert is_fused(output)
    for again in range(2):  # by hand, and by the model itself since the last output was read
        assert "logits" in model(**batch)
        assert len(model(**batch)) == len(own)
        assert "logits=" in repr(model(**batch))
        assert model(**batch).get("hidden_states", again) == again
        with pytest.raises(KeyError):
            model(**batch)["nothing"]


def test_the_loss_alone_reads_nothing(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    output = model(**batch)
    assert isinstance(output, Seq2SeqLMOutput)
    assert isinstance(output, dict)
    assert "loss" in output
    assert output["loss"] is output[0] is output.loss
    output.loss = output.loss / 2
    assert output["loss"] is output.loss
    assert type(output) is not Seq2SeqLMOutput  # which it becomes when more is read
    output.logits = output.logits[:1]
    assert output["logits"].shape[0] == 1
    assert type(output) is Seq2SeqLMOutput


def test_logits_lead_back_to_the_vectors(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    functional.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten()).backward()
    found = gradients(model)
    model(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def test_logits_read_after_the_step_are_from_before_it(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    before = models_own(model, **batch).logits.detach()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    output = model(**batch)
    output.loss.backward()
    optimizer.step()
    assert not torch.allclose(models_own(model, **batch).logits, before)
    with torch.no_grad():
        torch.testing.assert_close(output.logits, before)


def test_dropout_is_as_the_models_own(tiny, randomise) -> None:
    model, batch = adapted(tiny, randomise, "t5 gated").train(), batch_of()
    torch.manual_seed(0)
    output = model(**batch)
    assert is_fused(output)
    found = torch.stack([output.loss.detach(), *(model(**batch).loss.detach() for _ in range(199))])
    torch.manual_seed(0)
    assert float(model(**batch).loss.detach()) == float(output.loss.detach())
    own = torch.stack([models_own(model, **batch).loss.detach() for _ in range(200)])
    assert abs(found.mean() - own.mean()) < 4 * own.std() / 200**0.5 * 2**0.5
    assert len(found.unique()) > 190


def frozen_eval(model: Any, batch: Any) -> Any:
    model.decoder.eval()
    return batch


def hook(model: Any, batch: Any) -> Any:
    model.encoder.block[0].register_forward_hook(lambda module, args, output: output)
    return batch


def base_trained(model: Any, batch: Any) -> Any:
    model.encoder.final_layer_norm.weight.requires_grad_()
    return batch


def vector_frozen(model: Any, batch: Any) -> Any:
    next(each for each in model.parameters() if each.requires_grad).requires_grad_(False)
    return batch


def other_dropout(model: Any, batch: Any) -> Any:
    model.encoder.dropout.p = 0.5
    torch.manual_seed(0)
    return batch


def checkpointing(model: Any, batch: Any) -> Any:
    model.gradient_checkpointing_enable()
    return batch


def two_adapters(model: Any, batch: Any) -> Any:
    model.add_adapter("more", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter(["default", "more"])
    return batch


def merged(model: Any, batch: Any) -> Any:
    model.merge_adapter()
    return batch


def hidden_states(model: Any, batch: Any) -> Any:
    return {**batch, "output_hidden_states": True}


def configured_hidden_states(model: Any, batch: Any) -> Any:
    model.config.output_hidden_states = model.encoder.config.output_hidden_states = True
    model.decoder.config.output_hidden_states = True
    return batch


def a_tuple(model: Any, batch: Any) -> Any:
    return {**batch, "return_dict": False}


def hole_in_the_mask(model: Any, batch: Any) -> Any:
    mask = batch["attention_mask"].clone()
    mask[0, 2] = 0
    return {**batch, "attention_mask": mask}


def other_decoder_inputs(model: Any, batch: Any) -> Any:
    return {**batch, "decoder_input_ids": batch["labels"].clamp(min=0)}


def embeddings(model: Any, batch: Any) -> Any:
    ids = batch["input_ids"]
    return {**batch, "input_ids": None, "inputs_embeds": model.shared(ids)}


def nothing_to_learn(model: Any, batch: Any) -> Any:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


LEFT = [
    frozen_eval, hook, base_trained, vector_frozen, other_dropout, checkpointing, two_adapters, merged, hidden_states,
    configured_hidden_states, a_tuple, hole_in_the_mask, other_decoder_inputs, embeddings, nothing_to_learn,
]  # fmt: skip


@pytest.mark.parametrize("change", LEFT, ids=lambda change: change.__name__)
@pytest.mark.parametrize("before", [False, True])
def test_what_the_model_itself_must_do(tiny, randomise, change, before) -> None:
    """Changed before the first call or behind it."""
    model, batch = start(tiny, randomise, "t5 gated", torch.float32)
    if not before:
        assert is_fused(model(**batch))
    batch = change(model, batch)
    torch.manual_seed(0)
    output = model(**batch)
    torch.manual_seed(0)
    own = models_own(model, **batch)
    loss, expected = (each[0] if isinstance(each, tuple) else each.loss for each in (output, own))
    assert torch.equal(loss, expected) or bool(loss.isnan() & expected.isnan())
    assert type(loss.grad_fn).__name__ != "_WithGradientBackward"


def test_the_mode_and_the_gradient_decide(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated", torch.float32)
    with torch.no_grad():
        assert model(**batch).loss.grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(model(**batch))
    assert not is_fused(model.eval()(**batch))
    ids = batch.pop("input_ids")
    model.train()
    assert not is_fused(model(ids, **batch))
    assert model(input_ids=ids, decoder_input_ids=batch["labels"].clamp(min=0)).loss is None


def test_batches_as_collators_make_them(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    assert is_fused(model(**given, use_cache=False))
    torch.testing.assert_close(model(**given).loss, models_own(model, **batch).loss)
    del batch["attention_mask"]
    assert is_fused(model(**batch))
    torch.testing.assert_close(model(**batch).loss, models_own(model, **batch).loss)


def test_what_changes_is_heard(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    assert is_fused(model(**batch))
    model.add_adapter("more", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("more")
    assert is_fused(model(**batch))
    torch.testing.assert_close(model(**batch).loss, models_own(model, **batch).loss)
    model(**batch).loss.backward()
    assert all(".more" in name for name in gradients(model))
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(2)
    torch.testing.assert_close(model(**batch).loss, models_own(model, **batch).loss)
    with model.disable_adapter():
        assert not is_fused(model(**batch, adapter_names=None))
    names = ["default", "more"] * 2 + ["default"]
    assert not is_fused(model(**batch, adapter_names=names))
    assert is_fused(model(**batch))
    base = model.unload().train()
    assert "forward" not in vars(type(base)) or not hasattr(type(base).forward, "_ia3_own")
    assert not is_fused(base(**batch))


def test_copies_begin_anew(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    wanted = model(**batch).loss
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        output = other(**batch)
        assert is_fused(output)
        torch.testing.assert_close(output.loss, wanted)
        output.loss.backward()
        assert gradients(other)
        assert not gradients(model)


def test_torch_func_sees_its_own_tensors(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    wanted = model(**batch)
    assert is_fused(wanted)
    vectors = {name: each for name, each in model.named_parameters() if each.requires_grad}
    doubled = {name: 2 * each.detach() for name, each in vectors.items()}
    assert not torch.allclose(torch.func.functional_call(model, doubled, (), batch).loss, wanted.loss)
    found = torch.func.grad(lambda these: torch.func.functional_call(model, these, (), batch).loss)(
        {name: each.detach() for name, each in vectors.items()}
    )
    assert is_fused(model(**batch))
    wanted.loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def test_who_reads_the_rest_gets_the_models_own_from_then_on(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    outputs = [model(**batch) for _ in range(2)]
    assert all(map(is_fused, outputs))
    assert outputs[1].logits.grad_fn is not None
    for _ in range(2):
        output = model(**batch)
        assert not is_fused(output)
        assert isinstance(output, Seq2SeqLMOutput)
        output.logits.retain_grad()
        output.loss.backward()
        assert output.logits.grad is not None
    assert not is_fused(model(**batch))  # nothing of it is read
    assert is_fused(model(**batch))


def test_reading_leaves_no_trace(tiny, randomise) -> None:
    model, batch = adapted(tiny, randomise, "t5 gated").train(), batch_of()
    assert model.config.dropout_rate > 0
    states = []
    for reads in (False, True):
        torch.manual_seed(0)
        output = model(**batch)
        if reads:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert output.logits.requires_grad
            assert output.logits.dtype is torch.float64
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_rest_is_read_in_the_mode_of_its_call(tiny, randomise) -> None:
    model, batch = adapted(tiny, randomise, "t5 gated").train(), batch_of()
    output = model(**batch)
    still = models_own(model.eval(), **batch).logits
    assert not torch.allclose(output.logits, still)
    assert not any(module.training for module in model.modules())


def another_adapter(model: Any, batch: Any) -> None:
    model.add_adapter("more", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("more")


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "another adapter": another_adapter,
    "no adapter": lambda model, batch: model.unload(),
    "merged": lambda model, batch: model.merge_adapter(),
    "cast": lambda model, batch: model.float(),
    "hooked": lambda model, batch: model.shared.register_forward_hook(lambda *_: None),
    "other inputs": lambda model, batch: batch["input_ids"].fill_(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_can_not_be_read_any_more_says_so(tiny, randomise, change) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    output = model(**batch)
    change(model, batch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="read logits before, or call the model again"):
            _ = output.logits


def test_others_of_its_class_are_ordinary(tiny, randomise) -> None:
    from accelerate.utils import convert_to_fp32, send_to_device
    from torch.utils import _pytree

    model, batch = start(tiny, randomise, "t5 gated")
    assert type(type(model(**batch))(loss=torch.ones(()))) is Seq2SeqLMOutput
    kinds = (
        lambda output: convert_to_fp32(output),
        lambda output: send_to_device(output, "cpu"),
        lambda output: _pytree.tree_map(lambda each: each, output),
        lambda output: type(output)((key, output[key]) for key in output),
        lambda output: copy.copy(output),
        lambda output: pickle.loads(pickle.dumps(_detached(output))),
    )
    for make in kinds:
        for _ in range(2):
            output = model(**batch)
        assert is_fused(output)
        assert set(make(output)) == {"loss", "logits", "past_key_values", "encoder_last_hidden_state"}
    assert model(**batch)
    output = model(**batch)
    assert output.popitem()[0] == "encoder_last_hidden_state"


def _detached(output: Any) -> Any:
    for name in ("loss", "logits", "encoder_last_hidden_state"):
        output[name] = output[name].detach()
    return output


def test_checkpoints_by_storages_are_whole(tiny, randomise, tmp_path) -> None:
    from accelerate import Accelerator
    from safetensors.torch import load_file, save_model

    model, batch = start(tiny, randomise, "t5 gated", torch.float32)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert is_fused(model(**batch))
    accelerator.save_state(tmp_path / "state")
    saved = load_file(tmp_path / "state" / "model.safetensors")
    lost = set(tensors) - set(saved)
    assert all("embed_tokens" in name or name == "lm_head.weight" for name in lost), lost
    accelerator.load_state(tmp_path / "state")
    save_model(model, str(tmp_path / "model.safetensors"))
    weight = model.encoder.block[0].layer[0].SelfAttention.k.weight
    assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    assert is_fused(model(**batch))
    torch.testing.assert_close(model(**batch).loss, models_own(model, **batch).loss)


def test_nothing_is_kept_alive(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    assert is_fused(model(**batch))
    together = weakref.ref(model.__dict__["_ia3_fused_loss"].loss.losses.weights.stacks[0].layers[0].project.weight)
    gc.disable()
    try:
        model.float()
        assert together() is None
        assert is_fused(model(**batch))
        base = model.unload()
        assert "_ia3_fused_loss" not in vars(base)
        alive = weakref.ref(base.encoder.block[0].layer[0].SelfAttention.q)
        del model, base
        assert alive() is None
    finally:
        gc.enable()


def test_second_derivatives_are_refused(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    vectors = [each for each in model.parameters() if each.requires_grad]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(model(**batch).loss, vectors, create_graph=True)


def class_with_a_forward(module: Any) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(other, self).forward(*args, **kwargs)

    other = type(type(module).__name__, (type(module),), {"forward": forward, "__module__": type(module).__module__})
    return other


def swap_class(path: str) -> Callable[[Any, Any], None]:
    def change(model: Any, patch: Any) -> None:
        module = model.get_submodule(path)
        module.__class__ = class_with_a_forward(module)

    return change


def patch_class(path: str) -> Callable[[Any, Any], None]:
    def change(model: Any, patch: Any) -> None:
        owner = type(model.get_submodule(path)) if path else T5ForConditionalGeneration
        old = owner.forward
        patch.setattr(owner, "forward", functools.wraps(old)(lambda self, *args, **kwargs: old(self, *args, **kwargs)))

    return change


def set_attribute(path: str, name: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda model, patch: setattr(model.get_submodule(path), name, value)


def set_config(name: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda model, patch: setattr(model.config, name, value)


def lora(path: str) -> Callable[[Any, Any], None]:
    import peft

    def change(model: Any, patch: Any) -> None:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[path], init_lora_weights=False), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".ia3_l." in name)

    return change


T5_CHANGES = {
    "a linear's class": swap_class("encoder.block.0.layer.0.SelfAttention.o"),
    "a norm's class": swap_class("encoder.block.0.layer.0.layer_norm"),
    "the model's class is patched": patch_class(""),
    "attention is patched": patch_class("encoder.block.0.layer.0.SelfAttention"),
    "a forward of its own": set_attribute("encoder.block.0.layer.1", "forward", lambda *args: None),
    "another norm": set_attribute("decoder.block.0.layer.0", "layer_norm", nn.RMSNorm(16, 1e-6)),
    "dropout of an attention": set_attribute("encoder.block.0.layer.0.SelfAttention", "dropout", 0.5),
    "LoRA": lora("o"),
    "a hook before backward": lambda model, patch: model.encoder.register_full_backward_pre_hook(lambda *_: None),
    "a hook of backward": lambda model, patch: model.encoder.register_full_backward_hook(lambda *_: None),
    "attention in evaluation mode": lambda model, patch: model.encoder.block[0].layer[0].SelfAttention.eval(),
}
LLAMA_CHANGES = {
    "another loss": lambda model, patch: setattr(model, "loss_function", lambda logits, **_: logits.sum() * 0),
    "fewer layers": lambda model, patch: setattr(model.model, "layers", model.model.layers[:1]),
    "dropout in the configuration": set_config("attention_dropout", 0.5),
    "LoRA": lora("o_proj"),
}
# What the block reads from the model, or what a comparison with the model's own forward shows.
FOLLOWED = {
    "t5 gated: another activation": set_attribute("encoder.block.0.layer.1.DenseReluDense", "act", nn.SiLU()),
    "t5 gated: epsilon": set_attribute("decoder.block.0.layer.0.layer_norm", "variance_epsilon", 0.1),
    "t5 gated: epsilon in the configuration": set_config("layer_norm_epsilon", 0.1),
    "llama: the head's bias": set_attribute("lm_head", "bias", nn.Parameter(torch.ones(64), requires_grad=False)),
    "llama: half a bias": set_attribute(
        "model.layers.0.self_attn.v_proj", "bias", nn.Parameter(torch.ones(8), requires_grad=False)
    ),
    "llama: epsilon": set_attribute("model.norm", "variance_epsilon", 0.1),
    "llama: epsilon in the configuration": set_config("rms_norm_eps", 0.1),
    "llama: scaling": set_attribute("model.layers.0.self_attn", "scaling", 1.0),
    "llama: fewer layers by the configuration": set_config("num_hidden_layers", 1),
}
ALL_CHANGES = [("t5 gated", *each) for each in T5_CHANGES.items()] + [
    ("llama", *each) for each in LLAMA_CHANGES.items()
]


@pytest.mark.parametrize(("form", "change"), [(form, change) for form, _, change in ALL_CHANGES],
                         ids=[f"{form}: {name}" for form, name, _ in ALL_CHANGES])  # fmt: skip
@pytest.mark.parametrize("before", [True, False])
def test_another_model_is_left_to_itself(tiny, randomise, monkeypatch, form, change, before) -> None:
    model, batch = start(tiny, randomise, form, torch.float32)
    if not before:
        assert is_fused(model(**batch))
    change(model, monkeypatch)
    try:
        assert _state_of(model, batch) is None
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("before", [True, False])
def test_a_loss_is_that_of_the_model_as_it_is_now(tiny, randomise, name, before) -> None:
    model, batch = start(tiny, randomise, name.partition(":")[0], torch.float32)
    if not before:
        assert is_fused(model(**batch))
    FOLLOWED[name](model, None)
    trained = [each for each in model.parameters() if each.requires_grad]
    expected = models_own(model, **batch).loss
    found = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, trained, materialize_grads=True)
    for gradient, other in zip(torch.autograd.grad(found, trained, materialize_grads=True), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("form", "name"), [
    *((form, name) for form, name, _ in ALL_CHANGES), *((name.partition(":")[0], name) for name in FOLLOWED),
])  # fmt: skip
def test_of_a_changed_model_nobody_gets_what_a_graph_made(tiny, randomise, monkeypatch, form, name) -> None:
    """A recorded graph goes ahead of the look at the model."""
    model, batch = start(tiny, randomise, form, torch.float32)
    change = FOLLOWED.get(name) or {name: each for kind, name, each in ALL_CHANGES if kind == form}[name]
    with recording() as recorded:
        replays = counted(monkeypatch)
        for _ in range(3):
            assert is_fused(model(**batch))
        assert len(recorded) == 1
        assert len(replays) == 2
        state = model.__dict__[fused_output._STATE]
        before = state.loss
        change(model, monkeypatch)
        assert state.replay(batch) is None
        assert _state_of(model, batch) is not before
        monkeypatch.undo()


def counted(monkeypatch: Any) -> list[object]:
    """Grows with what `_State.replay` finds."""
    found: list[object] = []
    replay = fused_output._State.replay

    def count(self: Any, batch: Any) -> Any:
        made = replay(self, batch)
        found.extend([] if made is None else [made])
        return made

    monkeypatch.setattr(fused_output._State, "replay", count)
    return found


def test_what_is_replayed_is_the_models_own(tiny, randomise, monkeypatch) -> None:
    """Another batch of the same shape, with other vectors; and one of another shape."""
    model, batch = start(tiny, randomise, "t5 gated")
    with recording():
        replays = counted(monkeypatch)
        for turn in range(4):
            data = batch if turn < 3 else {name: tensor[:2] for name, tensor in batch.items()}
            data = {**data, "labels": data["labels"].roll(turn, 1)}
            models_own(model, **data).loss.backward()
            wanted = gradients(model)
            output = model(**data)
            output.loss.backward()
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-10)
            with torch.no_grad():
                for name, vector in model.named_parameters():
                    if name in wanted:
                        vector.mul_(1.1)
        assert len(replays) == 2


def test_no_graph_reads_where_a_weight_was(tiny, randomise, monkeypatch) -> None:
    """Whose memory may have been given back."""
    model, batch = start(tiny, randomise, "t5 gated")
    with recording():
        for _ in range(2):
            assert is_fused(model(**batch))
        ran: list[object] = []
        state = model.__dict__[fused_output._STATE]
        for key, graph in state.computation.graphs.items():
            state.computation.graphs[key] = dataclasses.replace(graph, replay=lambda: ran.append(None))
        assert state.replay(batch) is not None
        assert len(ran) == 1
        weight = model.decoder.final_layer_norm.weight
        weight.data = weight.data.clone()
        assert state.replay(batch) is None
        assert len(ran) == 1


def _state_of(model: Any, batch: Any) -> Any:
    """The fused loss for the model as it is."""
    state = model.__dict__.setdefault(fused_output._STATE, fused_output._State())
    return state.loss_for(model)


def test_global_hooks_are_called(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    assert is_fused(model(**batch))
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert not is_fused(model(**batch))
    finally:
        handle.remove()
    assert model.encoder in seen
    assert is_fused(model(**batch))


def test_a_class_patched_later_is_called(tiny, randomise, monkeypatch) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    old = T5ForConditionalGeneration.forward

    def ten_times(self: Any, **kwargs: Any) -> Any:
        output = old(self, **kwargs)
        output.loss = 10 * output.loss
        return output

    before = model(**batch).loss
    monkeypatch.setattr(T5ForConditionalGeneration, "forward", ten_times)
    torch.testing.assert_close(model(**batch).loss, 10 * before)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, 10 * before)


def test_replicas_of_data_parallel(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "t5 gated")
    assert is_fused(model(**batch))
    replica = model._replicate_for_data_parallel()
    assert replica._is_replica
    assert fused_output._output(replica, batch) is None


def test_no_items_at_all(tiny, randomise) -> None:
    model, batch = start(tiny, randomise, "llama", torch.float32)
    assert model(**batch, num_items_in_batch=0).loss.isinf()


def test_labels_of_a_regression_in_bfloat16() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.num_labels, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 1, 0.0, 0.0
    model = get_peft_model(BertForSequenceClassification(config), IA3Config(task_type="SEQ_CLS")).train()
    model = model.to(torch.bfloat16)
    batch = {
        "input_ids": torch.tensor([[2, 5, 6], [2, 8, 9]]),
        "labels": torch.tensor([0.5, 1.5], dtype=torch.bfloat16),
    }
    output = model(**batch)
    assert is_fused(output)
    torch.testing.assert_close(output.loss, models_own(model, **batch).loss, rtol=3e-2, atol=0)
    output.loss.backward()


def test_inputs_made_in_inference_mode(tiny, randomise) -> None:
    """Nobody counts how often such a tensor is changed."""
    model, batch = start(tiny, randomise, "t5 gated")
    with torch.inference_mode():
        made = {name: batch[name].clone() for name in ("input_ids", "attention_mask")}
    output = model(**{**batch, **made})
    assert is_fused(output)
    output.loss.backward()
    assert torch.equal(output.logits, model(**batch).logits)
