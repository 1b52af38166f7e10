"""What scripts written for PEFT do around an adapter: wrappers, disabling, half precision, folders of another shape."""

import logging
import os

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import FullyShardedDataParallel

from ia3 import (
    IA3Config,
    PeftConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from ia3.config import CONFIG_NAME
from ia3.tensors import SAFETENSORS_NAME


@pytest.fixture
def one_process(tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    destroy_process_group()


def _fsdp(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def _fsdp_within(model):
    model.decoder = _fsdp(model.decoder)
    return _fsdp(model)


WRAPPERS = [
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.compile,
    _fsdp,
    _fsdp_within,
    lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_wrapped_models_adapter_is_found(tiny, randomise, one_process, wrap, more):
    model = randomise(get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM", **more)))
    expected = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    wrapped = wrap(model)
    found = get_peft_model_state_dict(wrapped)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_wrapped_model_takes_values(tiny, randomise, output):
    model = randomise(get_peft_model(tiny("t5"), IA3Config()))
    expected, tensors = output(model), {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    randomise(model, seed=9)
    set_peft_model_state_dict(nn.DataParallel(model), tensors)
    assert torch.equal(output(model), expected)


def test_within_disable_adapter_nothing_requires_a_gradient(tiny):
    model = get_peft_model(tiny("t5"), IA3Config(), "a")
    model.add_adapter("b", IA3Config())
    model.set_requires_grad("b")

    def trained():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    before = trained()
    with model.disable_adapter():
        assert trained() == set()
        with model.disable_adapter():
            assert trained() == set()
        assert trained() == set()
    assert trained() == before
    model.disable_adapter_layers()
    assert (trained(), model.has_active_enabled_adapter) == (set(), False)
    model.enable_adapter_layers()
    assert (trained(), model.has_active_enabled_adapter) == (before, True)


def test_choosing_or_deleting_within_disable_adapter_stays_after_it(tiny):
    model = get_peft_model(tiny("t5"), IA3Config(), "a")
    model.add_adapter("b", IA3Config())
    with model.disable_adapter():
        model.set_adapter("b")
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"b"}
    with model.disable_adapter():
        model.delete_adapter("b")
    assert model.active_adapters == ["a"]


def test_an_exception_within_disable_adapter_gives_the_gradients_back(tiny):
    model = get_peft_model(tiny("t5"), IA3Config())
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [True, False])
def test_modules_trained_in_full_are_fp32_in_a_half_precision_model(tiny, feed, dtype, cast, tmp_path):
    base = tiny("bert", task="SEQ_CLS", dtype=dtype)
    batch = feed(base)
    expected = base(**batch).logits
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"), autocast_adapter_dtype=cast)
    held = {p.dtype for p in model.parameters() if p.requires_grad}
    assert held == ({torch.float32} if cast else {dtype})
    logits = model(**batch).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=dtype):
        model(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert", task="SEQ_CLS", dtype=dtype), tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    theirs = peft.PeftModel.from_pretrained(tiny("bert", task="SEQ_CLS", dtype=dtype), str(tmp_path))
    torch.testing.assert_close(theirs(**batch).logits, logits, rtol=2e-2, atol=2e-2)
    assert {p.dtype for p in model.merge_and_unload().parameters()} == {dtype}


def test_a_frozen_adapter_in_training_mode_is_said_once(tiny, tmp_path, caplog):
    get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("t5"), tmp_path)
    with caplog.at_level(logging.WARNING, "ia3"):
        model.train()
        model.train()
    assert caplog.text.count("is_trainable=True") == 1
    caplog.clear()
    PeftModel.from_pretrained(tiny("t5"), tmp_path, is_trainable=True).train()
    chosen = PeftModel.from_pretrained(tiny("t5"), tmp_path)
    chosen.set_adapter("default")
    chosen.train()
    PeftModel.from_pretrained(tiny("t5"), tmp_path).eval()
    assert "is_trainable" not in caplog.text


def test_another_number_of_classes_is_said(tiny, tmp_path):
    get_peft_model(tiny("bert", task="SEQ_CLS", num_labels=5), IA3Config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained for 5 classes and this model has 3: .*num_labels=5"):
        PeftModel.from_pretrained(tiny("bert", task="SEQ_CLS", num_labels=3), tmp_path)


def test_another_vocabulary_is_said(tiny, tmp_path):
    config = IA3Config(target_modules=["k"], feedforward_modules=[], modules_to_save=["lm_head"])
    get_peft_model(tiny("t5", vocab_size=70, tie_word_embeddings=False), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary was resized"):
        PeftModel.from_pretrained(tiny("t5", tie_word_embeddings=False), tmp_path)


def test_a_folder_with_named_adapters_only_is_explained(tiny, tmp_path):
    get_peft_model(tiny("t5"), IA3Config(), "french").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"but one in \['french'\]: pass subfolder='french'"):
        PeftModel.from_pretrained(tiny("t5"), tmp_path)
    assert PeftModel.from_pretrained(tiny("t5"), tmp_path, subfolder="french").active_adapters == ["default"]


def test_a_mark_at_the_beginning_of_the_configuration_is_read_over(tiny, tmp_path):
    get_peft_model(tiny("t5"), IA3Config()).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert PeftModel.from_pretrained(tiny("t5"), tmp_path).active_adapters == ["default"]


def test_settings_of_a_run_in_the_configuration_are_dropped_with_a_warning(tmp_path):
    path = tmp_path / CONFIG_NAME
    path.write_text('{"peft_type": "IA3", "runtime_config": {"ephemeral_gpu_offload": true}}')
    with pytest.warns(PeftWarning, match="runtime_config"):
        assert isinstance(PeftConfig.from_pretrained(tmp_path), IA3Config)


def test_modules_that_transformers_renamed_since_are_found(tmp_path):
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=32)

    def base():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(LlavaConfig(vision_config=vision, text_config=text)).eval()

    def config():
        return IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])

    model = get_peft_model(base(), config())
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SAFETENSORS_NAME)
    names = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
    old = {}
    for key, tensor in tensors.items():
        path = key.removeprefix("base_model.model.")
        for new, before in names.items():
            path = path.replace(new, before, 1) if path.startswith(new) else path
        old[f"base_model.model.{path}"] = tensor
    assert old.keys().isdisjoint(tensors)
    save_file(old, tmp_path / SAFETENSORS_NAME)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    other = get_peft_model(base(), config())
    other.load_adapter(tmp_path, "old")
    for name, found in (("default", loaded), ("old", other)):
        values = get_peft_model_state_dict(found, adapter_name=name)
        assert all(torch.equal(values[key], tensor) for key, tensor in tensors.items())


def test_pushing_takes_transformers_arguments(tiny, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **arguments):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **arguments):
            # The folder is text here, as the hub's client has it.
            seen.update(arguments, card=ModelCard.load(os.path.join(folder_path, "README.md")))  # noqa: PTH118

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = get_peft_model(tiny("t5"), IA3Config())
    model.push_to_hub("me/x", commit_message="m", commit_description="why", tags=["mine"], max_shard_size="1GB")
    assert (seen["commit_message"], seen["commit_description"]) == ("m", "why")
    assert {"mine", "ia3"} <= set(seen["card"].data.tags)
